"""The base beside its policy: log-probabilities of answers, which preferences are measured against."""

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from puna.model import Decoder
from puna.model.adapt import switched_off
from puna.train.loss import IGNORED, token_losses
from puna.train.method import Batch, Document, Example
from puna.train.processes import Processes
from puna.train.sharded import deal


class Reference:
    """The base: the same model with its adapters off, or, where all weights train, a frozen copy."""

    def __init__(self) -> None:
        self._copies: tuple[Decoder, ...] = ()
        self._known: dict[bytes, float] = {}
        self._processes = Processes.alone()

    def keep(self, model: Decoder) -> None:
        """Copy a model that is going to train itself."""
        self._copies = (copy.deepcopy(model).eval(),)

    def join(self, processes: Processes) -> None:
        """Work with other processes from now on; what trains has been chosen."""
        self._processes = processes
        for model in self._copies:
            deal(model, processes)

    def logprobs(self, model: Decoder, examples: Sequence[Example]) -> Tensor:
        """The base's log-probability of what carries loss in each document of these examples, computed once.

        Each example is alone in a pass, so that they don't depend on what else a pass holds, which a resumed run may
        meet at another time. Processes make as many passes as the one that has the most to do, since all take part in
        each.
        """
        unknown = [example for example in examples if any(key not in self._known for key in _keys(example))]
        for at in range(self._processes.most(len(unknown))):
            example = unknown[at] if at < len(unknown) else examples[0]
            batch = Batch.of([example], model.device)
            with torch.no_grad():
                if self._copies:
                    found, _ = answers(self._copies[0], batch)
                else:
                    with switched_off(model):
                        found, _ = answers(model, batch)
            self._known |= dict(zip(_keys(example), found.tolist(), strict=True))
        return torch.tensor([self._known[key] for each in examples for key in _keys(each)], device=model.device)


def _keys(example: Example) -> list[bytes]:
    return [_key(document) for document in example.documents]


def _key(document: Document) -> bytes:
    """Of all that the model is shown, and what of it counts."""
    found = hashlib.sha256(document.tokens.tobytes() + document.counted.tobytes())
    for picture in document.pictures:
        found.update(hashlib.sha256(picture.data).digest() + bytes([picture.low]))
    return found.digest()


def answers(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each document of a pass: the log-probability of its tokens that carry loss, and how many these are."""
    losses_N = token_losses(batch.states(model), model.head_weight, batch.targets_N, model.vocabulary)
    counted_N = (batch.targets_N != IGNORED).float()
    parts = zip(losses_N.split(list(batch.lengths)), counted_N.split(list(batch.lengths)), strict=True)
    sums = [(-losses.sum(), counted.sum()) for losses, counted in parts]
    return torch.stack([one for one, _ in sums]), torch.stack([count for _, count in sums])
