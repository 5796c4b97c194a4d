"""How well a text is predicted by where in the context its tokens stand: whether a longer context is any use, and
whether what lies past the trained one does harm."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from puna.errors import PunaError
from puna.evaluate.intervals import Z
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer

BLOCK = 512  # tokens that go through the model at once


@dataclass(frozen=True)
class Band:
    """Bits a UTF-8 byte at positions first..last - 1, with a 95 % interval over windows."""

    first: int
    last: int
    windows: int
    bits: float
    interval: tuple[float, float] | None  # None: of one window

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def bits_by_position(
    decoder: Decoder, tokenizer: Tokenizer, texts: Sequence[str], edges: Sequence[int], most: int = 32
) -> list[Band]:
    """Bits per byte of each band of positions between `edges` (from 0 on), over windows of texts of `edges[-1]` tokens,
    each begun with BOS: at most so many, taken evenly. Raises PunaError where no text is as long."""
    if not edges or any(b <= a for a, b in zip((0, *edges), edges, strict=False)):
        raise PunaError(f"positions are counted up to edges that grow, as in 512,1024,2048, not {list(edges)}")
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    width = edges[-1] - len(begin) + 1
    windows = [ids[at : at + width] for ids in tokenizer.encode_batch(list(texts))
               for at in range(0, len(ids) - width + 1, width)]  # fmt: skip
    if not windows:
        raise PunaError(f"no text has {width:,} tokens: give longer texts, or fewer positions")
    taken = [windows[i * len(windows) // min(most, len(windows))] for i in range(min(most, len(windows)))]
    sums = []
    for ids in taken:
        bits = torch.cat(list(_bits(decoder, [*begin, *ids])))
        shown = [0, *(edge - len(begin) + 1 for edge in edges)]  # position p predicts the token after it
        sums.append([(float(bits[low:high].sum()), len(tokenizer.decode(ids[a:b]).encode("utf-8", "replace")))
                     for low, high, a, b in zip((0, *edges), edges, shown, shown[1:], strict=False)])  # fmt: skip
    return [_band(low, high, [one[i] for one in sums])
            for i, (low, high) in enumerate(zip((0, *edges), edges, strict=False))]  # fmt: skip


def _bits(decoder: Decoder, ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """Of each id after the first, in blocks."""
    row, cache = torch.tensor([list(ids)], device=decoder.device), decoder.new_cache()
    for start in range(0, len(ids) - 1, BLOCK):
        block = row[:, start : min(start + BLOCK, len(ids) - 1)]
        logprobs = decoder(block, cache)[0].float().log_softmax(-1)
        following = row[0, start + 1 : start + 1 + block.shape[1]]
        yield -logprobs.gather(1, following[:, None])[:, 0].cpu() / math.log(2)


def _band(first: int, last: int, sums: Sequence[tuple[float, int]]) -> Band:
    count, size = len(sums), sum(n for _, n in sums)
    mean = sum(b for b, _ in sums) / size
    if count < 2:
        return Band(first, last, count, mean, None)
    residuals = [b - mean * n for b, n in sums]
    half = Z * math.sqrt(sum(r * r for r in residuals) * count / (count - 1)) / size
    return Band(first, last, count, mean, (mean - half, mean + half))
