"""How much memory a model will take, said before anything is loaded.

Weights and what loading needs beside them are counted by rehearsing the load (`puna.checkpoint.rehearsal`); cache and
work follow from the shape. Legend: D model width, F feed-forward width, V vocabulary, K head width.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from puna.engine.gallery import gallery_bytes, looking_bytes
from puna.engine.pace import LARGEST
from puna.engine.sizes import CacheSize, chunk_blocks, for_draft
from puna.engine.speculation import CAUGHT_UP, NGRAM_BYTES
from puna.family.config import ModelConfig
from puna.model.memory import resident
from puna.model.paged import BLOCK, PagedPool, blocks_for

if TYPE_CHECKING:
    from puna.checkpoint.rehearsal import Routed
    from puna.checkpoint.source import Source

LIBRARIES = 10_000_000  # bytes of code and buffers that the first answer brings in, measured with a tiny model
REQUEST = 450_000  # bytes of a request in progress beside its cache: a waiting thread, tokens, logits; measured with 64
MOST = 64  # requests that run at once (`Core`)
GROUP = 32  # inputs that share a scale of activations at least, in the kernels' scratch


@dataclass(frozen=True)
class Forecast:
    """Bytes. weights: as packed. experts: routed ones that stay in their files: those that are kept, and one while it
    is read and packed. draft: a draft model's weights and cache. cache: keys and values of `requests` sequences of
    `context` tokens, and features of pictures. work: activations of the largest step. loading: beyond everything else,
    while weights are packed. process: interpreter, libraries, tokenizer and what else it held before. limit: tokens of
    one request at most, where the cache is larger."""

    weights: int
    experts: int
    draft: int
    cache: int
    work: int
    loading: int
    process: int
    context: int
    requests: int
    limit: int | None = None

    @property
    def total(self) -> int:
        """The largest resident size of the process."""
        return self.weights + self.experts + self.draft + self.cache + self.work + self.loading + self.process

    @property
    def needed(self) -> str:
        """The numbers, for people."""
        many = f"{self.requests} x " if self.requests > 1 else ""
        limit = f", {self.limit:,} for one request" if self.limit is not None and self.limit < self.context else ""
        experts = f"experts read on demand {self.experts / 1e9:.2f}, " if self.experts else ""
        draft = f"draft model {self.draft / 1e9:.2f}, " if self.draft else ""
        return (
            f"needs {self.total / 1e9:.2f} GB: weights {self.weights / 1e9:.2f}, {experts}{draft}cache "
            f"{self.cache / 1e9:.2f} ({many}{self.context:,} tokens{limit}), work {self.work / 1e9:.2f}, "
            f"loading {self.loading / 1e9:.2f}, process {self.process / 1e9:.2f}"
        )

    def record(self) -> dict[str, int | None]:
        """For programs."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Needs:
    """What doesn't depend on context and requests; `forecast` adds these. Bytes; loading with the weights in it.

    routed: the routed experts among the weights. experts: see `Forecast`; then they are no longer in `weights`.
    draft: what a draft model needs. ngrams: whether each request has an index of its own text.
    """

    config: ModelConfig
    dtype: torch.dtype
    kv: str | None
    weights: int
    loading: int
    process: int
    routed: "Routed | None" = None
    experts: int = 0
    draft: "Needs | None" = None
    ngrams: bool = False

    @classmethod
    def of(cls, source: "Source", dtype: torch.dtype | None, quantize: str | None, kv: str | None) -> "Needs":
        """By rehearsing the load of an opened checkpoint on the CPU; arguments as for `puna.load`. What the process
        holds by now counts, so its tokenizer should be read before.

        Raises PunaError where loading would, as far as shapes and types tell.
        """
        from puna.checkpoint.rehearsal import rehearse

        found = rehearse(source, dtype, quantize)
        process = resident() + LIBRARIES
        return cls(source.config, found.dtype, kv, found.weights, found.peak, process, found.routed)

    def on_demand(self, kept: int = 0) -> "Needs":
        """The same with the routed experts in their files, but for so many bytes of them and one that is being read."""
        routed = self.routed
        assert routed is not None, "only a model with routed experts can leave some of them in its files"
        rest = self.weights - (0 if self.experts else routed.bytes)
        return replace(self, weights=rest, loading=routed.before, experts=max(kept, routed.largest) + routed.making)

    def forecast(self, context: int, requests: int = 1) -> Forecast:
        """With so many requests at once, each of `context` tokens with its answer."""
        draft = 0 if self.draft is None else requests * self.draft._sequence(context)
        cache = requests * self._sequence(context) + self._gallery()
        return self._sum(cache, draft, requests * context, requests, context, requests)

    def most(self, size: CacheSize, limit: int | None = None) -> Forecast:
        """With the whole cache in use by as many requests as run at once. limit: see `Forecast`."""
        draft = None if self.draft is None else for_draft(self.draft.config, size)
        answers = min(MOST, max(1, size.blocks))
        return replace(self.used(size, draft, LARGEST + MOST, answers, self._gallery()), limit=limit)

    def used(
        self, size: CacheSize, draft: CacheSize | None, tokens: int, answers: int, pictures: int = 0
    ) -> Forecast:
        """With so many blocks in use, of the model's cache and of the draft model's, steps of so many tokens of which
        some get logits, and so many bytes of pictures."""
        drafts = 0 if self.draft is None or draft is None else self.draft._blocks(draft)
        context = size.blocks * BLOCK
        return self._sum(self._blocks(size) + pictures, drafts, min(tokens, context), answers, context, 1)

    def _sum(self, cache: int, drafts: int, tokens: int, answers: int, context: int, requests: int) -> Forecast:
        work = work_bytes(self.config, self.dtype, min(tokens, LARGEST + answers), answers)
        work = max(work, looking_bytes(self.config, self.dtype.itemsize))
        work += answers * REQUEST
        loading = self.loading
        if self.ngrams:
            work += answers * NGRAM_BYTES
        if self.draft is not None:  # it is loaded first, and computes before the model does
            drafts += self.draft.weights
            step = min(tokens, CAUGHT_UP)
            work = max(work, work_bytes(self.draft.config, self.draft.dtype, step, answers))
            loading = max(self.draft.loading, self.draft.weights + loading)
        beyond = max(0, loading - self.weights - self.experts - drafts - cache - work)
        return Forecast(self.weights, self.experts, drafts, cache, work, beyond, self.process, context, requests)

    def _gallery(self) -> int:
        return gallery_bytes(self.config, self.dtype.itemsize)

    def _sequence(self, tokens: int) -> int:
        return cache_bytes(self.config, self.dtype, self.kv, tokens)

    def _blocks(self, size: CacheSize) -> int:
        full, local = PagedPool.block_bytes(self.config, self.dtype, self.kv)
        return size.blocks * full + size.local_blocks * local


