"""A source's examples as token ids in flat arrays, checked row by row, and kept on disk by the hash of what made them.

Legend: E examples, M documents, K tokens, I pictures.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import puna.sight
import puna.text
from puna.errors import PunaError
from puna.text.pictures import Vision
from puna.text.sentencepiece_ import SentencePieceBackend
from puna.text.tokenizer import Tokenizer
from puna.train.method import Document, Example, Method
from puna.train.pictures import PictureFile, open_pictures
from puna.train.read import Found, data_files, read_rows

MOST_ERRORS = 20  # told at once
_GROUP = 512  # rows that are tokenised together
ARRAYS = ("tokens", "counted", "documents", "examples", "shows", "pictures", "picture_bytes", "low")


@dataclass(frozen=True)
class Tokenised:
    """Examples of one source: example e has documents examples[e]..examples[e + 1], document m the tokens
    documents[m]..documents[m + 1] and the pictures shows[m]..shows[m + 1], picture i a file of the bytes
    pictures[i]..pictures[i + 1]."""

    tokens: NDArray[np.uint32]  # [K]
    counted: NDArray[np.bool_]  # [K]
    documents: NDArray[np.int64]  # [M + 1]
    examples: NDArray[np.int64]  # [E + 1]
    shows: NDArray[np.int64]  # [M + 1]
    pictures: NDArray[np.int64]  # [I + 1]
    picture_bytes: NDArray[np.uint8]
    low: NDArray[np.bool_]  # [I]
    extras: list[dict[str, Any]]  # [E], or empty where no example has any
    unused: list[str]  # fields of rows that the method doesn't read
    where: str  # the source
    beside: bool = False  # whether rows name files that lie beside it

    def __len__(self) -> int:
        return len(self.examples) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document [M]."""
        return np.diff(self.documents)

    @property
    def fingerprint(self) -> str:
        """A hash of all of it."""
        found = hashlib.sha256(json.dumps(self.extras).encode())
        for name in ARRAYS:
            found.update(np.ascontiguousarray(getattr(self, name)).data)
        return found.hexdigest()

    def part(self, document: int, start: int, end: int) -> Document:
        """Tokens start..end of a document, as one of its own; one with pictures is taken whole."""
        begin = int(self.documents[document])
        counted = np.array(self.counted[begin + start : begin + end])
        counted[:1] = False
        pictures = tuple(
            PictureFile(self.picture_bytes[self.pictures[i] : self.pictures[i + 1]].tobytes(), bool(self.low[i]))
            for i in range(self.shows[document], self.shows[document + 1])
        )
        return Document(np.asarray(self.tokens[begin + start : begin + end]), counted, pictures)

    def example(self, index: int) -> Example:
        """One, whole."""
        first, last = int(self.examples[index]), int(self.examples[index + 1])
        sizes = self.lengths[first:last]
        parts = tuple(self.part(first + i, 0, int(size)) for i, size in enumerate(sizes))
        return Example(parts, self.extras[index] if self.extras else {})


def tokenise(
    path: Path, method: Method, tokenizer: Tokenizer, cache: Path | None, vision: Vision | None = None
) -> Tokenised:
    """A source's rows by the method's reading of them; from `cache` where the same files were read before by the same
    method, tokenizer and code. vision: how the base sees, if it does.

    Raises PunaError naming file, line and field of every bad row, up to 20.
    """
    if cache is None:
        return _read(path, method, tokenizer, vision)
    key = hashlib.sha256(f"{method.name} {_hash_of_tokenizer(tokenizer)} {vision} {_hash_of_code()}".encode())
    for file in data_files(path):
        with file.open("rb") as handle:
            key.update(hashlib.file_digest(handle, "sha256").digest() + file.suffix.encode())
    folder = cache / key.hexdigest()[:32]
    if (folder / "facts.json").is_file():
        try:
            return _load(folder, path)
        except (OSError, ValueError, KeyError):  # what a full disk or somebody left: read again
            shutil.rmtree(folder, ignore_errors=True)
    read = _read(path, method, tokenizer, vision)
    if read.beside:
        return read  # files that the hash doesn't know
    _store(read, folder)
    return _load(folder, path)


