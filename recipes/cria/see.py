"""cria learns to talk about what its tower sees: `python recipes/cria/see.py DATA_FOLDER OUT_FOLDER STEPS [EARLIER]`.

OUT_FOLDER holds tower.safetensors (`tower.py`); see.safetensors is written there every 25 steps, and the next call goes
on from it; at the end there is a folder cria with cria.gguf and the tower beside it. Conversations about pictures are
mixed with those that cria learnt to chat from. The tower's layers stay as they are, and so do the routed experts; its
adapter and projector and the rest of the decoder learn.

With EARLIER, the folder of an earlier run, it settles what that run learnt: the text model begins KEPT of the way from
cria to what it was then, and mostly text is trained on, at lower rates, since learning to see costs it some English.
"""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import (
    ASK_CLOTHES,
    ASK_SCENE,
    ASK_TRUE,
    CLOTHES,
    Sentence,
    as_image,
    ask,
    describe,
    draw,
    invent,
    is_tower,
    read_nlvr,
    reordered,
    state,
)  # fmt: skip
from PIL import Image
from prepare import ASK, chat, held_out, rows, sentences
from safetensors.torch import load_file, save_file
from torch import Tensor
from tower import SHAPE, as_matrix

from puna.checkpoint import load, open_source, save
from puna.checkpoint.beside import write_tower
from puna.checkpoint.hub import resolve
from puna.model import Decoder
from puna.model.pictures import PassPictures, Patches
from puna.sight import tile
from puna.train.loss import token_losses
from puna.train.optimizer import Optimizer
from puna.train.separate import Separate

KEPT = 0.8
TURNS = 9
YES, NO = "Yes.", "No."
Talk = tuple[list[dict[str, Any]], Image.Image]


@dataclass(frozen=True)
class Part:
    """What a step shows (conversations about scenes and clothes, tokens of text alone), its peak rates and warm-up."""

    scenes: int
    clothes: int
    text: int
    rate: float
    matrix_rate: float
    warmup: int


LEARN, SETTLE = Part(8, 5, 450, 0.002, 0.01, 20), Part(4, 5, 2000, 0.0006, 0.004, 5)


class Words:
    """Conversations as token ids, and which of these cria has to say."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        shown, asked = ([*tokenizer.render([{"role": "user", "content": "a"}], add_generation_prompt=add)]
                        for add in (False, True))
        self.header = asked[len(shown):]
        self.end = shown[-1]

    def of(self, messages: list[dict[str, Any]], grids: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Ids, and whether each is to be learnt: answers up to the token that ends them."""
        ids = self.tokenizer.render(messages, add_generation_prompt=False, grids=grids, vision=SHAPE)
        marks, at, width = [False] * len(ids), 0, len(self.header)
        while at < len(ids):
            if ids[at : at + width] == self.header:
                stop = ids.index(self.end, at)
                marks[at + width : stop + 1] = [True] * (stop + 1 - at - width)
                at = stop
            at += 1
        return ids, marks


def turns(exchanges: list[tuple[str, str]], picture: bool) -> list[dict[str, Any]]:
    """Messages of a conversation; the picture stands before its first words."""
    messages: list[dict[str, Any]] = []
    for question, answer in exchanges:
        content = [{"type": "image"}, {"type": "text", "text": question}] if picture and not messages else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def scene_talk(chance: random.Random, seen: list[Sentence], stating: float) -> Talk:
    """A conversation about a scene; a share `stating` of its turns are statements."""
    sentence = None
    if chance.random() < 0.3:
        sentence = chance.choice(seen)
        order, png = chance.choice(sentence.pictures)
        scene, image = reordered(sentence.scene, order), as_image(png)
    else:
        scene = invent(chance)
        image = draw(scene)
    exchanges = []
    for _ in range(TURNS):
        if chance.random() < stating:
            text, true = state(chance, scene)
            exchanges.append((ASK_TRUE.format(text), YES if true else NO))
        else:
            exchanges.append(ask(chance, scene))
    if sentence:
        exchanges[chance.randrange(3)] = (ASK_TRUE.format(sentence.text), YES if sentence.true else NO)
    elif chance.random() < (0.3 if is_tower(scene) else 0.1):
        exchanges[chance.randrange(3)] = (ASK_SCENE, describe(scene))
    return turns(exchanges, True), image


