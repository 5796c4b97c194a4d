"""Read GGUF files of architecture `llama` and `llama4`.

Legend: D model width, F feed-forward width, E experts, K head width.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from puna.checkpoint import gguf_rope
from puna.checkpoint.fewbits import FALLBACK_GROUP, fallback
from puna.checkpoint.gguf_config import Metadata, read_config
from puna.checkpoint.gguf_format import TensorInfo, encoded_bytes, read_header
from puna.checkpoint.gguf_names import Slot, slots
from puna.checkpoint.rotary import to_halves
from puna.checkpoint.source import GenerationDefaults
from puna.checkpoint.validate import check_finite
from puna.errors import PunaError
from puna.model.quantized import Quantized, Weight, by_rows, stacked
from puna.text.tokenizer import Tokenizer

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_QUANTISED = (
    GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
)  # fmt: skip
_KEPT = {GGMLQuantizationType.Q8_0: 8, GGMLQuantizationType.Q4_0: 4}  # whose bits `read_packed` keeps
_CHUNK = 1 << 20  # elements dequantised at a time, so that working memory stays far below the model's


class GGUFSource:
    """An opened GGUF file; see `puna.checkpoint.source.Source`.

    Raises PunaError where the file is damaged, is split, or is no Llama text model that our decoder can represent.
    """

    format = "gguf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self.fields: Mapping[str, Any] = header.fields
        self._tensors = dict(header.tensors)
        parts = Metadata(self.path, self.fields).integer("split.count", 1)
        if parts > 1:
            raise PunaError(
                f"{self.path} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART OUT.gguf"
            )
        if "token_embd.weight" not in self._tensors:
            raise PunaError(f"{self.path}: tensor 'token_embd.weight' is missing: this holds no text model")
        rope = self._tensors.pop(gguf_rope.TENSOR, None)
        self.config = read_config(
            self.path,
            self.fields,
            vocab_size=self._tensors["token_embd.weight"].shape[0],
            tied="output.weight" not in self._tensors,
            blocks=self._blocks(),
            rope_divisors=self._load(rope).float().numpy() if rope else None,
        )
        self._slots = {slot.name: slot for slot in slots(self.config)}

    @property
    def generation(self) -> GenerationDefaults:
        """`general.sampling.*`, and the stop tokens."""
        fields = Metadata(self.path, self.fields)
        keys = {kind: f"general.sampling.{kind}" for kind in ("temp", "top_p", "top_k")}
        return GenerationDefaults(
            temperature=fields.number(keys["temp"]) if keys["temp"] in fields else None,
            top_p=fields.number(keys["top_p"]) if keys["top_p"] in fields else None,
            top_k=fields.integer(keys["top_k"]) if keys["top_k"] in fields else None,
            eos_token_ids=self.config.eos_token_ids,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Source.notes`."""
        return ()

    @property
    def packed_notes(self) -> tuple[str, ...]:
        """See `Source.packed_notes`."""
        other = Counter(info.type.name for info in self._tensors.values() if info.type in _QUANTISED)
        counts = [f"{count} of {name}" for name, count in other.items() if GGMLQuantizationType[name] not in _KEPT]
        if not counts:
            return ()
        return (f"Re-packed as int8 with a scale for {FALLBACK_GROUP} inputs: {', '.join(counts)} tensors.",)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the file's metadata, or None where it has none."""
        if self.fields.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
            return None
        from puna.text import tokenizer_from_gguf

        try:
            return tokenizer_from_gguf(self.fields)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PunaError(f"{self.path}: the metadata 'tokenizer.*' is damaged ({error!r})") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        left = dict(self._tensors)
        found: dict[str, tuple[int, ...]] = {}
        for slot in self._slots.values():
            parts = [left.pop(name).shape for name in slot.tensors if name in left]
            if len(parts) == len(slot.tensors):
                found[slot.name] = slot.shape if set(parts) == {slot.stored_shape} else parts[0]
        return found | {name: info.shape for name, info in left.items()}

    def where(self, name: str) -> str:
        slot = self._slots.get(name)
        stored = " and ".join(map(repr, slot.tensors)) if slot else repr(name)
        return f"{self.path}: tensor {stored}"

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own; F32, F16 and BF16 as stored, quantised ones as float32.

        Raises:
            PunaError: a type other than F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K, or a file that shrank meanwhile.
        """
        slot = self._slots[name]
        infos = [self._tensors[part] for part in slot.tensors]
        if slot.kind == "gate_up":
            return self._gate_up(slot, *infos)
        if slot.kind == "down_experts":
            return self._down_experts(slot, infos[0])
        tensor = self._load(infos[0])
        if slot.kind == "rotary" and self.config.architecture == "llama":
            return to_halves(tensor, slot.heads)
        return tensor

    def read_packed(self, name: str) -> Weight | list[Weight]:
        """See `Source.read_packed`; Q8_0 and Q4_0 keep their bits."""
        slot = self._slots[name]
        infos = [self._tensors[part] for part in slot.tensors]
        if slot.kind in ("gate_up", "down_experts"):
            return [self.read_expert(name, expert, packed=True) for expert in range(slot.shape[0])]
        weight = self._bits(infos[0])
        if slot.kind == "rotary" and self.config.architecture == "llama":
            return by_rows(weight, partial(to_halves, heads=slot.heads))
        return weight

    def read_expert(self, name: str, expert: int, packed: bool) -> Weight:
        """See `Source.read_expert`."""
        infos = [self._tensors[part] for part in self._slots[name].tensors]
        return stacked([self._bits(info, expert) if packed else self._load(info, expert) for info in infos])

    def _gate_up(self, slot: Slot, gate: TensorInfo, up: TensorInfo) -> Tensor:
        """Two tensors [E, F, D] -> [E, D, 2F], an expert at a time."""
        inner = slot.shape[-1] // 2
        out = torch.empty(slot.shape, dtype=torch.promote_types(self._dtype(gate), self._dtype(up)))
        for expert in range(slot.shape[0]):
            out[expert, :, :inner] = self._load(gate, expert).T
            out[expert, :, inner:] = self._load(up, expert).T
        return out

    def _down_experts(self, slot: Slot, info: TensorInfo) -> Tensor:
        """[E, D, F] -> [E, F, D], an expert at a time."""
        out = torch.empty(slot.shape, dtype=self._dtype(info))
        for expert in range(slot.shape[0]):
            out[expert] = self._load(info, expert).T
        return out

    def _dtype(self, info: TensorInfo) -> torch.dtype:
        if info.type not in _PLAIN and info.type not in _QUANTISED:
            known = ", ".join(type_.name for type_ in (*_PLAIN, *_QUANTISED))
            raise PunaError(
                f"{self.path}: tensor {info.name!r} is stored as {info.type.name}; puna reads {known}. "
                "Fetch or make the file in one of these."
            )
        return _PLAIN.get(info.type, torch.float32)

    def _place(self, info: TensorInfo, index: int | None) -> tuple[tuple[int, ...], int]:
        """Shape and offset of a stored tensor, or of one expert of it."""
        if index is None:
            return info.shape, info.offset
        return info.shape[1:], info.offset + index * encoded_bytes(info.shape[1:], info.type)

    def _bits(self, info: TensorInfo, index: int | None = None) -> Weight:
        """One stored tensor, or one expert of it, in few bits if it is stored so."""
        if info.type not in _KEPT:
            weight = self._load(info, index)
            return weight if info.type in _PLAIN else fallback(weight)
        shape, offset = self._place(info, index)
        block, size = GGML_QUANT_SIZES[info.type]
        rows, columns = prod(shape[:-1]), shape[-1]
        blocks = torch.empty((rows, columns // block, size), dtype=torch.uint8)  # 2 bytes of scale, then the values
        if not blocks.is_meta:
            with self.path.open("rb") as file:
                file.seek(offset)
                self._fill(file, blocks.numpy(), info)
        scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        check_finite(scales, f"{self.path}: tensor {info.name!r}")
        codes = blocks[..., 2:]
        if info.type == GGMLQuantizationType.Q8_0:
            return Quantized(8, codes.contiguous().view(torch.int8).view(rows, columns), scales, block)
        halves = torch.cat((codes & 15, codes >> 4), -1)  # low nibbles are the first half of a block
        return Quantized(4, halves.view(torch.int8).sub_(8).view(rows, columns), scales, block)

    def _load(self, info: TensorInfo, index: int | None = None) -> Tensor:
        """One stored tensor, or one expert of it, dequantised."""
        shape, offset = self._place(info, index)
        out = torch.empty(shape, dtype=self._dtype(info))
        if out.is_meta:
            return out
        with self.path.open("rb") as file:
            file.seek(offset)
            if info.type in _PLAIN:
                self._fill(file, out.view(torch.uint8).numpy(), info)
            else:
                self._dequantise(file, out.numpy().reshape(-1, shape[-1]), info)
        return out

    def _dequantise(self, file: BufferedReader, out: "np.ndarray[Any, Any]", info: TensorInfo) -> None:
        rows, width = out.shape
        step = max(1, _CHUNK // width)
        row_bytes = encoded_bytes((width,), info.type)
        for first in range(0, rows, step):
            raw = np.empty((min(step, rows - first), row_bytes), dtype=np.uint8)
            self._fill(file, raw, info)
            # damaged scales overflow to infinity here; whoever loads reports them with the tensor's name
            with np.errstate(all="ignore"):
                out[first : first + step] = dequantize(raw, info.type)

    def _fill(self, file: BufferedReader, buffer: "np.ndarray[Any, Any]", info: TensorInfo) -> None:
        if file.readinto(buffer.reshape(-1).data) != buffer.nbytes:
            raise PunaError(f"{self.path}: ends inside tensor {info.name!r}; fetch it again")

    def _blocks(self) -> int:
        """Number of layers that the tensor names show."""
        blocks = {name.split(".")[1] for name in self._tensors if name.startswith("blk.")}
        return len(blocks)
