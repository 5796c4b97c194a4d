"""GGUF files keep their own bits when packed: integers, scales and the order of rows."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from puna.checkpoint import open_source, save
from puna.checkpoint.fewbits import quantised
from puna.checkpoint.gguf_blocks import encoded
from puna.checkpoint.gguf_write import write_tensors
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model.quantized import Quantized, plain, quantize

torch.set_num_threads(1)


def written_config(kind: str) -> ModelConfig:
    """64 wide, so that rows are whole blocks."""
    return tiny.CONFIGS[kind].with_(hidden_size=64, head_dim=16, intermediate_size=96)


def written(path: Path, kind: str, type: str) -> Path:
    """A GGUF file of a tiny model."""
    config = written_config(kind)
    return save(tiny.decoder(config), config, None, path / f"{kind}.gguf", format="gguf", type=type)


@pytest.mark.parametrize("kind", ["llama3.1", "llama3.2", "scout"])
@pytest.mark.parametrize(("type", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
@pytest.mark.filterwarnings("ignore:llama.cpp")
def test_own_bits(type: str, bits: int, kind: str, tmp_path: Path) -> None:
    source = open_source(written(tmp_path, kind, type))
    assert source.packed_notes == ()
    for name, shape in source.shapes().items():
        packed, weight = source.read_packed(name), source.read(name)
        if len(shape) == 1 or "router" in name:
            assert isinstance(packed, Tensor)
            continue
        assert isinstance(packed, list) == (len(shape) == 3)
        parts = packed if isinstance(packed, list) else [packed]
        for part, expected in zip(parts, weight.mT if len(shape) == 3 else [weight], strict=True):
            assert isinstance(part, Quantized)
            assert (part.bits, part.group, part.scales.dtype) == (bits, 32, torch.float16)
            assert torch.equal(part.dequantize(), expected), name


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_integers_are_those_that_gguf_reads(type: str, tmp_path: Path) -> None:
    """Another reader's bytes, taken apart by hand: block i of a row is float16, then the values."""
    path = written(tmp_path, "llama3.1", type)
    raw = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight").data
    packed = open_source(path).read_packed("layers.1.feed_forward.up_proj.weight")
    assert isinstance(packed, Quantized)
    for row, line in enumerate(raw):
        for block, octets in enumerate(line.reshape(2, -1)):
            assert packed.scales[row, block].item() == octets[:2].view(np.float16)[0]
            codes = octets[2:]
            low = [int(b) & 15 for b in codes] + [int(b) >> 4 for b in codes]
            values = codes.view(np.int8).tolist() if type == "Q8_0" else [code - 8 for code in low]
            assert packed.values[row, 32 * block : 32 * block + 32].tolist() == values


def test_other_types_become_int8_and_a_note_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, "llama3.1", "Q8_0")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "puna.")):
            value = field.contents()
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(field.name, value)
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            blocks = np.random.default_rng(0).integers(0, 256, (24, 210), dtype=np.uint8)
            blocks[:, -2:] = np.array([0.01], dtype=np.float16).view(np.uint8)
            writer.add_tensor(tensor.name, blocks.reshape(24, 210), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
        elif tensor.name != "output.weight":
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "k.gguf")
    assert source.packed_notes == ("Re-packed as int8 with a scale for 32 inputs: 1 of Q6_K tensors.",)
    packed, exact = source.read_packed("embed_tokens.weight"), source.read("embed_tokens.weight")
    assert isinstance(packed, Quantized)
    assert (packed.bits, packed.group) == (8, 32)
    assert (plain(packed) - exact).abs().max() <= exact.abs().max() / 127


def test_damaged_scale_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "llama3.1", "Q8_0")
    source = open_source(path)
    offset = source._tensors["blk.0.ffn_up.weight"].offset
    data = bytearray(path.read_bytes())
    data[offset + 34 : offset + 36] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(PunaError, match=r"blk\.0\.ffn_up\.weight' holds NaN"):
        open_source(path).read_packed("layers.0.feed_forward.up_proj.weight")


@pytest.mark.parametrize("kind", ["llama3.1", "llama3.2", "scout"])
@pytest.mark.parametrize(("type", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
@pytest.mark.filterwarnings("ignore:llama.cpp")
def test_bits_are_written_as_they_are(type: str, bits: int, kind: str, tmp_path: Path) -> None:
    """Scales drawn so that rounding the values anew would choose others."""
    config = written_config(kind)
    weights = {name: quantised(name, tensor, bits, True) for name, tensor in tiny.decoder(config).state_dict().items()}
    if bits == 4:  # a file of one type holds the head in 4 bits too
        output = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        weights |= {name: quantize(plain(weights[name]), 4) for name in ("embed_tokens.weight", output)}
    path = write_tensors(weights.__getitem__, config, None, tmp_path / "m.gguf", type).path
    source = open_source(path)
    for name, weight in weights.items():
        found = source.read_packed(name)
        for one, other in zip(*(w if isinstance(w, list) else [w] for w in (weight, found)), strict=True):
            if isinstance(one, Quantized):
                assert torch.equal(one.values, other.values), name
                assert torch.equal(one.dequantize(), other.dequantize()), name


def test_integers_that_do_not_fit_are_rounded_anew(tmp_path: Path) -> None:
    config = written_config("llama3.1")
    weights = {n: quantised(n, t, 8, True) for n, t in tiny.decoder(config).state_dict().items()}
    path = write_tensors(weights.__getitem__, config, None, tmp_path / "m.gguf", "Q4_0").path
    exact, found = plain(weights["lm_head.weight"]), open_source(path).read("lm_head.weight")
    assert 0 < (exact - found).abs().max() < exact.abs().max() / 7
    odd = Quantized(8, torch.ones(4, 32, dtype=torch.int8), torch.full((4, 1), 0.1), 32)
    assert encoded(odd, gguf.GGMLQuantizationType.Q8_0) is None  # 0.1 is no float16
    assert encoded(replace(odd, scales=odd.scales.half()), gguf.GGMLQuantizationType.Q8_0) is not None
