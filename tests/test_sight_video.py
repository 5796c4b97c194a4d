"""Videos to frames."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from puna.errors import PunaError
from puna.family.vision import LLAMA_4_VISION, Llama32Vision
from puna.sight import VideoLimits, read_video

av = pytest.importorskip("av")


def make_video(kind: str = "mp4", codec: str = "mpeg4", frames: int = 150, key_every: int = 12,
               size: tuple[int, int] = (64, 48)) -> bytes:
    """30 frames a second; frame i is grey, of level 240 * i / frames."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.gop_size = key_every
        for i in range(frames):
            image = Image.new("RGB", size, (240 * i // frames,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file.getvalue()


def _levels(video: object) -> np.ndarray:
    return np.array([(frame.pixels[0, 1, 100, 100] + 1) * 127.5 for frame in video.frames])


@pytest.mark.parametrize(("kind", "codec", "key_every"), [
    ("mp4", "mpeg4", 12), ("mp4", "mpeg4", 600), ("matroska", "mpeg4", 30), ("avi", "mpeg4", 30), ("mov", "mpeg4", 5),
])
def test_frames_are_evenly_spaced_in_time(kind: str, codec: str, key_every: int) -> None:
    video = read_video(make_video(kind, codec, key_every=key_every), LLAMA_4_VISION, frames=6)
    assert (video.total, video.note) == (150, "frames used 6 of 150")
    assert abs(video.duration - 5) < 0.04
    # the middles of six parts of 5 seconds, each the frame then on the screen
    assert np.abs(np.array(video.seconds) - (np.arange(6) + 0.5) * 5 / 6).max() < 1 / 30 + 2e-3
    assert np.abs(_levels(video) - np.array(video.seconds) * 30 * 240 / 150).max() < 6
    assert all(frame.grid == (1, 1) and frame.pixels.shape == (1, 3, 336, 336) for frame in video.frames)


def test_a_long_video_gives_the_same_frames_as_one_decoded_whole() -> None:
    data = make_video(frames=90, key_every=7)
    whole = read_video(data, LLAMA_4_VISION, frames=1000)
    assert (len(whole.frames), whole.note) == (90, "frames used 90 of 90")
    few = read_video(data, LLAMA_4_VISION, frames=5)
    for frame, at in zip(few.frames, few.seconds, strict=True):
        assert frame.key == whole.frames[whole.seconds.index(at)].key


def test_an_animated_gif_and_llama_3_2(tmp_path: Path) -> None:
    file = tmp_path / "moving.gif"
    colors = ["red", "lime", "blue"]
    first, *later = (Image.new("RGB", (30, 20), color) for color in colors)
    first.save(file, save_all=True, append_images=later, duration=500)
    video = read_video(file, Llama32Vision(cross_attention_before=(1,), tile_side=28))
    assert (video.seconds, video.note) == ([0.0, 0.5, 1.0], "frames used 3 of 3")
    assert [int(frame.pixels[0, :, 5, 5].argmax()) for frame in video.frames] == [0, 1, 2]


def test_limits(tmp_path: Path) -> None:
    data = make_video(frames=60)
    file = tmp_path / "clip.mp4"
    file.write_bytes(data)
    with pytest.raises(PunaError, match=r"clip.mp4 has [\d,]+ bytes, above the limit of 100; cut it"):
        read_video(file, LLAMA_4_VISION, limits=VideoLimits(bytes=100))
    with pytest.raises(PunaError, match="the video is longer than 1 seconds or 250,000 frames; cut it"):
        read_video(data, LLAMA_4_VISION, limits=VideoLimits(seconds=1))
    with pytest.raises(PunaError, match="longer than 3,600 seconds or 59 frames"):
        read_video(data, LLAMA_4_VISION, limits=VideoLimits(frames=59))
    with pytest.raises(PunaError, match="part 1 is 64 x 48 pixels, above the limit of 100; make it smaller"):
        read_video(data, LLAMA_4_VISION, limits=VideoLimits(pixels=100), name="part 1")
    with pytest.raises(PunaError, match="frames is 0; give at least 1"):
        read_video(data, LLAMA_4_VISION, frames=0)
    assert len(read_video(data, LLAMA_4_VISION, frames=2, limits=VideoLimits(frames=60, seconds=2)).frames) == 2


@pytest.mark.parametrize("data", [
    b"", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/secret\n", b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"\xff\xd8\xff\xe0 a picture", b"RIFF\x00\x00\x00\x00WAVEfmt ",
])
def test_only_known_types_are_opened(data: bytes) -> None:
    """Playlists above all, which would make the library open what they name."""
    with pytest.raises(PunaError, match=r"the video is (empty|of no known video type); give MP4"):
        read_video(data, LLAMA_4_VISION)


def test_damaged_videos(tmp_path: Path) -> None:
    data = make_video()
    for cut in (40, len(data) // 2):
        with pytest.raises(PunaError, match="the video is cut off or damaged"):
            read_video(data[:cut], LLAMA_4_VISION)
    with pytest.raises(PunaError, match=r"none\.mp4 can't be read: No such file"):
        read_video(tmp_path / "none.mp4", LLAMA_4_VISION)
    # a Matroska file is readable as far as it goes
    data = make_video("matroska")
    video = read_video(data[: len(data) // 2], LLAMA_4_VISION, frames=4)
    assert 20 < video.total < 130
    assert video.note == (f"frames used 4 of {video.total}; its header says 5.0 s, its pictures end after "
                          f"{video.duration:.1f} s")


def test_sound_alone_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 8000
        frame.planes[0].update(bytes(4096))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(PunaError, match="holds no pictures"):
        read_video(file.getvalue(), LLAMA_4_VISION)


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PunaError, match=r"needs PyAV; install it with: pip install 'puna\[video\]'"):
        read_video(b"", LLAMA_4_VISION)
