"""Checks shared by all formats: JSON files, names that stay in their folder, the set of tensors, finite values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.checkpoint.source import Source

Shape = tuple[int, ...]
_LISTED = 4  # names given in full in one message
_REQUIRED = object()
_LARGEST = 2**40  # of any count or width
_MOST_LAYERS = 100_000


def read_json(path: Path, hint: str = "The download may be incomplete: fetch it again.") -> dict[str, Any]:
    """A JSON object from disk. Raises PunaError where the file is missing or is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PunaError(f"{path} is missing. {hint}") from None
    except (ValueError, RecursionError) as error:
        raise PunaError(f"{path} is not valid JSON: {error}. {hint}") from None
    except OSError as error:
        raise PunaError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(value, dict):
        raise PunaError(f"{path} holds a JSON {type(value).__name__} where an object is expected. {hint}")
    return value


class Fields:
    """Typed reading of a JSON object: every mistake becomes a PunaError that names file and key."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, problem: str) -> PunaError:
        """The error to raise for one key."""
        return PunaError(f"{self.path}: {self.prefix}{key} {problem}.")

    def _wrong(self, key: str, problem: str) -> PunaError:
        return self.error(key, f"{problem}. Mend it, or fetch the file again")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self._wrong(key, "is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """An integer; without a default the key is required."""
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._wrong(key, f"must be an integer, not {value!r}")
        if value is not None and abs(value) > _LARGEST:
            raise self.error(key, f"is {value}, which no model has")
        return value

    def layers(self, key: str) -> int:
        """A number of layers, bounded so that lists of that length can be made."""
        value: int = self.integer(key)
        if not 1 <= value <= _MOST_LAYERS:
            raise self._wrong(key, f"must be a number of layers, not {value}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number, as float; without a default the key is required."""
        value = self._get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self._wrong(key, f"must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; 0 and other integers count as such (first Llama 4 configs: `attn_temperature_tuning: 4`)."""
        value = self._get(key, default)
        if not isinstance(value, bool | int):
            raise self._wrong(key, f"must be true or false, not {value!r}")
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string or the default."""
        value = self._get(key, default)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, f"must be a string, not {value!r}")
        return value

    def integers(self, key: str) -> tuple[int, ...] | None:
        """A list of integers, a single one counting as a list; None where absent."""
        value = self.values.get(key)
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self._wrong(key, f"must be a list of integers, not {value!r}")
        return tuple(items)

    def section(self, key: str) -> "Fields | None":
        """A nested object, or None where absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, f"must be an object, not {value!r}")
        return Fields(value, self.path, f"{self.prefix}{key}.")


def weights_file(folder: Path, name: object, listed_in: Path) -> Path:
    """The real path of a weights file that an index or a folder listing names.

    It must lie in the folder, or be the hub cache's link from `snapshots/<revision>/` into `blobs/` of the same model.
    Raises PunaError for anything that leads elsewhere, and where the file is missing.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise PunaError(f"{listed_in} names the file {name!r}, which is no file name. The index is damaged.")
    root = folder.resolve()
    real = (root / name).resolve()
    inside = real.is_relative_to(root) and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside and root.parent.name == "snapshots" and len(Path(name).parts) == 1:
        inside = real.is_relative_to(root.parent.parent / "blobs")
    if not inside:
        raise PunaError(f"{listed_in} names {name!r}, which leads out of {folder} to {real}. Do not trust this file.")
    if not real.is_file():
        raise PunaError(f"{folder / name} is missing, though {listed_in} lists it. Download the checkpoint again.")
    return folder / name


def check_shapes(source: "Source", expected: Mapping[str, Shape]) -> None:
    """Compare what a checkpoint holds with what its decoder needs, before any weight is read.

    Raises PunaError that names the missing, extra and misshapen tensors.
    """
    found = source.shapes()
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    problems = []
    if missing:
        hint = " (config.json does not say that the embedding is tied)" if missing == ["lm_head.weight"] else ""
        problems.append(f"missing {_some(missing)}{hint}")
    if extra:
        problems.append(f"not part of this architecture: {_some([source.where(name) for name in extra])}")
    wrong = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    if wrong:
        shapes = [f"{source.where(n)} has shape {list(found[n])}, needs {list(expected[n])}" for n in wrong]
        problems.append(f"misshapen: {_some(shapes)}")
    if problems:
        raise PunaError(
            f"{source.path}: the weights do not fit the configuration; {'; '.join(problems)}. "
            "Check that the configuration belongs to these weights and that every file was downloaded."
        )


def _some(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def check_fp8(values: Tensor, where: str) -> None:
    """Raise PunaError for NaN among float8_e4m3fn, which has no infinity: 0x7f and 0xff."""
    if not values.is_meta and bool((values.view(torch.uint8).bitwise_and(0x7F) == 0x7F).any()):
        raise PunaError(f"{where} holds NaN values. The file is damaged: fetch it again.")


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise PunaError if a tensor holds NaN or infinity. One pass, no temporary of the tensor's size."""
    if not tensor.is_floating_point():
        raise PunaError(f"{where} holds {str(tensor.dtype).removeprefix('torch.')} values where weights are expected.")
    if tensor.is_meta:
        return
    low, high = torch.aminmax(tensor)  # both NaN if any element is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise PunaError(f"{where} holds NaN or infinite values. The file is damaged or its training diverged: "
                        "fetch it again, or use an earlier checkpoint.")
