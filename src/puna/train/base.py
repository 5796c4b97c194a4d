"""What a run begins with, each process reading its own part of it, and the whole result of several."""

from dataclasses import replace
from pathlib import Path

import torch

from puna.checkpoint.hf_config import read_config, read_generation
from puna.checkpoint.huggingface import HuggingFaceSource
from puna.checkpoint.shard import ShardSource
from puna.checkpoint.source import GenerationDefaults, open_source
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.model.parallel import local_decoder
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.train.checkpoint import RunFolder
from puna.train.config import TrainConfig
from puna.train.context import extended
from puna.train.initialise import initialise
from puna.train.lora import opener
from puna.train.optimizer import take_master
from puna.train.pieces import Piece
from puna.train.processes import Processes, device_of
from puna.train.session import Session
from puna.train.slices import Slices

Opened = tuple[Decoder, Tokenizer, GenerationDefaults | None]
WEIGHTS = (".safetensors", ".gguf", ".pth", ".bin")


def has_weights(base: Path) -> bool:
    """Whether it is a checkpoint, not a shape alone."""
    names = [p.name for p in base.iterdir()] if base.is_dir() else [base.name]
    return any(name.endswith(WEIGHTS) for name in names)


def shape_of(base: Path) -> ModelConfig:
    """The base's shape. Raises PunaError where it is neither a checkpoint nor a shape."""
    if has_weights(base):
        return open_source(base, text_only=True).config
    if not (base / "config.json").is_file():
        raise PunaError(f"{base}: neither a checkpoint nor a folder with config.json to begin from")
    return read_config(base / "config.json")


def open_base(base: Path, config: TrainConfig, processes: Processes) -> Opened:
    """Weights (or first values for a shape without), tokenizer and sampling defaults. Raises PunaError.

    Weights that are to be dealt to data groups stay in the CPU's memory until then: safetensors in the run's dtype as
    the files' pages, which the processes of a machine share, anything else whole in each.
    """
    dtype, share = getattr(torch, config.dtype), processes.share
    dealt = processes.data.size > 1
    device = torch.device("cpu") if dealt else device_of(config.device)
    if has_weights(base):
        source, empty = open_source(base, text_only=share is not None), None
        if dealt and isinstance(source, HuggingFaceSource):
            source.map()
        if share is not None:
            source = ShardSource(source, share.sharding, share.rank)
            empty = local_decoder(share.sharding, share.rank)
        loaded = opener(config)(source, device, dtype, empty)
        model, tokenizer, generation = loaded.model, loaded.tokenizer, loaded.generation
    else:
        model = Decoder(shape_of(base))
        generation = read_generation(base / "generation_config.json", model.config)
        initialise(model, config.seed)
        if share is not None:
            model = _slices(model, processes)
        model, tokenizer = model.to(device, dtype), load_tokenizer(base)
    if tokenizer is None:
        raise PunaError(f"{base}: no tokenizer; put tokenizer.json or tokenizer.model beside config.json")
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model's vocabulary only {model.config.vocab_size}"
        raise PunaError(f"{base}: the tokenizer has {sizes}")
    return model, tokenizer, generation


def _slices(model: Decoder, processes: Processes) -> Decoder:
    """This process's slices of a whole decoder."""
    assert processes.share is not None
    slices, local = Slices(processes.share), local_decoder(processes.share.sharding, processes.share.rank)
    local.load_state_dict({name: slices.mine(name, p.data) for name, p in model.named_parameters()}, assign=True)
    return local


def put_together(session: Session, base: Path, folder: RunFolder) -> Session:
    """What several processes trained, in this one alone: the whole model, in its dtype in the CPU's memory, made from
    the base and the masters that all have saved, which are read one by one."""
    config = session.config
    session.optimizer.state.clear()  # saved, and over: room for the whole model
    model, _, _ = open_base(base, config.model_copy(update={"device": "cpu"}), Processes.alone())
    if config.context is not None:
        model.read_as(extended(model.config, config.context))
    session.method.prepare(model, config.seed)
    found = folder.load()
    assert found is not None, "a run saves its last step"
    for name, parameter in model.named_parameters():
        if name in session.optimizer.parameters:  # a tower, which texts don't train, is the base's
            take_master(parameter, found[0].read(f"{name}/master", Piece.whole(parameter.shape)), None)
    return replace(session, model=model.eval(), processes=Processes.alone())
