"""Llama 4 in fbgemm_fp8: routed experts in one FP8 tensor a projection, a scale an output (Maverick FP8's layout)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from compressed_writers import write_raw
from puna.checkpoint import load_source, open_source, save
from puna.checkpoint.ready import load_ready
from puna.checkpoint.shard import ShardSource
from puna.errors import PunaError
from puna.family.sharding import Mesh, Sharding
from puna.model.on_demand import expert_cache, held_bytes
from puna.model.paged import Batch
from puna.model.quantized import Float8, plain

torch.set_num_threads(1)
CONFIG = tiny.CONFIGS["maverick"].with_(hidden_size=64, head_dim=16, expert_intermediate_size=96)
EXPERTS = "model.layers.1.feed_forward.experts"


def fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to float8 with a scale each, as fbgemm's `quantize_fp8_per_row`."""
    scale = matrix.abs().amax(-1, keepdim=True) / 448
    return (matrix / scale).to(torch.float8_e4m3fn), scale


def write(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose experts and shared experts are in FP8, and the values that it stands for."""
    save(tiny.decoder(CONFIG).bfloat16(), CONFIG, None, folder)
    file = folder / "model.safetensors"
    stored, exact = load_file(file), {}
    for name, tensor in list(stored.items()):
        exact[name] = tensor.float()
        if name.endswith((".gate_up_proj", ".down_proj")):  # as transformers' FbgemmFp8Quantize
            turned = tensor.float().transpose(1, 2)
            values, scales = fp8(turned.reshape(-1, turned.shape[-1]))
            stored[name] = values.reshape(turned.shape).transpose(1, 2).contiguous()
            shape = (len(tensor), 1, -1) if name.endswith("gate_up_proj") else (len(tensor), -1, 1)
            stored[f"{name}_scale"] = scales.reshape(shape)
            exact[name] = (values.float() * scales).reshape(turned.shape).transpose(1, 2)
        elif ".shared_expert." in name:
            stored[name], stored[f"{name}_scale"] = fp8(tensor.float())
            exact[name] = stored[name].float() * stored[f"{name}_scale"]
    write_raw(file, stored)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, exact


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    return write(tmp_path_factory.mktemp("fbgemm") / "m")


def logits(model: torch.nn.Module) -> Tensor:
    ids = tiny.token_ids(CONFIG)
    with torch.no_grad():
        return model(ids, Batch.single(CONFIG, ids.shape[1], model.dtype))  # type: ignore[arg-type]


def test_values_are_the_files(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, exact = checkpoint
    source = open_source(path)
    assert source.packed_notes == ()
    model = load_source(source, dtype=torch.float32).model
    for part in ("gate_up_proj", "down_proj"):
        assert torch.equal(model.get_parameter(f"layers.1.feed_forward.experts.{part}"), exact[f"{EXPERTS}.{part}"])
    shared = "layers.1.feed_forward.shared_expert.up_proj.weight"
    assert torch.equal(model.get_parameter(shared), exact[f"model.{shared}"])


def test_bits_stay_packed_all_together_or_one_by_one(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, exact = checkpoint
    source = open_source(path)
    for part in ("gate_up_proj", "down_proj"):
        name = f"layers.1.feed_forward.experts.{part}"
        whole = source.read_packed(name)
        assert isinstance(whole, list)
        assert len(whole) == CONFIG.num_experts
        for expert, weight in enumerate(whole):
            one = source.read_expert(name, expert, packed=True)
            assert isinstance(weight, Float8)
            assert isinstance(one, Float8)
            assert torch.equal(plain(weight), exact[f"model.{name}"][expert].T)
            assert torch.equal(plain(one), plain(weight))
            assert torch.equal(plain(source.read_expert(name, expert, packed=False)), plain(weight))


def test_models_whole_on_demand_and_exported_agree(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, _ = checkpoint
    whole = load_ready(open_source(path)).model
    routed = [held_bytes(whole.get_submodule(f"layers.{at}.feed_forward.experts")) for at in CONFIG.moe_layers]
    room = held_bytes(whole) - sum(routed) + 2 * max(routed) // CONFIG.num_experts
    lean = load_ready(open_source(path), memory=room).model
    assert expert_cache(lean) is not None
    assert torch.equal(logits(lean), logits(whole))
    save(whole, CONFIG, None, tmp_path / "again")
    assert torch.equal(logits(load_ready(open_source(tmp_path / "again")).model), logits(whole))


def test_shards_hold_their_part(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, exact = checkpoint
    sharding = Sharding(CONFIG, Mesh(2, 2))
    name = "layers.1.feed_forward.experts.down_proj"
    parts = [ShardSource(open_source(path), sharding, rank).read_packed(name) for rank in range(2)]
    assert all(isinstance(part, list) for part in parts)
    experts = [plain(weight).T for part in parts for weight in part]  # type: ignore[union-attr, arg-type]
    assert torch.equal(torch.stack(experts), exact[f"model.{name}"])


def broken(path: Path, target: Path, name: str, tensor: Tensor | None) -> Path:
    target.mkdir()
    (target / "config.json").write_text((path / "config.json").read_text())
    stored = load_file(path / "model.safetensors")
    stored.pop(name)
    write_raw(target / "model.safetensors", stored if tensor is None else stored | {name: tensor})
    return target


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("gate_up_proj_scale", torch.ones(3, 1, 192), r"gate_up_proj_scale is F32 \[3, 1, 192\]"),
        ("down_proj_scale", torch.ones(4, 64, 1).to(torch.int32), r"down_proj_scale is I32 \[4, 64, 1\]"),
        ("down_proj_scale", torch.full((4, 64, 1), float("nan")), r"down_proj_scale holds NaN"),
        ("down_proj", torch.full((4, 96, 64), float("nan")).to(torch.float8_e4m3fn), r"down_proj holds NaN"),
        ("down_proj_scale", None, r"down_proj_scale is missing, which its FP8 values need"),
    ],
)
def test_what_is_wrong_is_named(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        load_ready(open_source(broken(checkpoint[0], tmp_path / "m", f"{EXPERTS}.{name}", tensor)))
