"""A whole run: from a base and a configuration to a folder that loads like any checkpoint."""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.hf_config import read_config, read_generation
from puna.checkpoint.hub import resolve
from puna.checkpoint.source import GenerationDefaults, load, save
from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.train.card import write_card
from puna.train.checkpoint import RunFolder
from puna.train.config import TrainConfig
from puna.train.curves import draw_curves
from puna.train.initialise import initialise
from puna.train.loop import Progress, run


def pretrain(
    base: Path,
    config: TrainConfig,
    data: Path,
    out: Path,
    *,
    resume: bool,
    report: Callable[[Progress], None],
    note: Callable[[str], None],
) -> None:
    """Train `base` by `config` on files in `data`; `out` ends with safetensors, tokenizer, card, lineage and curves.

    `base` is a checkpoint (a bundled name or hub id too), or a folder with config.json and a tokenizer and no weights
    (then training begins from scratch). Weights and activations are bfloat16 over float32 master weights. A run that is
    killed goes on from its last saved step with `resume`. Raises PunaError for anything wrong with base, data or folder
    before the first step.
    """
    for source in (source for stage in config.stages for source in stage.sources):
        if not (data / source.file).is_file():
            raise PunaError(
                f"{data / source.file}: no such data file; --data names one, or the folder of those in --config"
            )
    name = base.name if base.exists() else str(base)
    base = resolve(base)
    model, tokenizer, generation = _base(base, config.seed)
    folder = RunFolder(out, resume)
    try:
        torch.set_flush_denormal(True)  # softmax over a vocabulary is full of them, and they are slow
        begun = time.time()
        run(model, tokenizer, config, data, folder, report, note)
        model.eval()
        _finish(model, tokenizer, generation, out)
        record = _lineage(name, base, config, data, model, time.time() - begun)
        (out / "lineage.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_card(out, record)
        draw_curves(out / "metrics.csv", out / "curves.png")
    finally:
        torch.set_flush_denormal(False)  # a setting of the whole thread, which others share
        folder.close()


def _base(base: Path, seed: int) -> tuple[Decoder, Tokenizer, GenerationDefaults | None]:
    names = [p.name for p in base.iterdir()] if base.is_dir() else [base.name]
    if any(name.endswith((".safetensors", ".gguf", ".pth", ".bin")) for name in names):
        loaded = load(base, dtype=torch.bfloat16)
        model, tokenizer, generation = loaded.model, loaded.tokenizer, loaded.generation
    elif "config.json" in names:
        model = Decoder(read_config(base / "config.json"))
        generation = read_generation(base / "generation_config.json", model.config)
        initialise(model, seed)
        model, tokenizer = model.to(torch.bfloat16), load_tokenizer(base)
    else:
        raise PunaError(f"{base}: neither a checkpoint nor a folder with config.json to begin from")
    if tokenizer is None:
        raise PunaError(f"{base}: no tokenizer; put tokenizer.json or tokenizer.model beside config.json")
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model's vocabulary only {model.config.vocab_size}"
        raise PunaError(f"{base}: the tokenizer has {sizes}")
    return model.requires_grad_(True), tokenizer, generation


def _finish(model: Decoder, tokenizer: Tokenizer, generation: GenerationDefaults | None, out: Path) -> None:
    new = out / ".finished"
    shutil.rmtree(new, ignore_errors=True)
    save(model, model.config, tokenizer, new, generation=generation)
    for file in new.iterdir():
        os.replace(file, out / file.name)
    new.rmdir()


def _lineage(name: str, base: Path, config: TrainConfig, data: Path, model: Decoder, seconds: float) -> dict[str, Any]:
    files = sorted({data / source.file for stage in config.stages for source in stage.sources})
    return {
        "base": {"name": name, "files": _hashes(sorted(p for p in ([base] if base.is_file() else base.iterdir())
                                                            if p.is_file() and not p.name.startswith(".")))},
        "data": _hashes(files),
        "method": config.model_dump(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "compute": {"seconds_of_last_session": round(seconds), "threads": torch.get_num_threads(),
                    "device": str(model.device), "machine": platform.machine(), "torch": torch.__version__},
    }  # fmt: skip


def _hashes(files: list[Path]) -> dict[str, str]:
    found = {}
    for file in files:
        with file.open("rb") as handle:
            found[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found
