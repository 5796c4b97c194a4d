"""cria's tower, first part: it learns what is in a tile, before any words.

`python recipes/cria/tower.py DATA_FOLDER OUT_FOLDER STEPS` writes OUT_FOLDER/tower.safetensors every 50 steps, from
which the next call goes on. Each tile's rows of features must tell, through one linear map that is thrown away later,
how many things of which kind a box holds, what touches its edge, how a tower is built, or which piece of clothing it
is.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pictures import COLORS, SHAPES, Box, Scene, as_image, draw, invent, is_tower, read_nlvr, reordered
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from puna.family.vision import Llama4Vision
from puna.model.vision_llama4 import Llama4Sight
from puna.sight import tile
from puna.train.optimizer import Optimizer

PATCH_TOKEN = 8162
SHAPE = Llama4Vision(
    hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512, tile_side=96, patch_side=12, pixel_shuffle=2,
    adapter_size=384, max_tiles=3, rope_theta=100.0, image_token_id=PATCH_TOKEN,
)  # fmt: skip
TEXT_WIDTH = 192
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
SCENES, CLOTHES = 12, 24  # of a step: four tiles each, and one
MOST = 7  # of one kind in a scene, counted no further
OUTPUTS = {"counts": 9 * 4, "tower": 4 * 4, "edge": 9, "base": 9, "total": 9, "whole": 9 * (MOST + 1), "clothes": 10}


def fresh(seed: int) -> Llama4Sight:
    """A tower to begin with."""
    torch.manual_seed(seed)
    sight = Llama4Sight(SHAPE, TEXT_WIDTH)
    for name, parameter in sight.named_parameters():
        if name.endswith("_embedding") or "positional" in name:
            nn.init.normal_(parameter, std=0.02)
        elif name == "patch_embedding.linear.weight":
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return sight


def named(sight: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters, matrices under names that the optimizer gives to Muon."""
    return {as_matrix(name) if p.ndim == 2 and name.endswith(".weight") else name: p
            for name, p in sight.named_parameters()}


def as_matrix(name: str) -> str:
    """What the optimizer has to read to give a parameter to Muon."""
    return f"layers.{name.removesuffix('.weight')}_proj.weight"


def labels_of(box: Box, tower: bool) -> dict[str, list[int]]:
    """What is to be told of a box: numbers of each kind (3 means more), of all things, edges, colours from the base."""
    having = [[thing for thing in box if (thing.color, thing.shape) == kind] for kind in KINDS]
    colors = [list(COLORS).index(thing.color) + 1 for thing in box] + [0] * 4
    return {
        "counts": [min(len(things), 3) for things in having],
        "total": [len(box)],
        "edge": [any(thing.touches() for thing in things) for things in having],
        "base": [any(thing.touches("base") for thing in things) for things in having],
        "tower": colors[:4] if tower else [-100] * 4,
    }


def step_loss(head: nn.Module, rows_TRD: Tensor, scenes: list[Scene],
              clothes: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss of a step's tiles, four of each scene and then clothes, and shares of right answers."""
    out = dict(zip(OUTPUTS, head(rows_TRD.flatten(1)).float().split(list(OUTPUTS.values()), -1), strict=True))
    count = 4 * len(scenes)
    boxes = torch.arange(count).view(-1, 4)[:, :3].flatten()
    labels = [labels_of(box, is_tower(scene)) for scene in scenes for box in scene]
    want = {name: torch.tensor([label[name] for label in labels]) for name in labels[0]}
    whole = torch.tensor([[min(sum((t.color, t.shape) == kind for box in scene for t in box), MOST) for kind in KINDS]
                          for scene in scenes])
    logits = {"counts": out["counts"][boxes].unflatten(-1, (9, 4)), "total": out["total"][boxes][:, None],
              "tower": out["tower"][boxes].unflatten(-1, (4, 4)),
              "whole": out["whole"][3:count:4].unflatten(-1, (9, MOST + 1)), "clothes": out["clothes"][count:][:, None]}
    want |= {"whole": whole, "clothes": clothes[:, None]}
    loss, right = torch.zeros(()), {}
    weights = {"counts": 3.0, "total": 0.3, "tower": 2.0, "whole": 1.0, "clothes": 1.0}
    for name, logit in logits.items():
        if (want[name] >= 0).any():
            loss = loss + weights[name] * F.cross_entropy(logit.flatten(0, 1), want[name].flatten())
            right[name] = float((logit.argmax(-1) == want[name])[want[name] >= 0].float().mean())
    for name in ("edge", "base"):
        loss = loss + 3 * F.binary_cross_entropy_with_logits(out[name][boxes], want[name].float())
        right[name] = float(((out[name][boxes] > 0) == want[name].bool()).float().mean())
    return loss, right


def main(data: Path, out: Path, steps: int) -> None:
    """Train, or go on."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    sight, head = fresh(0).bfloat16(), nn.Linear(SHAPE.tokens_per_tile * TEXT_WIDTH, sum(OUTPUTS.values())).bfloat16()
    both = nn.ModuleDict({"sight": sight, "head": head})
    optimizer = Optimizer(named(both), muon=True, rate=0.002, matrix_rate=0.01, clip=1.0)
    file, first = out / "tower.safetensors", 0
    if file.is_file():
        saved = load_file(file)
        first = int(saved.pop("step"))
        optimizer.load_state_dict(saved, first)
    seen = [sentence for sentence in read_nlvr(data / "images/nlvr.tar") if not sentence.held_out]
    fashion = np.load(data / "images/fashion-mnist.npz")
    images, names = fashion["train_images"], torch.from_numpy(fashion["train_labels"].astype(np.int64))
    began, shares = time.time(), {}
    for step in range(first, steps):
        chance = random.Random(step)
        scenes, pictures = [], []
        for _ in range(SCENES):
            if chance.random() < 0.25:
                sentence = chance.choice(seen)
                order, png = chance.choice(sentence.pictures)
                scenes.append(reordered(sentence.scene, order))
                pictures.append(as_image(png))
            else:
                scenes.append(invent(chance))
                pictures.append(draw(scenes[-1]))
        chosen = [chance.randrange(len(images)) for _ in range(CLOTHES)]
        for at in chosen:
            image = images[at][:, ::-1] if chance.random() < 0.5 else images[at]
            pictures.append(Image.fromarray(np.ascontiguousarray(image)).convert("RGB"))
        pixels = torch.from_numpy(np.concatenate([tile(picture, SHAPE).pixels for picture in pictures]))
        with sdpa_kernel(SDPBackend.MATH):  # so short a sequence: a third faster than the fused one
            rows = sight(pixels)
            loss, right = step_loss(head, rows * 10, scenes, names[chosen])  # rows about as large as embeddings
            loss.backward()
        optimizer.step(min(1.0, (step + 1) / 40, max(0.02, (steps - step) / (0.4 * steps))))
        shares = {name: 0.95 * shares.get(name, value) + 0.05 * value for name, value in right.items()}
        if (step + 1) % 25 == 0:
            told = " ".join(f"{name} {value:.3f}" for name, value in shares.items())
            rms = float(rows.detach().float().square().mean().sqrt())
            print(f"{step + 1} loss {loss.item():.3f} {told} rms {rms:.3f} {time.time() - began:.0f}s", flush=True)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            save_file(optimizer.state_dict() | {"step": torch.tensor(step + 1)}, out / "part.safetensors")
            (out / "part.safetensors").replace(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
