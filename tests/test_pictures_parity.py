"""The engine with pictures against transformers: logits within 1e-4, the same greedy answers, all requests at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

import puna
import seeing
from puna.engine import Inputs
from seeing import LLAMA4_IMAGE, LLAMA32_IMAGE, patch_tokens, pixels, tiles_of

pytest.importorskip("transformers")
torch.set_num_threads(1)

LONG = [3, 1, 4, 1, 5, 9, 2, 6] * 5  # more than a block of the cache
GRIDS = {
    "text alone": [], "one tile": [(1, 1)], "odd": [(1, 3)], "tall": [(4, 1)], "two": [(2, 2), (1, 1)],
    "three": [(1, 2), (3, 1), (1, 1)],
}  # fmt: skip
ONLY_LLAMA4 = {"sixteen": [(4, 4)], "wide": [(1, 16)], "thirteen": [(13, 1)]}
NEW = 5


class Pair:
    """transformers' model, and what `puna.load` makes of the checkpoint that it wrote."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.four = kind == "llama4"
        self.theirs = seeing.llama4("scout") if self.four else seeing.llama32()
        self.ours = puna.load(seeing.saved(self.theirs, folder), dtype="float32")

    def inputs(self, grids: list, before: list[int]) -> Inputs:
        """Pictures between texts; in a later turn where `before` is long."""
        ids = list(before)
        for at, grid in enumerate(grids):
            ids += (patch_tokens(grid) if self.four else [LLAMA32_IMAGE]) + [11 + at, 12, 13]
        count = sum(tiles_of(grid, self.four) for grid in grids)
        return Inputs([*ids, 5, 8, 9], pixels(count) if grids else None, grids or None)

    def logits(self, inputs: Inputs, ids: list[int]) -> torch.Tensor:
        """transformers' of all positions."""
        asked: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if inputs.grids and self.four:
            asked["pixel_values"] = inputs.pixel_values
        elif inputs.grids:
            asked = seeing.llama32_inputs([ids], inputs.pixel_values, [list(inputs.grids)])
        with torch.no_grad():
            return self.theirs(**asked, use_cache=False).logits[0].float()

    def greedy(self, inputs: Inputs) -> list[int]:
        ids = list(inputs.token_ids)
        for _ in range(NEW):
            logits = self.logits(inputs, ids)[-1]
            logits[LLAMA4_IMAGE] = -100.0  # transformers would want a picture for it
            ids.append(int(logits.argmax()))
        return ids[-NEW:]


@pytest.mark.parametrize("kind", ["llama4", "llama3.2"])
def test_answers_are_those_of_transformers(kind, tmp_path):
    pair = Pair(kind, tmp_path / kind)
    grids = GRIDS | (ONLY_LLAMA4 if pair.four else {})
    asked = [pair.inputs(each, before) for each in grids.values() for before in ([1], LONG)]
    assert not pair.four or LLAMA4_IMAGE in asked[-1].token_ids
    options = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "logit_bias": {LLAMA4_IMAGE: -100.0}}
    streams = [pair.ours.stream(one, **options) for one in asked * 2]
    for stream in streams:
        list(stream)
    found = [stream.reply.token_ids for stream in streams]
    assert found[: len(asked)] == found[len(asked) :] == [pair.greedy(one) for one in asked]
    for one in asked:
        expected = pair.logits(one, list(one.token_ids))
        torch.testing.assert_close(pair.ours.logits(one), expected, atol=1e-4, rtol=0)
