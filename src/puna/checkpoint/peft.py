"""Reading PEFT's LoRA adapters: adapter_config.json and adapter_model.safetensors, as our own updates of weights.

PEFT's names are those of the Hugging Face model behind `base_model.model.`; of fused experts it flattens A to [E R, K]
and B to [O, R E], since 0.19 with the two sides exchanged. Experts that were adapted one by one are fused here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.hf_context import KEY, read_context
from puna.checkpoint.hf_vision import layer_name
from puna.checkpoint.safetensors_read import SafetensorsFile
from puna.checkpoint.validate import Fields, check_finite, read_json
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.family.vision import Llama32Vision
from puna.model.lora import Update

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXCHANGED = (0, 19)  # the version since which an experts' A holds the outputs' side
# What would change the model in ways that an update of weights doesn't say, and the values that mean "not used"
_UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "modules_to_save": (None, []), "layer_replication": (None, []), "fan_in_fan_out": (False,),
    "lora_bias": (None, False), "trainable_token_indices": (None, [], {}), "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []), "use_bdlora": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # others change the base
}  # fmt: skip
_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector|base_layer)"
                  r"(?:\.default)?(?:\.weight)?")  # fmt: skip
_STEM = re.compile(r"(?:language_model\.model\.|model\.language_model\.|model\.)(.*)")
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.experts)\.(\d+)\.(gate|up|down)_proj")
_FUSED = re.compile(r"layers\.\d+\.feed_forward\.experts")
_INNER = ".base_layer"  # of two updates of the fused experts, the first
_FOREIGN = "It is another model's adapter."


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: what it changes by canonical names, and what its configuration says of its base."""

    path: Path
    updates: dict[str, Update]
    base: str | None
    config: ModelConfig  # the base's, with the context that the adapter was trained for
    base_layers: dict[str, Tensor] = field(default_factory=dict)  # whole weights that came along, unchanged


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def check_adapter(folder: Path) -> None:
    """Raise PunaError for what holds no adapter."""
    if not (folder / CONFIG).is_file():
        raise PunaError(
            f"{folder} holds no {CONFIG}: it is no adapter. Name the folder that `puna tune` or PEFT wrote."
        )


