"""Who trains in `train.py` and `lora.py`: each in a process of its own, which takes a step when it is asked, from the
same weights, on the same batch.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import machine, write_rows

from puna.family.config import AttentionTemperature, ModelConfig
from puna.model import Decoder
from puna.model.memory import resident_peak
from puna.train.roof import matrix_roof

SHAPES = {
    "dense-25M": ModelConfig("llama", 16_384, 384, 8, 6, 2, 64, 1024, 2048),
    "dense-110M": ModelConfig("llama", 32_000, 768, 12, 12, 4, 64, 2048, 2048, tie_word_embeddings=True),
    "moe-45M": ModelConfig("llama4", 16_384, 384, 6, 6, 2, 64, 1024, 2048, num_experts=8, expert_intermediate_size=512,
                           moe_layers=tuple(range(6)), nope_layers=(3,), attention_chunk_size=256, qk_norm=True,
                           attention_temperature=AttentionTemperature(0.1, 8192)),
}  # fmt: skip
NOTES = (
    "{what}. Tokens/s: {rows} x {length} tokens over the median step ({repeats} of each in turn, after one that isn't "
    "timed). Memory: the process's largest resident size. Share: of the {roof:.0f} GFLOP/s that PyTorch's bfloat16 "
    "product reaches here, with 2 operations a weight and token forward, 2 for the gradient of the states, 2 for each "
    "weight that trains, and attention's. Every contender begins with the same weights; the losses of the last step "
    "show that they learnt the same."
)


@dataclass(frozen=True)
class Case:
    """One contender on one shape: `rows` documents of `length` tokens a step, in one pass. checkpoint: its weights."""

    shape: str
    contender: str
    rows: int
    length: int
    threads: int
    checkpoint: Path

    @property
    def tokens(self) -> int:
        """A step's."""
        return self.rows * self.length

    def batch(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids [rows, length], the same for all; each but a row's first is predicted from those before."""
        return np.random.default_rng(0).integers(0, SHAPES[self.shape].vocab_size, (self.rows, self.length))


@dataclass(frozen=True)
class Stepper:
    """What a contender gives: one step, which returns the loss, and where it knows them the operations of a step and
    the forecast of its memory."""

    step: Callable[[], float]
    operations: float = 0.0
    forecast: int = 0


Maker = Callable[[Case], Stepper]


class Contender:
    """A process that trains."""

    def __init__(self, make: Maker, case: Case) -> None:
        self.case = case
        self._pipe, others = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(others, make, case))
        self._process.start()
        others.close()
        self.operations, self.forecast = self._pipe.recv()
        self.seconds: list[float] = []
        self.loss = 0.0

    def step(self) -> float:
        """Take one: seconds."""
        self._pipe.send(True)
        seconds, self.loss = self._pipe.recv()
        return float(seconds)

    def close(self) -> int:
        """End it: its peak of resident bytes."""
        self._pipe.send(False)
        peak = self._pipe.recv()
        self._process.join()
        return int(peak)


def _serve(pipe: Any, make: Maker, case: Case) -> None:
    torch.set_num_threads(case.threads)
    stepper = make(case)
    pipe.send((stepper.operations, stepper.forecast))
    while pipe.recv():
        begun = time.perf_counter()
        loss = stepper.step()
        pipe.send((time.perf_counter() - begun, loss))
    pipe.send(resident_peak())


