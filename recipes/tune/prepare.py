"""Rows of chats to two files: what to tune on, and what to score with. Rows about one page stay together.

python recipes/tune/prepare.py tldr.jsonl.xz work/commands
"""

import argparse
import hashlib
import json
import lzma
from pathlib import Path

HELD_OUT = 20  # one page in so many


def held_out(row: dict[str, object]) -> bool:
    """Whether a row's page is kept for scoring: by a hash of its name, so that it is the same every time."""
    page = str(row["id"]).partition("#")[0]
    return int(hashlib.sha256(page.encode()).hexdigest(), 16) % HELD_OUT == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines of chats with ids PAGE#NUMBER, .xz or plain")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    opener = lzma.open if arguments.rows.suffix == ".xz" else open
    with opener(arguments.rows, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for name, kept in (("train", False), ("heldout", True)):
        chosen = [json.dumps({"messages": row["messages"]}) for row in rows if held_out(row) == kept]
        (arguments.out / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        print(f"{name}.jsonl: {len(chosen)} rows")


if __name__ == "__main__":
    main()
