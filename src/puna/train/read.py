"""Data files to rows: JSON Lines (plain, .gz, .xz), Parquet, and folders of text files. Rows keep where they stood."""

import gzip
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from puna.errors import PunaError

TEXT_FILES = (".txt", ".md")
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Found:
    """One row, or what is wrong with its line."""

    where: str  # file and line (or row)
    row: dict[str, Any] | None
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
                yield Found(str(file), {"text": text.decode("utf-8-sig")})
            except UnicodeDecodeError as error:
                yield Found(str(file), None, f"not UTF-8 at byte {error.start}; save the file as UTF-8")
        elif file.suffix == ".parquet":
            yield from _parquet(file)
        else:
            yield from _json_lines(file)


def _json_lines(path: Path) -> Iterator[Found]:
    number = 0
    try:
        with _opened(path) as lines:
            for number, data in enumerate(lines, 1):
                yield _json_line(data, f"{path}:{number}", first=number == 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PunaError(f"{path}: can't read the data after line {number}: {reason}") from None
    if not number:
        raise PunaError(f"{path}: the file is empty; give it rows, or take it out of the configuration")


def _opened(path: Path) -> IO[bytes]:
    opener: Any = OPENERS.get(path.suffix, open)
    handle: IO[bytes] = opener(path, "rb")
    return handle


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
        return Found(where, None, f"JSON that can't be read: {error}; mend the line")
    if not isinstance(row, dict):
        return Found(where, None, f"a row is an object, not a {type(row).__name__}; mend the line")
    return Found(where, row)


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
                yield Found(f"{path}:{number}", _without_none(row))
    except (ArrowException, OSError) as error:
        raise PunaError(f"{path}: no Parquet file that can be read: {error}") from None
    if not number:
        raise PunaError(f"{path}: the file has no rows")


def _without_none(value: Any) -> Any:
    """Parquet gives every object of a column all of the column's fields, None where the row has none."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
