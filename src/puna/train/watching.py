"""What a run leaves to look at: metrics.csv and experts.csv, and the same numbers as TensorBoard events."""

import csv
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

if TYPE_CHECKING:
    from puna.train.loop import Progress

COLUMNS = ("step", "loss", "norm", "rate", "tokens", "tokens_per_second", "roof", "expert_imbalance")
EXPERTS = ("step", "layer", "busiest", "idle")


class Metrics:
    """The tables of a run that goes on after step `first`; what a killed run wrote beyond that is taken out."""

    def __init__(
        self, folder: Path, first: int, method: Sequence[str], scores: Sequence[str], has_experts: bool
    ) -> None:
        columns = [*COLUMNS, *method, *scores]
        self._method, self._scores = method, scores
        kept = keep(folder / "metrics.csv", first, columns)
        self._files: list[TextIO] = [(folder / "metrics.csv").open("a", newline="")]
        self._metrics = csv.writer(self._files[0])
        self._experts = None
        if has_experts:
            keep(folder / "experts.csv", first, EXPERTS)
            self._files.append((folder / "experts.csv").open("a", newline=""))
            self._experts = csv.writer(self._files[1])
        self._events = Events(folder / "events.out.tfevents.puna")
        for row in kept:
            self._events.write(int(row["step"]), {k: float(v) for k, v in row.items() if v and k != "step"})

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
        self._events.close()

    def write(self, progress: "Progress") -> None:
        """One step. Numbers that a resumed run must repeat are written to their last digit."""
        values: dict[str, float] = {
            "loss": progress.loss, "norm": progress.norm, "rate": progress.rate, "tokens": progress.tokens,
            "tokens_per_second": round(progress.tokens_per_second), "roof": round(progress.roof, 4),
            "expert_imbalance": progress.worst_imbalance, **progress.metrics, **progress.scores,
        }  # fmt: skip
        names = (*COLUMNS[1:], *self._method, *self._scores)
        self._metrics.writerow([progress.step, *(values.get(name, "") for name in names)])
        layers: dict[str, float] = {}
        for layer, busiest in progress.imbalance.items():
            layers |= {f"experts/{layer}/busiest": busiest, f"experts/{layer}/idle": float(progress.idle[layer])}
            if self._experts is not None:
                self._experts.writerow([progress.step, layer, busiest, progress.idle[layer]])
        self._events.write(progress.step, values | layers)

    def flush(self) -> None:
        """Before a state is saved: the tables reach at least as far as it."""
        for file in self._files:
            file.flush()
        self._events.flush()


def keep(path: Path, step: int, columns: Sequence[str]) -> list[dict[str, str]]:
    """Leave in a table the header and whole rows up to `step`; give them."""
    rows: list[dict[str, str]] = []
    if path.exists() and step:
        with path.open(newline="", errors="replace") as file:
            found = [row for row in csv.reader(file) if len(row) == len(columns) and row[0].isdigit()]
        rows = [dict(zip(columns, row, strict=True)) for row in found if int(row[0]) <= step]
    new = path.with_name(f".{path.name}")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)  # a kill leaves the old table or the new one
    return rows


class Events:
    """TensorBoard's event file: records of length, checksum, protobuf `Event`, checksum (tensorflow/core/lib/io/
    record_writer.h, tensorflow/core/util/event.proto)."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._record(b"\x1a" + _sized(b"brain.Event:2"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        scalars = b"".join(
            b"\x0a" + _sized(b"\x0a" + _sized(name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in values.items()
        )
        self._record(b"\x10" + _varint(step) + b"\x2a" + _sized(scalars))

    def _record(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))

    def flush(self) -> None:
        """Let a TensorBoard that is running see it."""
        self._file.flush()

    def close(self) -> None:
        """The run is over."""
        self._file.close()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _table()


def _checksum(data: bytes) -> bytes:
    """TensorFlow's masked CRC-32C (tensorflow/core/lib/hash/crc32c.h)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
