"""Pictures and video to tiles: what a vision tower is given. numpy and Pillow; video through PyAV."""

from puna.sight.canvas import Canvas, canvas_for
from puna.sight.read import PictureLimits, read_picture
from puna.sight.tiles import Picture, tile
from puna.sight.video import Video, VideoLimits, read_video

__all__ = [
    "Canvas", "Picture", "PictureLimits", "Video", "VideoLimits", "canvas_for", "read_picture", "read_video", "tile",
]
