"""Can a model find a fact in a long text? Scored by length of the text and depth of the fact.

Two measures: `exact`, the greedy answer is the value; and, as a signal where that is too much to ask, `chosen`: among
the values hidden in the same text, asking for this fact raises the log-probability of its own value most. What is
compared is each value's log-probability less its mean over all of the text's questions, so that neither a likely
number nor a recent one has an advantage: by chance one in `depths` is chosen, with a margin of 0.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from puna.errors import PunaError
from puna.evaluate.haystack import Builder, Haystack, common, read_filler
from puna.evaluate.intervals import Z, wilson
from puna.model import Decoder
from puna.model.cache import Cache
from puna.text.tokenizer import Tokenizer
from puna.train.loop import Evaluation

BLOCK = 512  # tokens of a text that go through the model at once
_LONGEST_REPLY = 24  # tokens of a chat's answer, in which the value must stand


@dataclass(frozen=True)
class Found:
    """How one question was answered: `margin` in nats, above the mean of the other values."""

    length: int
    depth: float  # 0: the fact is where the text begins, 1: where it ends
    exact: bool
    chosen: bool
    margin: float


@dataclass(frozen=True)
class Cell:
    """What several answers come to, with 95 % intervals. depth None: of all depths."""

    length: int
    depth: float | None
    questions: int
    exact: float
    exact_interval: tuple[float, float]
    chosen: float
    chosen_interval: tuple[float, float]
    margin: float
    margin_interval: tuple[float, float]

    @staticmethod
    def of(length: int, depth: float | None, found: Sequence[Found]) -> "Cell":
        """Of answers, at least one."""
        count, margins = len(found), [one.margin for one in found]
        exact, chosen = sum(one.exact for one in found), sum(one.chosen for one in found)
        half = Z * stdev(margins) / math.sqrt(count) if count > 1 else math.inf
        middle = fmean(margins)
        return Cell(length, depth, count, exact / count, wilson(exact, count), chosen / count, wilson(chosen, count),
                    middle, (middle - half, middle + half))  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """For JSON, which has no infinity."""
        fields = asdict(self)
        return fields if math.isfinite(self.margin_interval[0]) else fields | {"margin_interval": None}


def cells(found: Sequence[Found]) -> list[Cell]:
    """By length and depth, each length's whole after its depths."""
    made = []
    for length in dict.fromkeys(one.length for one in found):
        here = [one for one in found if one.length == length]
        depths = sorted({one.depth for one in here})
        made += [Cell.of(length, depth, [one for one in here if one.depth == depth]) for depth in depths]
        made.append(Cell.of(length, None, here))
    return made


def retrieve(decoder: Decoder, tokenizer: Tokenizer, lengths: Sequence[int], *, text: Path | None = None,
             samples: int = 8, depths: int = 5, chat: bool = False, seed: int = 0) -> list[Found]:  # fmt: skip
    """Ask a decoder for every fact of `samples` texts of each length (tokens, prompt and answer together).

    A text longer than the decoder's own context is asked about all the same: its positions go on. text: what the facts
    are hidden in (default: a bundled page, repeated). chat: ask as a message. Same seed and tokenizer, same questions.
    Raises PunaError for lengths too short for the facts and for a file without sentences.
    """
    if not lengths or min(lengths) < 1 or samples < 1 or not 2 <= depths <= 24:
        raise PunaError("retrieval needs a length, a sample, and from 2 to 24 depths: one fact has no others beside it")
    builder = Builder(tokenizer, read_filler(text), depths, seed, chat)
    texts = ((length, builder.haystack(length, sample)) for length in lengths for sample in range(samples))
    return [one for length, hay in texts for one in ask(decoder, tokenizer, hay, length, chat)]