def cache_bytes(config: ModelConfig, dtype: torch.dtype, kv: str | None, tokens: int) -> int:
    """Of one sequence in whole blocks; chunked layers hold one chunk at most."""
    full, local = PagedPool.block_bytes(config, dtype, kv)
    blocks = blocks_for(tokens)
    return blocks * full + min(blocks, chunk_blocks(config) or blocks) * local


def work_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int, answers: int) -> int:
    """Activations of a step of so many tokens, of which `answers` get logits: the most that is held at once.

    A pass has its buffers for all layers together (`puna.model.layers`); a mixture of experts has more of its own
    (`native/experts.c`).
    """
    size, d, k = dtype.itemsize, config.hidden_size, config.num_experts_per_token
    q = config.num_heads * config.head_dim
    qkv = q + 2 * config.num_kv_heads * config.head_dim
    mixtures = len(config.moe_layers)
    f = config.intermediate_size if mixtures < config.num_layers else 0
    token = (2 * d + qkv + q + 3 * f + d) * size + _scratch(max(d, q, f)) + 4 * config.head_dim  # and angles
    if mixtures:
        e = config.expert_intermediate_size
        token += (config.num_experts + 2 * k * d + 3 * e) * size + 16 * k + _scratch(max(d, e))
    head = answers * (config.vocab_size * (size + 8) + _scratch(d))
    return max(tokens * token, tokens * 2 * d * size + head)


def _scratch(inputs: int) -> int:
    """What our product kernel needs for one row beside input and output."""
    return 4 * inputs + 8 * (inputs // GROUP)


