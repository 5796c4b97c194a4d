"""Very long contexts on a small machine: a tiny Llama-4-style model (three chunked layers, one that sees everything).

1. It really prefills `--tokens` tokens, through `puna.load` and `stream`; the time, and the memory against what the
   arithmetic of cache and prompt says.
2. For ten million tokens the cache is filled with seeded keys and values instead, 32 tokens are decoded across an edge
   of a chunk, and their logits are compared with attention computed block by block in float64. The prefill time is then
   extrapolated: fitted to the measured pieces as a + b * position, and said to be so.

The layer that sees everything is the second: of the last one, only rows that somebody reads are computed. Rotations are
float32 in both, as the models were trained: at position 10^7 float32 angles differ from float64's.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from rows import machine, parser, write_rows
from torch import Tensor

import puna
from puna.checkpoint import save
from puna.engine.blocks import BlockStore, Table
from puna.engine.pace import LARGEST
from puna.family.config import AttentionTemperature, ModelConfig
from puna.model import Decoder
from puna.model.packing import pack
from puna.model.paged import Batch, PagedPool, Span, blocks_for
from puna.model.records import BLOCK
from puna.model.rope import Positions, inverse_frequencies

CHUNK = 8192
CONFIG = ModelConfig(
    architecture="llama4", vocab_size=512, hidden_size=64, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16,
    intermediate_size=128, context_length=10_485_760, nope_layers=(1,), attention_chunk_size=CHUNK, qk_norm=True,
    attention_temperature=AttentionTemperature(), tie_word_embeddings=True,
)  # fmt: skip
PIECE = 1 << 16  # tokens of the seeded cache that are made at a time
DECODED = 32


def decoder() -> Decoder:
    """Seeded weights in float32."""
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


def seeded(layer: int, piece: int) -> tuple[Tensor, Tensor]:
    """Keys and values [PIECE, 1, head_dim] of one piece of one layer's cache, always the same."""
    generator = torch.Generator().manual_seed(1000 * piece + layer)
    return tuple(torch.randn(PIECE, 1, CONFIG.head_dim, generator=generator) for _ in range(2))  # type: ignore[return-value]


