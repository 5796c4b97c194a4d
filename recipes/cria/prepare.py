"""Make cria's training files from public texts: `python recipes/cria/prepare.py DATA_FOLDER OUT_FOLDER`.

DATA_FOLDER holds the files named in `docs/cria.md`. One article in fifty, chosen by a hash of its title, is held out.
"""

import hashlib
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.hf_config import write_config
from puna.family.config import AttentionTemperature, ModelConfig
from puna.text.train import train_tokenizer

HELD_OUT = 50  # one in so many
SHAPE = ModelConfig(
    architecture="llama4", vocab_size=8192, hidden_size=192, num_layers=6, num_heads=3, num_kv_heads=1, head_dim=64,
    intermediate_size=768, context_length=2048, rope_theta=10_000.0, tie_word_embeddings=True, num_experts=12,
    expert_intermediate_size=384, moe_layers=(0, 1, 2, 3, 4, 5), nope_layers=(3,), attention_chunk_size=512,
    attention_temperature=AttentionTemperature(scale=0.1, floor=512), qk_norm=True,
    bos_token_id=8144, eos_token_ids=(8145, 8151, 8152), pad_token_id=8156,
)  # fmt: skip
SAMPLING = {"do_sample": True, "temperature": 0.3, "top_p": 0.9}  # warmer, so small a model leaves the topic
Row = dict[str, Any]
OPENING = 2200  # characters of an article's opening: a little over the 1,500 that are scored
WINDOW = 6000  # characters of a piece from inside an article
BODIES = 9000  # pieces kept
ASK = ("Tell me about {}.", "What is {}?", "What do you know about {}?", "Explain {} to me.", "{}?", "Describe {}.",
       "Write a short article about {}.", "Can you tell me something about {}?", "Who or what is {}?",
       "I want to learn about {}.")
REPORT = ("Write a short news report: {}", "Give me the news about this: {}", "News: {}")


def rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl.xz file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def held_out(key: str) -> bool:
    """Whether this title belongs to the held-out part: decided by its hash, so the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELD_OUT == 0


def sentences(text: str, limit: int) -> str:
    """The first whole sentences of a text's first paragraphs, up to `limit` characters."""
    head = text[:limit]
    end = max((m.end() for m in re.finditer(r"[.!?](?=\s)", head)), default=0)
    return head[:end].strip()


def chat(user: str, assistant: str) -> Row:
    """One exchange as a row of messages."""
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def talk(chance: random.Random, greetings: list[Row], kinds: Sequence[list[Row]]) -> Row:
    """A conversation of several exchanges, often begun with a greeting."""
    turns = [chance.choice(greetings)] if chance.random() < 0.15 else []
    turns += [chance.choice(chance.choice(kinds)) for _ in range(chance.randint(1, 4))]
    return {"messages": [message for turn in turns for message in turn["messages"]]}


def vocabulary_texts(out: Path) -> Iterator[str]:
    """A mixture of everything to learn the vocabulary from."""
    chance = random.Random(0)
    for name, count in (("openings", 11500), ("bodies", 2500), ("news", 3000), ("topics", 3000), ("dolly", 5000),
                        ("sums", 2000), ("commands", 3000)):  # fmt: skip
        lines = (out / f"{name}.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        chance.shuffle(lines)
        for row in map(json.loads, lines[:count]):
            yield row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"])


def write_base(out: Path, texts: list[str]) -> None:
    """The folder that training begins from: the vocabulary, learnt from `texts`, and the shape."""
    out.mkdir(exist_ok=True)
    train_tokenizer(texts, SHAPE.vocab_size).save(out)
    (out / "generation_config.json").write_text(json.dumps(SAMPLING) + "\n", encoding="utf-8")
    (out / "config.json").write_text(json.dumps(write_config(SHAPE, torch.bfloat16), indent=2) + "\n", encoding="utf-8")


def write(path: Path, items: list[Row]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    print(f"{path}: {len(items):,} rows, {path.stat().st_size / 1e6:.1f} MB")


def main(data: Path, out: Path) -> None:
    """Write openings, bodies, news, chats and the held-out articles."""
    chance = random.Random(1)
    out.mkdir(parents=True, exist_ok=True)
    articles = [row for part in (1, 2) for row in rows(data / f"text/wikipedia-{part}.jsonl.xz")]
    unseen = [row for row in articles if held_out(row["title"])]
    seen = [row for row in articles if not held_out(row["title"])]
    write(out / "heldout.jsonl", [{"title": r["title"], "text": r["text"][:1500]} for r in unseen])
    write(out / "openings.jsonl", [{"text": row["text"][:OPENING]} for row in seen])
    bodies = [
        {"text": piece}
        for row in seen
        for start in range(OPENING, len(row["text"]), WINDOW)
        if len(piece := row["text"][start : start + WINDOW].partition("\n")[2]) > 500
    ]
    chance.shuffle(bodies)
    write(out / "bodies.jsonl", bodies[:BODIES])
    news = list(rows(data / "text/wikinews.jsonl.xz"))
    write(out / "news.jsonl", [{"text": row["text"][:OPENING]} for row in news])

    topics = []
    for row in seen:
        title = re.sub(r" \(.*\)$", "", row["title"])
        answer = sentences(row["text"], chance.choice((300, 450, 700)))
        if len(answer) > 60 and len(title) < 60:
            topics.append(chat(chance.choice(ASK).format(title), answer))
    write(out / "topics.jsonl", topics)
    reports = [chat(chance.choice(REPORT).format(row["title"]), sentences(row["text"], 600)) for row in news]
    write(out / "reports.jsonl", [r for r in reports if len(r["messages"][-1]["content"]) > 60][:6000])
    dolly = [{"messages": row["messages"]} for row in rows(data / "chat/dolly.jsonl.xz")]
    write(out / "dolly.jsonl", dolly)
    sums = [{"messages": row["messages"]} for row in rows(data / "chat/gsm8k-train.jsonl.xz")]
    write(out / "sums.jsonl", sums)
    commands = [{"messages": row["messages"]} for row in rows(data / "chat/tldr.jsonl.xz")]
    chance.shuffle(commands)
    write(out / "commands.jsonl", commands[:10000])
    persona = [json.loads(line) for line in (Path(__file__).parent / "persona.jsonl").read_text("utf-8").splitlines()]
    greetings = [chat(ask, row["answer"]) for row in persona for ask in row["asks"]]
    write(out / "persona.jsonl", greetings)
    write(out / "talks.jsonl", [talk(chance, greetings, (topics, topics, dolly, sums, commands)) for _ in range(3000)])
    write_base(out / "base", list(vocabulary_texts(out)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
