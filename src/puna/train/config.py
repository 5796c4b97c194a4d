"""What a training run is, as typed data read from YAML."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puna.errors import PunaError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """One data file: JSON lines with `text`, or with `messages` (loss on the assistant's tokens alone)."""

    file: str
    weight: float = Field(1.0, gt=0)  # share of the stage's rows, relative to the other sources
    documents: bool = False  # rows start where documents do; what a row can't hold is left out, and counted


class Stage(_Strict):
    """A share of the run with one mixture and one row length."""

    share: float = Field(1.0, gt=0)  # of the run's steps, relative to the other stages
    length: int = Field(512, ge=8)  # tokens a row
    sources: list[Source] = Field(min_length=1)


class TrainConfig(_Strict):
    """A pretraining or continued-training run. Rates are of the peak; tokens a step = `batch_tokens`."""

    stages: list[Stage] = Field(min_length=1)
    steps: int = Field(gt=0)
    batch_tokens: int = Field(16384, gt=0)
    micro_tokens: int = Field(6144, gt=0)  # tokens of one forward and backward pass
    matrix_rate: float = Field(0.02, gt=0)
    vector_rate: float = Field(0.004, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.01, ge=0, lt=1)  # share of the steps
    decay: float = Field(0.5, ge=0, le=1)  # share of the steps, at the end, in which the rate falls linearly to zero
    balance: float = Field(0.01, ge=0)  # weight of the experts' load-balancing loss
    seed: int = Field(0, ge=0)
    save_every: int = Field(200, gt=0)  # steps
    evaluate_every: int = Field(200, gt=0)  # steps
    heldout: str | None = None  # JSON lines with `text`, scored in bits per byte

    def order(self) -> dict[str, Any]:
        """What decides which rows each step sees: a resumed run must have the same."""
        return self.model_dump(include={"seed", "steps", "batch_tokens", "stages"})

    def rate(self, step: int, steps: int) -> float:
        """Multiplier of the peak rates at a step of a run of `steps`: warm-up, constant, linear decay."""
        warm = max(1, round(self.warmup * steps))
        fall = round(self.decay * steps)
        return min(1.0, (step + 1) / warm, (steps - step) / max(1, fall))


def read_config(path: Path, defaults: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Read a YAML file; `defaults` fill what it doesn't say, `changes` that are not None replace its values.

    Raises PunaError naming file and field.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise PunaError(f"{path}: can't read the configuration: {error.strerror}; --config names a YAML file") from None
    except UnicodeDecodeError as error:
        raise PunaError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise PunaError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}; mend the line") from None
    if not isinstance(values, dict):
        raise PunaError(f"{path}: a configuration is a mapping of names to values, not {type(values).__name__}")
    given = {k: v for k, v in changes.items() if v is not None}
    return checked_config({**(defaults or {}), **values, **given}, str(path))


def checked_config(values: dict[str, Any], where: str) -> TrainConfig:
    """Validate raw values. Raises PunaError that names every wrong field."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {_problem(e)}" for e in error.errors())
        raise PunaError(f"{where}: {problems}") from None


def _problem(found: Any) -> str:
    """One of pydantic's findings, in the words of a user. The depth of a field tells what it belongs to."""
    if found["type"] == "extra_forbidden":
        owners: dict[int, type[_Strict]] = {1: TrainConfig, 3: Stage}
        owner = owners.get(len(found["loc"]), Source)
        return f"no such field; take it out, or use one of {', '.join(owner.model_fields)}"
    words = str(found["msg"])
    return words[:1].lower() + words[1:]
