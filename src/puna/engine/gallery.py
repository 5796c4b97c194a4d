"""Room for what was seen: features of pictures by key, as many as fit, and how many bytes they take."""

from collections import Counter, OrderedDict
from collections.abc import Iterable

from puna.family.config import ModelConfig
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.model.pictures import PictureFeatures

LARGEST_KEPT = 8  # as many pictures of the largest size find room


class Gallery:
    """Features by key: of the pictures in use, and of as many others as fit; those unused for longest go first.

    room: bytes. Held pictures count by what they will take, so that whoever begins to look finds room for all of its
    own.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.most = 0  # bytes that were ever in use
        self._known: OrderedDict[bytes, PictureFeatures] = OrderedDict()
        self._holders: Counter[bytes] = Counter()
        self._sizes: dict[bytes, int] = {}  # of all that is held or known

    @property
    def used(self) -> int:
        """Bytes held and kept."""
        return sum(self._sizes.values())

    def __contains__(self, key: bytes) -> bool:
        """Whether a picture has its room, be it held or kept."""
        return key in self._sizes

    def get(self, key: bytes) -> PictureFeatures | None:
        """A picture's features, if known."""
        return self._known.get(key)

    def hold(self, sizes: dict[bytes, int]) -> bool:
        """Keep room for these pictures until `release`. False, and nothing changed, where others hold too much."""
        held = sum(self._sizes[key] for key in self._holders if key not in sizes)
        if held + sum(sizes.values()) > self.room:
            return False
        self._holders.update(sizes.keys())
        self._sizes |= sizes
        for key in [key for key in self._known if key not in self._holders]:
            if self.used <= self.room:
                break
            del self._known[key], self._sizes[key]
        self.most = max(self.most, self.used)
        return True

    def put(self, key: bytes, features: PictureFeatures) -> None:
        """A held picture's features."""
        self._known[key] = features

    def release(self, keys: Iterable[bytes]) -> None:
        """Undo one `hold`."""
        for key in keys:
            self._holders[key] -= 1
            if self._holders[key]:
                continue
            del self._holders[key]
            if key in self._known:
                self._known.move_to_end(key)
                self._sizes[key] = self._known[key].bytes()
            else:
                del self._sizes[key]


def picture_bytes(config: ModelConfig, tiles: int, itemsize: int) -> int:
    """What the features of a picture of so many tiles (with the global one) take."""
    vision = config.vision
    if isinstance(vision, Llama32Vision):
        tokens = (vision.max_tiles if vision.reference == "transformers" else tiles) * (vision.patches + 1)
        return 2 * len(vision.cross_attention_before) * tokens * config.num_kv_heads * config.head_dim * itemsize
    assert vision is not None
    return 2 * tiles * vision.tokens_per_tile * config.hidden_size * itemsize  # kept, and laid out for a prompt


def most_tiles(vision: Llama4Vision | Llama32Vision) -> int:
    """Tiles that one prompt may show."""
    return LARGEST_KEPT * vision.tiles((1, vision.max_tiles))


def gallery_bytes(config: ModelConfig, itemsize: int) -> int:
    """Room for features, in bytes; 0 for a model without vision."""
    if config.vision is None:
        return 0
    return LARGEST_KEPT * picture_bytes(config, config.vision.tiles((1, config.vision.max_tiles)), itemsize)


def looking_bytes(config: ModelConfig, itemsize: int) -> int:
    """Activations of a tower at its widest: of one tile (Llama 4), or of one picture (Llama 3.2)."""
    vision = config.vision
    if vision is None:
        return 0
    tiles = 1 if isinstance(vision, Llama4Vision) else vision.max_tiles
    wide, inner = vision.hidden_size, vision.intermediate_size
    if isinstance(vision, Llama32Vision):  # what the projector reads and gives
        kept = len(vision.intermediate_layers) + 1
        widest = max(4 * wide, 2 * inner, kept * wide + config.hidden_size)
    else:
        kept = vision.pixel_shuffle**2
        widest = max(4 * wide, 2 * inner)
    row = (widest + (2 + kept) * wide) * itemsize + max(inner, kept * wide)  # with a product's input in 8 bits
    pixels = tiles * 3 * vision.tile_side**2 * (4 + 2 * itemsize)
    return pixels + tiles * (vision.patches + 8) * row
