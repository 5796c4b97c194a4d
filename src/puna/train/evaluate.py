"""Held-out bits per byte: a measure that doesn't depend on the tokenizer."""

import json
import math
from pathlib import Path

import torch

from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.loss import linear_cross_entropy


def read_texts(path: Path) -> list[str]:
    """The `text` of each line of a JSON-lines file. Raises PunaError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise PunaError(f"{path}: can't read the held-out texts: {error.strerror}; mend `heldout`") from None
    except UnicodeDecodeError as error:
        raise PunaError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PunaError(f"{path}:{number}: text: each line is an object with `text`; mend the line") from None
        if not isinstance(text, str) or not text:
            raise PunaError(f"{path}:{number}: text: must be a string that is not empty; mend or delete the line")
        texts.append(text)
    return texts


@torch.no_grad()
def bits_per_byte(model: Decoder, tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """Mean bits per UTF-8 byte over all texts, each begun with BOS and scored from its first token, and the standard
    error of that mean over texts."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    bits, sizes = [], []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        row = torch.tensor([*begin, *ids], device=model.device)
        states = model.hidden(row[None, :-1])[0]
        bits.append(linear_cross_entropy(states, model.head_weight, row[1:]).item() / math.log(2))
        sizes.append(len(text.encode("utf-8", "replace")))  # a lone surrogate has no UTF-8
    mean = sum(bits) / sum(sizes)
    residuals = [b - mean * n for b, n in zip(bits, sizes, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals)) / sum(sizes)
    return mean, error
