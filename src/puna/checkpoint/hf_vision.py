"""The vision part of Hugging Face checkpoints: `vision_config` to what `puna.family.vision` has and back, and names.

Defaults for absent keys are those of transformers' `Llama4VisionConfig` and `MllamaVisionConfig`.
"""

import re
from typing import Any

from puna.checkpoint.validate import Fields
from puna.family.config import ModelConfig
from puna.family.vision import Llama4Vision, Llama32Vision

Vision = Llama4Vision | Llama32Vision

REFERENCE = "puna_reference"  # our own key in vision_config: `Llama32Vision.reference`
MOST_TILES = "puna_max_tiles"  # likewise `Llama4Vision.max_tiles`: transformers has it in preprocessor_config.json
_OUTPUTS_SINCE = (4, 55)  # transformers 4.54.0 took the intermediate layers' inputs, 4.57.1 and 5.23 their outputs
_TOWER = re.compile(r"(?:model\.)?(vision_model|multi_modal_projector|vision_tower)\.")
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")


def read_llama4_vision(top: Fields) -> Llama4Vision | None:
    """From a `Llama4ForConditionalGeneration`'s config.json; None where it describes no tower."""
    section = top.section("vision_config")
    if section is None or not section.values:
        return None
    _check_common(section)
    hidden, adapter = section.integer("hidden_size", 768), section.integer("projector_output_dim", 4096)
    for key in ("projector_input_dim", "vision_output_dim"):
        if (width := section.integer(key, 7680 if key == "vision_output_dim" else 4096)) != adapter:
            raise section.error(key, f"is {width}, but projector_output_dim {adapter}: the two must be equal")
    ratio = section.number("pixel_shuffle_ratio", 0.5)
    shuffle = round(1 / ratio) if ratio > 0 else 0
    if shuffle < 1 or abs(shuffle * ratio - 1) > 1e-9:
        raise section.error("pixel_shuffle_ratio", f"is {ratio}, which is no whole number's inverse")
    intermediate = section.integer("intermediate_size", 5632)
    if intermediate != hidden * shuffle**2:  # transformers reads the adapter's width from it
        raise section.error("intermediate_size", f"is {intermediate}, needs hidden_size / pixel_shuffle_ratio^2, "
                            f"{hidden * shuffle**2}")  # fmt: skip
    for key, only in (("multi_modal_projector_bias", False), ("norm_eps", 1e-5)):
        if section.values.get(key, only) != only:
            raise section.error(key, f"is {section.values[key]!r}; only {only!r} is supported, as in every Llama 4")
    rope = section.section("rope_parameters") or Fields({}, section.path)
    return Llama4Vision(
        hidden_size=hidden,
        num_layers=section.layers("num_hidden_layers") if "num_hidden_layers" in section else 34,
        num_heads=section.integer("num_attention_heads", 16),
        intermediate_size=intermediate,
        tile_side=section.integer("image_size", 448),
        patch_side=section.integer("patch_size", 14),
        pixel_shuffle=shuffle,
        adapter_size=adapter,
        max_tiles=section.integer(MOST_TILES, 16),
        rope_theta=rope.number("rope_theta", section.number("rope_theta", 10_000.0)),
        image_token_id=top.integer("image_token_index", top.integer("image_token_id", 200_092)),
    )


def cross_attention_before(text: Fields) -> tuple[int, ...]:
    """Which text layers a cross-attention layer precedes, from the places of these among all layers."""
    places = text.integers("cross_attention_layers")
    places = (3, 8, 13, 18, 23, 28, 33, 38) if places is None else tuple(sorted(places))
    total = text.layers("num_hidden_layers") if "num_hidden_layers" in text else 40
    if len(set(places)) != len(places) or any(not 0 <= place < total for place in places) or len(places) == total:
        raise text.error("cross_attention_layers", f"must name some of the {total} layers, not {list(places)}")
    return tuple(place - i for i, place in enumerate(places))


