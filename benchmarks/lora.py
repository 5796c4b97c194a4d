"""Speed and peak memory of adapter tuning against PEFT, same shape, batch and updates: `python benchmarks/lora.py`.

The peer is what PEFT's examples run: transformers' model in bfloat16 with float32 adapters under bfloat16 autocast, and
all in float32; then clipping and AdamW. On a machine that others use too, the processor's seconds tell more than the
clock. qlora: our base in four bits.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import torch
from train import SHAPES, Case, batch, peer

from puna.model.memory import resident_peak

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
CONTENDERS = ("puna lora", "puna lora float32", "puna qlora", "peft", "peft float32")


def ours(case: Case) -> Callable[[], float]:
    """One step of puna's loop."""
    from puna.model import Decoder
    from puna.model.frozen import FrozenLinear
    from puna.model.linear import Linear
    from puna.model.quantized import quantize
    from puna.train.config import TrainConfig
    from puna.train.initialise import initialise
    from puna.train.loop import gradients
    from puna.train.method import Batch, Document, Example
    from puna.train.methods import METHODS
    from puna.train.optimizer import Optimizer
    from puna.train.routing import Routing
    from puna.train.session import Session

    torch.set_flush_denormal(True)
    model = Decoder(SHAPES[case.shape])
    initialise(model, 0)
    dtype = "float32" if case.contender.endswith("float32") else "bfloat16"
    model = model.to(getattr(torch, dtype)).train()
    if case.contender == "puna qlora":
        for path, module in list(model.named_modules()):
            if path.startswith("layers.") and path.endswith("_proj") and isinstance(module, Linear):
                owner, _, name = path.rpartition(".")
                setattr(model.get_submodule(owner), name, FrozenLinear(quantize(module.weight.detach(), 4)))
    config = TrainConfig.model_validate({
        "method": "lora", "options": {"rank": RANK, "alpha": 2 * RANK, "targets": ["attention", "feed_forward"]},
        "steps": 10, "dtype": dtype, "balancing": "none", "stages": [{"sources": [{"file": "-"}]}],
    })  # fmt: skip
    method = METHODS["lora"](config)
    method.prepare(model, 0)
    optimizer = Optimizer(dict(model.named_parameters()), muon=False, rate=1e-3, clip=1.0)
    session = Session(config, model, None, method, None, optimizer, Routing(model, "none", 0.0))  # type: ignore[arg-type]
    counted = np.arange(case.length + 1) > 0
    rows = [Example((Document(ids.astype(np.uint32), counted),)) for ids in batch(case, model.config.vocab_size)]

    def step() -> float:
        loss, _ = gradients(session, [Batch.of(rows, model.device)], 1.0)
        optimizer.step(1.0)
        return loss

    return step


def theirs(case: Case) -> Callable[[], float]:
    """One step of PEFT's adapters under transformers' model."""
    from peft import LoraConfig, get_peft_model

    half = case.contender == "peft"
    base = peer(SHAPES[case.shape])
    base = base.to(torch.bfloat16) if half else base
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)).train()
    ids = torch.from_numpy(batch(case, base.config.vocab_size)[:, :-1].copy())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _run(pipe: Connection, case: Case) -> None:
    torch.set_num_threads(case.threads)
    step = (theirs if case.contender.startswith("peft") else ours)(case)
    losses = [step()]
    times, processor = [], []
    for _ in range(case.steps):
        begun, spent = time.perf_counter(), time.process_time()
        losses.append(step())
        times.append(time.perf_counter() - begun)
        processor.append(time.process_time() - spent)
    pipe.send({"seconds": min(times), "cpu_seconds": min(processor), "peak": resident_peak(), "loss": losses[-1]})


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["dense-25M", "moe-45M"], choices=[*SHAPES])
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for shape in options.shapes:
        case = Case(shape, "", options.rows, options.length, options.steps, options.threads)
        for contender in options.contenders:
            mine, others = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=_run, args=(others, replace(case, contender=contender))
            )
            process.start()
            others.close()
            found = mine.recv()
            process.join()
            row = {"shape": shape, "contender": contender, "peak_MB": round(found["peak"] / 1e6)}
            row |= {"tokens_per_second": round(case.tokens / found["seconds"])}
            row |= {"tokens_per_cpu_second": round(case.tokens / found["cpu_seconds"])}
            print(json.dumps(row | {"loss": round(found["loss"], 4)}), flush=True)


if __name__ == "__main__":
    main()
