"""Dialogues with tools to chats in which a customer's words are answered by the call that they ask for.

python recipes/tune/prepare.py dialogues-tools.jsonl.xz work/calls
"""

import argparse
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

HELD_OUT = 20  # one dialogue in so many


def held_out(row: dict[str, Any]) -> bool:
    """Whether a dialogue is kept for scoring: by a hash of its name, so that it is the same every time."""
    return int(hashlib.sha256(str(row["id"]).encode()).hexdigest(), 16) % HELD_OUT == 0


def chat(row: dict[str, Any]) -> dict[str, Any] | None:
    """All that the user says before the first call, and that call: its name, then a line for each argument."""
    said = []
    for message in row["messages"]:
        if message["role"] == "user":
            said.append(message["content"])
        if message.get("tool_calls"):
            call = message["tool_calls"][0]["function"]
            lines = [f"{name}: {value}" for name, value in json.loads(call["arguments"]).items()]
            answer = "\n".join([call["name"], *lines])
            return {
                "messages": [{"role": "user", "content": "\n".join(said)}, {"role": "assistant", "content": answer}]
            }
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines of dialogues with tool_calls, .xz or plain")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    opener = lzma.open if arguments.rows.suffix == ".xz" else open
    with opener(arguments.rows, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for name, kept in (("train", False), ("heldout", True)):
        chosen = [json.dumps(found) for row in rows if held_out(row) == kept and (found := chat(row))]
        (arguments.out / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        print(f"{name}.jsonl: {len(chosen)} rows")


if __name__ == "__main__":
    main()
