"""From the command to the first token of a checkpoint in int4, with warm file cache: `python benchmarks/start.py`."""

import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import shapes
from rows import machine, parser, write_rows

import puna

PEERS = {
    "llama.cpp Q4_0": ("llama_cpp", """
import sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads={threads}, verbose=False)
llama.eval([5, 6, 7])
print(llama_cpp.llama_get_logits_ith(llama.ctx, -1)[0], flush=True)
"""),
    "transformers bf16": ("transformers", """
import sys, torch, transformers
torch.set_num_threads({threads})
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1), flush=True)
"""),
}  # fmt: skip


def seconds_to_output(command: list[str]) -> float:
    """From starting `command` to the first byte that it writes. RuntimeError if it ends without one."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = time.perf_counter() - begun
        _, errors = process.communicate()
    if not first or process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {errors.decode()[-500:]}")
    return taken


def ours(shape: str, widths: list[str], folder: Path) -> dict[str, list[str]]:
    """Our commands by name. Few bits are quantised and saved afresh: what starts is a finished checkpoint."""
    commands = {}
    for bits in widths:
        path = shapes.checkpoint(shape)
        if bits != "bf16":
            puna.load(path, quantize=bits).save(folder / bits)
            path = folder / bits
        commands[f"puna {bits}"] = [sys.executable, "-m", "puna", "generate", str(path), "--ids", "5,6,7",
                                    "--max-tokens", "1", "--temperature", "0", "--ignore-eos"]  # fmt: skip
    return commands


def peers(shape: str, threads: int) -> dict[str, list[str]]:
    """The peers' commands by name, of those that are installed."""
    commands = {}
    for name, (package, code) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} isn't installed, so it is left out")
            continue
        path = shapes.gguf(shape, "Q4_0") if package == "llama_cpp" else shapes.checkpoint(shape)
        commands[name] = [sys.executable, "-c", code.format(threads=threads), str(path)]
    return commands


def measure(commands: dict[str, list[str]], repeats: int) -> list[str]:
    """A row for each command: median and slowest start, in turns, after one that warms the file cache."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        seconds_to_output(command)
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(seconds_to_output(command))
    return [f"| {name} | {statistics.median(taken):.2f} s | {max(taken):.2f} s |" for name, taken in times.items()]


def main() -> None:
    """Measure, print and record."""
    arguments = parser("Command to first token")
    arguments.add_argument("--shape", default="1b", choices=shapes.SHAPES)
    arguments.add_argument("--bits", nargs="+", default=["int4", "int8", "bf16"], choices=["int4", "int8", "bf16"])
    arguments.add_argument("--repeats", type=int, default=5)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(ours(args.shape, args.bits, Path(folder)) | peers(args.shape, args.threads), args.repeats)
    print(*rows, sep="\n")
    write_rows(Path(__file__), f"Start: command to first token, shape {args.shape}", rows,
               f"{machine()}; {args.repeats} starts each, interleaved, files in the page cache",
               notes="Ours: `puna generate CHECKPOINT --ids 5,6,7 --max-tokens 1` to its first byte of output; "
                     "peers: the least Python that loads the file and runs the same three tokens.",
               columns=("what", "median", "slowest"), document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
