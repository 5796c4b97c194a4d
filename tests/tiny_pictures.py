"""Tiny random models that see, of both kinds, with tokenizers; and pictures for them."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from puna.engine import Model, Sampling
from puna.family.config import ModelConfig, RopeScaling
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.model import Decoder
from puna.model.packing import pack
from puna.text.tokenizer import Tokenizer
from puna.text.train import train_tokenizer
from tiny import randomise

KINDS = ("llama4", "llama3.2")
TEXTS = ["What is in this picture? A red square beside a blue circle.", "Describe it: 1, 2 or 3 llamas, 世界! 🦙"] * 4
SIDE = 28


@cache
def tokenizer() -> Tokenizer:
    """A vocabulary with Llama 4's control tokens."""
    return train_tokenizer(TEXTS, 330)


def config(kind: str, context: int = 1024, reference: Any = "meta") -> ModelConfig:
    """Llama 4: tiles of 4 tokens, up to 4 and a global one. Llama 3.2: tiles of 17 states, up to 4."""
    size = tokenizer().vocab_size
    shape: dict[str, Any] = {"vocab_size": size, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
                             "intermediate_size": 48, "context_length": context}  # fmt: skip
    if kind == "llama4":
        vision = Llama4Vision(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=64, tile_side=SIDE,
                              patch_side=7, adapter_size=32, max_tiles=4,
                              image_token_id=tokenizer().control["<|patch|>"])  # fmt: skip
        return ModelConfig("llama4", num_layers=4, nope_layers=(3,), attention_chunk_size=32, vision=vision, **shape)
    tower = Llama32Vision(cross_attention_before=(1, 2), hidden_size=16, num_layers=3, num_global_layers=1, num_heads=2,
                          intermediate_size=32, tile_side=SIDE, patch_side=7, max_tiles=4, intermediate_layers=(0, 1),
                          image_token_id=size, reference=reference)  # fmt: skip
    return ModelConfig("llama", num_layers=3, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), vision=tower, **shape)


def plain(kind: str, **settings: Any) -> Decoder:
    """Random weights; gates open, so that pictures matter."""
    model = Decoder(config(kind, **settings))
    randomise(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name:
                weight.fill_(0.7)
    return model.eval()


def decoder(kind: str, **settings: Any) -> Decoder:
    """The same, packed as after loading."""
    model = plain(kind, **settings)
    pack(model)
    return model


def checkpoint_of(kind: str, folder: Path) -> Path:
    """The same as a checkpoint."""
    Model(plain(kind), tokenizer()).save(folder)
    return folder


def seeing(folder: Path) -> None:
    """What docs/sight.md takes for granted: my-eyes, chart.png, photo.png, clip.mp4."""
    checkpoint_of("llama4", folder / "my-eyes")
    (folder / "chart.png").write_bytes(png(1, 60, 40))
    (folder / "photo.png").write_bytes(png(2, 40, 60))
    (folder / "clip.mp4").write_bytes(clip())


def model(kind: str, decoder_: Decoder | None = None, **settings: Any) -> Model:
    """Ready to answer, greedily."""
    return Model(decoder_ or decoder(kind), tokenizer(), defaults=Sampling(temperature=0), **settings)


def image(seed: int, width: int = 28, height: int = 28) -> Image.Image:
    """Random blocks of colour."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def png(seed: int, width: int = 28, height: int = 28) -> bytes:
    """The same as a file."""
    file = io.BytesIO()
    image(seed, width, height).save(file, "PNG")
    return file.getvalue()


def clip(seconds: float = 5, rate: int = 8) -> bytes:
    """A video whose colour changes."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 32
        for at in range(int(seconds * rate)):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (5 * at, 255 - 5 * at, 90)))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def asked(*content: Any) -> list[dict[str, Any]]:
    """A message of the user: texts, and pictures as `image` gives them."""
    parts = [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one}
             for one in content]  # fmt: skip
    return [{"role": "user", "content": parts}]
