"""The vision part of Meta's checkpoints: shapes from params.json and the tensors, and which tensors make which of ours.

Names and constants: llama-models 0.3.0 `llama4/vision`, `llama3/multimodal/model.py`; shard axes: its `checkpoint.py`.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from puna.checkpoint.meta_names import COLUMNS, ROWS, Parts, Recipe, joined, same
from puna.checkpoint.validate import Fields
from puna.family.config import ModelConfig
from puna.family.vision import Llama4Vision, Llama32Vision

Shapes = Mapping[str, tuple[int, ...]]
Join = Callable[..., Tensor]

TEXT = "text_model."  # Llama 3.2 Vision's prefix of everything that isn't the tower
_TOWER = re.compile(r"(vision_embeddings|vision_projection|vision_model)\.")
_CROSS = re.compile(r"text_model\.(cross_attention_layers\.|learnable_embedding\.)")
_ENCODER4, _ADAPTER4 = "vision_embeddings.vision_encoder.", "vision_embeddings.vision_adapter."
_ENCODER32 = "vision_model.vision_encoder."


def is_vision(name: str) -> bool:
    """Whether a stored tensor is only for pictures."""
    return bool(_TOWER.match(name) or _CROSS.match(name))


def read_vision(
    fields: Fields, shapes: Shapes, ranks: int, text: ModelConfig
) -> Llama4Vision | Llama32Vision | None:
    """The tower's shape, from params.json and one rank's tensors; None where these hold none.

    Raises PunaError for missing keys, ValueError for impossible shapes.
    """
    if f"{_ENCODER4}class_embedding" in shapes:
        return _llama4(fields)
    if f"{_ENCODER32}class_embedding" in shapes:
        return _llama32(fields, shapes, ranks, text)
    return None


def _llama4(fields: Fields) -> Llama4Vision:
    section = fields.section("vision_args")
    if section is None:
        raise fields.error("vision_args", "is missing, though the weights hold a tower")
    width = section.integer("dim")
    ratio = section.number("pixel_shuffle_ratio")
    return Llama4Vision(
        hidden_size=width,
        num_layers=section.layers("n_layers"),
        num_heads=section.integer("n_heads"),
        intermediate_size=int(section.number("mlp_ratio") * width),
        tile_side=_square(section, "image_size"),
        patch_side=_square(section, "patch_size"),
        pixel_shuffle=round(1 / ratio) if ratio > 0 else 0,
        adapter_size=section.integer("output_dim"),
    )


def _square(fields: Fields, key: str) -> int:
    section = fields.section(key)
    if section is None:
        raise fields.error(key, "is missing")
    height, width = section.integer("height"), section.integer("width")
    if height != width:
        raise fields.error(key, f"is {height} x {width}; only squares are supported")
    return int(height)


def _llama32(fields: Fields, shapes: Shapes, ranks: int, text: ModelConfig) -> Llama32Vision:
    layers = text.num_layers
    width = shapes[f"{_ENCODER32}class_embedding"][0]
    inputs = shapes.get(f"{_ENCODER32}conv1._linear.weight", (0, 0))[1]
    hidden = shapes.get(f"{_ENCODER32}transformer.resblocks.0.mlp.c_fc.weight", (0,))[0] * ranks
    cross = fields.integer("vision_num_cross_attention_layers", -1)
    if cross < 1:  # the spelling of the first releases
        section = fields.section("vision_model")
        adapter = section.section("cross_attention_adapter") if section else None
        cross = adapter.integer("num_layers") if adapter else cross
    if not 1 <= cross <= layers:
        raise fields.error("vision_num_cross_attention_layers", f"must be 1 to {layers}, not {cross}")
    step = math.ceil(layers / cross)
    return Llama32Vision(
        cross_attention_before=tuple(sorted(list(range(layers))[::-1][::step][:cross])),
        tile_side=fields.integer("vision_chunk_size"),
        hidden_size=width,
        num_layers=_blocks(shapes, "transformer"),
        num_global_layers=_blocks(shapes, "global_transformer"),
        intermediate_size=hidden,
        patch_side=math.isqrt(inputs // 3),
        max_tiles=fields.integer("vision_max_num_chunks", 4),
        image_token_id=text.vocab_size,  # the first of the extra rows
    )


def _blocks(shapes: Shapes, stack: str) -> int:
    pattern = re.compile(re.escape(f"{_ENCODER32}{stack}.resblocks.") + r"(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def vision_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Decoder's tensor name -> recipe, for what pictures add to a decoder of this shape."""
    if isinstance(config.vision, Llama4Vision):
        return _llama4_recipes(config.vision)
    if isinstance(config.vision, Llama32Vision):
        return _llama32_recipes(config.vision)
    return {}


