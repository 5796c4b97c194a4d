"""Time per picture of Llama 4's tower against transformers', in one run: `python benchmarks/vision.py`.

Random weights in the published shape (336-pixel tiles, 34 layers of width 1408, adapter, projection to 5120). Both
sides get the same tiles and the same weights, and what they give is compared with float32 before anything is timed.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from roof import matrix_rate
from rows import machine, parser, write_rows
from torch import Tensor, nn

from puna.family.vision import LLAMA_4_VISION, Llama4Vision
from puna.model.packed import PackedLinear
from puna.model.quantized import Weight, quantize
from puna.model.vision_llama4 import Llama4Sight
from puna.model.vision_packing import TOWER_BITS, fill_tower

TEXT_WIDTH = 5120
BF16, FLOAT32 = torch.bfloat16, torch.float32
KINDS = {"bf16": (BF16, None), "int8": (BF16, TOWER_BITS), "float32": (FLOAT32, None)}
NOTES = (
    "One tile of {side} pixels a picture, {layers} layers; {flops:.0f} GFLOP a picture: twice the products' "
    "multiplications (patches, 4 D^2 + 2 D F and 2 S D of attention for each of S = {rows} rows and each layer, "
    "adapter, projection). Roof: the faster of torch's product and ours, of {rows} rows with a 1408 x 5632 matrix. "
    "int8 is what `quantize` gives: weights and the rows that meet them in 8 bits, all else bfloat16; transformers, "
    "which has no such tower on a CPU, runs in bfloat16 beside it. Error: of a picture's features against float32 with "
    "the same weights, relative (2-norm), ours and transformers'."
)


def flops(vision: Llama4Vision) -> float:
    """Floating-point operations for one tile."""
    rows, width = vision.patches + 1, vision.hidden_size
    layer = rows * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * rows**2 * width
    adapter = vision.adapter_size * (width * vision.pixel_shuffle**2 + vision.adapter_size + TEXT_WIDTH)
    patches = vision.patches * 3 * vision.patch_side**2 * width
    return 2.0 * (patches + vision.num_layers * layer + vision.tokens_per_tile * adapter)


Tower = Callable[[Tensor], Tensor]


def theirs(vision: Llama4Vision) -> nn.ModuleDict:
    """transformers' tower and a projector, in float32 with random weights that bfloat16 holds."""
    from transformers import Llama4VisionConfig
    from transformers.models.llama4.modeling_llama4 import Llama4VisionModel

    config = Llama4VisionConfig(
        hidden_size=vision.hidden_size, num_hidden_layers=vision.num_layers, num_attention_heads=vision.num_heads,
        intermediate_size=vision.intermediate_size, vision_output_dim=vision.adapter_size,
        projector_input_dim=vision.adapter_size, projector_output_dim=vision.adapter_size,
        image_size=vision.tile_side, patch_size=vision.patch_side,
        rope_parameters={"rope_type": "default", "rope_theta": vision.rope_theta},
    )  # fmt: skip
    linear = nn.Linear(vision.adapter_size, TEXT_WIDTH, bias=False)
    both = nn.ModuleDict({"tower": Llama4VisionModel(config), "projector": linear}).eval()
    products = {id(module.weight) for module in both.modules() if isinstance(module, nn.Linear)}
    for name, parameter in both.named_parameters():
        if "layernorm" not in name:  # these stay ones and zeros
            size = parameter.shape[1] ** -0.5 if id(parameter) in products else 0.02
            parameter.data = (torch.randn(parameter.shape) * size).to(BF16).float()
    return both


def runs(both: nn.ModuleDict) -> Tower:
    """As one function."""
    return lambda tiles: both["projector"](both["tower"](tiles).last_hidden_state)


def ours(vision: Llama4Vision, both: nn.ModuleDict, dtype: torch.dtype, bits: int | None) -> Tower:
    """Our tower with those weights."""
    weights = {f"vision.{name}": weight for name, weight in both["tower"].state_dict().items()}
    weights["vision.multi_modal_projector.linear_1.weight"] = both["projector"].weight
    with torch.device("meta"):
        tower = Llama4Sight(vision, TEXT_WIDTH)

    def read(name: str, bits: int | None) -> Weight:
        weight = weights[name].detach().to(dtype)
        return weight if bits is None else quantize(weight, bits)

    fill_tower(tower, read, dtype, bits)
    return tower


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, by the 2-norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def seconds(run: Callable[[Tensor], Tensor], tiles: Tensor) -> float:
    """Of one call."""
    begun = time.perf_counter()
    run(tiles)
    return time.perf_counter() - begun


def roof(dtype: torch.dtype, bits: int | None, vision: Llama4Vision) -> float:
    """The best rate of any product here."""
    rows, inputs, outputs = vision.patches + 1, vision.hidden_size, vision.intermediate_size
    weight, x = torch.ones(outputs, inputs, dtype=dtype), torch.ones(rows, inputs, dtype=dtype)
    packed = PackedLinear(weight if bits is None else quantize(weight, bits))
    mine = 2 * rows * inputs * outputs / min(seconds(packed, x) for _ in range(6))
    if bits is None:
        return max(mine, matrix_rate(dtype, rows, inputs, outputs))
    integers, values = weight.to(torch.int8).T, x.to(torch.int8)
    best = min(seconds(lambda rows: torch._int_mm(rows, integers), values) for _ in range(6))
    return max(mine, 2 * rows * inputs * outputs / best)


@torch.no_grad()
def main() -> None:
    """Measure, print and record."""
    arguments = parser("Time per picture against transformers")
    arguments.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    arguments.add_argument("--pictures", nargs="+", type=int, default=[1, 8], help="in one call")
    arguments.add_argument("--layers", type=int, default=LLAMA_4_VISION.num_layers, help="of 34")
    arguments.add_argument("--repeats", type=int, default=5)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    vision = Llama4Vision(num_layers=args.layers)
    both = theirs(vision)
    towers = {name: ours(vision, both, *KINDS[name]) for name in args.kinds}
    tiles = torch.randn(max(args.pictures), 3, vision.tile_side, vision.tile_side).to(BF16).float()
    expected = runs(both)(tiles[:1])
    rows = []
    for name in args.kinds:
        (dtype, bits), mine = KINDS[name], towers[name]
        for parameter in both.parameters():  # not .to: it would spoil the complex rotations
            parameter.data = parameter.data.to(dtype)
        other, best, some = runs(both), roof(dtype, bits, vision), tiles.to(dtype)
        errors = " / ".join(f"{error(tower(some[:1]), expected):.2g}" for tower in (mine, other))
        for count in args.pictures:
            times = [(seconds(mine, some[:count]), seconds(other, some[:count])) for _ in range(args.repeats)]
            own, peer = (statistics.median(column) / count for column in zip(*times, strict=True))
            label = "transformers" if bits is None else "transformers bf16"
            rows.append(
                f"| {name}, {count} at once | {own:.2f} s a picture | {label} {peer:.2f} s | {peer / own:.2f}x | "
                f"{flops(vision) / own / best:.0%} of {best / 1e9:.0f} GFLOP/s | {errors} |"
            )
            print(rows[-1], flush=True)
    notes = NOTES.format(side=vision.tile_side, layers=args.layers, flops=flops(vision) / 1e9, rows=vision.patches + 1)
    print(notes)
    write_rows(Path(__file__), "Pictures", rows, f"{machine()}; medians of {args.repeats}, interleaved", notes=notes,
               columns=("what", "ours", "peer", "ratio", "share of the matrix roof", "error"),
               document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
