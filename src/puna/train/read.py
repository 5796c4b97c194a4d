"""Data files to rows: JSON Lines (plain, .gz, .xz), Parquet, and folders of text files. Rows keep where they stood."""

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from puna.errors import PunaError

TEXT_FILES = (".txt", ".md")
# what files of other kinds begin with, and what to do with them
BEGINNINGS = {
    b"\x1f\x8b": (".gz", "it is compressed by gzip: end its name in .gz"),
    b"\xfd7zXZ\0": (".xz", "it is compressed by xz: end its name in .xz"),
    b"PAR1": (".parquet", "it is Parquet: end its name in .parquet"),
    b"BZh": (None, "it is compressed by bzip2; use gzip or xz"),
    b"\x28\xb5\x2f\xfd": (None, "it is compressed by zstd; use gzip or xz"),
    b"PK\x03\x04": (None, "it is a zip archive; unpack it"),
    b"version https://git-lfs": (None, "it only points to the data, which git-lfs keeps: run `git lfs pull`"),
}
_LONE = re.compile("[\ud800-\udfff]")


class Fields(dict[str, Any]):
    """A row that remembers which of its fields were asked for: the others are told as unused."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.asked: set[object] = set()
        self.beside = False  # whether a file is named that lies beside the data

    def with_(self, changed: Mapping[str, Any]) -> "Fields":
        """A row with other values, whose fields count as asked for here, too."""
        other = Fields({**self, **changed})
        other.asked = self.asked
        return other

    def __contains__(self, name: object) -> bool:
        self.asked.add(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict's."""
        self.asked.add(name)
        return super().get(name, default)


@dataclass(frozen=True)
class Found:
    """One row, or what is wrong with its line."""

    where: str  # file and line (or row)
    row: Fields | None
    problem: str = ""


def data_files(path: Path) -> list[Path]:
    """The files that a source is made of: itself, or the text files below the folder. Raises PunaError."""
    if not path.exists():
        raise PunaError(f"{path}: no such data file; --data names one, or the folder of those in --config")
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.parts))
    if other := [p for p in files if p.suffix not in TEXT_FILES]:
        raise PunaError(
            f"{other[0]}: a folder of text holds {' and '.join(TEXT_FILES)} files alone; {len(other)} are others: "
            "take them out, or name the files one by one in --config"
        )
    if not files:
        raise PunaError(f"{path}: the folder holds no {' or '.join(TEXT_FILES)} file")
    return files


def read_rows(path: Path) -> Iterator[Found]:
    """Every row of a source, in order, good or not; blank lines count as rows that are no JSON. Raises PunaError where
    a file can't be read at all."""
    for file in data_files(path):
        if path.is_dir():
            text = file.read_bytes()
            try:
                yield Found(str(file), Fields({"text": text.decode("utf-8-sig")}))
            except UnicodeDecodeError as error:
                yield Found(str(file), None, f"not UTF-8 at byte {error.start}; save the file as UTF-8")
        elif file.suffix.lower() == ".parquet":
            yield from _parquet(file)
        else:
            yield from _json_lines(file)


def _json_lines(path: Path) -> Iterator[Found]:
    number = 0
    try:
        _check_kind(path)
        with _opened(path) as lines:
            for number, data in enumerate(lines, 1):
                yield _json_line(data, f"{path}:{number}", first=number == 1)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise PunaError(f"{path}: can't read the data after line {number}: {reason}") from None
    if not number:
        raise PunaError(f"{path}: the file is empty; give it rows, or take it out of the configuration")


def _check_kind(path: Path) -> None:
    """Raises PunaError for a file that is not what its name says, before its bytes are taken for lines."""
    with path.open("rb") as file:
        begun = file.read(32)
    for beginning, (suffix, cure) in BEGINNINGS.items():
        if begun.startswith(beginning) and path.suffix.lower() != suffix:
            raise PunaError(f"{path}: no JSON lines by its first bytes; {cure}")


def _opened(path: Path) -> IO[bytes]:
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lambda file: io.BufferedReader(_Xz(file))}
    handle: IO[bytes] = openers.get(path.suffix.lower(), lambda file: file.open("rb"))(path)
    return handle


class _Xz(io.RawIOBase):
    """Streams of xz end to end, padded with zeros. lzma's own reader ends without a word where what follows a stream is
    none: rows would be left out silently."""

    def __init__(self, path: Path) -> None:
        self._file, self._decoder = path.open("rb"), lzma.LZMADecompressor()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some of the next bytes."""
        found = b""
        while not found:
            given = self._file.read(io.DEFAULT_BUFFER_SIZE) if self._decoder.eof or self._decoder.needs_input else b""
            if self._decoder.eof:
                following = (self._decoder.unused_data + given).lstrip(b"\0")
                if not following and not given:
                    return 0
                if not following:
                    continue
                self._decoder, given = lzma.LZMADecompressor(), following
            elif self._decoder.needs_input and not given:
                raise EOFError("it ends before its end-of-stream marker")
            found = self._decoder.decompress(given, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Also the file."""
        self._file.close()
        super().close()


def _json_line(data: bytes, where: str, first: bool) -> Found:
    if first and data.startswith(b"\xef\xbb\xbf"):
        return Found(where, None, "begins with a byte order mark; save the file as UTF-8 without it")
    try:
        text = data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        return Found(where, None, f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8")
    if not text.strip():
        return Found(where, None, "not JSON: the line is blank; delete it")
    try:
        row = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return Found(where, None, f"not JSON: {error.msg}, column {error.colno}; mend the line")
    except (RecursionError, ValueError) as error:
        reason = str(error).partition("; use sys.")[0]  # Python's advice on huge integers is none for users
        return Found(where, None, f"JSON that can't be read: {reason}; mend the line")
    if not isinstance(row, dict):
        return Found(where, None, f"a row is an object, not a {type(row).__name__}; mend the line")
    if b"\\ud" in data.lower() and (field := _lone_surrogate(row)) is not None:
        return Found(where, None, f"{field}: has half of a surrogate pair, which is no character; mend the line")
    return Found(where, Fields(row))


def _lone_surrogate(row: dict[str, Any]) -> str | None:
    """The first field of a row whose text, or whose key, holds one."""
    left: list[tuple[str, Any]] = [("", row)]
    while left:
        field, value = left.pop()
        if isinstance(value, str) and _LONE.search(value):
            return field
        if isinstance(value, dict):
            if any(map(_LONE.search, value)):
                return field or "a field's name"
            left += [(f"{field}.{key}".lstrip("."), each) for key, each in reversed(value.items())]
        elif isinstance(value, list):
            left += [(f"{field}[{at}]", each) for at, each in reversed(list(enumerate(value)))]
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in {k for k, _ in pairs[:at]})
        raise ValueError(f"the field {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _parquet(path: Path) -> Iterator[Found]:
    try:
        from pyarrow import ArrowException, parquet  # an optional extra
    except ImportError:
        raise PunaError(f"{path}: Parquet needs pyarrow; pip install 'puna[parquet]', or give JSON lines") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Found(f"{path}:{number}", Fields(_without_none(row)))
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: values Python can't hold
        raise PunaError(f"{path}: no Parquet file that can be read, after row {number}: {error}") from None
    if not number:
        raise PunaError(f"{path}: the file has no rows")


def _without_none(value: Any) -> Any:
    """Parquet gives every object of a column all of the column's fields, None where the row has none."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
