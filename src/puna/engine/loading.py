"""`load`: the front door. Checks what a caller asks for, says what memory it takes, and makes a `Model`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from puna.engine.fitting import planned
from puna.engine.forecast import Forecast, Needs
from puna.engine.model import Model, check_context
from puna.engine.sampling import Sampling
from puna.engine.speculation import check_vocabulary, draft_decoder
from puna.errors import PunaError
from puna.model.native import release_threads

if TYPE_CHECKING:
    from puna.checkpoint import Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    context: int | None = None,
    kv: str | None = None,
    speculate: str | Path | Model | Literal[False] | None = None,
    prefix_cache: bool = True,
    expert_parallel: int | None = None,
    memory: int | None = None,
    tell: Callable[[Forecast], None] | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Load a checkpoint by bundled name ("cria"), hub id, folder or file.

    dtype: None keeps the stored one, and files in few bits stay in few; else a torch dtype or "float32", "bfloat16",
    "float16", to which few bits are widened.
    context: caps the context length, in tokens; the cache is made for it. By default the model's own, or what a quarter
    of the available memory holds, if that is less (`Model.context_length` tells).
    quantize: "int8" or "int4" keeps the linear layers' weights in so many bits (embedding and output layer: 8, or 6
    with "int4"; a tower for pictures: 8); activations are then bfloat16 unless dtype says otherwise. Such bits in a
    file are kept exactly.
    kv: "int8" keeps keys and values in 8 bits.
    speculate: "ngram" guesses that text repeats itself, a model (or what `load` takes) of the same vocabulary guesses
    what it would say itself; several tokens may then come of one pass. Answers are the same (docs/engine.md).
    prefix_cache: whether requests share the keys and values of equal beginnings (answers are the same either way).
    Under torchrun each process loads its share of the weights (docs/parallel.md); expert_parallel: over how many of
    them the routed experts are dealt out, None chooses.
    memory: bytes that the process may take; None: all that is available (on one CPU process: elsewhere it is not looked
    at). What doesn't fit gets a shorter context where none was asked for, and is refused else, before anything is
    loaded. tell: is called with the forecast before that.
    adapter: a folder (or hub id) with a PEFT adapter, whose updates are served beside the weights (docs/tuning.md);
    `name_or_path` may be an adapter's too, which loads the base that it names.
    Raises PunaError: unknown name, damaged checkpoint, missing device, a setting that doesn't exist yet.
    """
    if kv not in (None, "int8"):
        raise PunaError(f"kv must be None or 'int8', not {kv!r}")
    if quantize not in (None, "int8", "int4"):
        raise PunaError(f"quantize {quantize!r} is not known; use int8 or int4, or leave it out")
    if not isinstance(prefix_cache, bool):
        raise PunaError(f"prefix_cache must be True or False, not {prefix_cache!r}")
    target = _device(device)
    wanted = _dtype(dtype)
    from puna.checkpoint import open_source
    from puna.checkpoint.hub import resolve
    from puna.checkpoint.ready import load_ready
    from puna.engine import sharded
    from puna.engine.adapters import open_adapted, put_beside

    path = resolve(str(name_or_path))
    adapted = open_adapted(path, adapter)
    if speculate not in (None, False, "ngram") and sharded.processes() > 1:
        raise PunaError("a model over several processes takes no draft model; use speculate='ngram', or leave it out")
    small = None  # the draft model's checkpoint, where it is not loaded yet
    if isinstance(speculate, str | Path) and speculate != "ngram":
        small = open_source(resolve(str(speculate)))
    make: Callable[..., Model] = Model
    if sharded.processes() > 1:
        loaded, share = sharded.load_share(path, target, wanted, quantize, expert_parallel)
        make = partial(sharded.ShardedModel, share)
    elif expert_parallel not in (None, 1):
        raise PunaError(f"expert_parallel={expert_parallel} needs several processes; start them with torchrun")
    else:
        source = open_source(path) if adapted is None else adapted.bare()
        check_context(context, source.config.context_length)  # before anything is loaded
        draft = _draft(speculate, small, source.config.vocab_size)
        room = None
        tokenizer = source.tokenizer()  # before the forecast, so that its memory is counted
        if target.type == "cpu":
            plan = planned(source, wanted, quantize, context, kv, memory, draft, speculate == "ngram")
            if tell is not None:
                limit = context or source.config.context_length
                tell(plan.needs.most(plan.cache, limit))
            room = plan.weights
            make = partial(Model, cache=plan.cache, needs=plan.needs)
        if small is not None:
            speculate = Model(load_ready(small, target).model)
        loaded = load_ready(source, target, wanted, quantize, memory=room, tokenizer=tokenizer)
    if adapted is not None:
        put_beside(loaded.model, adapted.adapter.updates)
    release_threads()  # the engine computes in a thread of its own
    given = loaded.generation
    defaults = Sampling().with_options({"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k})
    return make(
        loaded.model, loaded.tokenizer, defaults=defaults, stop_ids=given.eos_token_ids, context=context,
        generation=given, kv=kv, prefix_cache=prefix_cache, speculate=speculate, notes=loaded.notes,
    )  # fmt: skip


def _draft(speculate: object, small: "Source | None", vocabulary: int) -> Needs | None:
    """What a draft model needs beside what the process holds already. Raises PunaError for what can't guess."""
    if small is not None:
        check_vocabulary(small.config.vocab_size, vocabulary)
        return Needs.of(small, None, None, None)
    decoder = draft_decoder(speculate, vocabulary)
    return None if decoder is None else Needs(decoder.config, decoder.dtype, None, weights=0, loading=0, process=0)


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise PunaError(
            f"device {str(device)!r} can't be used here: there is no such device; use cpu, cuda, cuda:1 or mps"
        ) from None
    try:
        torch.zeros(1, device=target).tolist()  # of "meta", which holds no numbers, nothing can be read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PunaError(f"device {str(device)!r} can't be used here: {reason}; use device='cpu'") from None
    return target


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise PunaError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise PunaError(f"dtype must be a floating torch dtype or its name, not {dtype!r}")
    return dtype
