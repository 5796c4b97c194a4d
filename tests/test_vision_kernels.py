"""The compiled steps of a tower against PyTorch's, and what `benchmarks/vision.py` counts against PyTorch's counter."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from puna.family.vision import Llama4Vision, Llama32Vision
from puna.model import native_vision
from puna.model.native import kernels
from puna.model.native_vision import attend_all, bias_add, bias_gelu, layer_norm
from puna.model.quantized import Weight, quantize
from puna.model.vision_llama4 import Llama4Sight
from puna.model.vision_llama32 import Llama32Sight
from puna.model.vision_packing import fill_tower

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
WIDTHS = (1, 15, 16, 17, 48, 100)
needs_kernels = pytest.mark.skipif(kernels() is None, reason="needs the compiled kernels")
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Within the dtype's rounding of the largest value."""
    return float((ours.float() - theirs).abs().max()) <= TOLERANCE[ours.dtype] * float(theirs.abs().max().clamp(min=1))


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batches", "queries", "keys", "heads", "head_dim"), [
    (1, 1, 1, 1, 2), (2, 33, 31, 3, 20), (1, 32, 64, 2, 88), (3, 70, 33, 1, 80), (1, 5, 257, 2, 256),
])  # fmt: skip
def test_attention(dtype: torch.dtype, batches: int, queries: int, keys: int, heads: int, head_dim: int) -> None:
    q = draw(batches, queries, heads, head_dim).to(dtype)
    both = draw(batches, keys, 2, heads, head_dim, seed=1).to(dtype)
    k, v = both.unbind(2)  # rows with something between them
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2).float() for x in (q, k, v))).transpose(1, 2)
    assert near(attend_all(q, k, v), expected)
    alone = torch.cat([attend_all(q[:, at : at + 1], k, v) for at in range(queries)], 1)
    assert torch.equal(alone, attend_all(q, k, v))  # a query's bits don't depend on the others


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
def test_between_products(dtype: torch.dtype, width: int) -> None:
    x, weight, bias, to = (draw(*shape, seed=i).to(dtype) * 2 for i, shape in
                           enumerate([(3, 5, width), (width,), (width,), (3, 5, width)]))  # fmt: skip
    assert near(bias_gelu(x.clone(), bias), F.gelu((x + bias).float()))
    assert torch.equal(bias_add(x.clone(), bias, to), to + (x + bias))
    expected = F.layer_norm(x.float(), (width,), weight.float(), bias.float(), 1e-5)
    assert near(layer_norm(x, weight, bias, 1e-5), expected)
    for far in (-100.0, -6.0, 0.0, 6.0, 100.0):
        given = torch.full((1, width), far, dtype=dtype)
        zero = torch.zeros(width, dtype=dtype)
        assert torch.allclose(bias_gelu(given.clone(), zero).float(), F.gelu(given.float()), atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_tile_gives_the_same_bits_alone(dtype: torch.dtype, bits: int | None) -> None:
    vision = Llama4Vision(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=128, tile_side=24, patch_side=4,
                          adapter_size=24)  # fmt: skip
    tower = packed(Llama4Sight(vision, 16), dtype, bits)
    tiles = draw(3, 3, 24, 24)
    assert torch.equal(tower(tiles), torch.cat([tower(tile[None]) for tile in tiles]))
    other = Llama32Vision((0,), tile_side=8, hidden_size=16, num_layers=2, num_global_layers=1, num_heads=2,
                          intermediate_size=32, patch_side=2, intermediate_layers=(1,))  # fmt: skip
    tower32 = packed(Llama32Sight(other, 16), dtype, bits)
    tiles = draw(3, 3, 8, 8)
    one, two = tower32(tiles, [(2, 1), (1, 1)])
    assert torch.equal(one, tower32(tiles[:2], [(2, 1)])[0])
    assert torch.equal(two, tower32(tiles[2:], [(1, 1)])[0])


def packed(tower: Llama4Sight | Llama32Sight, dtype: torch.dtype, bits: int | None = None) -> torch.nn.Module:
    weights = {name: draw(*weight.shape, seed=i) * 0.2 for i, (name, weight) in enumerate(tower.named_parameters())}

    def read(name: str, bits: int | None) -> Weight:
        weight = weights[name.removeprefix("vision.")].to(dtype)
        return weight if bits is None else quantize(weight, bits)

    fill_tower(tower, read, dtype, bits)
    return tower


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_vision, "fast", lambda _: None)
    test_between_products(torch.float32, 16)
    x = draw(1, 4, 2, 8)
    assert attend_all(x, x, x).shape == x.shape


def test_the_benchmark_counts_what_is_computed() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("benchmarks_vision", folder / "vision.py")
    assert spec is not None
    assert spec.loader is not None
    script: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.TEXT_WIDTH = 40
    vision = Llama4Vision(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=128, tile_side=24, patch_side=4,
                          adapter_size=24)  # fmt: skip
    tower = Llama4Sight(vision, 40).eval()
    # with gradients all is PyTorch's, and only its plain attention is counted
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(draw(1, 3, 24, 24))
    assert counter.get_total_flops() == script.flops(vision)