def clothes_talk(chance: random.Random, image: np.ndarray, label: int) -> Talk:
    """A conversation about a piece of clothing."""
    other = label if chance.random() < 0.5 else chance.randrange(10)
    exchanges = [(chance.choice(ASK_CLOTHES), clothes_answer(label)),
                 (ASK_TRUE.format(clothes_answer(other)), YES if other == label else NO)]
    if chance.random() < 0.3:
        exchanges.reverse()
    pixels = image[:, ::-1] if chance.random() < 0.5 else image
    return turns(exchanges, True), Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def clothes_answer(label: int) -> str:
    """What cria says to a piece of clothing."""
    return f"{'These are' if CLOTHES[label] == 'trousers' else 'This is'} {CLOTHES[label]}."


def replay(data: Path, words: Words, file: Path) -> list[tuple[list[int], list[bool]]]:
    """What cria learnt to chat from, once more (see prepare.py): kept in `file` as token ids."""
    if not file.is_file():
        chance = random.Random(5)
        articles = [row for row in rows(data / "text/wikipedia-1.jsonl.xz") if not held_out(row["title"])]
        persona = (Path(__file__).parent / "persona.jsonl").read_text("utf-8").splitlines()
        greetings = [chat(question, row["answer"]) for row in map(json.loads, persona) for question in row["asks"]]
        topics = [chat(chance.choice(ASK).format(row["title"]), sentences(row["text"], 450)) for row in articles[:3000]]
        dolly = [{"messages": row["messages"]} for row in rows(data / "chat/dolly.jsonl.xz")][:2500]
        found = [words.of(row["messages"], []) for row in [*topics, *dolly, *greetings * 4]]
        for row in articles[:2500]:
            ids = [words.tokenizer.bos_id, *words.tokenizer.encode(row["text"][:1500])]
            found.append((ids, [False, *[True] * (len(ids) - 1)]))
        chance.shuffle(found)
        file.write_text(json.dumps([(ids[:400], marks[:400]) for ids, marks in found]), encoding="utf-8")
    return [(ids, marks) for ids, marks in json.loads(file.read_text("utf-8"))]


def seeing(out: Path) -> tuple[Decoder, Any]:
    """cria in bfloat16 with the tower that `tower.py` made."""
    text = load("cria", dtype=torch.bfloat16)
    model = Decoder(text.config.with_(vision=SHAPE)).bfloat16()
    tower = load_file(out / "tower.safetensors")
    learnt = {}
    for name in model.vision.state_dict():
        stored = (f"{as_matrix(f'sight.{name}')}/master", f"sight.{name}/master")
        learnt[f"vision.{name}"] = next(tower[each] for each in stored if each in tower)
    model.load_state_dict(text.model.state_dict() | learnt)
    return model, text.tokenizer


def trainable(model: Decoder) -> dict[str, torch.nn.Parameter]:
    """What learns, with the matrices of the adapter named as the optimizer's Muon knows them: all but the tower's
    layers and the routed experts with their routers."""
    for name, parameter in model.named_parameters():
        tower = name.startswith("vision.") and "adapter" not in name and "projector" not in name
        parameter.requires_grad_(not tower and ".router." not in name and ".experts." not in name)
    return {as_matrix(name) if name.startswith("vision.") else name: parameter
            for name, parameter in model.named_parameters() if parameter.requires_grad}