def base_of(folder: Path) -> str | None:
    """The base that an adapter's configuration names: a hub repository, a path or a bundled name."""
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def read_adapter(folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The adapter in a folder, checked against a model's `config` and its weights' `shapes` (`Source.shapes`).

    Raises PunaError naming file and tensor or field for what is missing, damaged, of another shape, or a kind of
    adapter that is not a low-rank update of weights.
    """
    check_adapter(folder)
    fields = _Fields(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickled = " Pickled adapters are not read: save it as safetensors." if list(folder.glob("*.bin")) else ""
        raise PunaError(f"{folder} holds no {WEIGHTS}.{pickled}")
    file = SafetensorsFile(folder / WEIGHTS)
    tensors, base_layers = _sorted(file, config)
    experts = {
        module: parts for module, parts in tensors.items() if _FUSED.fullmatch(module.replace(".base_layer", ""))
    }
    single = {module: parts for module, parts in tensors.items() if _EXPERT.fullmatch(module)}
    updates: dict[str, Update] = {}
    for module, parts in tensors.items():
        if module not in experts and module not in single:
            updates[f"{module}.weight"] = _update(file, module, parts, fields)
    updates |= _fused(file, experts, fields, shapes) | _joined(file, single, fields, config, shapes)
    embedding = shapes["embed_tokens.weight"]
    for name, update in updates.items():
        wanted = shapes.get(name, embedding if name == "lm_head.weight" else None)
        if wanted is None:
            raise PunaError(
                f"{file.path} changes {name}, which this model does not have. It is another model's adapter."
            )
        if update.shape != tuple(wanted):
            raise PunaError(f"{file.path} changes {name} as of shape {list(update.shape)}, but this model's is "
                            f"{list(wanted)}. {_FOREIGN}")  # fmt: skip
    if not updates:
        raise PunaError(f"{file.path} holds no update. Train the adapter again.")
    return Adapter(folder, updates, base_of(folder), fields.read_as(config), base_layers)


class _Fields:
    """adapter_config.json: rank and alpha of each module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = values = read_json(path)
        if values.get("peft_type") != "LORA":
            raise PunaError(
                f"{path}: peft_type {values.get('peft_type')!r} is not read; LORA is (with DoRA and rsLoRA)."
            )
        for name, allowed in _UNUSED.items():
            if name in values and not any(values[name] is one or values[name] == one for one in allowed):
                raise PunaError(f"{path}: {name} is {values[name]!r}, which is not a change that can be applied here. "
                                "Merge the adapter with PEFT, and load the whole model.")  # fmt: skip
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = values.get(name) or {}
            if not isinstance(pattern, dict) or not all(isinstance(v, int | float) for v in pattern.values()):
                raise PunaError(f"{path}: {name} must map module names to numbers. Mend it.")
        if not isinstance(values.get("lora_alpha"), int | float) or isinstance(values["lora_alpha"], bool):
            raise PunaError(f"{path}: lora_alpha must be a number, not {values.get('lora_alpha')!r}. Mend it.")
        numbers = re.findall(r"\d+", str(values.get("peft_version") or ""))[:2]
        self.exchanged = len(numbers) < 2 or tuple(map(int, numbers)) >= EXCHANGED

    def read_as(self, config: ModelConfig) -> ModelConfig:
        """The base's config with the context that the adapter wants."""
        section = Fields(self.values, self.path).section(KEY)
        try:
            return config if section is None else read_context(section, config)
        except ValueError as error:
            raise PunaError(f"{self.path}: {KEY}: {error}. Mend it.") from None

    def scale(self, module: str, rank: int) -> float:
        """What a module's B A is multiplied by."""
        patterns: dict[str, float] = self.values.get("alpha_pattern") or {}
        stored = module.replace(".feed_forward.", ".mlp.")
        alpha = next((value for key, value in patterns.items()
                      if re.fullmatch(rf"(.*\.)?({key})", module) or re.fullmatch(rf"(.*\.)?({key})", stored)),
                     self.values["lora_alpha"])  # fmt: skip
        return float(alpha / (rank**0.5 if self.values.get("use_rslora") else rank))

    def part_first(self) -> str:
        """Which of two wrapped parameters of the experts is the inner one."""
        targets = self.values.get("target_parameters") or []
        return "down" if targets and all("gate_up_proj" not in str(target) for target in targets) else "gate_up"


def _sorted(file: SafetensorsFile, config: ModelConfig) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module (our name) and kind; and the unchanged base weights that PEFT saved along."""
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key in file.entries:
        match = _KEY.fullmatch(key)
        # of two updates of experts the inner one's module ends in base_layer, which the pattern takes for a kind
        inner = re.fullmatch(r"base_model\.model\.(.+\.experts)\.base_layer\.(lora_[AB])(?:\.default)?\.weight", key)
        if "lora_embedding" in key:
            raise PunaError(f"{file.path}, tensor {key}: updates of the embedding can't be applied here. Merge the "
                            "adapter with PEFT, and load the whole model.")  # fmt: skip
        if match is None and inner is None:
            raise PunaError(f"{file.path}, tensor {key}: no part of a LoRA adapter. Save the adapter again with PEFT.")
        module, kind = (inner[1] + _INNER, inner[2]) if inner else (match["module"], match["kind"])  # type: ignore[index]
        module = _decoders(module, file, config)
        tensor = file.read(key)
        check_finite(tensor, f"{file.path}, tensor {key}")
        if kind == "base_layer":
            whole[f"{module}.weight"] = tensor
        else:
            found.setdefault(module, {})[kind] = tensor
    for module, parts in found.items():
        lacking = {"lora_A", "lora_B"} - set(parts)
        if lacking:
            raise PunaError(f"{file.path}: {module} has no {min(lacking)}. Save the adapter again.")
        if any(parts[kind].dim() != 2 for kind in ("lora_A", "lora_B")):
            raise PunaError(f"{file.path}: {module}'s lora_A and lora_B must be matrices. Save the adapter again.")
    return found, whole


def _decoders(module: str, file: SafetensorsFile, config: ModelConfig) -> str:
    """The decoder's name of a module of Hugging Face's."""
    if module.removeprefix("language_model.") == "lm_head":
        return "lm_head"
    stem = _STEM.fullmatch(module)
    name = stem[1] if stem else module
    if config.architecture != "llama":
        return name
    if isinstance(config.vision, Llama32Vision):
        name = layer_name(name, config.vision)
    elif "language_model." in module:  # whose layers are counted with others, which aren't here
        raise PunaError(f"{file.path} is an adapter of a model that sees, but its base is loaded for text alone. Load "
                        "the base with its tower.")  # fmt: skip
    return re.sub(r"^((?:cross_)?layers\.\d+)\.mlp\.", r"\1.feed_forward.", name)


def _update(file: SafetensorsFile, module: str, parts: dict[str, Tensor], fields: _Fields) -> Update:
    a, b = parts["lora_A"], parts["lora_B"]
    if a.shape[0] != b.shape[1]:
        raise PunaError(f"{file.path}: {module}'s lora_A has rank {a.shape[0]}, its lora_B {b.shape[1]}.")
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise PunaError(f"{file.path}: {module}'s magnitudes are {list(magnitude.shape)}, not one a row.")
    return Update(a, b, fields.scale(module, a.shape[0]), magnitude)


def _fused(file: SafetensorsFile, found: Mapping[str, dict[str, Tensor]], fields: _Fields,
           shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Update]:  # fmt: skip
    """Updates of fused experts, whose wrappers don't say which parameter they are of: their order does."""
    updates: dict[str, Update] = {}
    for path in {module.removesuffix(_INNER) for module in found}:
        inner = fields.part_first()
        parts = {inner: found.get(path + _INNER, found.get(path)), "down": found.get(path)}
        for part, tensors in parts.items():
            name = f"{path}.{part}_proj"
            if tensors is None or name not in shapes:
                raise PunaError(f"{file.path} changes {path}, which this model does not have.")
            updates[name] = _expert_update(file, name, tensors, fields, shapes[name])
            if path + _INNER not in found:
                break
    return updates


def _expert_update(file: SafetensorsFile, name: str, parts: dict[str, Tensor], fields: _Fields,
                   shape: tuple[int, ...]) -> Update:  # fmt: skip
    """PEFT's flat factors as [E, R, K] and [E, O, R]; exchanged, what PEFT calls A is the outputs' side."""
    experts, inputs, outputs = shape
    flat_a, flat_b = parts["lora_A"], parts["lora_B"]
    rank = flat_a.shape[0] // experts
    fits = [(flat_a.shape[1], flat_b.shape[0]) == sides for sides in ((inputs, outputs), (outputs, inputs))]
    if flat_a.shape[0] != flat_b.shape[1] or rank * experts != flat_a.shape[0] or not rank or not any(fits):
        raise PunaError(f"{file.path}: the update of {name} has factors {list(flat_a.shape)} and {list(flat_b.shape)}, "
                        f"which don't fit {experts} experts of {inputs} by {outputs}.")  # fmt: skip
    first_ERK = flat_a.unflatten(0, (experts, rank))
    second_EOR = flat_b.unflatten(1, (rank, experts)).permute(2, 0, 1)
    scale = fields.scale(name.rpartition(".")[0], rank)
    if fits[1] and (fields.exchanged or not fits[0]):
        return Update(second_EOR.mT.contiguous(), first_ERK.mT.contiguous(), scale)
    return Update(first_ERK.contiguous(), second_EOR.contiguous(), scale)


def _joined(file: SafetensorsFile, found: Mapping[str, dict[str, Tensor]], fields: _Fields, config: ModelConfig,
            shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Update]:  # fmt: skip
    """Experts that were adapted one by one, each of gate, up and down for itself, as updates of the fused weights."""
    grouped: dict[str, dict[tuple[int, str], Update]] = {}
    for module, parts in found.items():
        match = _EXPERT.fullmatch(module)
        assert match is not None
        update = _update(file, module, parts, fields)
        part = "down" if match[3] == "down" else "gate_up"
        if update.magnitude is not None or int(match[2]) >= config.num_experts:
            raise PunaError(f"{file.path}: {module} can't be applied: this model has {config.num_experts} experts in a "
                            "layer, and updates without magnitudes.")  # fmt: skip
        grouped.setdefault(f"{match[1]}.{part}_proj", {})[int(match[2]), match[3]] = update
    return {name: _stacked(file, name, ones, shapes) for name, ones in grouped.items()}


def _stacked(file: SafetensorsFile, name: str, ones: Mapping[tuple[int, str], Update],
             shapes: Mapping[str, tuple[int, ...]]) -> Update:  # fmt: skip
    if name not in shapes:
        raise PunaError(f"{file.path} changes {name}, which this model does not have.")
    experts, inputs, outputs = shapes[name]
    halves = ("down",) if name.endswith("down_proj") else ("gate", "up")
    rows = outputs // len(halves)
    rank = max(one.a.shape[0] for one in ones.values())
    a = torch.zeros(experts, len(halves) * rank, inputs)
    b = torch.zeros(experts, outputs, len(halves) * rank)
    for (expert, half), one in ones.items():
        if one.shape != (rows, inputs):
            raise PunaError(f"{file.path}: {name}, expert {expert}, {half}: the update is of {list(one.shape)}, the "
                            f"weight of {[rows, inputs]}.")  # fmt: skip
        at, own = halves.index(half), one.a.shape[0]
        a[expert, at * rank : at * rank + own] = one.a
        b[expert, at * rows : (at + 1) * rows, at * rank : at * rank + own] = one.scale * one.b
    return Update(a, b, 1.0)
