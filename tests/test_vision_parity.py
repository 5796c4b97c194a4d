"""Towers, fusion and cross-attention against transformers: tiny random models in float32, pictures made by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seeing
from puna.checkpoint import load_source, open_source
from puna.checkpoint.ready import load_ready
from puna.model import Decoder
from puna.model.paged import Batch, PagedPool, Span, blocks_for
from puna.model.pictures import PassPictures

pytest.importorskip("transformers")
Grid = tuple[int, int]
Seeing = tuple[Any, Decoder]  # transformers' model and ours

GRIDS16 = [(rows, columns) for rows in range(1, 17) for columns in range(1, 17) if rows * columns <= 16]
GRIDS4 = [(rows, columns) for rows in range(1, 5) for columns in range(1, 5) if rows * columns <= 4]
IMAGE = seeing.LLAMA32_IMAGE


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    theirs = seeing.llama4()
    return theirs, read(seeing.saved(theirs, tmp_path_factory.mktemp("llama4")))


@pytest.fixture(scope="module")
def llama32(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    theirs = seeing.llama32()
    return theirs, read(seeing.saved(theirs, tmp_path_factory.mktemp("llama32")))


@pytest.fixture(scope="module")
def llama32_meta(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    """Meta's arithmetic, which transformers' model has after two changes: the intermediate layers' inputs, as it had
    them until 4.54, and nothing of the attention for rows that see no picture (its issue 39379)."""
    theirs = seeing.llama32()
    ours = read(seeing.as_meta(seeing.saved(theirs, tmp_path_factory.mktemp("meta"))))
    tower = theirs.model.vision_model
    tower.intermediate_layers_indices = [layer - 1 for layer in tower.intermediate_layers_indices]
    rows: list[Tensor] = []
    for layer in theirs.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.register_forward_pre_hook(
                lambda _, __, given: rows.append(given["full_text_row_masked_out_mask"]), with_kwargs=True
            )
            layer.cross_attn.register_forward_hook(lambda _, __, out: (out[0] * rows.pop()[:, 0], out[1]))
    return theirs, ours


def read(folder: Path) -> Decoder:
    source = open_source(folder)
    assert not source.notes
    return load_source(source).model


def ours_says(model: Decoder, ids: Sequence[int], tiles: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Logits [S, V] of a plain pass."""
    share = model.place(ids, model.look(tiles, grids)).share(0, len(ids), 0)
    return model(torch.tensor([list(ids)]), pictures=PassPictures.joined([share]))[0]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Within 1e-4, and not because nothing was said."""
    assert theirs.std() > 0.3
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) < 1e-4


def chat4(*grids: Grid) -> list[int]:
    """Turns with a picture each, after a turn without."""
    ids = [1, 2, 3, 4]
    for grid in grids:
        ids += [5, *seeing.patch_tokens(grid), 6, 8]
    return ids


def tiles4(grids: Sequence[Grid], seed: int = 5) -> Tensor:
    return seeing.pixels(sum(seeing.tiles_of(grid, True) for grid in grids), seed)


def tiles32(grids: Sequence[Grid], seed: int = 5) -> Tensor:
    return seeing.pixels(sum(rows * columns for rows, columns in grids), seed)


# every grid of up to 16 tiles in three rounds, several pictures in each conversation
@pytest.mark.parametrize("grids", [GRIDS16[start : start + 5] for start in range(0, 50, 5)])
def test_llama4(grids: list[Grid], llama4: Seeing) -> None:
    theirs, ours = llama4
    ids, tiles = chat4(*grids), tiles4(grids)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=tiles).logits[0]
        assert close(ours_says(ours, ids, tiles, grids), expected)
        assert not close(ours_says(ours, ids, tiles.flip(0), grids), expected)


@pytest.mark.parametrize("kind", ["maverick", "guard4"])
def test_other_llama4(kind: str, tmp_path: Path) -> None:
    theirs = seeing.llama4(kind)
    ours = read(seeing.saved(theirs, tmp_path, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    grids = [(1, 1), (2, 1)]
    ids, tiles = chat4(*grids), tiles4(grids)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=tiles).logits[0]
        assert close(ours_says(ours, ids, tiles, grids), expected)


@pytest.mark.parametrize("grid", GRIDS4)
@pytest.mark.parametrize("ids", [[1, IMAGE, 3, 4, 5], [IMAGE, 3, 4], [1, 2, 3, 4, 5, 6, 7, IMAGE]])
def test_llama32_one_picture(ids: list[int], grid: Grid, llama32: Seeing) -> None:
    theirs, ours = llama32
    tiles = tiles32([grid])
    with torch.no_grad():
        expected = theirs(**seeing.llama32_inputs([ids], tiles, [[grid]])).logits[0]
        assert close(ours_says(ours, ids, tiles, [grid]), expected)
        assert not close(ours_says(ours, ids, tiles + 1, [grid]), expected)


SEVERAL = [
    ([1, IMAGE, IMAGE, 4, 5, 6], [(1, 2), (4, 1)]),  # side by side: seen together
    ([1, IMAGE, 3, 4, IMAGE, 6, 7, IMAGE, IMAGE, IMAGE, 9], [(2, 2), (1, 1), (1, 3), (2, 1), (1, 4)]),
    ([1, 2, 3, 4, 5, 6, IMAGE, 8, IMAGE], [(3, 1), (1, 1)]),  # in later turns, the last one at the end
]


@pytest.mark.parametrize(("ids", "grids"), SEVERAL)
def test_llama32_several(ids: list[int], grids: list[Grid], llama32: Seeing) -> None:
    theirs, ours = llama32
    tiles = tiles32(grids)
    with torch.no_grad():
        expected = theirs(**seeing.llama32_inputs([ids], tiles, [grids])).logits[0]
        assert close(ours_says(ours, ids, tiles, grids), expected)


def test_llama32_text_alone(llama32: Seeing) -> None:
    theirs, ours = llama32
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        assert close(ours(ids), theirs(input_ids=ids).logits)


def test_llama32_batch(llama32_meta: Seeing) -> None:
    """Rows of unequal length, with several pictures, one and none: theirs padded, ours in one ragged pass."""
    theirs, ours = llama32_meta
    chats = [*SEVERAL, ([1, 2, 3, 4], []), ([1, 2, 3, IMAGE, 5, 6, 7], [(2, 1)])]
    ids, grids = [chat[0] for chat in chats], [chat[1] for chat in chats]
    tiles = tiles32([grid for each in grids for grid in each])
    with torch.no_grad():
        expected = theirs(**seeing.llama32_inputs(ids, tiles, grids)).logits
        items = iter(ours.look(tiles, [grid for each in grids for grid in each]))
        placed = [ours.place(row, [next(items) for _ in each]) for row, each in zip(ids, grids, strict=True)]
        pool, spans, shares, at, block = PagedPool(ours.config, 8, 0, torch.float32), [], [], 0, 0
        for row, pictures in zip(ids, placed, strict=True):
            table = torch.arange(block, block := block + blocks_for(len(row)), dtype=torch.int32).numpy()
            spans.append(Span(0, len(row), table, table))
            shares.append(pictures.share(0, len(row), at))
            at += len(row)
        flat = torch.tensor([[token for row in ids for token in row]])
        found = ours(flat, Batch(pool, spans), pictures=PassPictures.joined(shares))[0].split([len(row) for row in ids])
        for row, mine, other in zip(ids, found, expected, strict=True):
            assert close(mine, other[: len(row)])


def test_llama4_batch(llama4: Seeing) -> None:
    """A row with two pictures, one with one, one with none."""
    theirs, ours = llama4
    rows: list[list[Grid]] = [[(1, 2), (1, 1)], [(2, 1)], []]
    ids = [chat4(*grids) for grids in rows]
    length = max(map(len, ids))
    tiles = tiles4([grid for grids in rows for grid in grids])
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    with torch.no_grad():
        expected = theirs(input_ids=padded, attention_mask=mask, pixel_values=tiles).logits
        at = 0
        for row, grids, other in zip(ids, rows, expected, strict=True):
            count = sum(seeing.tiles_of(grid, True) for grid in grids)
            mine = ours_says(ours, row, tiles[at : at + count], grids)
            at += count
            assert close(mine, other[: len(row)])


@pytest.mark.parametrize("name", ["llama4", "llama32", "llama32_meta"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_in_pieces(name: str, pieces: int, request: pytest.FixtureRequest) -> None:
    """A prompt in pieces, then token by token, all from the cache: the logits of the whole in one pass."""
    model: Decoder = request.getfixturevalue(name)[1]
    if name == "llama4":
        grids = [(1, 1), (2, 1)]
        ids, tiles = chat4(*grids), tiles4(grids)
    else:
        ids, grids = SEVERAL[1]
        tiles = tiles32(grids)
    answer = [11, 12, 13]
    with torch.no_grad():
        items = model.look(tiles, grids)
        whole = model.place([*ids, *answer], items).share(0, len(ids) + 3, 0)
        expected = model(torch.tensor([ids + answer]), pictures=PassPictures.joined([whole]))[0]
        placed, cache, found, at = model.place(ids, items), model.new_cache(), [], 0
        for count in [*([pieces] * (len(ids) // pieces)), len(ids) % pieces, 1, 1, 1]:
            if count:
                tokens = torch.tensor([(ids + answer)[at : at + count]])
                pictures = PassPictures.joined([placed.share(at, count, 0)])
                found.append(model(tokens, cache, pictures=pictures)[0])
                at += count
        assert torch.allclose(torch.cat(found), expected, atol=2e-5)


@pytest.mark.parametrize("make", [seeing.llama4, seeing.llama32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_for_the_engine(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = make()
    source = open_source(seeing.saved(theirs, tmp_path))
    plain = load_source(source).model
    model = load_ready(source, dtype=dtype).model
    grids = [(1, 2), (1, 1)]
    llama32 = model.cross_layers is not None
    ids, tiles = ([1, IMAGE, 3, IMAGE, 5], tiles32(grids)) if llama32 else (chat4(*grids), tiles4(grids))
    with torch.no_grad():
        difference = (ours_says(model, ids, tiles, grids) - ours_says(plain, ids, tiles, grids)).abs()
    assert difference.max() < 1e-4 if dtype == torch.float32 else difference.mean() < 0.1


@pytest.mark.parametrize("name", ["llama4", "llama32"])
def test_gradients_reach_tower_and_text(name: str, request: pytest.FixtureRequest) -> None:
    theirs, ours = request.getfixturevalue(name)
    grids = [(1, 2), (1, 1)]
    ids, tiles = (chat4(*grids), tiles4(grids)) if name == "llama4" else ([1, IMAGE, 3, IMAGE, 5], tiles32(grids))
    given = {"input_ids": torch.tensor([ids]), "pixel_values": tiles}
    given = given if name == "llama4" else seeing.llama32_inputs([ids], tiles, [grids])
    theirs(**given).logits.square().mean().backward()
    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    ours_says(ours, ids, tiles, grids).square().mean().backward()
    tower = theirs.vision_model if name == "llama4" else theirs.model.vision_model
    expected = {key: parameter.grad for key, parameter in tower.named_parameters()}
    for key, gradient in expected.items():
        mine = ours.vision.get_parameter(key).grad
        assert mine is not None, key
        assert torch.allclose(mine, gradient, rtol=1e-3, atol=1e-5), key
    ours.zero_grad()
    ours.vision.requires_grad_(False)
    ours_says(ours, ids, tiles, grids).square().mean().backward()
    assert all(parameter.grad is None for parameter in ours.vision.parameters())
    assert ours.layers[0].self_attn.q_proj.weight.grad is not None
