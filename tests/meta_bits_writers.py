"""Writers of Meta's quantised releases: a folder in few bits, and beside it the same weights in float32."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_writers import write_meta
from puna.model import Decoder

LINEAR = re.compile(r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight")
EXPERTS = re.compile(r"(layers\.\d+\.feed_forward\.experts)\.(moe_w_in_eD_F|moe_w_swiglu_eD_F|moe_w_out_eF_D)")
KEYS = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}


def write_integers(folder: Path, model: Decoder, group: int = 16, zeros: int = 0, rank: int | None = None) -> None:
    """SpinQuant's form in `folder`, with adaptors of a `rank` QLoRA's; `folder`-plain has the weights in float32."""
    generator = torch.Generator().manual_seed(3)

    def draw(shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)

    write_meta(folder, model, 1)
    shard = torch.load(folder / "consolidated.00.pth")
    plain, stored = dict(shard), dict(shard)
    tied = torch.equal(shard["tok_embeddings.weight"], shard["output.weight"])
    for name, weight in shard.items():
        stem = name.removesuffix(".weight")
        if LINEAR.fullmatch(name):
            values = draw(weight.shape, -8, 8)
            scales = 0.02 * (0.5 + torch.rand(weight.shape[0], weight.shape[1] // group, generator=generator))
            offsets = torch.full_like(scales, zeros)
            wide = (values - offsets.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
            if zeros:
                stored[f"{stem}.zeros"] = offsets
            if rank is not None:
                a = torch.randn(rank, weight.shape[1], generator=generator).bfloat16()
                b = torch.randn(weight.shape[0], rank, generator=generator).bfloat16() * 0.01
                stored |= {f"{stem}.adaptor.A.weight": a, f"{stem}.adaptor.B.weight": b}
                wide = wide + 2.0 * (b.float() @ a.float())
        elif stem in ("tok_embeddings", "output"):
            values = draw(weight.shape, -128, 128)
            scales = 0.002 * (0.5 + torch.rand(weight.shape[0], 1, generator=generator))
            wide = values * scales
        else:
            continue
        stored |= {name: values, f"{stem}.scales": scales}
        plain[name] = wide
    if tied:
        for part in ("weight", "scales"):
            stored[f"output.{part}"] = stored[f"tok_embeddings.{part}"]
        plain["output.weight"] = plain["tok_embeddings.weight"]
    _save(folder, [stored], [plain])
    args: dict[str, Any] = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": group, "spinquant": not rank}
    edit(folder, quantization_args=args, **({} if rank is None else {"lora_args": {"rank": rank, "scale": 2.0}}))


def write_fp8_dense(folder: Path, model: Decoder, ranks: int) -> None:
    """Llama 3.1 405B's form: the feed-forward of inner layers in FP8, a scale for each row of each rank."""
    write_meta(folder, model, ranks)
    stored, plain = [], []
    for rank in range(ranks):
        shard = torch.load(folder / f"consolidated.{rank:02}.pth")
        wide, scales = dict(shard), {}
        for name in list(shard):
            match = re.fullmatch(r"layers\.(\d+)\.feed_forward\.(w[123])\.weight", name)
            if match and 0 < int(match[1]) < model.config.num_layers - 1:
                shard[name], scale, wide[name] = fp8(shard[name], rank)
                scales[f"{match[1]}_feed_forward.{match[2]}_{rank}"] = scale
        torch.save(scales, folder / f"fp8_scales_{rank}.pt")
        stored.append(shard)
        plain.append(wide)
    _save(folder, stored, plain)


def write_experts(folder: Path, model: Decoder, ranks: int, kind: str) -> None:
    """Llama 4's fp8_mixed ("fp8") or int4_mixed ("int4"): routed experts of inner layers, by Meta's own steps
    (llama-models 0.3.0 `llama4/scripts/quantize.py`)."""
    write_meta(folder, model, ranks)
    edit(folder, multiple_of=256)
    experts = model.config.num_experts
    stored, plain = [], []
    for rank in range(ranks):
        shard = torch.load(folder / f"consolidated.{rank:02}.pth")
        wide, scales = dict(shard), {}
        for name in list(shard):
            match = EXPERTS.fullmatch(name)
            if not match or int(name.split(".")[1]) in (0, model.config.num_layers - 1):
                continue
            param = shard[name].unflatten(0, (experts, -1))
            weight = param.transpose(1, 2).contiguous()
            if kind == "int4":
                parts = [int4(one) for one in weight]
                packed = torch.stack([pack_int4(values) for values, _ in parts])
                scale = torch.stack([scale for _, scale in parts])
                dequantised = torch.stack([v * s.t().repeat_interleave(128, 1) for v, s in parts])
                shard[name] = packed.transpose(1, 2).reshape(-1, param.shape[-1]).contiguous().view(torch.float8_e4m3fn)
            else:
                values, scale, dequantised = fp8(weight, rank)
                flat = values.view(torch.uint8).transpose(1, 2).reshape(-1, param.shape[-1]).contiguous()
                shard[name] = flat.view(torch.float8_e4m3fn)
            wide[name] = dequantised.transpose(1, 2).reshape(-1, param.shape[-1]).contiguous()
            scales[f"{match[1]}.{KEYS[match[2]]}"] = scale
        torch.save(scales, folder / f"{kind}_scales_{rank}.pt")
        stored.append(shard)
        plain.append(wide)
    _save(folder, stored, plain)


def fp8(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, a scale a row [..., N], and the weight that they stand for."""
    scale = weight.abs().amax(-1) / 448 * (1 + 0.25 * rank)
    values = (weight / scale[..., None]).to(torch.float8_e4m3fn)
    return values, scale, values.float() * scale[..., None]


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`int4_row_quantize`: values [N, K], scales [K / 128, N]."""
    grouped = weight.reshape(-1, 128)
    scales = grouped.abs().amax(1, keepdim=True).clamp(min=1e-6) / 8
    values = grouped.div(scales).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
    return values, scales.view(weight.shape[0], -1).t().contiguous()


def pack_int4(x: Tensor) -> Tensor:
    """`pack_int4`."""
    return torch.bitwise_or(torch.bitwise_and(x[:, ::2], 0xF), torch.bitwise_left_shift(x[:, 1::2], 4)).contiguous()


def edit(folder: Path, **changes: Any) -> None:
    """Change params.json."""
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | changes))


def _save(folder: Path, stored: list[dict[str, Tensor]], plain: list[dict[str, Tensor]]) -> None:
    beside = folder.with_name(folder.name + "-plain")
    beside.mkdir()
    (beside / "params.json").write_text((folder / "params.json").read_text())
    for rank, (few, wide) in enumerate(zip(stored, plain, strict=True)):
        torch.save(few, folder / f"consolidated.{rank:02}.pth")
        torch.save(wide, beside / f"consolidated.{rank:02}.pth")
