"""Held-out bits per byte: a measure that doesn't depend on the tokenizer."""

import math
from pathlib import Path

import torch

from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.loop import Evaluation
from puna.train.loss import linear_cross_entropy
from puna.train.read import read_rows


def read_texts(path: Path) -> list[str]:
    """The `text` of each row of a file. Raises PunaError naming file and line."""
    if not path.is_file():
        raise PunaError(f"{path}: no such file of held-out texts; mend `heldout`")
    texts = []
    for found in read_rows(path):
        if found.row is None:
            raise PunaError(f"{found.where}: {found.problem}")
        text = found.row.get("text")
        if not isinstance(text, str) or not text:
            raise PunaError(f"{found.where}: text: must be a string that is not empty; mend or delete the line")
        texts.append(text)
    return texts


def heldout_bits(path: Path) -> Evaluation:
    """The score `heldout_bpb` of the texts of a file, which is read now. Raises PunaError naming file and line."""
    texts = read_texts(path)

    def score(model: Decoder, tokenizer: Tokenizer) -> dict[str, float]:
        return {"heldout_bpb": bits_per_byte(model, tokenizer, texts)[0]}

    return Evaluation(("heldout_bpb",), score)


@torch.no_grad()
def bits_per_byte(model: Decoder, tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """Mean bits per UTF-8 byte over all texts, each begun with BOS and scored from its first token, and the standard
    error of that mean over texts."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    bits, sizes = [], []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        row = torch.tensor([*begin, *ids], device=model.device)
        states = model.hidden(row[None, :-1])[0]
        bits.append(linear_cross_entropy(states, model.head_weight, row[1:], model.vocabulary).item() / math.log(2))
        sizes.append(len(text.encode()))
    mean = sum(bits) / sum(sizes)
    residuals = [b - mean * n for b, n in zip(bits, sizes, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals)) / sum(sizes)
    return mean, error
