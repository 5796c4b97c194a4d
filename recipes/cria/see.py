"""cria learns to talk about what its tower sees: `python recipes/cria/see.py DATA PREPARED TEXT OUT STEPS`.

PREPARED is what `prepare.py` wrote, TEXT the model that can chat (a folder or a GGUF), OUT holds tower.safetensors
(`tower.py`). OUT/see.safetensors is written every 50 steps, and the next call goes on from it; at the end there is a
folder OUT/cria with cria.gguf and the tower beside it.

The tower learns on, and so do attention, shared experts and norms; embeddings, routers and routed experts stay. So
that it forgets nothing, each step also shows texts and chats, for which it has to predict what TEXT predicts.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import (
    Sentence,
    as_image,
    draw,
    invent,
    read_nlvr,
    reordered,
)  # fmt: skip
from PIL import Image
from questions import ASK_CLOTHES, ASK_SCENE, ASK_TRUE, CLOTHES, ask, describe
from safetensors.torch import load_file, save_file
from statements import state
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tower import SHAPE, as_matrix

from puna.checkpoint import load, open_source, save
from puna.checkpoint.beside import write_tower
from puna.checkpoint.hub import resolve
from puna.model import Decoder
from puna.model.pictures import PassPictures, Patches
from puna.sight import tile
from puna.train.loss import IGNORED, token_losses
from puna.train.optimizer import Optimizer
from puna.train.separate import Separate

SCENES, CLOTHES_TALKS, TEXT = 9, 6, 700  # of a step: conversations, and tokens of text alone
RATE, MATRIX_RATE, WARMUP = 0.002, 0.01, 30
FAITH = 3.0  # weight of the divergence from TEXT's predictions, in nats a token
LONGEST = 900  # tokens of a text
# What `prepare.py` wrote, and how often it is shown; `greeted` are the talks that begin with a greeting.
TEXTS = {"openings": 0.25, "bodies": 0.1, "news": 0.05, "talks": 0.1, "greeted": 0.1, "topics": 0.2, "dolly": 0.1,
         "commands": 0.05, "sums": 0.03, "persona": 0.02}  # fmt: skip
TURNS = 10
YES, NO = "Yes.", "No."
Talk = tuple[list[dict[str, Any]], Image.Image]


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
    """A conversation about a scene: questions, of which a share `stating` are statements, and then what there is."""
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
    return turns([*exchanges, (ASK_SCENE, describe(scene))], True), image


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


class Texts:
    """Texts and chats from what cria learnt, as token ids."""

    def __init__(self, prepared: Path, words: Words) -> None:
        self.words = words
        self.lines = {name: (prepared / f"{name}.jsonl").read_text("utf-8").rstrip("\n").split("\n")
                      for name in TEXTS if name != "greeted"}  # fmt: skip
        greetings = {_first(line) for line in self.lines["persona"]}
        self.lines["greeted"] = [line for line in self.lines["talks"] if _first(line) in greetings]

    def draw(self, chance: random.Random) -> list[int]:
        """One of them, cut off at LONGEST."""
        name = chance.choices(tuple(TEXTS), tuple(TEXTS.values()))[0]
        row = json.loads(chance.choice(self.lines[name]))
        tokenizer = self.words.tokenizer
        ids = ([tokenizer.bos_id, *tokenizer.encode(row["text"])] if "text" in row
               else self.words.of(row["messages"], [])[0])  # fmt: skip
        return ids[:LONGEST]


def _first(line: str) -> str:
    """How a conversation begins."""
    return str(json.loads(line)["messages"][0]["content"])


def seeing(text: Any, out: Path) -> Decoder:
    """The text model in bfloat16 with the tower that `tower.py` made."""
    model = Decoder(text.config.with_(vision=SHAPE)).bfloat16()
    tower = load_file(out / "tower.safetensors")
    learnt = {}
    for name in model.vision.state_dict():
        stored = (f"{as_matrix(f'sight.{name}')}/master", f"sight.{name}/master")
        learnt[f"vision.{name}"] = next(tower[each] for each in stored if each in tower)
    model.load_state_dict(text.model.state_dict() | learnt)
    return model


def trainable(model: Decoder) -> dict[str, torch.nn.Parameter]:
    """What learns, with the tower's matrices named as the optimizer's Muon knows them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in ("embed", ".router.", ".experts."))
                                 or name.startswith("vision."))
    return {as_matrix(name) if name.startswith("vision.") and p.ndim == 2 and name.endswith(".weight") else name: p
            for name, p in model.named_parameters() if p.requires_grad}


