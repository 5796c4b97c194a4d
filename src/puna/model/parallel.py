"""One decoder over several processes: each computes with its own heads, widths, experts and vocabulary.

`local_decoder` gives a rank its share as an ordinary decoder of smaller parts, to be filled, packed and cached as any
other; `connect` then adds the sums and gathers between ranks. All ranks must run the same passes in the same order.
Legend: B batch, S sequence, D model width, V vocabulary, C (token, expert) choices.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from puna.errors import PunaError
from puna.family.sharding import Range, Sharding, part
from puna.model.decoder import Decoder
from puna.model.feedforward import Experts, MixtureOfExperts
from puna.model.linear import Embedding, Linear
from puna.model.ranks import Ranks, VocabularyPart


@dataclass(frozen=True)
class Share:
    """One process's place in a sharded decoder."""

    sharding: Sharding
    everyone: Ranks  # all processes
    peers: Ranks  # those that hold the slices of one copy of the matrices

    @property
    def rank(self) -> int:
        """This process's number among all."""
        return self.everyone.rank


def join(sharding: Sharding) -> Share:
    """This process's place, made by all processes at once in an initialised torch.distributed.

    Raises PunaError where the number of processes is not the mesh's.
    """
    mesh, rank, size = sharding.mesh, dist.get_rank(), dist.get_world_size()
    if size != mesh.ranks:
        raise PunaError(f"this mesh needs {mesh.ranks} processes, but {size} run; start torchrun with that many")
    everyone = Ranks(rank, size)
    if mesh.replicas == 1:
        return Share(sharding, everyone, everyone)
    groups = [dist.new_group(list(range(first, first + mesh.tensor))) for first in range(0, size, mesh.tensor)]
    return Share(sharding, everyone, Ranks(mesh.tensor_rank(rank), mesh.tensor, groups[mesh.replica(rank)]))


def local_decoder(sharding: Sharding, rank: int) -> Decoder:
    """The rank's share as a decoder on the meta device: smaller matrices under the same names."""
    config = sharding.config
    with torch.device("meta"):
        decoder = Decoder(sharding.local_config())
        decoder.embed_tokens = Embedding(sharding.shape("embed_tokens.weight", rank)[0], config.hidden_size)
        if decoder.lm_head is not None:
            decoder.lm_head = Linear(config.hidden_size, sharding.shape("lm_head.weight", rank)[0])
        for layer in config.moe_layers:
            count, inner, width = sharding.shape(f"layers.{layer}.feed_forward.experts.down_proj", rank)
            moe_of(decoder, layer).experts = Experts(count, width, inner)
    return decoder


def connect(decoder: Decoder, share: Share) -> None:
    """Join a filled local decoder with the other ranks': from now on its logits are the whole model's, everywhere."""
    join_parts(decoder, share)
    for layer in share.sharding.config.moe_layers:
        moe = moe_of(decoder, layer)
        moe.set_submodule("experts", LocalExperts(moe.experts, share.sharding.experts(share.rank)))


def join_parts(decoder: Decoder, share: Share) -> None:
    """All of `connect` but for the routed experts, which still serve only rows of their own.

    Hooks stand at the outputs of attention and feed-forward, where the partial sums are complete, so that linear
    layers of any kind may lie inside.
    """
    peers, everyone = share.peers, share.everyone
    decoder.vocabulary = VocabularyPart(*part(share.sharding.config.vocab_size, peers.size, peers.rank), peers)
    rows = VocabularyRows(decoder.vocabulary)
    decoder.embed_tokens.register_forward_pre_hook(lambda _, args: _check_in_step(args[0], everyone))
    decoder.embed_tokens.register_forward_pre_hook(rows.before)
    decoder.embed_tokens.register_forward_hook(rows.after)
    for layer in range(len(decoder.layers)):
        decoder.get_submodule(f"layers.{layer}.self_attn").register_forward_hook(lambda _, __, out: peers.sum(out))
        if not share.sharding.config.is_moe(layer):
            feed_forward = decoder.get_submodule(f"layers.{layer}.feed_forward")
            feed_forward.register_forward_hook(lambda _, __, out: peers.sum(out))
            continue
        moe = moe_of(decoder, layer)
        moe.register_forward_hook(lambda _, __, out: everyone.sum(out))
        if share.sharding.mesh.replica(share.rank):  # only the first copy's shared expert enters the sum
            moe.shared_expert.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    decoder.register_forward_hook(lambda _, __, part_BSV: gather_logits(part_BSV, share))


def gather_logits(part_BSV: Tensor, share: Share) -> Tensor:
    """Logits of the whole vocabulary from every rank's part of it; parts may differ by one in length."""
    total, peers = share.sharding.config.vocab_size, share.peers
    lengths = [stop - start for start, stop in (part(total, peers.size, rank) for rank in range(peers.size))]
    padded = F.pad(part_BSV, (0, max(lengths) - part_BSV.shape[-1]))
    parts = peers.gather(padded)
    return torch.cat([x[..., :length] for x, length in zip(parts, lengths, strict=True)], -1)


class VocabularyRows:
    """Hooks of an embedding that holds some of the rows: the others' come from their ranks, by a sum with zeros."""

    def __init__(self, vocabulary: VocabularyPart) -> None:
        self.vocabulary = vocabulary
        self._mine = torch.empty(0, dtype=torch.bool)  # which tokens of the pass in progress are this rank's

    def before(self, _: nn.Module, args: tuple[Tensor]) -> Tensor:
        """Local row numbers; 0 in place of other ranks' tokens."""
        rows, self._mine = self.vocabulary.local(args[0])
        return rows

    def after(self, _: nn.Module, __: tuple[Tensor], out: Tensor) -> Tensor:
        """Everyone's rows."""
        return self.vocabulary.ranks.sum(out * self._mine[..., None])


class LocalExperts(nn.Module):
    """Some of the routed experts. Rows come sorted by expert, so this rank's are one run; the others give zeros."""

    def __init__(self, local: nn.Module, experts: Range) -> None:
        super().__init__()
        self.local, self.experts = local, experts

    def forward(self, x_CD: Tensor, counts: list[int]) -> Tensor:
        start, stop = rows_of(self.experts, counts)
        out_CD = torch.zeros_like(x_CD)
        if stop > start:
            out_CD[start:stop] = self.local(x_CD[start:stop], counts[slice(*self.experts)])
        return out_CD


def rows_of(experts: Range, counts: list[int]) -> Range:
    """The run of rows, sorted by expert with `counts` of each, that some experts serve."""
    first, last = experts
    return sum(counts[:first]), sum(counts[:last])


def moe_of(decoder: Decoder, layer: int) -> MixtureOfExperts:
    """A layer's mixture of experts."""
    moe = decoder.layers[layer].feed_forward
    assert isinstance(moe, MixtureOfExperts)
    return moe


def _check_in_step(token_ids_BS: Tensor, everyone: Ranks) -> None:
    """Ranks that compute different tokens would give wrong answers without a sign: raise on all of them instead."""
    ids = token_ids_BS.flatten().to(torch.int64)
    places = torch.arange(1, len(ids) + 1, device=ids.device)
    seen = everyone.gather(torch.stack((places[-1], (ids * places).sum())))
    if any(not torch.equal(other, seen[0]) for other in seen):
        raise PunaError(
            "the processes of this sharded model were given different tokens; make the same calls with the same seeds "
            "in each of them"
        )