def fill(pool: PagedPool, layer: int, start: int, end: int) -> None:
    """Write the seeded keys and values of positions start..end (whole blocks) into blocks of the same number."""
    local = pool.local_layers[layer]
    records = pool.local if local else pool.full
    number = pool.local_layers[:layer].count(local)
    shift = start // BLOCK if local else 0
    for piece in range(start // PIECE, -(-end // PIECE)):
        k, v = seeded(layer, piece)
        positions = torch.arange(max(start, piece * PIECE), min(end, (piece + 1) * PIECE))
        rows = positions - piece * PIECE
        records.write(number, positions // BLOCK - shift, positions % BLOCK, k[rows], v[rows])


class Reference:
    """One layer's cache in float64: seeded keys and values up to `start`, then those of the decoded tokens."""

    def __init__(self, layer: int, start: int) -> None:
        self.layer, self.start, self.chunk = layer, start, CONFIG.chunk(layer)
        self.new: list[tuple[Tensor, Tensor]] = []

    def attend(self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """One query over everything it sees, block by block."""
        position = self.start + len(self.new)
        self.new.append((k_BSGK[0], v_BSGK[0]))
        first = position // self.chunk * self.chunk if self.chunk else 0
        q_HK = q_BSHK[0, 0] / math.sqrt(CONFIG.head_dim)
        most, total, out = torch.full((2,), -math.inf).double(), torch.zeros(2).double(), torch.zeros_like(q_HK)
        for k, v in self._pieces(first, position + 1):
            scores = q_HK @ k[:, 0].double().T
            higher = torch.maximum(most, scores.amax(1))
            weights, kept = (scores - higher[:, None]).exp(), (most - higher).exp()
            total, out, most = total * kept + weights.sum(1), out * kept[:, None] + weights @ v[:, 0].double(), higher
        return (out / total[:, None])[None, None]

    def _pieces(self, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in range(first // PIECE, -(-self.start // PIECE)):
            seen = slice(max(first - piece * PIECE, 0), self.start - piece * PIECE)
            k, v = seeded(self.layer, piece)
            if len(k[seen]):
                yield k[seen], v[seen]
        for k, v in self.new[max(first - self.start, 0) : end - self.start]:
            yield k, v


def decode_from_seeded(start: int) -> tuple[float, float, float]:
    """(largest difference of logits to the float64 reference relative to the largest logit, seconds a token, GB)."""
    small = decoder()
    end = start + DECODED
    ids = torch.randint(CONFIG.vocab_size, (DECODED,), generator=torch.Generator().manual_seed(5)).tolist()
    lowest = start // CHUNK * CHUNK
    pool = PagedPool(CONFIG, blocks_for(end), blocks_for(end - lowest), torch.float32)
    for layer in range(CONFIG.num_layers):
        fill(pool, layer, lowest if pool.local_layers[layer] else 0, start)
    blocks = np.arange(blocks_for(end), dtype=np.int32)
    local = blocks - lowest // BLOCK
    exact = decoder().double()
    frequencies = inverse_frequencies(CONFIG, "cpu", torch.float32)
    layers = [Reference(layer, start) for layer in range(CONFIG.num_layers)]
    pack(small)
    worst, seconds = 0.0, []
    with torch.no_grad():
        for i, token in enumerate(ids):
            begin = time.perf_counter()
            ours = small(torch.tensor([[token]]), Batch(pool, [Span(start + i, 1, blocks, local)]))[0, 0]
            seconds.append(time.perf_counter() - begin)
            positions = Positions.of(torch.tensor([start + i]), frequencies, CONFIG.attention_temperature)
            cosine, sine = positions.turns
            wide = Positions((cosine.double(), sine.double()), positions.scale_S)
            x = exact.embed_tokens(torch.tensor([[token]]))
            for block, layer in zip(exact.layers, layers, strict=True):
                x = block(x, wide, layer)
            expected = exact.head(exact.norm(x))[0, 0]
            worst = max(worst, float((ours - expected).abs().max() / expected.abs().max()))
    return worst, sorted(seconds)[DECODED // 2], pool.bytes() / 1e9


def prefill(tokens: int) -> tuple[float, list[tuple[int, float]], int, int]:
    """(seconds, (tokens done, seconds) along the way, bytes the process grew by, bytes forecast)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny"
        save(decoder(), CONFIG, None, path)
        model = puna.load(path, context=tokens + BLOCK, prefix_cache=False)
        ids = torch.randint(CONFIG.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
        model.generate(ids[:2048], max_tokens=1, ignore_eos=True)  # threads, buffers
        process = psutil.Process()
        before, begin, curve = process.memory_info().rss, time.perf_counter(), []
        stream = model.stream(ids, max_tokens=1, ignore_eos=True)
        while True:  # looks at how far the cache has grown: the engine's own thread does the work
            time.sleep(min(5.0, tokens / 20_000))
            done = model.stats().used_blocks * BLOCK
            if done < (curve[-1][0] if curve else 1):  # it has ended, and given its blocks back
                break
            curve.append((done, time.perf_counter() - begin))
        next(stream)
        seconds = time.perf_counter() - begin
        grown = process.memory_info().rss - before
        full, local = PagedPool.block_bytes(CONFIG, torch.float32)
        chunk = blocks_for(CHUNK) - blocks_for(2048)
        ids_bytes = 8 * tokens  # the engine's own list of the prompt
        return seconds, curve, grown, (blocks_for(tokens) - blocks_for(2048)) * full + chunk * local + ids_bytes


def held(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(tokens, bytes of full layers' blocks, most bytes of local layers' blocks at any time so far) of one sequence.

    The engine's own accounting is asked, in steps of the engine's size; the model isn't run.
    """
    store = BlockStore(blocks_for(lengths[-1]), blocks_for(2 * CHUNK), CHUNK, BLOCK, share=False)
    full, local = PagedPool.block_bytes(CONFIG, torch.float32)
    table, done, most = Table(), 0, 0
    for length in lengths:
        while done < length:
            done = min(length, done + LARGEST, done // CHUNK * CHUNK + CHUNK)
            if not store.reserve(table, done):
                raise RuntimeError(f"no blocks left at {done} tokens")
            most = max(most, store.local.used * local)
            store.computed(table, [], done)
        yield length, store.full.used * full, most


def extrapolated(curve: list[tuple[int, float]], tokens: int) -> float:
    """Seconds for a prefill of so many tokens: a * n + b * n^2 fitted to the measured curve."""
    done, seconds = np.array(curve, np.float64).T
    (a, b), *_ = np.linalg.lstsq(np.stack([done, done**2], 1), seconds, rcond=None)
    return float(a * tokens + b * tokens**2)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--tokens", type=int, default=1_000_000, help="prefilled for real")
    arguments.add_argument("--far", type=int, default=10_002_416, help="decoded from; 16 tokens before a chunk's edge")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    worst, each, size = decode_from_seeded(given.far)
    print(
        f"decode at {given.far:,}: {each * 1e3:.1f} ms a token, difference {worst:.1e} of the largest logit", flush=True
    )
    shares = [
        f"| cache of {length:,} tokens | local layers {local / 1e6:.1f} MB | full layer {full / 1e6:.1f} MB |"
        for length, full, local in held([CHUNK, 8 * CHUNK, 32 * CHUNK, 1_000_000, given.far])
    ]
    print(*shares, sep="\n", flush=True)
    seconds, curve, grown, forecast = prefill(given.tokens)
    far = extrapolated(curve, given.far)
    rows = [
        f"| prefill of {given.tokens:,} tokens | {seconds / 60:.1f} min | {given.tokens / seconds:,.0f} tokens/s |",
        f"| memory it took | {grown / 1e6:.0f} MB | forecast {forecast / 1e6:.0f} MB ({grown / forecast - 1:+.1%}) |",
        f"| decode at {given.far:,} tokens (cache of seeded values, {size:.2f} GB) "
        f"| {each * 1e3:.0f} ms a token | {size / each:.1f} GB/s |",
        f"| largest difference to float64 there, {DECODED} tokens | {worst:.1e} | of the largest logit |",
        f"| prefill of {given.far:,} tokens, extrapolated (a n + b n^2), not run | {far / 3600:.1f} h | |",
        *shares,
    ]
    print("\n".join(rows))
    write_rows(Path(__file__), "Long contexts", rows, machine(), columns=("what", "figure", "beside it"),
               notes="Model: width 64, 4 layers (3 in chunks of 8,192, 1 over everything), 2 heads of 16, float32.",
               document=given.document)  # fmt: skip


if __name__ == "__main__":
    main()
