"""Packed weights: the kernels against plain products, one row against many, packing and back."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.native import kernels
from puna.model.packed import PackedLinear, Panels
from puna.model.packing import Packer, pack, requantized
from puna.model.paged import Batch
from puna.model.quantized import Float8, Quantized, Weight, Words, plain, quantize, stacked
from puna.model.unpacked import BlockwiseLinear
from puna.model.words import pack_int32

needs_kernels = pytest.mark.skipif(kernels() is None, reason="the compiled kernels were not built")


def float8(weight: torch.Tensor) -> Float8:
    scales = weight.abs().amax(1, keepdim=True) / 448
    return Float8((weight / scales).to(torch.float8_e4m3fn), scales)


KINDS: dict[str, Callable[[torch.Tensor], Weight]] = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.bfloat16(),
    "int8": lambda w: quantize(w, 8),
    "int8 a row": lambda w: quantize(w, 8, w.shape[1]),
    "int4": lambda w: quantize(w, 4),
    "int4 of 64": lambda w: quantize(w, 4, 64),
    "int6": lambda w: quantize(w, 6),
    "int6 of 16": lambda w: quantize(w, 6, 16),
    "float8": float8,
}


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(outputs=st.integers(1, 70), inputs=st.integers(1, 200), rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_product_is_right_and_its_rows_are_the_same_bits_alone_and_together(
    kind: str, outputs: int, inputs: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = KINDS[kind](torch.randn(outputs, inputs))
    panels = Panels(weight)
    for dtype in (torch.float32, torch.bfloat16):
        if kind == "bfloat16" and dtype == torch.float32:
            continue  # float32 activations would be rounded: a stream has its weights' dtype
        x = torch.randn(rows, inputs).to(dtype)
        out = panels.product(x)
        expected = x.double() @ plain(weight).double().T
        weights = plain(weight).double().abs()
        bound = x.double().abs() @ weights.T * (1e-6 if dtype == torch.float32 else 2**-8)
        if "int" in kind and dtype == torch.bfloat16:  # half a step of the activations' own 127, and the rounding
            bound += x.double().abs().amax(1, keepdim=True) * weights.sum(1) * (0.55 / 127)
        assert ((out - expected).abs() <= bound + 1e-30).all()
        alone = torch.cat([panels.product(x[i : i + 1]) for i in range(rows)])
        assert torch.equal(alone, out)
        cut = seed % rows
        if cut:
            assert torch.equal(torch.cat((panels.product(x[:cut]), panels.product(x[cut:]))), out)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_packing_loses_nothing(kind: str) -> None:
    torch.manual_seed(1)
    weight = KINDS[kind](torch.randn(37, 131))
    panels = Panels(weight)
    back = panels.unpack()
    assert torch.equal(plain(back), plain(weight))
    assert isinstance(back, Quantized) == isinstance(weight, Quantized)
    ids = torch.tensor([0, 36, 5, 5, 17])
    assert torch.equal(panels.rows(ids, torch.float32), plain(weight).float()[ids])


@needs_kernels
@pytest.mark.parametrize(("width", "span"), [(96, 96), (256, 128), (320, 64), (160, 32)])
def test_an_integer_product_of_bfloat16_rows_quantises_them_by_span(width: int, span: int) -> None:
    torch.manual_seed(2)
    weight, x = quantize(torch.randn(20, width), 8, 32), torch.randn(3, width).bfloat16()
    spans = x.float().unflatten(1, (-1, span))
    largest = spans.abs().amax(-1, keepdim=True)
    integers = (spans * (torch.full_like(largest, 127) / largest)).round().flatten(1)  # 127 / x rounds twice
    sums = torch.einsum("msg,nsg->mns", *(each.float().unflatten(1, (-1, 32)) for each in (integers, weight.values)))
    expected = torch.zeros(3, 20)
    for parts, scales, most in zip(sums.split(span // 32, -1), weight.scales.float().split(span // 32, -1),
                                   largest.unbind(1), strict=True):  # fmt: skip
        expected += (parts * scales).sum(-1) * (most / 127)
    rounding = 2**-8 * expected.abs()  # of the result to bfloat16; wrong spans err a hundred times more
    assert ((Panels(weight).product(x).float() - expected).abs() <= rounding + 1e-4).all()


def test_quantising_picks_scales_with_less_error_than_the_largest_weight_gives() -> None:
    torch.manual_seed(3)
    weight = torch.randn(64, 256)
    for bits, bound in ((4, 0.11), (8, 0.008)):
        chosen = quantize(weight, bits)
        top = 2 ** (bits - 1) - 1
        assert int(chosen.values.int().abs().max()) <= top + 1
        plain_scale = weight.unflatten(1, (-1, chosen.group)).abs().amax(-1, keepdim=True) / top
        simple = (weight.unflatten(1, (-1, chosen.group)) / plain_scale).round() * plain_scale
        error = (chosen.dequantize() - weight).norm() / weight.norm()
        assert error < bound
        assert error <= (simple.flatten(1) - weight).norm() / weight.norm() * 1.001
    assert torch.equal(quantize(torch.zeros(4, 32), 4).dequantize(), torch.zeros(4, 32))
    with pytest.raises(PunaError, match="4, 6 or 8 bits, not 3"):
        quantize(weight, 3)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_quantises_as_the_plain_code_does(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    weight = torch.randn(19, 75) * 0.02
    for given_weight in (weight, weight.bfloat16()):
        native = quantize(given_weight, bits, 32)
        monkeypatch.setattr("puna.model.quantized.kernels", lambda: None)
        slow = quantize(given_weight, bits, 32)
        monkeypatch.undo()
        assert torch.equal(native.scales, slow.scales)
        assert torch.equal(native.values, slow.values)


def test_integers_that_fit_keep_their_bits_when_more_are_asked_for() -> None:
    weight = quantize(torch.randn(8, 64), 4)
    wider = requantized(weight, 8)
    assert wider.bits == 8
    assert torch.equal(wider.dequantize(), weight.dequantize())
    assert requantized(weight, 4) == weight


@pytest.mark.parametrize("kind", ["int8", "int4", "int8 a row", "float8"])
def test_without_kernels_few_bits_give_the_plain_product(kind: str) -> None:
    torch.manual_seed(4)
    weight = KINDS[kind](torch.randn(33, 61))
    layer = BlockwiseLinear(weight)
    x = torch.randn(2, 3, 61)
    assert torch.equal(layer.weight(slice(0, 33), torch.float32), plain(weight))
    torch.testing.assert_close(layer(x), x @ plain(weight).T)
    assert layer.values.nbytes == (33 * 31 if kind == "int4" else 33 * 61)


def packed(decoder: Decoder, bits: int | None, dtype: torch.dtype) -> Decoder:
    weights = decoder.state_dict()
    with torch.device("meta"):
        empty = Decoder(decoder.config)
    Packer(empty, weights.__getitem__, bits, dtype).fill()
    return empty.eval()


def logits(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        batch = Batch.single(decoder.config, len(ids), decoder.dtype)
        return decoder(torch.tensor([ids]), batch)[0].float()


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_packed_decoder_gives_the_plain_one_s_logits(kind: str) -> None:
    decoder = tiny.decoder(kind)
    ids = [i * 7 % decoder.config.vocab_size for i in range(45)]
    with torch.no_grad():
        expected = decoder(torch.tensor([ids]))[0]
    assert (logits(packed(decoder, None, torch.float32), ids) - expected).abs().max() < 1e-5
    if kernels() is None:
        return
    for bits, dtype, bound in ((None, torch.bfloat16, 0.06), (8, torch.bfloat16, 0.12), (4, torch.float32, 0.6)):
        few = packed(decoder, bits, dtype)
        together = logits(few, ids)
        assert (together - expected).norm() / expected.norm() < bound, (bits, dtype)
        assert torch.equal(logits(few, ids[:20]), together[:20])


def test_stacking_keeps_bits_where_all_are_alike() -> None:
    parts = [quantize(torch.randn(n, 64), 4) for n in (3, 5)]
    assert torch.equal(plain(stacked(parts)), torch.cat([plain(part) for part in parts]))
    mixed = [parts[0], torch.randn(2, 64)]
    assert isinstance(stacked(mixed), torch.Tensor)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_activations_that_the_kernels_do_not_take_never_reach_them(dtype: torch.dtype, bits: int) -> None:
    expected, other = tiny.decoder("llama3.2"), tiny.decoder("llama3.2").to(dtype)
    pack(expected, bits)
    pack(other, bits)
    assert not any(isinstance(module, PackedLinear) for module in other.modules())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = expected(ids)
        assert (other(ids).float() - wanted).norm() < 0.1 * wanted.norm()  # it rounds weights first
    with pytest.raises(TypeError, match="take float32 and bfloat16"):
        PackedLinear(torch.ones(16, 16))(torch.ones(1, 16, dtype=dtype))


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", [16, 160])
def test_words_give_the_panels_of_their_values(bits: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (outputs, 512), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, 16, generator=generator)
    packed = Panels(Words(bits, pack_int32(values, bits), 512, scales, 32))
    assert torch.equal(packed.panels, Panels(Quantized(bits, values, scales, 32)).panels)
