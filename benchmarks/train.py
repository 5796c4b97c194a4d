"""Training speed and peak memory against transformers, same shape, batch and machine: `python benchmarks/train.py`.

Each contender runs in a process of its own: first one step that is not timed, then `--steps`. The peer's loop is what
its Trainer does in a step: forward with labels, backward, clipping, AdamW (fused), zero_grad; in float32, and under
bfloat16 autocast (`bf16=True`). On a machine that others use too, `--threads 1` and the processor's seconds tell more
than the clock.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from puna.family.config import AttentionTemperature, ModelConfig
from puna.model.memory import resident_peak
from puna.train.config import TrainConfig

SHAPES = {
    "dense-25M": ModelConfig("llama", 16_384, 384, 8, 6, 2, 64, 1024, 2048),
    "dense-110M": ModelConfig("llama", 32_000, 768, 12, 12, 4, 64, 2048, 2048, tie_word_embeddings=True),
    "moe-45M": ModelConfig("llama4", 16_384, 384, 6, 6, 2, 64, 1024, 2048, num_experts=8, expert_intermediate_size=512,
                           moe_layers=tuple(range(6)), nope_layers=(3,), attention_chunk_size=256, qk_norm=True,
                           attention_temperature=AttentionTemperature(0.1, 8192)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One contender on one shape: `rows` documents of `length` predictions a step, in one pass."""

    shape: str
    contender: str
    rows: int
    length: int
    steps: int
    threads: int

    @property
    def tokens(self) -> int:
        """A step's."""
        return self.rows * self.length


def batch(case: Case, vocabulary: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids [rows, length + 1], the same for all."""
    return np.random.default_rng(0).integers(0, vocabulary, (case.rows, case.length + 1))


def ours(case: Case) -> tuple[Callable[[], float], int]:
    """One step of puna's loop, and the plan's forecast of its memory."""
    from puna.model import Decoder
    from puna.train.initialise import initialise
    from puna.train.loop import gradients
    from puna.train.method import Batch, Document, Example
    from puna.train.methods import Full
    from puna.train.optimizer import Optimizer
    from puna.train.plan import forecast
    from puna.train.routing import Routing
    from puna.train.session import Session

    torch.set_flush_denormal(True)
    model = Decoder(SHAPES[case.shape])
    initialise(model, 0)
    dtype = "float32" if case.contender == "puna float32" else "bfloat16"
    model = model.to(getattr(torch, dtype)).train()
    config = TrainConfig.model_validate({
        "method": "full", "steps": 10, "dtype": dtype, "recompute": case.contender == "puna recompute",
        "stages": [{"sources": [{"file": "-"}]}],
    })  # fmt: skip
    method = Full(config)
    method.prepare(model, 0)
    optimizer = Optimizer(dict(model.named_parameters()), muon=False, rate=1e-3, clip=1.0)
    session = Session(config, model, None, method, None, optimizer, Routing(model, "auxiliary", 0.01))  # type: ignore[arg-type]
    counted = np.arange(case.length + 1) > 0
    rows = [Example((Document(ids.astype(np.uint32), counted),)) for ids in batch(case, model.config.vocab_size)]

    def step() -> float:
        loss, _ = gradients(session, [Batch.of(rows, model.device)], 1.0)
        optimizer.step(1.0)
        return loss

    return step, forecast(session, [Batch.of(rows, model.device)]).total


def theirs(case: Case) -> tuple[Callable[[], float], None]:
    """One step as transformers' Trainer takes it."""
    model = peer(SHAPES[case.shape]).train()
    ids = torch.from_numpy(batch(case, model.config.vocab_size)[:, :-1].copy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    autocast = case.contender == "transformers bf16"

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, None


def peer(config: ModelConfig) -> Any:
    """transformers' model of a shape, first values its own, float32."""
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


def _run(pipe: Connection, case: Case) -> None:
    torch.set_num_threads(case.threads)
    step, promised = (theirs if case.contender.startswith("transformers") else ours)(case)
    losses = [step()]
    times, processor = [], []
    for _ in range(case.steps):
        begun, spent = time.perf_counter(), time.process_time()
        losses.append(step())
        times.append(time.perf_counter() - begun)
        processor.append(time.process_time() - spent)
    pipe.send({"seconds": min(times), "cpu_seconds": min(processor), "peak": resident_peak(), "forecast": promised,
               "losses": losses})  # fmt: skip


def measure(case: Case) -> dict[str, Any]:
    """Seconds of the best step, by the clock and of processors, and the process's largest resident size."""
    mine, others = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(others, case))
    process.start()
    others.close()
    found: dict[str, Any] = mine.recv()
    process.join()
    return found


CONTENDERS = ("puna", "puna recompute", "transformers", "transformers bf16")


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for shape in options.shapes:
        case = Case(shape, "", options.rows, options.length, options.steps, options.threads)
        for contender in options.contenders:
            found = measure(replace(case, contender=contender))
            row = {"shape": shape, "contender": contender, "peak_MB": round(found["peak"] / 1e6)}
            if found["forecast"]:
                row["forecast_MB"] = round(found["forecast"] / 1e6)
            row |= {"tokens_per_second": round(case.tokens / found["seconds"])}
            row |= {"tokens_per_cpu_second": round(case.tokens / found["cpu_seconds"])}
            print(json.dumps(row | {"loss": round(found["losses"][-1], 4)}), flush=True)


if __name__ == "__main__":
    main()