def _read(path: Path, method: Method, tokenizer: Tokenizer, vision: Vision | None) -> Tokenised:
    tokens: list[NDArray[np.uint32]] = []
    counted: list[NDArray[np.bool_]] = []
    sizes, counts, shows, problems = [0], [0], [0], []
    files: list[PictureFile] = []
    beside = False
    extras: list[dict[str, Any]] = []
    unused: dict[str, None] = {}
    for found, outcome in _outcomes(path, method, tokenizer, vision):
        if isinstance(outcome, str):
            problems.append(outcome)
            if len(problems) >= MOST_ERRORS:
                break
            continue
        if found.row is not None:
            unused |= {name: None for name in found.row if name not in found.row.asked}
            beside = beside or found.row.beside
        for document in outcome.documents:
            tokens.append(document.tokens)
            counted.append(document.counted)
            sizes.append(len(document.tokens))
            files += document.pictures
            shows.append(len(document.pictures))
        counts.append(len(outcome.documents))
        extras.append(dict(outcome.extra))
    if problems:
        more = f"\n{path}: after {MOST_ERRORS} bad rows the rest was not read" if len(problems) >= MOST_ERRORS else ""
        raise PunaError("\n".join(problems) + more)
    return Tokenised(
        np.concatenate(tokens), np.concatenate(counted), np.cumsum(sizes), np.cumsum(counts), np.cumsum(shows),
        np.cumsum([0, *(len(file.data) for file in files)]), np.frombuffer(b"".join(f.data for f in files), np.uint8),
        np.array([file.low for file in files], np.bool_), extras if any(extras) else [], list(unused), str(path),
        beside,
    )  # fmt: skip


def _outcomes(
    path: Path, method: Method, tokenizer: Tokenizer, vision: Vision | None
) -> Iterator[tuple[Found, Example | str]]:
    """Every row with its example, or with what is wrong. Threads, because tokenizers leave Python alone meanwhile."""

    def made(found: Found) -> tuple[Found, Example | str]:
        if found.row is None:
            return found, f"{found.where}: {found.problem}"
        try:
            row = found.row if vision is None else open_pictures(found.row, vision, path.parent)
            example = method.example(row, tokenizer)
        except PunaError as error:
            return found, f"{found.where}: {error}"
        if not any(document.counted.any() for document in example.documents):
            return found, f"{found.where}: nothing in it can be learned: one token, or no counted one; delete the line"
        return found, example

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for group in _groups(read_rows(path)):
            yield from pool.map(made, group)


def _groups(rows: Iterable[Found]) -> Iterator[list[Found]]:
    source = iter(rows)
    while group := list(islice(source, _GROUP)):
        yield group


def _store(read: Tokenised, folder: Path) -> None:
    """Whole or not at all: another run may read the same folder."""
    new = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
        for name in ARRAYS:
            np.save(new / f"{name}.npy", getattr(read, name))
        (new / "facts.json").write_text(json.dumps({"extras": read.extras, "unused": read.unused}))
        new.rename(folder)
    except OSError as error:
        if (folder / "facts.json").is_file():
            return  # another run was quicker
        raise PunaError(f"{folder}: can't keep the tokenised data: {error.strerror}; set PUNA_CACHE") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _load(folder: Path, path: Path) -> Tokenised:
    facts = json.loads((folder / "facts.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return Tokenised(**arrays, extras=facts["extras"], unused=facts["unused"], where=str(path))


def _hash_of_tokenizer(tokenizer: Tokenizer) -> str:
    backend = tokenizer.backend
    spec = backend.tokenizer_json()
    model = backend.model.serialize() if isinstance(backend, SentencePieceBackend) else json.dumps(spec).encode()
    said = (sorted(tokenizer.control.items()), tokenizer.bos_id, tokenizer.generation, tokenizer.chat_template)
    return hashlib.sha256(model + repr(said).encode()).hexdigest()


def _hash_of_code() -> str:
    """Of the sources that turn rows into ids, so that a newer version doesn't take an older one's reading."""
    found = hashlib.sha256()
    for folder in (*puna.text.__path__, *puna.sight.__path__, str(Path(__file__).parent)):
        for file in sorted(Path(folder).glob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()