class Divergence(torch.autograd.Function):
    """Mean KL divergence, in nats, of two models' predictions from states [N, D] with the same output matrix [V, D];
    the gradient, which only the second's states get, is made at once, block by block."""

    @staticmethod
    def forward(ctx: Any, wanted_ND: Tensor, states_ND: Tensor, weight_VD: Tensor) -> Tensor:
        gradient, total = torch.empty_like(states_ND), 0.0
        for place in torch.arange(len(states_ND)).split(128):
            wanted, found = ((x[place] @ weight_VD.T).log_softmax(-1, dtype=torch.float32)
                             for x in (wanted_ND, states_ND))  # fmt: skip
            shares = wanted.exp()
            total += float((shares * wanted.sub_(found)).sum())
            gradient[place] = found.exp_().sub_(shares).to(weight_VD.dtype) @ weight_VD
        ctx.gradient = gradient / len(states_ND)
        return torch.tensor(total / len(states_ND))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.gradient * grads[0], None


def losses(model: Decoder, text: Decoder, docs: list[tuple[list[int], list[bool]]], pixels: Tensor,
           texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Loss per learnt token of conversations, whose pictures' tiles come in the same order, and the divergence from
    what `text` predicts in texts."""
    tokens, said = (torch.tensor([token for ids in part for token in ids[:-1]])
                    for part in ([ids for ids, _ in docs], texts))  # fmt: skip
    targets = torch.tensor([token if mark else IGNORED for ids, marks in docs
                            for token, mark in zip(ids[1:], marks[1:], strict=True)])
    places = (tokens == SHAPE.image_token_id).nonzero()[:, 0]
    with sdpa_kernel(SDPBackend.MATH):
        features = model.vision(pixels)
        pictures = PassPictures((Patches(places, features.flatten(0, 1)),))
    shown, read = ([len(ids) - 1 for ids in part] for part in ([ids for ids, _ in docs], texts))
    states = model.hidden(torch.cat((tokens, said))[None], Separate(model.config, (*shown, *read)), pictures)[0]
    with torch.no_grad():
        wanted = text.hidden(said[None], Separate(text.config, read))[0]
    answers = token_losses(states[: len(tokens)], model.head_weight, targets).sum() / (targets != IGNORED).sum()
    return answers, Divergence.apply(wanted, states[len(tokens) :], model.head_weight)


def main(data: Path, prepared: Path, source: str, out: Path, steps: int) -> None:
    """Train, or go on; then write OUT/cria/cria.gguf and the tower beside it."""
    torch.set_num_threads(1)
    text = load(source, dtype=torch.bfloat16)
    model, words = seeing(text, out), Words(text.tokenizer)
    optimizer = Optimizer(trainable(model), muon=True, rate=RATE, matrix_rate=MATRIX_RATE, clip=1.0)
    file, first = out / "see.safetensors", 0
    if file.is_file():
        saved = load_file(file)
        first = int(saved.pop("step"))
        optimizer.load_state_dict(saved, first)
    seen = [sentence for sentence in read_nlvr(data / "images/nlvr.tar") if not sentence.held_out]
    fashion = np.load(data / "images/fashion-mnist.npz")
    garments, labels = fashion["train_images"], fashion["train_labels"]
    texts = Texts(prepared, words)
    began, shown = time.time(), [0.0, 0.0]
    for step in range(first, steps):
        chance = random.Random(step)
        talks = [scene_talk(chance, seen, min(0.85, 0.4 + step / steps)) for _ in range(SCENES)]
        for _ in range(CLOTHES_TALKS):
            at = chance.randrange(len(labels))
            talks.append(clothes_talk(chance, garments[at], int(labels[at])))
        pictures = [tile(image, SHAPE) for _, image in talks]
        docs = [words.of(messages, [picture.grid]) for (messages, _), picture in zip(talks, pictures, strict=True)]
        alone: list[list[int]] = []
        while sum(map(len, alone)) < TEXT:
            alone.append(texts.draw(chance))
        pixels = torch.from_numpy(np.concatenate([picture.pixels for picture in pictures]))
        both = losses(model, text.model, docs, pixels, alone)
        (both[0] + FAITH * both[1]).backward()
        optimizer.step(min(1.0, (step + 1) / WARMUP, max(0.02, (steps - step) / (0.8 * steps))))
        share = 1.0 if step == first else 0.05
        shown = [(1 - share) * old + share * new.item() for old, new in zip(shown, both, strict=True)]
        if (step + 1) % 10 == 0:
            print(f"{step + 1} answers {shown[0]:.4f} text {shown[1]:.4f} {time.time() - began:.0f}s "
                  f"cpu {time.process_time():.0f}s", flush=True)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            save_file(optimizer.state_dict() | {"step": torch.tensor(step + 1)}, out / "part.safetensors")
            (out / "part.safetensors").replace(file)
    bundle(model, text.tokenizer, source, out)


def bundle(model: Decoder, tokenizer: Any, source: str, out: Path) -> None:
    """Write the text model as cria is bundled, with its source's way of sampling, and the tower beside it."""
    defaults = open_source(resolve(source)).generation
    file = out / "cria/cria.gguf"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    text = Decoder(model.config.with_(vision=None)).bfloat16()
    text.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("vision.")})
    save(text, text.config, tokenizer, file, format="gguf", type="Q8_0", generation=defaults)
    write_tower(model, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