def _one(stored: str, join: Join = same) -> Recipe:
    return Recipe((stored,), join)


def _both(ours: str, stored: str, weight: Join = same, bias: Join = same) -> dict[str, Recipe]:
    return {f"{ours}.weight": _one(f"{stored}.weight", weight), f"{ours}.bias": _one(f"{stored}.bias", bias)}


def _layer(ours: str, stored: str, attention_bias: bool) -> dict[str, Recipe]:
    table = _both(f"{ours}input_layernorm", f"{stored}ln_1") | _both(f"{ours}post_attention_layernorm", f"{stored}ln_2")
    table |= _both(f"{ours}mlp.fc1", f"{stored}mlp.c_fc", ROWS, ROWS)
    table |= _both(f"{ours}mlp.fc2", f"{stored}mlp.c_proj", COLUMNS)
    for part in "qkvo":
        names = f"{ours}self_attn.{part}_proj", f"{stored}attn.w{part}"
        weight, bias = (COLUMNS, same) if part == "o" else (ROWS, ROWS)
        pair = _both(*names, weight, bias)
        table |= pair if attention_bias else {f"{names[0]}.weight": pair[f"{names[0]}.weight"]}
    return table


def _llama4_recipes(vision: Llama4Vision) -> dict[str, Recipe]:
    at = "vision."
    table = {
        f"{at}patch_embedding.linear.weight": _one(f"{_ENCODER4}conv1._linear.weight", ROWS),
        f"{at}class_embedding": _one(f"{_ENCODER4}class_embedding"),
        f"{at}positional_embedding_vlm": _one(f"{_ENCODER4}positional_embedding_vlm"),
        f"{at}vision_adapter.mlp.fc1.weight": _one(f"{_ADAPTER4}mlp.c_fc.weight", ROWS),
        f"{at}vision_adapter.mlp.fc2.weight": _one(f"{_ADAPTER4}mlp.c_proj.weight", COLUMNS),
        f"{at}multi_modal_projector.linear_1.weight": _one("vision_projection.weight", ROWS),
    }
    for where in ("pre", "post"):
        table |= _both(f"{at}layernorm_{where}", f"{_ENCODER4}ln_{where}")
    for i in range(vision.num_layers):
        table |= _layer(f"{at}model.layers.{i}.", f"{_ENCODER4}transformer.resblocks.{i}.", attention_bias=True)
    return table


