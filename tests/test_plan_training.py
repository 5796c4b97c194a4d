"""`puna plan --train`: bytes of each process by numbers computed by hand, and what is refused."""

import json
import re

import pytest
from typer.testing import CliRunner

from puna.cli.main import app
from puna.errors import PunaError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def planned(*arguments: str) -> dict[str, int]:
    """The only mesh's bytes."""
    (mesh,) = json.loads(run(*arguments, "--json"))["meshes"]
    return mesh["bytes_per_rank"] | {"total": mesh["total"], "total_recomputed": mesh["total_recomputed"]}


def test_405b_by_hand() -> None:
    # D 16384, F 53248, H 128, G 8, K 128, V 128256, 126 layers. Of 8 that split it, one has of a layer 2 * 2048 rows of
    # q and columns of o, 2 * 128 of k and v, 3 * 6656 of the feed-forward; 64 such keep a 64th each, in float32. Of the
    # vocabulary's 16032 rows one keeps 251. Norms: 253 * 16384.
    kept = 126 * (2 * 2_048 + 2 * 128 + 3 * 6_656) * 16_384 // 64 + 2 * 251 * 16_384 + 253 * 16_384 // 64
    found = planned("llama-3.1-405b", "--train", "full", "--data-parallel", "64", "--tensor-parallel", "8", "--tokens",
                    "8192")  # fmt: skip
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4 * kept, 4 * kept, 8 * kept)
    # a token in bfloat16: two norms and what they give, 16 heads' queries, keys, values and results of 128, a number
    # a head, 3 * 6656; and 126 times, then twice the last state
    layer = 2 * (4 * 16_384 + 4 * 16 * 128 + 3 * 6_656) + 4 * 16
    assert found["kept"] == 8_192 * (126 * layer + 2 * 2 * 16_384)
    assert found["recomputed"] == 8_192 * (126 * 2 * 16_384 + layer + 2 * 2 * 16_384)
    # embedding, output and last norm; two layers in bfloat16, one layer's gradients in it and in float32
    block = (2 * 2_048 + 2 * 128 + 3 * 6_656) * 16_384 + 2 * 16_384
    assert found["gathered"] == 2 * (2 * 16_032 + 1) * 16_384 + 2 * 2 * block + 6 * block
    assert found["total"] - found["kept"] == found["total_recomputed"] - found["recomputed"]


def test_scouts_updates_by_hand() -> None:
    # the router stays; q, k, v, o of 48 layers; 2 of 16 experts whole; the shared expert. D 5120, F 8192, rank 16
    D, F, rank = 5_120, 8_192, 16
    attention = rank * (3 * D + D) + rank * (640 + 128 + 128 + 640)  # three A and o's B whole, their others split
    shared = rank * (2 * D + D) + rank * (3 * F // 8)
    experts = 2 * rank * ((D + 2 * F) + (F + D))
    found = planned("scout", "--train", "lora", "--tensor-parallel", "8", "--expert-parallel", "8")
    assert found["gradients"] == 4 * 48 * (attention + shared + experts)
    assert found["optimizer"] == 2 * found["gradients"]


def test_the_table_has_meshes_that_fit() -> None:
    text = run("maverick", "--train", "qlora", "--rank", "8", "--tokens", "4096")
    assert "method qlora, 4,096 tokens a pass" in text
    assert re.search(r"^ +64 +8 +8 +512 ", text, re.MULTILINE), "40 query heads can be split over 8"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["maverick", "--train", "full", "--tensor-parallel", "16"], "that fit: 1, 2, 4, 8"),
        (["maverick", "--train", "full", "--expert-parallel", "8"], "divisor of --tensor-parallel, 1"),
        (["maverick", "--train", "grpo"], "full, pretrain, lora, qlora"),
        (["maverick", "--train", "full", "--bits", "int4"], "--bits is for plans without --train"),
        (["maverick", "--tokens", "100"], "--tokens is for plans with --train"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, PunaError)
    assert words in str(result.exception)
