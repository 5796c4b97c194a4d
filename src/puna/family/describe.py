"""A member, or any decoder's shape, as one plain dictionary: what `puna show --json` prints."""

from dataclasses import asdict, replace
from typing import Any

from puna.family.arithmetic import (
    BITS_PER_WEIGHT,
    Parameters,
    count_parameters,
    encoder_parameters,
    kv_bytes,
    kv_cache,
    member_parameters,
    weight_bytes,
)
from puna.family.claims import CLAIMS
from puna.family.config import ModelConfig
from puna.family.licences import LICENCES
from puna.family.member import Member


def describe_config(config: ModelConfig, parameters: Parameters | None = None) -> dict[str, Any]:
    """A decoder's shape, parameter counts, weight bytes and key/value cache bytes (bfloat16), ready for JSON.

    `parameters` are counted from `config` where they aren't given, its vision tower's with them.
    """
    parameters = parameters or count_parameters(config, config.vision)
    cache = kv_cache(config)
    shape = asdict(config)
    return {
        "shape": shape,
        "vision": shape.pop("vision"),
        "parameters": _parameters(parameters),
        "weight_bytes": _weight_bytes(parameters.total),
        "kv_cache": {
            "dtype": "bfloat16",
            "naive_bytes_per_token": cache.naive_per_token,
            "growing_bytes_per_token": cache.growing_per_token,
            "fixed_bytes": cache.fixed,
            "bytes_at_full_context": kv_bytes(config, config.context_length),
        },
    }


def describe(member: Member) -> dict[str, Any]:
    """Everything known about a member, ready for JSON. None means "not published"."""
    facts: dict[str, Any] = {
        "name": member.name,
        "title": member.title,
        "generation": member.generation,
        "kind": member.kind,
        "released": member.released,
        "licence": asdict(LICENCES[member.licence]) if member.licence else None,
        "inputs": list(member.inputs),
        "languages": list(member.languages) if member.languages else None,
        "knowledge_cutoff": member.knowledge_cutoff,
        "training_tokens": member.training_tokens,
        "context": {"classifier": member.context_length} if member.encoder else
                   {"base": member.base_context, "instruct": member.instruct_context},
        "hub_ids": dict(member.hub_ids),
        "shape": None,
        "vision": asdict(member.vision) if member.vision else None,
        "encoder": asdict(member.encoder) if member.encoder else None,
        "parameters": None,
        "weight_bytes": None,
        "kv_cache": None,
    }
    parameters = member_parameters(member)
    if member.config is not None:
        facts |= describe_config(replace(member.config, vision=member.vision), parameters)
    elif member.encoder is not None and parameters is not None:
        backbone, embeddings = encoder_parameters(member.encoder)
        facts["parameters"] = {"backbone": backbone, "token_embeddings": embeddings, "total": parameters.total}
        facts["weight_bytes"] = _weight_bytes(parameters.total)
    facts["notes"] = [asdict(note) for note in member.notes]
    facts["claims"] = [asdict(claim) for claim in CLAIMS[member.name]]
    return facts


def _parameters(parameters: Parameters) -> dict[str, int]:
    return asdict(parameters) | {"total": parameters.total, "active": parameters.active}


def _weight_bytes(parameters: int) -> dict[str, int]:
    return {dtype: weight_bytes(parameters, dtype) for dtype in BITS_PER_WEIGHT}
