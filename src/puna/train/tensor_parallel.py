"""Training a decoder that several processes split: each trains its own slices on the same tokens.

Where a layer's slices begin, the backward pass adds up what each found for the common input; where they end, the
forward pass adds up their outputs (Shoeybi et al., Megatron-LM, 2019). So the stream between layers and its gradient
are whole and alike on every process, and so is what trains there: norms and routers.
Legend: D model width, C (token, expert) choices.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from puna.family.sharding import Range
from puna.model import Decoder
from puna.model.lora import LoRALinear
from puna.model.parallel import Share, join_parts, moe_of, rows_of
from puna.model.ranks import Ranks
from puna.train.slices import Slices


def connect_training(decoder: Decoder, share: Share) -> None:
    """Join a filled local decoder (`puna.model.parallel.local_decoder`) with the other processes', to be trained.

    Parameters keep their names. Updates (LoRA) are attached before. Every process must make the same passes, and give
    its gradients to `puna.train.slices.Slices.finish`.
    """
    config, peers = share.sharding.config, share.peers
    assert share.sharding.mesh.replicas == 1, "training deals experts inside the group that splits the matrices"
    join_parts(decoder, share)
    slices = Slices(share)
    for path, module in decoder.named_modules():
        if isinstance(module, LoRALinear):
            name = f"{path}.lora_A"
            for cut in slices.cuts(name):
                module.join(peers, (*cut.ranges[0], slices.whole_shape(name, module.lora_A.shape)[cut.axis]))

    def begin(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return peers.share(args[0]), *args[1:]

    for layer in range(config.num_layers):
        decoder.get_submodule(f"layers.{layer}.self_attn").register_forward_pre_hook(begin)
        if not config.is_moe(layer):
            decoder.get_submodule(f"layers.{layer}.feed_forward").register_forward_pre_hook(begin)
            continue
        moe = moe_of(decoder, layer)  # its router is whole: only what lies beside it begins slices
        moe.shared_expert.register_forward_pre_hook(begin)
        moe.experts.forward = _own_experts(moe.experts.forward, share.sharding.experts(share.rank), peers)


def _own_experts(
    forward: Callable[[Tensor, list[int]], Tensor], experts: Range, peers: Ranks
) -> Callable[[Tensor, list[int]], Tensor]:
    """Of all rows, those of this process's experts; zeros elsewhere. The gates' gradients are added up with the rows'.

    Experts without any row get one of zeros, so that their gradients are zeros, as they are in one process, and every
    process has the same sums to make.
    """

    def own(x_CD: Tensor, counts: list[int]) -> Tensor:
        x_CD = peers.share(x_CD)
        start, stop = rows_of(experts, counts)
        rows_CD, mine = x_CD[start:stop], counts[slice(*experts)]
        if start == stop:
            rows_CD, mine = F.pad(rows_CD, (0, 0, 0, 1)), [1, *mine[1:]]
        out_CD = forward(rows_CD, mine)[: stop - start]
        return F.pad(out_CD, (0, 0, start, len(x_CD) - stop))

    return own
