"""What fewer bits cost in quality, on real text: `python benchmarks/quality.py`.

The bundled model in int8 and int4, and llama.cpp's Q8_0 and Q4_0 of the same weights (its bits, run by us in float32:
its own rounding of activations to 8 bits is left out, to its favour), each against bfloat16 on the same tokens.
"""

import itertools
import json
import lzma
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import shapes
import torch
from contenders import decoder_bytes
from rows import machine, parser, write_rows
from torch import Tensor

import puna

TEXT = Path(__file__).parents[2] / "shared" / "data" / "text" / "wikinews.jsonl.xz"
NOTES = (
    "{windows} windows of {length} tokens of {text}. KL: mean over all positions of KL(bf16 || this), in nats; same "
    "choice: positions where the likeliest token is the same; bytes: all weights but a separate input embedding."
)


@dataclass
class Quality:
    """Means over all positions: negative log-likelihood and KL divergence in nats, agreement of the first choice."""

    loss: float
    divergence: float
    agreement: float


def windows(path: Path, encode: "puna.Model", count: int, length: int) -> list[list[int]]:
    """The first `count` windows of `length` token ids of the texts of a .jsonl.xz file, one after the other."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        ids = itertools.chain.from_iterable(encode.tokenizer.encode(json.loads(line)["text"]) for line in file)
        return [list(itertools.islice(ids, length)) for _ in range(count)]


def log_probabilities(llama: "puna.Model", texts: list[list[int]]) -> Iterator[Tensor]:
    """float32 [length, V] for each window."""
    for ids in texts:
        yield llama.logits(ids).log_softmax(-1)


def compare(reference: list[Tensor], llama: "puna.Model", texts: list[list[int]]) -> Quality:
    """A model against the reference's log-probabilities."""
    loss, divergence, agreement = [], [], []
    for ids, true, mine in zip(texts, reference, log_probabilities(llama, texts), strict=True):
        loss.append(-mine[:-1].gather(1, torch.tensor(ids[1:])[:, None]))
        divergence.append((true.exp() * (true - mine)).sum(-1))
        agreement.append((true.argmax(-1) == mine.argmax(-1)).float())
    return Quality(*(torch.cat(column).mean().item() for column in (loss, divergence, agreement)))


def llama_cpp_forms(model: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Files with the bits that llama.cpp makes of the model; none where its package is missing."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("llama-cpp-python isn't installed, so its formats are left out")
        return
    source = folder / "bf16.gguf"
    puna.load(model, dtype="bfloat16").save(source, format="gguf")
    for kind in ("Q8_0", "Q4_0"):
        yield kind, shapes.quantise_gguf(source, folder / f"{kind}.gguf", kind)


def main() -> None:
    """Measure, print and record."""
    arguments = parser("Quality of few bits")
    arguments.add_argument("--model", default="cria", help="anything that puna.load takes, with a tokenizer")
    arguments.add_argument("--text", type=Path, default=TEXT, help="a .jsonl.xz file with a 'text' in each line")
    arguments.add_argument("--bits", nargs="+", default=["int8", "int4"], choices=["int8", "int4"])
    for name, value in (("windows", 16), ("length", 512)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    args = arguments.parse_args()
    if not args.text.exists():
        sys.exit(f"{args.text} does not exist; give --text")
    torch.set_num_threads(args.threads)
    base = puna.load(args.model, dtype="bfloat16")
    texts = windows(args.text, base, args.windows, args.length)
    reference = list(log_probabilities(base, texts))
    rows = []

    def row(name: str, llama: "puna.Model", size: int) -> None:
        found = compare(reference, llama, texts)
        rows.append(f"| {name} | {torch.tensor(found.loss).exp():.3f} | {found.divergence:.5f} | "
                    f"{found.agreement:.2%} | {size / 1e6:.2f} MB |")

    row("puna bf16", base, decoder_bytes(base.decoder))
    for bits in args.bits:
        llama = puna.load(args.model, dtype="bfloat16", quantize=bits)
        row(f"puna {bits}", llama, decoder_bytes(llama.decoder))
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in llama_cpp_forms(args.model, Path(folder)):
            row(f"llama.cpp's {kind}", puna.load(path, dtype="float32"), shapes.gguf_bytes(path))
    notes = NOTES.format(windows=args.windows, length=args.length, text=args.text.name)
    print(notes, *rows, sep="\n")
    write_rows(Path(__file__), f"Quality of few bits, {args.model}", rows, machine(), notes=notes,
               columns=("what", "perplexity", "KL", "same choice", "bytes"), document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