def read_llama32_vision(top: Fields, text: Fields) -> Llama32Vision:
    """From a `MllamaForConditionalGeneration`'s config.json."""
    section = top.section("vision_config")
    if section is None:
        raise top.error("vision_config", "is missing")
    _check_common(section)
    layers = section.integers("intermediate_layers_indices")
    vision = Llama32Vision(
        cross_attention_before=cross_attention_before(text),
        tile_side=section.integer("image_size", 448),
        hidden_size=section.integer("hidden_size", 1280),
        num_layers=section.layers("num_hidden_layers") if "num_hidden_layers" in section else 32,
        num_global_layers=section.integer("num_global_layers", 8),
        num_heads=section.integer("attention_heads", section.integer("num_attention_heads", 16)),
        intermediate_size=section.integer("intermediate_size", 5120),
        patch_side=section.integer("patch_size", 14),
        max_tiles=section.integer("max_num_tiles", 4),
        intermediate_layers=(3, 7, 15, 23, 30) if layers is None else layers,
        image_token_id=top.integer("image_token_index", top.integer("image_token_id", 128_256)),
        layer_norm_eps=section.number("norm_eps", 1e-5),
        reference=_reference(top, section),
    )
    ratios = section.values.get("supported_aspect_ratios")
    if ratios is not None and ratios != [list(ratio) for ratio in vision.aspect_ratios]:
        raise section.error("supported_aspect_ratios", f"must hold all grids of up to {vision.max_tiles} tiles")
    if (width := section.integer("vision_output_dim", vision.output_size)) != vision.output_size:
        raise section.error("vision_output_dim", f"is {width}, but the layers that it takes have {vision.output_size}")
    if vision.image_token_id >= text.integer("vocab_size", 128_256) + vision.extra_embeddings:
        raise top.error("image_token_index", f"is {vision.image_token_id}, which the embedding does not have")
    return vision


def _reference(top: Fields, section: Fields) -> Any:
    """Whose arithmetic: our own key says it, else the version of transformers that wrote the file. Meta's own releases
    were written by 4.45."""
    if (own := section.text(REFERENCE)) is not None:
        if own not in ("meta", "transformers"):
            raise section.error(REFERENCE, f"is {own!r}; known are 'meta' and 'transformers'")
        return own
    version = re.match(r"(\d+)\.(\d+)", top.text("transformers_version") or "")
    later = version is not None and (int(version[1]), int(version[2])) >= _OUTPUTS_SINCE
    return "transformers" if later else "meta"


def _check_common(section: Fields) -> None:
    if section.text("hidden_act", "gelu") != "gelu":
        raise section.error("hidden_act", f"is {section.text('hidden_act')!r}; only 'gelu' is supported")
    if section.integer("num_channels", 3) != 3:
        raise section.error("num_channels", f"is {section.integer('num_channels')}; pictures have 3")


def write_vision(vision: Vision) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json holds beside the text: (at the top, in `vision_config`)."""
    common = {
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "intermediate_size": vision.intermediate_size,
        "image_size": vision.tile_side,
        "patch_size": vision.patch_side,
        "num_channels": 3,
        "norm_eps": vision.layer_norm_eps,
    }
    top: dict[str, Any] = {"image_token_index": vision.image_token_id}
    if isinstance(vision, Llama4Vision):
        top |= {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"}
        return top, common | {
            "model_type": "llama4_vision_model",
            "num_attention_heads": vision.num_heads,
            "pixel_shuffle_ratio": 1 / vision.pixel_shuffle,
            MOST_TILES: vision.max_tiles,
            "projector_input_dim": vision.adapter_size,
            "projector_output_dim": vision.adapter_size,
            "vision_output_dim": vision.adapter_size,
            "multi_modal_projector_bias": False,
            "rope_theta": vision.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        }
    top |= {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"}
    return top, common | {
        "model_type": "mllama_vision_model",
        "attention_heads": vision.num_heads,
        "num_global_layers": vision.num_global_layers,
        "max_num_tiles": vision.max_tiles,
        "intermediate_layers_indices": list(vision.intermediate_layers),
        "supported_aspect_ratios": [list(ratio) for ratio in vision.aspect_ratios],
        "vision_output_dim": vision.output_size,
        REFERENCE: vision.reference,
    }


def is_tower(stored: str) -> bool:
    """Whether a stored tensor is of the tower or its projector."""
    return _TOWER.match(stored) is not None


def tower_name(stored: str) -> str:
    """The decoder's name of a tensor of the tower."""
    return "vision." + stored.removeprefix("model.").removeprefix("vision_model.")


def layer_name(name: str, vision: Llama32Vision) -> str:
    """The decoder's name of a tensor of a layer that is counted with the cross-attention layers among the others."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    layer, places = int(match[1]), vision.cross_attention_layers()
    if layer in places:
        return f"cross_layers.{places.index(layer)}.{match[2]}"
    return f"layers.{layer - sum(place < layer for place in places)}.{match[2]}"


def stored_name(name: str, config: ModelConfig) -> str:
    """What Hugging Face's classes for pictures and text call the decoder's tensor (but for `mlp`)."""
    vision = config.vision
    if name.startswith("vision."):
        rest = name.removeprefix("vision.")
        return rest if rest.startswith("multi_modal_projector.") else f"vision_model.{rest}"
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if isinstance(vision, Llama32Vision):
        places = vision.cross_attention_layers()
        kind, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        if kind == "cross_layers":
            name = f"layers.{places[int(number)]}.{part}"
        elif kind == "layers":
            others = (place for place in range(config.num_layers + len(places)) if place not in places)
            name = f"layers.{list(others)[int(number)]}.{part}"
    return f"language_model.model.{name}"
