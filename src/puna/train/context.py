"""Extending a model's context before the first step, by what the family itself uses: Llama 3.1's position scaling, a
larger theta (Llama 3's 500,000 after Llama 2's 10,000), Llama 4's chunks and the temperature of its NoPE layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from puna.errors import PunaError
from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling

if TYPE_CHECKING:
    from puna.train.data import StageData


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TemperatureConfig(_Strict):
    """See `AttentionTemperature`."""

    scale: float = Field(0.1, gt=0)
    floor: int = Field(gt=0)


class ContextConfig(_Strict):
    """The context that a run trains for. Without `factor` and `theta`, layers that rotate and see further than before
    get Llama 3.1's scaling by as much as the context grows."""

    length: int = Field(gt=0)  # tokens
    factor: float | None = Field(None, gt=1)  # of Llama 3.1's scaling: long wavelengths are divided by it
    low: float | None = Field(None, gt=0)  # wavelengths above original / low are divided in full
    high: float | None = Field(None, gt=0)  # wavelengths below original / high are kept
    original: int | None = Field(None, gt=0)  # the context that the scaling starts from
    theta: float | None = Field(None, gt=1)
    chunk: int | None = Field(None, gt=0)  # of Llama 4's rotary layers
    temperature: TemperatureConfig | None = None  # of Llama 4's NoPE layers


def extended(config: ModelConfig, wanted: ContextConfig) -> ModelConfig:
    """The shape with the wanted context. Raises PunaError for what is no extension of it."""
    before = config.context_length
    if wanted.length < before:
        raise PunaError(f"context.length: {wanted.length:,} is less than the model's own {before:,}; give more, or "
                        "leave `context` out")  # fmt: skip
    changes: dict[str, object] = {
        "context_length": wanted.length,
        "rope_theta": _theta(config, wanted),
        "attention_chunk_size": _chunk(config, wanted),
        "attention_temperature": _temperature(config, wanted),
    }
    changed = config.with_(**changes)
    changed = changed.with_(rope_scaling=_scaling(config, changed, wanted))
    if changed == config:
        raise PunaError(f"context.length: {wanted.length:,} is the model's own, and nothing else changes; give more, "
                        "or leave `context` out")  # fmt: skip
    return changed


def _theta(config: ModelConfig, wanted: ContextConfig) -> float:
    if wanted.theta is None:
        return config.rope_theta
    if wanted.theta <= config.rope_theta:
        raise PunaError(f"context.theta: {wanted.theta:g} is not above the model's own {config.rope_theta:g}, and "
                        "would turn positions no slower; give more")  # fmt: skip
    return wanted.theta


def _chunk(config: ModelConfig, wanted: ContextConfig) -> int | None:
    own = config.attention_chunk_size
    if wanted.chunk is None:
        return own
    if own is None:
        raise PunaError("context.chunk: this model's layers have no chunks; leave it out")
    if not own <= wanted.chunk <= wanted.length:
        raise PunaError(f"context.chunk: {wanted.chunk:,} must be from the model's own {own:,} to the length "
                        f"{wanted.length:,}")  # fmt: skip
    return wanted.chunk


def _temperature(config: ModelConfig, wanted: ContextConfig) -> AttentionTemperature | None:
    if wanted.temperature is None:
        return config.attention_temperature
    if not config.nope_layers:
        raise PunaError("context.temperature: it scales queries of layers without rotary positions, and this model has "
                        "none; leave it out")  # fmt: skip
    return AttentionTemperature(wanted.temperature.scale, wanted.temperature.floor)


def _reach(config: ModelConfig) -> int:
    """The longest distance, in tokens, that a rotary layer sees."""
    return min(config.context_length, config.attention_chunk_size or config.context_length)


def _scaling(config: ModelConfig, changed: ModelConfig, wanted: ContextConfig) -> RopeScaling | None:
    own = config.rope_scaling
    given = (wanted.factor, wanted.low, wanted.high, wanted.original)
    asked = any(value is not None for value in given)
    if not asked and (wanted.theta is not None or _reach(changed) <= _reach(config)):
        return own
    factor = wanted.factor or (own.factor if own else 1.0) * _reach(changed) / _reach(config)
    if own is not None and factor < own.factor:
        raise PunaError(f"context.factor: {factor:g} is less than the model's own {own.factor:g}; give more")
    if factor <= 1:
        raise PunaError("context.factor: missing, and nothing says how far positions are scaled; give it")
    low = wanted.low or (own.low_freq_factor if own else 1.0)
    high = wanted.high or (own.high_freq_factor if own else 4.0)
    if high < low:
        raise PunaError(f"context.high: {high:g} is below context.low, {low:g}: the scaling would have a gap")
    original = wanted.original or (own.original_context if own else _reach(config))
    if original > wanted.length:
        raise PunaError(f"context.original: {original:,} is longer than the new length {wanted.length:,}")
    return RopeScaling(factor, low, high, original)


def context_notes(before: ModelConfig, after: ModelConfig, stages: "Sequence[StageData]") -> list[str]:
    """What the extension changes, and how much of the data stands past the old context.

    Raises PunaError where no row is long enough to teach anything of it.
    """
    said = [f"context: {before.context_length:,} to {after.context_length:,} tokens"]
    if after.rope_theta != before.rope_theta:
        said.append(f"theta {before.rope_theta:,.0f} to {after.rope_theta:,.0f}")
    if after.rope_scaling != before.rope_scaling and (scaling := after.rope_scaling) is not None:
        said.append(f"positions scaled by {scaling.factor:g} (low {scaling.low_freq_factor:g}, high "
                    f"{scaling.high_freq_factor:g}, original {scaling.original_context:,})")  # fmt: skip
    if after.attention_chunk_size != before.attention_chunk_size:
        said.append(f"chunks of {before.attention_chunk_size:,} to {after.attention_chunk_size:,}")
    if after.attention_temperature != before.attention_temperature and (warm := after.attention_temperature):
        said.append(f"attention temperature {warm.scale:g} a floor of {warm.floor:,}")
    old = _reach(before) if _reach(after) > _reach(before) else before.context_length
    spans = np.concatenate([rows.spans for stage in stages for rows in stage.sources])
    if not len(spans):  # prompts alone: nobody knows how long answers become
        return ["; ".join(said)]
    past, longest = np.maximum(spans - old, 0).sum(), int(spans.max())
    if not past:
        raise PunaError(
            f"context: the longest document of any row has {longest:,} predictions, none past the {old:,} that the "
            "model knows already: nothing would be learnt of a longer context. Give longer documents and a longer "
            "`length` of a stage (or, to let documents see each other, `separate: false`)"
        )
    notes = ["; ".join(said), f"{past / spans.sum():.1%} of the data's predictions stand past {old:,} tokens"]
    if longest < after.context_length:
        notes.append(f"no document of a row is longer than {longest:,} tokens: positions from there to "
                     f"{after.context_length:,} are not trained")  # fmt: skip
    return notes
