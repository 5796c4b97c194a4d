"""The benchmark of what one order of additions costs: both sides compute the same, and every row is there."""

import sys
from pathlib import Path

import pytest
import torch

from puna.model.native import kernels

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # last: tests/ has files of the same names

import determinism

pytestmark = pytest.mark.skipif(kernels() is None, reason="there are no products of ours without the kernels")


@pytest.mark.parametrize("bits", ["bf16", "int8", "int4"])
def test_both_products_are_the_same(bits: str) -> None:
    torch.manual_seed(0)
    pair = determinism.made(bits, 256, 128)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    assert (pair.ours(x).float() - pair.free(x).float()).abs().max() < 1


def test_every_number_of_rows_has_its_line() -> None:
    lines = determinism.measure("int4", ((256, 64), (64, 256)), (1, 4), 0, 0.0)
    assert [line.split(" | ")[1] for line in lines] == ["1", "4"]
    assert all(line.startswith("| int4 | ") and line.endswith("% |") for line in lines)
