"""How often a model's greedy answer is, word for word, that of held-out chats; with a 95 % interval.

python recipes/tune/score.py cria work/commands/heldout.jsonl
python recipes/tune/score.py cria work/commands/heldout.jsonl --adapter runs/commands
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
    parser.add_argument("--limit", type=int, default=400, help="rows to score")
    parser.add_argument("--json", type=Path, help="file for the answers")
    arguments = parser.parse_args()
    llama = puna.load(arguments.model, adapter=arguments.adapter, context=512)
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    chats = iter([json.loads(line)["messages"] for line in lines])
    right, answers = 0, []
    while some := list(islice(chats, AT_ONCE)):
        streams = [llama.stream(chat[:-1], max_tokens=64, temperature=0.0) for chat in some]
        for chat, stream in zip(some, streams, strict=True):
            reply = [piece.reply for piece in stream][-1]
            assert reply is not None
            answers.append({"expected": chat[-1]["content"], "answer": reply.text.strip()})
            right += answers[-1]["answer"] == chat[-1]["content"].strip()
    low, high = wilson(right, len(lines))
    print(f"{right} of {len(lines)} right: {right / len(lines):.1%}, 95 % interval {low:.1%} to {high:.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