def _llama32_recipes(vision: Llama32Vision) -> dict[str, Recipe]:
    at = "vision."
    table = {
        "embed_tokens.weight": Recipe((f"{TEXT}tok_embeddings.weight", f"{TEXT}learnable_embedding.weight"), _stacked),
        f"{at}patch_embedding.weight": _one(f"{_ENCODER32}conv1._linear.weight", partial(_kernel, vision=vision)),
        f"{at}class_embedding": _one(f"{_ENCODER32}class_embedding"),
        f"{at}gated_positional_embedding.gate": _one(f"{_ENCODER32}gated_positional_embedding_gate"),
        f"{at}gated_positional_embedding.embedding": _one(f"{_ENCODER32}positional_embedding"),
        f"{at}gated_positional_embedding.tile_embedding.weight": _one(
            f"{_ENCODER32}gated_positional_embedding", partial(_by_ratio, vision=vision)
        ),
    }
    table |= _both(f"{at}multi_modal_projector", "vision_model.vision_projection", ROWS, ROWS)
    for where in ("pre", "post"):
        ours, stored = f"{at}{where}_tile_positional_embedding.", f"{_ENCODER32}{where}_tile_pos_embed."
        table[f"{ours}embedding.weight"] = _one(f"{stored}embedding", partial(_by_ratio, vision=vision))
        table[f"{ours}gate"] = _one(f"{stored}gate")
        table |= _both(f"{at}layernorm_{where}", f"{_ENCODER32}ln_{where}")
    for stack, layers in (("transformer", vision.num_layers), ("global_transformer", vision.num_global_layers)):
        for i in range(layers):
            ours, stored = f"{at}{stack}.layers.{i}.", f"{_ENCODER32}{stack}.resblocks.{i}."
            table |= _layer(ours, stored, attention_bias=False)
            if stack == "global_transformer":
                table |= {f"{ours}{gate}": _one(f"{stored}{gate}") for gate in ("gate_attn", "gate_ffn")}
    for i in range(len(vision.cross_attention_before)):
        table |= _cross(f"cross_layers.{i}.", f"{TEXT}cross_attention_layers.{i}.")
    return table


def _cross(ours: str, stored: str) -> dict[str, Recipe]:
    """Queries and keys are not turned, so their rows stay in Meta's order."""
    names: dict[str, tuple[str, Join]] = {
        "cross_attn_attn_gate": ("gate_attn", same),
        "cross_attn_mlp_gate": ("gate_ffwd", same),
        "input_layernorm.weight": ("attention_norm.weight", same),
        "post_attention_layernorm.weight": ("ffn_norm.weight", same),
        "cross_attn.q_norm.weight": ("attention.q_norm.weight", same),
        "cross_attn.k_norm.weight": ("attention.k_norm.weight", same),
        "cross_attn.q_proj.weight": ("attention.wq.weight", ROWS),
        "cross_attn.k_proj.weight": ("attention.wk.weight", ROWS),
        "cross_attn.v_proj.weight": ("attention.wv.weight", ROWS),
        "cross_attn.o_proj.weight": ("attention.wo.weight", COLUMNS),
        "feed_forward.gate_proj.weight": ("feed_forward.w1.weight", ROWS),
        "feed_forward.down_proj.weight": ("feed_forward.w2.weight", COLUMNS),
        "feed_forward.up_proj.weight": ("feed_forward.w3.weight", ROWS),
    }
    return {f"{ours}{name}": _one(f"{stored}{part}", join) for name, (part, join) in names.items()}


def _stacked(tokens: Parts, extra: Parts) -> Tensor:
    return joined([*tokens, *extra], 0)


def _kernel(parts: Parts, vision: Llama32Vision) -> Tensor:
    return joined(parts, 0).unflatten(1, (3, vision.patch_side, vision.patch_side))


def _by_ratio(parts: Parts, vision: Llama32Vision) -> Tensor:
    """Meta's vectors for every place of a grid [rows, columns, P, D] as one row for each aspect ratio; 0 is none, and
    tiles that a ratio doesn't have get zeros."""
    grid = parts[0]
    if tuple(grid.shape[:2]) != (vision.max_tiles, vision.max_tiles):
        raise ValueError("the table is not of max_tiles x max_tiles tiles")
    size = grid[0, 0].numel()
    table = grid.new_zeros(len(vision.aspect_ratios) + 1, vision.max_tiles * size)
    for at, (rows, columns) in enumerate(vision.aspect_ratios, 1):
        table[at, : rows * columns * size] = grid[:rows, :columns].flatten()
    return table