def peer(config: ModelConfig) -> Any:
    """transformers' model of a shape, float32, random."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_word_embeddings, "attn_implementation": "sdpa",
    }  # fmt: skip
    if config.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=config.intermediate_size, **common))
    return Llama4ForCausalLM(Llama4TextConfig(
        intermediate_size=config.expert_intermediate_size, intermediate_size_mlp=config.intermediate_size,
        num_local_experts=config.num_experts, num_experts_per_tok=1, interleave_moe_layer_step=1,
        attention_chunk_size=config.attention_chunk_size, use_qk_norm=config.qk_norm, **common,
    ))  # fmt: skip


def loaded_peer(case: Case, dtype: torch.dtype) -> Any:
    """transformers' model with the case's weights."""
    from transformers import Llama4ForCausalLM, LlamaForCausalLM

    kind = LlamaForCausalLM if SHAPES[case.shape].architecture == "llama" else Llama4ForCausalLM
    return kind.from_pretrained(case.checkpoint, dtype=dtype, attn_implementation="sdpa").train()


RATE = 1e-3


def our_steps(case: Case, model: Decoder, settings: dict[str, Any]) -> Stepper:
    """puna's loop, with a configuration's `settings` of the method."""
    from puna.train.config import TrainConfig
    from puna.train.loop import gradients
    from puna.train.method import Batch, Document, Example
    from puna.train.methods import METHODS
    from puna.train.optimizer import Optimizer
    from puna.train.plan import forecast
    from puna.train.roof import operations
    from puna.train.routing import Routing
    from puna.train.session import Session

    torch.set_flush_denormal(True)
    config = TrainConfig.model_validate({"steps": 10, "stages": [{"sources": [{"file": "-"}]}], **settings})
    method = METHODS[config.method](config)
    method.prepare(model.train(), 0)
    optimizer = Optimizer(dict(model.named_parameters()), muon=False, rate=RATE, clip=1.0)
    session = Session(config, model, None, method, None, optimizer, Routing(model, "none", 0.0))  # type: ignore[arg-type]
    counted = np.arange(case.length) > 0
    batch = Batch.of([Example((Document(ids.astype(np.uint32), counted),)) for ids in case.batch()], model.device)

    def step() -> float:
        loss, _ = gradients(session, [batch], 1.0)
        optimizer.step(1.0)
        return loss

    return Stepper(step, operations(session, [batch]), forecast(session, [batch]).total)


def their_steps(case: Case, model: Any) -> Stepper:
    """What transformers' Trainer does with a model, under bfloat16 autocast where the contender's name says so."""
    ids = torch.from_numpy(case.batch())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in case.contender):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Stepper(step)


def arguments(description: str, shapes: list[str]) -> argparse.Namespace:
    """What both scripts are asked."""
    from rows import parser

    found = parser(description)
    found.add_argument("--shapes", nargs="+", default=shapes, choices=[*SHAPES])
    found.add_argument("--rows", type=int, default=4, help="documents a step")
    found.add_argument("--length", type=int, default=256, help="tokens of each")
    found.add_argument("--repeats", type=int, default=5)
    return found.parse_args()


def compare(script: Path, title: str, what: str, makers: dict[str, Maker], args: argparse.Namespace) -> None:
    """Measure all contenders on all shapes, in turn, and write the rows: ours first, each of `makers` named by whether
    it begins with "puna"."""
    rows: list[str] = []
    roof = matrix_roof(torch.device("cpu"), torch.bfloat16)
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            peer(SHAPES[shape]).save_pretrained(folder)
            case = (args.rows, args.length, args.threads, Path(folder))
            contenders = [Contender(make, Case(shape, name, *case)) for name, make in makers.items()]
            for each in contenders:
                each.step()
            for _ in range(args.repeats):
                for each in contenders:
                    each.seconds.append(each.step())
            peaks = [each.close() for each in contenders]
        rows += _rows(contenders, peaks, roof)
        print("\n".join(rows[-len(contenders) :]), flush=True)
    notes = NOTES.format(what=what, rows=args.rows, length=args.length, repeats=args.repeats, roof=roof / 1e9)
    columns = ("shape, contender", "tokens/s", "speed: ours to this", "share of the matrix roof", "peak memory",
               "memory: ours to this", "last loss")  # fmt: skip
    write_rows(script, title, rows, f"{machine()}; {args.threads} threads", columns=columns, notes=notes,
               document=args.document)  # fmt: skip


def _rows(contenders: list[Contender], peaks: list[int], roof: float) -> list[str]:
    first, rows = contenders[0], []
    for each, peak in zip(contenders, peaks, strict=True):
        seconds = statistics.median(each.seconds)
        speed, memory = seconds / statistics.median(first.seconds), peaks[0] / peak
        share = f"{each.operations / seconds / roof:.0%}" if each.operations else "-"
        promised = f" (forecast {each.forecast / 1e6:.0f})" if each.forecast else ""
        rows.append(
            f"| {each.case.shape}, {each.case.contender} | {each.case.tokens / seconds:.0f} | {speed:.2f}x | {share} | "
            f"{peak / 1e6:.0f} MB{promised} | {memory:.2f}x | {each.loss:.4f} |"
        )
    return rows