@torch.no_grad()
def ask(decoder: Decoder, tokenizer: Tokenizer, hay: Haystack, length: int, chat: bool = False) -> Iterator[Found]:
    """Every question of one text, which goes through the model once."""
    shared, cache = common(hay.prompts), decoder.new_cache()
    for start in range(0, shared, BLOCK):
        _next(decoder, hay.prompts[0][start : min(start + BLOCK, shared)], cache)
    count = len(hay.values)
    logprobs = torch.zeros(count, count)  # of value v where q is asked for
    said = []
    for q, prompt in enumerate(hay.prompts):
        asked = cache.fork()
        first = _next(decoder, prompt[shared:], asked)
        for v, answer in enumerate(hay.answers):
            logprobs[q, v] = _logprob(decoder, answer, first, asked.fork())
        said.append(_greedy(decoder, tokenizer, first, asked, _LONGEST_REPLY if chat else len(hay.answers[q])))
    gains = logprobs - logprobs.mean(0)
    for q, (value, text) in enumerate(zip(hay.values, said, strict=True)):
        own, others = float(gains[q, q]), [float(gains[q, v]) for v in range(count) if v != q]
        exact = bool(re.search(rf"(?<!\d){value}(?!\d)", text)) if chat else text.strip() == value
        yield Found(length, q / (count - 1), exact, own > max(others), own - fmean(others))


def _next(decoder: Decoder, ids: Sequence[int], cache: Cache) -> torch.Tensor:
    """Log-probabilities [V] of what follows these ids, which the cache takes."""
    last = torch.tensor([-1], device=decoder.device)
    logits = decoder(torch.tensor([list(ids)], device=decoder.device), cache, last)
    return logits[0, -1].float().log_softmax(-1)


def _logprob(decoder: Decoder, answer: Sequence[int], first: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Of an answer's ids together, the first from `first`."""
    total = first[answer[0]]
    if len(answer) > 1:
        ids = torch.tensor([list(answer)], device=decoder.device)
        rest = decoder(ids[:, :-1], cache)[0].float().log_softmax(-1)
        total = total + rest.gather(1, ids[0, 1:, None]).sum()
    return total.cpu()


def _greedy(decoder: Decoder, tokenizer: Tokenizer, first: torch.Tensor, cache: Cache, most: int) -> str:
    """The text of at most so many likeliest tokens, up to the model's end."""
    ends = {*decoder.config.eos_token_ids, *tokenizer.eos_ids}
    ids: list[int] = []
    following = first
    while len(ids) < most and (token := int(following.argmax())) not in ends:
        ids.append(token)
        if len(ids) < most:
            following = _next(decoder, [token], cache)
    return tokenizer.decode(ids)


def retrieval(lengths: Sequence[int], text: Path | None = None, samples: int = 2, depths: int = 5) -> Evaluation:
    """The measures as scores in the training loop: `exact_N` and `chosen_N` for each length N."""
    names = tuple(f"{name}_{length}" for length in lengths for name in ("exact", "chosen"))

    def score(model: Decoder, tokenizer: Tokenizer) -> dict[str, float]:
        found = retrieve(model, tokenizer, lengths, text=text, samples=samples, depths=depths)
        whole = [cell for cell in cells(found) if cell.depth is None]
        return {f"{name}_{cell.length}": getattr(cell, name) for cell in whole for name in ("exact", "chosen")}

    return Evaluation(names, score)


def draw(found: Sequence[Cell], picture: Path) -> None:
    """Both measures as a picture, length by depth, a PNG."""
    from matplotlib.figure import Figure

    inner = [cell for cell in found if cell.depth is not None]
    lengths, depths = (sorted({getattr(cell, name) for cell in inner}) for name in ("length", "depth"))
    figure = Figure(figsize=(4 + 1.6 * len(lengths), 1.5 + 0.6 * len(depths)), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("exact", "chosen"), strict=True):
        table = {(cell.depth, cell.length): getattr(cell, name) for cell in inner}
        shares = [[table[depth, length] for length in lengths] for depth in depths]
        axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", color="black" if share > 0.5 else "white")
        axes.set(title=name, xlabel="tokens", ylabel="depth of the fact", xticks=range(len(lengths)),
                 xticklabels=[f"{length:,}" for length in lengths], yticks=range(len(depths)),
                 yticklabels=[f"{depth:.0%}" for depth in depths])  # fmt: skip
    figure.savefig(picture, dpi=120, format="png")
