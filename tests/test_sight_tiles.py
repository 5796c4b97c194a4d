"""Tiles against the reference's image processors."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from picture_reference import processors
from puna.family.vision import LLAMA_4_VISION, Llama32Vision
from puna.sight import canvas_for, tile

torch = pytest.importorskip("torch")

LLAMA_32_VISION = Llama32Vision(cross_attention_before=(1,))
EXTREME = [(1, 1), (1, 5000), (5000, 1), (4001, 37), (37, 4001), (336, 336), (337, 336), (335, 337), (672, 336),
           (560, 560), (561, 560), (1680, 1120), (1008, 1680), (3000, 5000), (1120, 1120), (16384, 3), (2, 1), (1, 3)]


def _sizes(count: int, largest: float, seed: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return EXTREME + [(int(2 ** draw.uniform(0, largest)), int(2 ** draw.uniform(0, largest))) for _ in range(count)]


def _image(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise, or smooth colours: rounding shows differently on both."""
    generator = np.random.default_rng(seed)
    height, width = size
    if seed % 2:
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


class Differences:
    """How far pixels [T, 3, S, S] lie from the reference's, in 8-bit levels before normalisation."""

    def __init__(self, processor: Any) -> None:
        values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
        made = processor.rescale_and_normalize(values, True, 1 / 255, True, processor.image_mean, processor.image_std)
        self.made = made[0, :, 0].float().numpy()
        self.counts = np.zeros(256, int)

    def _levels(self, pixels: np.ndarray) -> np.ndarray:
        levels = np.empty(pixels.shape, np.int16)
        for channel, made in enumerate(self.made):
            assert (np.diff(made) > 0).all()
            at = np.searchsorted(made, pixels[:, channel] - 1e-5)
            assert np.abs(made[at] - pixels[:, channel]).max() < 1e-5  # no value that the reference can't make
            levels[:, channel] = at
        return levels

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        self.counts += np.bincount(np.abs(self._levels(ours) - self._levels(theirs)).ravel(), minlength=256)

    def check(self, exact: bool) -> None:
        if exact:
            assert not self.counts[1:].any()
        else:  # two levels where both passes of PyTorch's resizing round the other way: smooth pictures, hardly shrunk
            assert self.counts[2] <= self.counts.sum() * 1e-5
            assert not self.counts[3:].any()


def test_canvases_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    llama4, mllama = processors(monkeypatch)
    square = type("Square", (), {"height": 336, "width": 336})
    for most in (1, 4, 5, 16):
        llama4.find_supported_resolutions.cache_clear()
        allowed = torch.tensor(llama4.find_supported_resolutions(most, square))
        vision4 = replace(LLAMA_4_VISION, max_tiles=most)
        vision32 = replace(LLAMA_32_VISION, max_tiles=most)
        for size in _sizes(100, 14, most):
            target = llama4.get_best_fit(size, allowed)
            bounds = tuple(min(max(own, 336), bound) for own, bound in zip(size, target, strict=True))
            drawn = llama4.get_max_res_without_distortion(size, bounds)
            ours = canvas_for(size, vision4)
            assert ours.grid == tuple(side // 336 for side in target.tolist()), (size, most)
            assert ours.drawn == tuple(max(int(side), 1) for side in drawn), (size, most)

            canvas = mllama.get_optimal_tiled_canvas(*size, most, 560)
            ours = canvas_for(size, vision32)
            assert ours.grid == tuple(side // 560 for side in canvas), (size, most)
            assert ours.drawn == tuple(mllama.get_image_size_fit_to_canvas(*size, *canvas, 560)), (size, most)


SIDES = pytest.mark.parametrize(("side", "sizes"), [
    (28, _sizes(200, 8.5, 28)),
    (336, [(1, 5000), (700, 500), (336, 300), (1008, 1680)]),
    (560, [(1, 5000), (700, 500)]),
])


@SIDES
@pytest.mark.parametrize("pillow", [True, False], ids=["resized by Pillow", "resized by PyTorch"])
def test_llama_4_tiles_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch, side: int,
                                                  sizes: list[tuple[int, int]], pillow: bool) -> None:
    processor = processors(monkeypatch, pillow)[0].Llama4ImageProcessor(size={"height": side, "width": side})
    vision = replace(LLAMA_4_VISION, tile_side=side)
    differences = Differences(processor)
    for seed, size in enumerate(sizes):
        image = _image(size, seed)
        theirs = processor(images=[image], return_tensors="pt")
        ours = tile(image, vision)
        assert ours.grid == tuple(theirs["aspect_ratios"][0].tolist()), size
        differences.add(ours.pixels, theirs["pixel_values"].float().numpy())
    differences.check(exact=pillow)


@SIDES
@pytest.mark.parametrize("pillow", [True, False], ids=["resized by Pillow", "resized by PyTorch"])
def test_llama_32_tiles_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch, side: int,
                                                   sizes: list[tuple[int, int]], pillow: bool) -> None:
    vision = replace(LLAMA_32_VISION, tile_side=side)
    processor = processors(monkeypatch, pillow)[1].MllamaImageProcessor(
        size={"height": side, "width": side}, image_mean=list(vision.channel_means),
        image_std=list(vision.channel_deviations))
    differences = Differences(processor)
    for seed, size in enumerate(sizes):
        image = _image(size, seed)
        theirs = processor(images=[image], return_tensors="np")
        ours = tile(image, vision)
        assert vision.aspect_ratios.index(ours.grid) + 1 == theirs["aspect_ratio_ids"][0, 0], size
        differences.add(ours.pixels, theirs["pixel_values"][0, 0, : theirs["num_tiles"][0][0]])
    differences.check(exact=pillow)


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.integers(1, 20), st.sampled_from((28, 224, 336, 560)),
       st.booleans())
