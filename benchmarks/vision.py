"""Time per picture of Llama 4's tower against transformers', in one run: `python benchmarks/vision.py`.

Random weights in the published shape (336-pixel tiles, 34 layers of width 1408, adapter, projection to 5120). Both
sides get the same tiles and the same weights, and what they give is compared before anything is timed.
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
from puna.model.vision_llama4 import Llama4Sight
from puna.model.vision_packing import fill_tower

TEXT_WIDTH = 5120
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
NOTES = (
    "One tile of {side} pixels a picture, {layers} layers; {flops:.0f} GFLOP a picture: twice the products' "
    "multiplications (patches, 4 D^2 + 2 D F and 2 S D of attention for each of S = {rows} rows and each layer, "
    "adapter, projection). Roof: the faster of torch's product and ours, of {rows} rows with a 1408 x 5632 matrix."
)


def flops(vision: Llama4Vision) -> float:
    """Floating-point operations for one tile."""
    rows, width = vision.patches + 1, vision.hidden_size
    layer = rows * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * rows**2 * width
    adapter = vision.adapter_size * (width * vision.pixel_shuffle**2 + vision.adapter_size + TEXT_WIDTH)
    patches = vision.patches * 3 * vision.patch_side**2 * width
    return 2.0 * (patches + vision.num_layers * layer + vision.tokens_per_tile * adapter)


def pair(vision: Llama4Vision, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """transformers' tower and ours, of equal random weights."""
    from transformers import Llama4VisionConfig
    from transformers.models.llama4.modeling_llama4 import Llama4VisionModel

    config = Llama4VisionConfig(
        hidden_size=vision.hidden_size, num_hidden_layers=vision.num_layers, num_attention_heads=vision.num_heads,
        intermediate_size=vision.intermediate_size, vision_output_dim=vision.adapter_size,
        projector_input_dim=vision.adapter_size, projector_output_dim=vision.adapter_size,
        image_size=vision.tile_side, patch_size=vision.patch_side,
        rope_parameters={"rope_type": "default", "rope_theta": vision.rope_theta},
    )  # fmt: skip
    tower, projector = Llama4VisionModel(config).eval(), nn.Linear(vision.adapter_size, TEXT_WIDTH, bias=False)
    for parameter in (*tower.parameters(), *projector.parameters()):  # not .to: it would spoil the complex rotations
        parameter.data = torch.randn(parameter.shape).mul_(0.02).to(dtype)
    weights = {f"vision.{name}": weight for name, weight in tower.state_dict().items()}
    weights["vision.multi_modal_projector.linear_1.weight"] = projector.weight
    with torch.device("meta"):
        ours = Llama4Sight(vision, TEXT_WIDTH)
    fill_tower(ours, lambda name: weights[name].detach(), dtype, torch.device("cpu"))
    return (lambda tiles: projector(tower(tiles).last_hidden_state)), ours


def seconds(run: Callable[[Tensor], Tensor], tiles: Tensor) -> float:
    """Of one call."""
    begun = time.perf_counter()
    run(tiles)
    return time.perf_counter() - begun


def roof(dtype: torch.dtype, vision: Llama4Vision) -> float:
    """The best rate of any product here."""
    rows, inputs, outputs = vision.patches + 1, vision.hidden_size, vision.intermediate_size
    torch_rate = matrix_rate(dtype, rows, inputs, outputs)
    packed, x = PackedLinear(torch.ones(outputs, inputs, dtype=dtype)), torch.ones(rows, inputs, dtype=dtype)
    return max(torch_rate, 2 * rows * inputs * outputs / min(seconds(packed, x) for _ in range(6)))


@torch.no_grad()
def main() -> None:
    """Measure, print and record."""
    arguments = parser("Time per picture against transformers")
    arguments.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    arguments.add_argument("--pictures", nargs="+", type=int, default=[1, 8], help="in one call")
    arguments.add_argument("--layers", type=int, default=LLAMA_4_VISION.num_layers, help="of 34")
    arguments.add_argument("--repeats", type=int, default=5)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    vision = Llama4Vision(num_layers=args.layers)
    rows = []
    for name in args.dtypes:
        theirs, ours = pair(vision, DTYPES[name])
        best = roof(DTYPES[name], vision)
        for count in args.pictures:
            tiles = torch.randn(count, 3, vision.tile_side, vision.tile_side).to(DTYPES[name])
            expected, found = theirs(tiles).float(), ours(tiles).float()
            error = float((expected - found).abs().max() / expected.abs().max())
            times = [(seconds(ours, tiles), seconds(theirs, tiles)) for _ in range(args.repeats)]
            mine, other = (statistics.median(column) / count for column in zip(*times, strict=True))
            rows.append(
                f"| {name}, {count} at once | {mine:.2f} s a picture | transformers {other:.2f} s | "
                f"{other / mine:.2f}x | {flops(vision) / mine / best:.0%} of {best / 1e9:.0f} GFLOP/s | {error:.0e} |"
            )
            print(rows[-1], flush=True)
    notes = NOTES.format(side=vision.tile_side, layers=args.layers, flops=flops(vision) / 1e9, rows=vision.patches + 1)
    print(notes)
    write_rows(Path(__file__), "Pictures", rows, f"{machine()}; medians of {args.repeats}, interleaved", notes=notes,
               columns=("what", "ours", "peer", "ratio", "share of the matrix roof", "largest difference"),
               document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
