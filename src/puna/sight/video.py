"""A video as a few frames, evenly spaced in time. Needs PyAV (`pip install 'puna[video]'`)."""

import bisect
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from PIL import Image

from puna.errors import PunaError
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.sight.tiles import Picture, tile


@dataclass(frozen=True)
class VideoLimits:
    """What a video file may hold: bytes, seconds, frames in all, and pixels a frame."""

    bytes: int = 512 * 2**20
    seconds: float = 3600.0
    frames: int = 250_000
    pixels: int = 8192 * 4320


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, one tile each, in order; `seconds` says when each is shown, counted from the first frame of
    the file; the file holds `total` frames and `duration` seconds, and its header says that it lasts `claimed` seconds
    (0: says nothing)."""

    frames: list[Picture]
    seconds: list[float]
    total: int
    duration: float
    claimed: float = 0.0

    @property
    def note(self) -> str:
        """What of the video is seen, to be told to the user."""
        used = f"frames used {len(self.frames)} of {self.total}"
        if self.claimed > self.duration + 1:
            return f"{used}; its header says {self.claimed:.1f} s, its pictures end after {self.duration:.1f} s"
        return used


def read_video(source: bytes | Path, vision: Llama4Vision | Llama32Vision, frames: int = 16,
               limits: VideoLimits | None = None, name: str = "") -> Video:
    """At most `frames` frames of a video (MP4, MOV, WebM, MKV, AVI, animated GIF), each as one tile.

    Frame i of n is the one on the screen in the middle of the i-th of n equally long parts; a video with fewer frames
    gives them all. The models know no time in a video: the frames are pictures in order, and whoever lays out the
    prompt may tell the seconds. Raises PunaError for what is no such video, damaged, or over the limits, and where
    PyAV is not installed.
    """
    if frames < 1:
        raise PunaError(f"frames is {frames}; give at least 1")
    limits = limits or VideoLimits()
    name = name or (str(source) if isinstance(source, Path) else "the video")
    with _opened(source, limits, name) as (av, file, kind):
        # every packet's time is read first: what the header tells of length and count is often missing or wrong
        with _container(av, file, kind, name) as container:
            times, keys, unit, last = _packets(container, limits, name)
            claimed = (container.duration or 0) / av.time_base
        duration = (times[-1] - times[0] + last) * unit
        wanted = _chosen(times, last, frames)
        file.seek(0)
        with _container(av, file, kind, name) as container:
            images = list(_decoded(container, wanted, keys, name))
    one_tile = replace(vision, max_tiles=1)
    return Video([tile(image, one_tile) for image in images], [round((at - times[0]) * unit, 3) for at in wanted],
                 len(times), round(duration, 3), round(claimed, 3))


@contextmanager
def _opened(source: bytes | Path, limits: VideoLimits, name: str) -> Iterator[tuple[ModuleType, BinaryIO, str]]:
    try:
        import av
    except ImportError:
        raise PunaError("reading a video needs PyAV; install it with: pip install 'puna[video]'") from None
    try:
        file: BinaryIO = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    except OSError as error:
        raise PunaError(f"{name} can't be read: {error.strerror}") from None
    with file:
        size = file.seek(0, io.SEEK_END)
        if size > limits.bytes:
            raise PunaError(f"{name} has {size:,} bytes, above the limit of {limits.bytes:,}; cut it")
        file.seek(0)
        kind = _kind(file.read(16))
        if not kind:
            raise PunaError(f"{name} is {'empty' if not size else 'of no known video type'}; give MP4, MOV, WebM, MKV, "
                            "AVI or an animated GIF")
        file.seek(0)
        yield av, file, kind


def _kind(head: bytes) -> str:
    """FFmpeg's name of the file's format by its first bytes, "" where it is none of those that we read. FFmpeg is told
    the format rather than left to guess: some that it knows (playlists) make it open other files and addresses."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return ""


@contextmanager
def _container(av: ModuleType, file: BinaryIO, kind: str, name: str) -> Iterator[Any]:
    try:
        with av.open(file, format=kind, metadata_errors="replace") as container:
            if not container.streams.video:
                raise PunaError(f"{name} holds no pictures ({kind} with sound alone)")
            yield container
    except av.FFmpegError as error:
        raise PunaError(f"{name} is cut off or damaged ({error.strerror}); send it again, or convert it to MP4"
                        ) from None


def _packets(container: Any, limits: VideoLimits, name: str) -> tuple[list[int], list[int], float, int]:
    """When each frame of the video is shown, and when each key frame, both ascending; the seconds of one unit of time;
    and for how many units the last frame is shown."""
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.pixels:
        raise PunaError(f"{name} is {width} x {height} pixels, above the limit of {limits.pixels:,}; make it smaller")
    unit, start = float(stream.time_base), None
    times: list[int] = []
    keys: list[int] = []
    lasting = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        at = packet.pts if packet.pts is not None else packet.dts
        if at is None:
            raise PunaError(f"{name} does not tell when its frames are shown; convert it to MP4")
        start = at if start is None else start
        if len(times) >= limits.frames or (at - start) * unit > limits.seconds:
            raise PunaError(f"{name} is longer than {limits.seconds:,.0f} seconds or {limits.frames:,} frames; cut it")
        times.append(at)
        if packet.is_keyframe:
            keys.append(at)
        lasting = packet.duration or lasting
    if not times:
        raise PunaError(f"{name} has no frames; send it again, or convert it to MP4")
    times.sort()
    keys.sort()
    if not lasting and len(times) > 1:
        lasting = (times[-1] - times[0]) // (len(times) - 1)
    return times, keys, unit, lasting


def _chosen(times: list[int], last: int, count: int) -> list[int]:
    """The times of the frames that are on the screen in the middle of `count` equally long parts, each once."""
    if len(times) <= count:
        return times
    length = times[-1] - times[0] + last
    middles = (times[0] + (2 * part + 1) * length / (2 * count) for part in range(count))
    return sorted({times[max(bisect.bisect_right(times, middle) - 1, 0)] for middle in middles})


def _decoded(container: Any, wanted: list[int], keys: list[int], name: str) -> Iterator[Image.Image]:
    """The frames shown at the wanted times (ascending). It jumps to a key frame where one lies between two of them."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    decoder = container.decode(stream)
    at: int | None = None
    for time in wanted:
        key = keys[bisect.bisect_right(keys, time) - 1] if keys and keys[0] <= time else None
        if key is not None and (at is None or key > at):
            container.seek(key, stream=stream, backward=True)
            decoder = container.decode(stream)
        for frame in decoder:
            at = frame.pts if frame.pts is not None else frame.dts
            if at is not None and at >= time:
                yield _upright(frame, stream)
                break
        else:
            raise PunaError(f"{name} is cut off or damaged: no frame at {float(time * stream.time_base):.2f} s; "
                            "send it again, or convert it to MP4")


def _upright(frame: Any, stream: Any) -> Image.Image:
    """The frame in RGB as it is shown: with square pixels, and turned as the file says."""
    image: Image.Image = frame.to_image()
    ratio = stream.sample_aspect_ratio or 1
    if ratio != 1:
        image = image.resize((max(round(image.width * float(ratio)), 1), image.height), Image.Resampling.BILINEAR)
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
