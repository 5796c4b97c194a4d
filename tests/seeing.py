"""Tiny random models that see, of transformers' own making, and pictures made by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiny

Grid = tuple[int, int]

SIDE = 8  # pixels of a tile
PATCH = 2
LLAMA4_IMAGE = 90  # of 96 tokens
LLAMA32_IMAGE = 96  # the first extra row
CROSS = [1, 4]  # of six layers, four of them text
VISION4 = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
VISION32 = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 2, "intermediate_size": 24,
    "vision_output_dim": 48, "image_size": SIDE, "patch_size": PATCH, "intermediate_layers_indices": [1, 3],
}  # fmt: skip


def randomise(module: nn.Module, seed: int = 0) -> None:
    """As `tiny.randomise`, with gates and tables that matter and norms that differ."""
    tiny.randomise(module, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            if "gate" in name.rpartition(".")[2] and weight.numel() == 1:
                weight.copy_(0.5 + 0.2 * torch.randn(weight.shape, generator=generator))
            elif "embedding" in name and "vision" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
            elif name.endswith(".bias"):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def llama4(kind: str = "scout", **vision: Any) -> Any:
    """transformers' Llama 4 with a tower, in eval mode."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

    config = Llama4Config(
        vision_config=Llama4VisionConfig(**VISION4 | vision), text_config=tiny.transformers_config(kind),
        image_token_index=LLAMA4_IMAGE,
    )  # fmt: skip
    model = Llama4ForConditionalGeneration(config)
    randomise(model)
    return model.eval()


def llama32(inner: int = 48, **vision: Any) -> Any:
    """transformers' Llama 3.2 Vision, in eval mode; inner: the width of the text's feed-forward."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": inner, "max_position_embeddings": 256,
        "cross_attention_layers": CROSS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    }  # fmt: skip
    config = MllamaConfig(vision_config=VISION32 | vision, text_config=text, image_token_index=LLAMA32_IMAGE)
    model = MllamaForConditionalGeneration(config)
    randomise(model)
    return model.eval()


def saved(model: Any, path: Path, **options: Any) -> Path:
    """A folder of transformers' own writing."""
    model.save_pretrained(path, **options)
    return path


def as_meta(folder: Path) -> Path:
    """The same weights, for Meta's arithmetic: as a release of transformers 4.45 has it."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "4.45.0.dev0"}))
    return folder


def pixels(tiles: int, seed: int = 5) -> Tensor:
    """Normalised tiles [tiles, 3, SIDE, SIDE]."""
    return torch.randn(tiles, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def tiles_of(grid: Grid, global_tile: bool) -> int:
    """Tiles of a picture; Llama 4 adds a global one to several."""
    count = grid[0] * grid[1]
    return count + (global_tile and count > 1)


def patch_tokens(grid: Grid) -> list[int]:
    """The `<|patch|>` tokens of a picture for Llama 4, with other tokens between tiles."""
    one = [LLAMA4_IMAGE] * ((SIDE // PATCH) ** 2 // 4)
    return [tok for tile in range(tiles_of(grid, True)) for tok in (7 + tile % 3, *one)]


def llama32_inputs(ids: Sequence[Sequence[int]], tiles: Tensor, grids: Sequence[Sequence[Grid]]) -> dict[str, Tensor]:
    """What transformers' processor makes for `MllamaForConditionalGeneration`: padded rows, pictures and tiles."""
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    ratios = [(rows, columns) for rows in range(1, 5) for columns in range(1, 5) if rows * columns <= 4]
    most, length = max(1, *map(len, grids)), max(map(len, ids))
    values = torch.zeros(len(ids), most, 4, 3, SIDE, SIDE)
    ratio_ids = torch.zeros(len(ids), most, dtype=torch.long)
    ratio_mask = torch.zeros(len(ids), most, 4, dtype=torch.long)
    ratio_mask[:, :, 0] = 1
    at = 0
    for row, pictures in enumerate(grids):
        for i, grid in enumerate(pictures):
            count = grid[0] * grid[1]
            values[row, i, :count] = tiles[at : at + count]
            ratio_ids[row, i] = ratios.index(grid) + 1
            ratio_mask[row, i, :count] = 1
            at += count
    sparse = [get_cross_attention_token_mask(list(row), LLAMA32_IMAGE) for row in ids]
    dense = convert_sparse_cross_attention_mask_to_dense(
        sparse, [[rows * columns for rows, columns in pictures] for pictures in grids], 4, length
    )
    tokens = torch.zeros(len(ids), length, dtype=torch.long)
    mask = torch.zeros(len(ids), length, dtype=torch.long)
    for row, each in enumerate(ids):
        tokens[row, : len(each)] = torch.tensor(list(each))
        mask[row, : len(each)] = 1
    return {
        "input_ids": tokens, "attention_mask": mask, "pixel_values": values, "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": ratio_mask, "cross_attention_mask": torch.from_numpy(dense),
    }  # fmt: skip
