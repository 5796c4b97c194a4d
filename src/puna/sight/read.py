"""Picture files to upright RGB images; whatever else comes is refused by name before it is decoded."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from puna.errors import PunaError

# what browsers, cameras and scanners write; Pillow knows more, some of which start other programs (EPS)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_NAMED = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or PPM"
# formats in which further frames are further content, not previews of the first
_MOVING = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")


@dataclass(frozen=True)
class PictureLimits:
    """What a picture file may hold: bytes, and pixels when decoded (a pixel takes 3 to 8 bytes of memory)."""

    bytes: int = 64 * 2**20
    pixels: int = 64_000_000


def read_picture(source: bytes | Path, limits: PictureLimits | None = None, name: str = "") -> Image.Image:
    """The picture in a file or in bytes: RGB, 8 bits a channel, turned upright by its EXIF orientation.

    Transparent parts lie on white, 16-bit grey is scaled to 8 bits, of a file with several frames or pages the first is
    taken; `image.info["note"]` says so. `name` is how errors call the picture. Raises PunaError for what is too large
    (found out before it is decoded), cut off, damaged, or no picture.
    """
    limits = limits or PictureLimits()
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    data = _data(source, limits, name)
    try:
        # raises for files beyond Pillow's own bound of 2 * MAX_IMAGE_PIXELS, too
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise PunaError(f"{name} {_what(data)}; give {_NAMED}") from None
    except Image.DecompressionBombError as error:
        raise PunaError(f"{name} is too large: {error}; make it smaller") from None
    except Exception as error:  # a damaged file makes Pillow's readers raise whatever they like
        raise PunaError(f"{name} can't be read as a picture ({error}); save it anew as PNG or JPEG") from None
    with image:
        if image.width * image.height > limits.pixels:
            raise PunaError(f"{name} is {image.width} x {image.height} pixels, above the limit of {limits.pixels:,}; "
                            "make it smaller")
        notes = _frames(image)
        try:
            image.load()
        except Exception as error:
            raise PunaError(f"{name} is cut off or damaged ({image.format}: {error}); send it again, or save it anew"
                            ) from None
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:
            notes.append("its EXIF data are damaged: shown as stored, perhaps not upright")
    try:
        rgb = _rgb(image)
    except ValueError as error:
        raise PunaError(f"{name} has pixels of a kind that can't be shown ({image.mode}: {error}); save it anew as "
                        "8-bit PNG or JPEG") from None
    rgb.info = {"note": "; ".join(notes)}
    return rgb


def _data(source: bytes | Path, limits: PictureLimits, name: str) -> bytes:
    if isinstance(source, Path):
        try:
            size = source.stat().st_size
            _check_bytes(size, limits, name)
            data = source.read_bytes()
        except OSError as error:
            raise PunaError(f"{name} can't be read: {error.strerror}") from None
    else:
        data = source
        _check_bytes(len(data), limits, name)
    if not data:
        raise PunaError(f"{name} is empty; give {_NAMED}")
    return data


def _check_bytes(size: int, limits: PictureLimits, name: str) -> None:
    if size > limits.bytes:
        raise PunaError(f"{name} has {size:,} bytes, above the limit of {limits.bytes:,}; make it smaller")


def _what(data: bytes) -> str:
    """What the bytes look like, for who sent something else by mistake."""
    head = data[:512].lstrip()
    if data[:4] == b"%PDF":
        return "is a PDF, not a picture: save its pages as pictures"
    if data[:4] == b"%!PS" or data[:4] == b"\xc5\xd0\xd3\xc6":
        return "is PostScript, not a picture"
    if b"<svg" in head:
        return "is an SVG drawing: save it as PNG"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "is a HEIC picture: save it as JPEG"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "is a damaged AVIF picture"
    if data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3":
        return "is a video, not a picture"
    if head[:1] == b"<":
        return "is HTML or XML, not a picture"
    if head and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in head):
        return "is text, not a picture"
    return "is of no known picture type, or damaged at its start"


def _frames(image: Image.Image) -> list[str]:
    if image.format not in _MOVING:
        return []
    try:
        frames = getattr(image, "n_frames", 1)
        image.seek(0)
    except Exception:  # a damaged later frame; the first may be whole
        return ["it has several frames, of which only the first is seen"]
    return [f"only the first of its {frames} frames is seen"] if frames > 1 else []


def _rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, on white. Raises ValueError for pixels that have no 8-bit meaning."""
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit levels")
        # Pillow's own conversion clips at 255
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point levels")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")
