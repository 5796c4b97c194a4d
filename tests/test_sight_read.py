"""Picture files of every kind, and files that are none."""

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from puna.errors import PunaError
from puna.sight import PictureLimits, read_picture


def _bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _picture() -> Image.Image:
    levels = np.zeros((6, 10, 3), np.uint8)
    levels[:3, :5] = (250, 20, 10)
    levels[3:, 5:] = (10, 240, 30)
    return Image.fromarray(levels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "AVIF"])
def test_every_format(kind: str) -> None:
    image = _picture().resize((80, 48), Image.Resampling.NEAREST)
    options = {"lossless": True} if kind == "WEBP" else {}
    read = read_picture(_bytes(image, kind, **options))
    assert (read.mode, read.size, read.info["note"]) == ("RGB", image.size, "")
    difference = np.abs(np.asarray(read).astype(int) - np.asarray(image))
    assert difference.max() == 0 if kind not in ("JPEG", "AVIF") else difference.mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    upright = _picture()
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    file.write_bytes(_bytes(stored, exif=exif))
    assert np.array_equal(np.asarray(read_picture(file)), np.asarray(upright))


def test_transparent_parts_lie_on_white() -> None:
    image = _picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[0] * 5 + [255] * 5] * 6, np.uint8)))
    read = np.asarray(read_picture(_bytes(image)))
    assert (read[:, :5] == 255).all()
    assert np.array_equal(read[:, 5:], np.asarray(_picture())[:, 5:])
    half = read_picture(_bytes(Image.new("LA", (2, 2), (0, 51))))
    assert half.getpixel((0, 0)) == (204, 204, 204)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    read = np.asarray(read_picture(_bytes(palette, transparency=0)))
    assert read[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_other_pixels_become_rgb() -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    read = np.asarray(read_picture(_bytes(Image.fromarray(grey))))
    assert read[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
    assert np.asarray(read_picture(_bytes(Image.fromarray(grey), "TIFF")))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert read_picture(_bytes(Image.new("1", (3, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(_bytes(Image.new("L", (3, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    cmyk = read_picture(_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert all(abs(a - b) < 10 for a, b in zip(cmyk.getpixel((8, 8)), (255, 0, 0), strict=True))
    with pytest.raises(PunaError, match=r"of a kind that can't be shown \(F: floating-point levels\); save it anew"):
        read_picture(_bytes(Image.new("F", (3, 2), 0.5), "TIFF"))
    with pytest.raises(PunaError, match="32-bit levels"):
        read_picture(_bytes(Image.new("I", (3, 2), 70000), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_that_is_said(kind: str) -> None:
    first, *later = (Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    options = {"lossless": True} if kind == "WEBP" else {}
    read = read_picture(_bytes(first, kind, save_all=True, append_images=later, **options))
    assert read.getpixel((4, 4)) == (255, 0, 0)
    assert read.info["note"] == "only the first of its 3 frames is seen"


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""
    data = bytearray(_bytes(Image.new("1", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"^the picture is 8001 x 8000 pixels, above the limit of 64,000,000; make"):
        read_picture(_bomb(8001, 8000))
    with pytest.raises(PunaError, match=r"is too large: Image size .* exceeds limit"):
        read_picture(_bomb(100_000, 100_000))
    with pytest.raises(PunaError, match="part 2 is 10 x 6 pixels, above the limit of 59"):
        read_picture(_bytes(_picture()), PictureLimits(pixels=59), name="part 2")
    file = tmp_path / "big.png"
    file.write_bytes(_bytes(_picture()))
    with pytest.raises(PunaError, match=r"big.png has \d+ bytes, above the limit of 10; make it smaller"):
        read_picture(file, PictureLimits(bytes=10))
    assert read_picture(_bytes(_picture()), PictureLimits(pixels=60)).size == (10, 6)


@pytest.mark.parametrize(("data", "what"), [
    (b"", "is empty; give PNG, JPEG"),
    (b"hello, here is a picture", "is text, not a picture; give PNG"),
    (b"%PDF-1.7\n\xff", "is a PDF"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript"),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing: save it as PNG"),
    (b"<!doctype html><p>404", "is HTML or XML"),
    (b"\x00\x00\x00\x18ftypheic" + bytes(40), "is a HEIC picture: save it as JPEG"),
    (b"\x00\x00\x00\x18ftypisom" + bytes(40), "is a video"),
    (b"\x93NUMPY" + bytes(40), "of no known picture type"),
])
def test_what_is_no_picture_is_called_by_its_name(data: bytes, what: str) -> None:
    with pytest.raises(PunaError, match=what):
        read_picture(data)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"none\.png can't be read: No such file or directory"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(PunaError, match="can't be read: Is a directory"):
        read_picture(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_cut_off_files_are_refused(kind: str) -> None:
    data = _bytes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(PunaError, match=r"the picture (is cut off or damaged|is a damaged|can't be read)"):
        read_picture(data[: len(data) // 2])


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]), st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_files_give_a_picture_or_our_error(kind: str, data: st.DataObject) -> None:
    file = bytearray(_bytes(_picture().resize((40, 24)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PunaError):
        assert read_picture(bytes(file), PictureLimits(pixels=1_000_000)).mode == "RGB"
