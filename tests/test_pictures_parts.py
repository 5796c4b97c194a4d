"""Picture parts of messages: what is taken, what is refused, and what is told."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from puna.errors import PunaError
from puna.family.vision import Llama4Vision
from puna.sight import read_video, tile
from tiny_pictures import KINDS, clip, config, image, model, png, seeing

torch.set_num_threads(1)
PNG = png(1, 60, 20)
DATA = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.fixture(scope="module", params=KINDS)
def llama(request):
    return model(request.param)


def prepared(llama, *parts):
    return llama.prepare([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}])


def same(one, other):
    return list(one.token_ids) == list(other.token_ids) and one.grids == other.grids and torch.equal(
        one.pixel_values, other.pixel_values)  # fmt: skip


def test_all_ways_to_give_a_picture_are_the_same(llama, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(PNG)
    expected = prepared(llama, {"type": "image", "image": PNG})
    for part in [
        {"type": "image_url", "image_url": {"url": DATA}},
        {"type": "image_url", "image_url": {"url": DATA, "detail": "high"}},
        {"type": "image_url", "image_url": DATA},
        {"type": "input_image", "image_url": DATA, "detail": "auto"},
        {"type": "image", "image": DATA},
        {"type": "image", "image": file},
        {"type": "image", "image": image(1, 60, 20)},
        {"type": "image", "image": image(1, 60, 20).convert("RGBA")},
        {"type": "image", "image": Image.open(file)},
        {"type": "image", "image": tile(image(1, 60, 20), llama.config.vision)},
        {"type": "image_url", "image_url": {"url": DATA.replace("image/png", "image/jpeg")}},  # the content decides
        {"type": "image_url", "image_url": {"url": DATA.replace("+", "%2B").replace("data:", "DATA:")}},
    ]:
        assert same(prepared(llama, part), expected)


def test_all_ways_to_give_a_video_are_the_same(llama, tmp_path):
    seeing(tmp_path)
    file = tmp_path / "clip.mp4"
    url = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
    expected = prepared(llama, {"type": "video", "video": file.read_bytes()})
    assert len(expected.grids) == 16
    for part in [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url, "frames": 16}},
        {"type": "input_video", "video_url": url},
        {"type": "video", "video": file},
        {"type": "video", "video": read_video(file, llama.config.vision)},
    ]:
        found = prepared(llama, part)
        assert same(found, expected)
        assert found.notes[0].endswith(": frames used 16 of 40")


def test_pil_images_of_every_mode_and_orientation(llama):
    def pixels(picture):
        return prepared(llama, {"type": "image", "image": picture}).pixel_values

    colours = Image.new("RGB", (28, 28), (200, 30, 60))
    for mode in ("CMYK", "P", "L", "RGBA", "YCbCr", "1", "LA"):
        found = pixels(colours.convert(mode))
        wanted = torch.from_numpy(tile(colours.convert(mode).convert("RGB"), llama.config.vision).pixels)
        assert (found - wanted).abs().max() < 0.05
    turned = Image.fromarray(np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    assert torch.equal(pixels(Image.open(file)), pixels(turned.rotate(180)))
    assert torch.equal(pixels(file.getvalue()), pixels(turned.rotate(180)))


def test_low_detail_is_one_tile(llama):
    assert list(prepared(llama, {"type": "image", "image": PNG, "detail": "low"}).grids) == [(1, 1)]
    assert list(prepared(llama, {"type": "image", "image": PNG}).grids) == [(1, 3)]


def test_what_is_not_to_be_seen_is_told(llama):
    file = io.BytesIO()
    frames = [Image.new("RGB", (28, 28), (seed, 0, 0)) for seed in (10, 90)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    notes = prepared(llama, {"type": "image", "image": file.getvalue()}).notes
    assert notes == ("messages[0].content[0].image: only the first of its 2 frames is seen",)


@pytest.mark.parametrize(("part", "error"), [
    ({"type": "image", "image": 7}, "content[0].image: a data URL is needed (in Python also bytes or a pathlib.Path)"),
    ({"type": "image", "image": "a.png"}, "content[0].image: 'a.png' is no data URL, and nothing is fetched from"),
    ({"type": "image", "image": tile(image(1), Llama4Vision())}, "tiles have 336 pixels a side, but this model's 28"),
    ({"type": "image", "image": tile(image(1, 60, 20), config("llama4").vision), "detail": "low"},
     "content[0].image: it is cut into 4 tiles already; leave out detail"),
    ({"type": "video", "video": b"", "frames": 0}, "content[0].frames: a whole number from 1 to 48 is needed, not 0"),
    ({"type": "video", "video": b"", "frames": True}, "content[0].frames: a whole number"),
    ({"type": "video", "video": b"", "detail": "low"}, "content[0].detail: not known; beside video there may be"),
    ({"type": "image", "image": b"", "frames": 2}, "content[0].frames: not known; beside image there may be detail"),
    ({"type": "image", "url": DATA}, "content[0].url: not known"),
])  # fmt: skip
def test_refusals_name_the_field(llama, part, error):
    with pytest.raises(PunaError) as found:
        prepared(llama, part)
    assert error in str(found.value)
    assert str(found.value).startswith("messages[0].content[0]")


def test_chosen_frames_are_not_chosen_again(llama):
    video = read_video(clip(), llama.config.vision)
    with pytest.raises(PunaError, match="the frames of this video are chosen already"):
        prepared(llama, {"type": "video", "video": video, "frames": 3})


def test_a_pil_image_that_is_cut_off(tmp_path):
    (tmp_path / "cut.png").write_bytes(png(1, 300, 300)[:300])
    with pytest.raises(PunaError, match=r"content\[0\].image: this PIL image can't be read"):
        prepared(model("llama4"), {"type": "image", "image": Image.open(tmp_path / "cut.png")})
