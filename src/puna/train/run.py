"""A whole run: from a base and a configuration to a folder that loads like any checkpoint."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from puna.checkpoint.hub import resolve
from puna.checkpoint.lineage import model_files, sampled, write_record
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.memory import returned_at_once
from puna.text.tokenizer import Tokenizer
from puna.train.base import Opened, open_base, put_together, shape_of
from puna.train.card import write_card
from puna.train.checkpoint import RunFolder
from puna.train.config import TrainConfig
from puna.train.context import context_notes, extended
from puna.train.curves import draw_curves
from puna.train.evaluate import heldout_bits
from puna.train.loop import Evaluation, Progress, run
from puna.train.method import Finished
from puna.train.plan import Plan, make_plan
from puna.train.processes import Processes, device_of, start
from puna.train.record import authors_of, recorded, run_record
from puna.train.session import Session
from puna.train.terms import Terms, check_terms, terms_of


def train(
    base: Path,
    config: TrainConfig,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Train `base` by `config` on files in `data`; `out` ends with what the method saves, card, lineage and curves.

    `base` is a checkpoint (a bundled name or hub id too), or a folder with config.json and a tokenizer and no weights
    (then training begins from scratch). A run that is killed goes on from its last saved step with `resume`. Raises
    PunaError for anything wrong with base, data or folder before the first step.
    """
    given = str(base.resolve() if base.exists() else base)
    begun, opened = _begin(base, config, data, note)
    processes, config, evaluations = begun.processes, begun.config, (*evaluations, *begun.evaluations)
    report = report if processes.first else lambda _: None
    model, tokenizer, generation = opened
    folder = RunFolder(out, resume, processes)
    try:
        torch.set_flush_denormal(True)  # softmax over a vocabulary is full of them, and they are slow
        since = time.time()
        session = replace(_session(begun, model, tokenizer, data), base=sampled(model_files(begun.base)))
        # weights are gathered and let go block by block: what glibc would keep of them is most of what dealing saves
        with returned_at_once() if processes.data.size > 1 else nullcontext():
            tokens = run(session, folder, evaluations, report, begun.note)
        model.eval()
        session.routing.remove()
        if not processes.first:
            return
        if processes.size > 1:
            del model, opened
            session = put_together(session, begun.base, folder)
        finished = Finished(session.model, tokenizer, generation, given, config.context is not None)
        _finish(session, finished, out)
        recorded(session).write(out)
        compute: dict[str, Any] = {
            "seconds_of_last_session": round(time.time() - since),
            "tokens": tokens,
            "steps": config.steps,
        }
        if processes.size > 1:
            mesh = {"data": processes.data.size, "tensor": processes.peers.size, "expert": config.mesh.expert}
            compute |= {"device": str(device_of(config.device)), "mesh": mesh}
        scores = [name for evaluation in evaluations for name in evaluation.names]
        record = run_record(session, begun.name, begun.base, begun.terms, data, out, compute, scores)
        write_record(out, record)
        write_card(out, record, begun.base)
        draw_curves(out / "metrics.csv", out / "curves.png")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PunaError(
            f"{out}: can't write the run: {reason}; what was saved is whole: make room and go on with --resume"
        ) from error
    finally:
        torch.set_flush_denormal(False)  # a setting of the whole thread, which others share
        folder.close()


def plan(base: Path, config: TrainConfig, data: Path, note: Callable[[str], None] = lambda _: None) -> Plan:
    """What `train` would do and need, with one step really measured. Writes nothing but tokenised data. Raises
    PunaError for what `train` would refuse."""
    begun, (model, tokenizer, _) = _begin(base, config, data, note)
    return make_plan(_session(begun, model, tokenizer, data))


@dataclass(frozen=True)
class _Begun:
    """A run that may take place: this process among the run's, who says what there is to say, and the base."""

    processes: Processes
    config: TrainConfig
    note: Callable[[str], None]
    name: str
    base: Path
    terms: Terms
    evaluations: tuple[Evaluation, ...]


def _begin(base: Path, config: TrainConfig, data: Path, note: Callable[[str], None]) -> tuple[_Begun, Opened]:
    """Join the other processes and open the base. Raises PunaError on all of them for what is wrong with either."""
    processes = start(config.mesh, device_of(config.device))
    config = config.dealt(processes.data.size)
    note = note if processes.first else lambda _: None
    with processes.together():
        check_files(config, data)
        if processes.first:
            resolve(base)  # alone, where it is to be fetched
    with processes.together():
        name, base = _named(base)
        terms = terms_of(base, name)
        for sentence in check_terms(terms, authors_of(config), config.domicile):
            note(sentence)
        evaluations = (heldout_bits(data / config.heldout),) if config.heldout else ()
        processes = processes.split(shape_of(base), config.mesh)
        opened = open_base(base, config, processes)
    return _Begun(processes, config, note, name, base, terms, evaluations), opened


def _session(begun: _Begun, model: Decoder, tokenizer: Tokenizer, data: Path) -> Session:
    """The run in memory, its model with the context that the run is for, and what there is to say of both."""
    config, processes, note, before = begun.config, begun.processes, begun.note, model.config
    if config.context is not None:
        model.read_as(extended(before, config.context))
    session = Session.of(model, tokenizer, config, data, cache_folder(), processes)
    for sentence in session.order.notes():
        note(sentence)
    groups, passes = processes.data.size, len(session.passes(0)) if processes.size > 1 else 1
    if groups > 1 and passes % groups:
        note(f"passes of a step: {passes}, which can't be dealt evenly to {groups} data groups, so that some wait; "
             "mend micro_tokens, the tokens of a pass")  # fmt: skip
    if model.config != before:
        for sentence in context_notes(before, model.config, session.order.stages):
            note(sentence)
    return session


def check_files(config: TrainConfig, data: Path) -> None:
    """Raises PunaError where a source isn't there: told before a large base is loaded."""
    for source in (source for stage in config.stages for source in stage.sources):
        if not (data / source.file).exists():
            raise PunaError(
                f"{data / source.file}: no such data file; --data names one, or the folder of those in --config"
            )


def cache_folder() -> Path:
    """Where tokenised data are kept: $PUNA_CACHE, or the user's cache folder."""
    given = os.environ.get("PUNA_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else home / "puna") / "tokenised"


def _named(base: Path) -> tuple[str, Path]:
    return base.name if base.exists() else str(base), resolve(base)


def _finish(session: Session, finished: Finished, out: Path) -> None:
    new = out / ".finished"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    session.method.save(finished, new)
    for file in new.iterdir():
        os.replace(file, out / file.name)
    new.rmdir()