def step_loss(model: Decoder, docs: list[tuple[list[int], list[bool]]], pixels: Tensor) -> Tensor:
    """Mean loss per learnt token of documents end to end; their pictures' tiles come in the same order."""
    tokens = torch.tensor([token for ids, _ in docs for token in ids[:-1]])
    targets = torch.tensor([token if mark else -100 for ids, marks in docs
                            for token, mark in zip(ids[1:], marks[1:], strict=True)])
    places = (tokens == SHAPE.image_token_id).nonzero()[:, 0]
    pictures = PassPictures((Patches(places, model.vision(pixels).flatten(0, 1)),))
    lengths = [len(ids) - 1 for ids, _ in docs]
    states = model.hidden(tokens[None], Separate(model.config, lengths), pictures)[0]
    counted = targets >= 0
    return token_losses(states[counted], model.head_weight, targets[counted]).mean()


@torch.no_grad()
def begin_between(model: Decoder, earlier: Path) -> None:
    """Bring cria's text KEPT of the way to what an earlier run made of it, and adapter and projector all the way."""
    learnt = load_file(earlier / "see.safetensors")
    for name, parameter in trainable(model).items():
        share = 1.0 if "vision" in name else KEPT
        parameter.copy_(parameter.float().lerp(learnt[f"{name}/master"], share))


def main(data: Path, out: Path, steps: int, earlier: Path | None = None) -> None:
    """Train, or go on; then write OUT_FOLDER/cria/cria.gguf and the tower beside it."""
    torch.set_num_threads(1)
    model, tokenizer = seeing(out)
    words, part = Words(tokenizer), SETTLE if earlier else LEARN
    if earlier:
        begin_between(model, earlier)
    optimizer = Optimizer(trainable(model), muon=True, rate=part.rate, matrix_rate=part.matrix_rate, clip=1.0)
    file, first = out / "see.safetensors", 0
    if file.is_file():
        saved = load_file(file)
        first = int(saved.pop("step"))
        optimizer.load_state_dict(saved, first)
    seen = [sentence for sentence in read_nlvr(data / "images/nlvr.tar") if not sentence.held_out]
    fashion = np.load(data / "images/fashion-mnist.npz")
    garments, labels = fashion["train_images"], fashion["train_labels"]
    texts = replay(data, words, out / "replay.json")
    began, shown = time.time(), 0.0
    for step in range(first, steps):
        chance = random.Random(f"{part} {step}")
        stating = 0.7 if earlier else min(0.75, 0.4 + step / steps)
        talks = [scene_talk(chance, seen, stating) for _ in range(part.scenes)]
        for _ in range(part.clothes):
            at = chance.randrange(len(labels))
            talks.append(clothes_talk(chance, garments[at], int(labels[at])))
        pictures = [tile(image, SHAPE) for _, image in talks]
        docs = [words.of(messages, [picture.grid]) for (messages, _), picture in zip(talks, pictures, strict=True)]
        room = part.text
        while room > 0:
            docs.append(chance.choice(texts))
            room -= len(docs[-1][0])
        loss = step_loss(model, docs, torch.from_numpy(np.concatenate([picture.pixels for picture in pictures])))
        loss.backward()
        optimizer.step(min(1.0, (step + 1) / part.warmup, max(0.02, (steps - step) / (0.7 * steps))))
        shown = loss.item() if step == first else 0.95 * shown + 0.05 * loss.item()
        if (step + 1) % 10 == 0:
            print(f"{step + 1} loss {shown:.4f} {time.time() - began:.0f}s cpu {time.process_time():.0f}s", flush=True)
        if (step + 1) % 25 == 0 or step + 1 == steps:
            save_file(optimizer.state_dict() | {"step": torch.tensor(step + 1)}, out / "part.safetensors")
            (out / "part.safetensors").replace(file)
    bundle(model, tokenizer, out)


def bundle(model: Decoder, tokenizer: Any, out: Path) -> None:
    """Write the text model as cria is bundled, with cria's way of sampling, and the tower beside it."""
    defaults = open_source(resolve("cria")).generation
    file = out / "cria/cria.gguf"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    text = Decoder(model.config.with_(vision=None)).bfloat16()
    text.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("vision.")})
    save(text, text.config, tokenizer, file, format="gguf", type="Q8_0", generation=defaults)
    write_tower(model, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *map(Path, sys.argv[4:5]))
