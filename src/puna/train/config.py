"""What a training run is, as typed data read from YAML or from a command's options."""

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from puna.errors import PunaError
from puna.train.context import ContextConfig, TemperatureConfig


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, field: ValidationInfo) -> Any:
        """Python counts with True; nobody means it."""
        if isinstance(value, bool) and cls.model_fields[str(field.field_name)].annotation is not bool:
            raise ValueError(f"must not be {str(value).lower()}")
        return value


class Source(_Strict):
    """One data file, or one folder of text files."""

    file: str
    weight: float = Field(1.0, gt=0)  # share of the stage's rows, relative to the other sources
    outputs_of: str | None = None  # the model that wrote it, if one did: its licence may say what may learn from it
    packing: Literal["stream", "starts", "whole"] | None = None  # how documents fill rows; None: as the method does
    overlong: Literal["split", "refuse"] | None = None  # documents longer than a row; None: as the method does


class Stage(_Strict):
    """A share of the run with one mixture and one row length."""

    share: float = Field(1.0, gt=0)  # of the run's steps, relative to the other stages
    length: int = Field(512, ge=8)  # predictions a row
    sources: list[Source] = Field(min_length=1)


class MeshConfig(_Strict):
    """How several processes (torchrun) share a run: `data` groups train on other passes, and each group's `tensor`
    processes split the matrices, and their experts `expert` ways."""

    data: int | None = Field(None, ge=1)  # None: as many as there are processes for
    tensor: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)

    def data_groups(self, processes: int) -> int:
        """How many data groups that many processes make. Raises PunaError naming the size that doesn't fit."""
        if self.tensor % self.expert:
            raise PunaError(f"mesh.expert: {self.expert} doesn't divide mesh.tensor, {self.tensor}; mend one of them")
        if processes % self.tensor:
            raise PunaError(
                f"mesh.tensor: {processes} process{'es' * (processes > 1)} can't be dealt to groups of {self.tensor}; "
                "start torchrun with a multiple, or mend mesh.tensor"
            )
        groups = processes // self.tensor
        if self.data is not None and self.data != groups:
            raise PunaError(
                f"mesh.data: {self.data} groups of {self.tensor} need {self.data * self.tensor} processes, but "
                f"{processes} run; start torchrun with --nproc-per-node {self.data * self.tensor}, or leave data out"
            )
        return groups


class TrainConfig(_Strict):
    """A run of any method. Rates are of the peak; tokens a step = `batch_tokens`."""

    method: str = "pretrain"
    options: dict[str, Any] = Field(default_factory=dict)  # the method's own, which it checks
    stages: list[Stage] = Field(min_length=1)
    steps: int = Field(gt=0)
    batch_tokens: int = Field(16384, gt=0)
    micro_tokens: int = Field(6144, gt=0)  # tokens of one forward and backward pass
    separate: bool = True  # documents of a row don't see each other
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and activations; masters are float32 always
    device: str | None = None  # None: the GPU where there is one
    mesh: MeshConfig = MeshConfig.model_validate({})  # of several processes
    context: ContextConfig | None = None  # longer than the base's; None: as the base has it
    recompute: bool = False  # activations again in the backward pass, in place of keeping them
    optimizer: Literal["muon", "adamw"] | None = None  # None: the method's
    rate: float | None = Field(None, gt=0)  # AdamW's for all parameters; None: the method's
    matrix_rate: float = Field(0.02, gt=0)  # Muon's for hidden matrices
    vector_rate: float = Field(0.004, gt=0)  # AdamW's for the rest, beside Muon
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)  # the gradient's largest norm; null: as it is
    warmup: float = Field(0.01, ge=0, lt=1)  # share of the steps
    decay: float = Field(0.5, ge=0, le=1)  # share of the steps, at the end, in which the rate falls linearly to zero
    balancing: Literal["auxiliary", "bias", "none"] = "auxiliary"  # of the experts' load
    balance: float = Field(0.01, ge=0)  # the auxiliary loss's weight, or the bias's change a step
    seed: int = Field(0, ge=0, lt=2**32)
    save_every: int = Field(200, gt=0)  # steps
    evaluate_every: int = Field(200, gt=0)  # steps
    domicile: Literal["EU", "elsewhere"] | None = None  # of whoever trains: some licences ask
    heldout: str | None = None  # JSON lines with `text`, scored in bits per byte

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        from puna.train.methods import METHODS

        if name not in METHODS:
            raise ValueError(f"no method is called {name!r}; choose from {', '.join(METHODS)}")
        return name

    @field_validator("device")
    @classmethod
    def _there(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise ValueError(f"{name!r} is not one; use cpu, cuda, or cuda:1 for the second of several")
        if name is not None and name.startswith("cuda"):
            from torch import cuda

            if int(name[5:] or 0) >= cuda.device_count():
                raise ValueError(f"there is no {name} here, by PyTorch's count of {cuda.device_count()}; use cpu")
        return name

    def order(self) -> dict[str, Any]:
        """What decides which rows each step sees, and what it makes of them: a resumed run must have the same."""
        return self.model_dump(
            exclude={"save_every", "evaluate_every", "heldout", "micro_tokens", "recompute", "device", "mesh"}
        )

    def dealt(self, groups: int) -> "TrainConfig":
        """With passes that so many data groups can share evenly, unless `micro_tokens` is given."""
        if groups == 1 or "micro_tokens" in self.model_fields_set:
            return self
        passes = groups * -(-self.batch_tokens // (groups * self.micro_tokens))
        return self.model_copy(update={"micro_tokens": -(-self.batch_tokens // passes)})

    def schedule(self, step: int) -> float:
        """Multiplier of the peak rates at a step: warm-up, constant, linear decay."""
        warm = max(1, round(self.warmup * self.steps))
        fall = round(self.decay * self.steps)
        return min(1.0, (step + 1) / warm, (self.steps - step) / max(1, fall))

    def rows_per_step(self, stage: Stage) -> int:
        """Rows of one step of a stage."""
        return max(1, self.batch_tokens // stage.length)


class _Once(yaml.SafeLoader):
    """Refuses a mapping that names one key twice: YAML's own rule, which PyYAML doesn't keep."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent does."""
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(path: Path, defaults: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Read a YAML file; `defaults` fill what it doesn't say, `changes` that are not None replace its values.

    Raises PunaError naming file and field.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Once) or {}
    except OSError as error:
        raise PunaError(f"{path}: can't read the configuration: {error.strerror}; --config names a YAML file") from None
    except UnicodeDecodeError as error:
        raise PunaError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
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
    """One of pydantic's findings, in the words of a user. Where it begins and how deep it is tells its owner."""
    if found["type"] == "extra_forbidden":
        owners: dict[tuple[str, int], type[BaseModel]] = {
            ("mesh", 2): MeshConfig, ("context", 2): ContextConfig, ("context", 3): TemperatureConfig,
            ("stages", 3): Stage, ("stages", 5): Source,
        }  # fmt: skip
        owner = owners.get((found["loc"][0], len(found["loc"])), TrainConfig)
        return f"no such field; take it out, or use one of {', '.join(owner.model_fields)}"
    words = str(found["msg"]).removeprefix("Value error, ")
    return words[:1].lower() + words[1:]
