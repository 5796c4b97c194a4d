"""How often a model's greedy answer, and its first line, is word for word that of held-out chats; with 95 % intervals.

python recipes/tune/score.py cria work/calls/heldout.jsonl
python recipes/tune/score.py cria work/calls/heldout.jsonl --adapter runs/calls
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import puna
from puna.evaluate.intervals import wilson

AT_ONCE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--adapter")
    parser.add_argument("--limit", type=int, default=1000, help="rows to score")
    parser.add_argument("--json", type=Path, help="file for the answers")
    arguments = parser.parse_args()
    llama = puna.load(arguments.model, adapter=arguments.adapter, context=512)
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    chats = iter([json.loads(line)["messages"] for line in lines])
    answers: list[dict[str, str]] = []
    while some := list(islice(chats, AT_ONCE)):
        streams = [llama.stream(chat[:-1], max_tokens=64, temperature=0.0) for chat in some]
        for chat, stream in zip(some, streams, strict=True):
            reply = [piece.reply for piece in stream][-1]
            assert reply is not None
            answers.append({"expected": chat[-1]["content"].strip(), "answer": reply.text.strip()})
    for what, count in (("whole answer", None), ("first line", 1)):
        right = sum(each["answer"].split("\n")[:count] == each["expected"].split("\n")[:count] for each in answers)
        low, high = wilson(right, len(answers))
        interval = f"95 % interval {low:.1%} to {high:.1%}"
        print(f"{what}: {right} of {len(answers)} right, {right / len(answers):.1%}, {interval}")
    if arguments.json:
        arguments.json.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