@settings(deadline=None, max_examples=300)
def test_every_size_has_a_canvas_within_the_limit(height: int, width: int, most: int, side: int, cross: bool) -> None:
    vision = replace(LLAMA_32_VISION if cross else LLAMA_4_VISION, max_tiles=most, tile_side=side)
    canvas = canvas_for((height, width), vision)
    rows, columns = canvas.grid
    assert 1 <= rows * columns <= most
    # the picture lies on its canvas and reaches the last row or column of tiles
    assert 1 <= canvas.drawn[0] <= rows * side
    assert 1 <= canvas.drawn[1] <= columns * side
    assert canvas.drawn[0] > (rows - 1) * side or canvas.drawn[1] > (columns - 1) * side
    # its proportions stay, but for less than a pixel
    longer, shorter = sorted(zip((height, width), canvas.drawn, strict=True), reverse=True)
    scale = longer[1] / longer[0]
    assert scale <= max(1.0, side / longer[0])
    assert abs(shorter[1] - shorter[0] * scale) < 1 + shorter[0] / longer[0] or shorter[1] == 1


def test_tiles_put_together_are_the_picture() -> None:
    vision = replace(LLAMA_4_VISION, tile_side=8, patch_side=2)
    image = _image((21, 30), 1)
    picture = tile(image, vision)
    assert picture.grid == (3, 4)
    rows, columns = picture.grid
    assert len(picture.pixels) == rows * columns + 1
    whole = picture.pixels[:-1].reshape(rows, columns, 3, 8, 8).transpose(0, 3, 1, 4, 2).reshape(24, 32, 3)
    assert np.array_equal(np.rint(whole[:21, :30] * 127.5 + 127.5), np.asarray(image).astype(float))
    assert (whole[21:] == -1).all()
    assert (whole[:, 30:] == -1).all()
    shrunk = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR)).astype(float)
    assert np.array_equal(np.rint(picture.pixels[-1].transpose(1, 2, 0) * 127.5 + 127.5), shrunk)


def test_the_key_is_that_of_the_tiles() -> None:
    vision = replace(LLAMA_4_VISION, tile_side=8, patch_side=2)
    image = _image((16, 16), 1)
    key = tile(image, vision).key
    assert tile(image.copy(), vision).key == key
    other = image.copy()
    other.putpixel((15, 15), (image.getpixel((15, 15))[0] ^ 1, *image.getpixel((15, 15))[1:]))
    assert tile(other, vision).key != key
    assert tile(image, replace(LLAMA_32_VISION, tile_side=8, patch_side=2)).key != key
    # the same bytes on another grid
    black = [tile(Image.new("RGB", size), replace(vision, max_tiles=2)) for size in ((16, 8), (8, 16))]
    assert np.array_equal(black[0].pixels, black[1].pixels)
    assert black[0].key != black[1].key
