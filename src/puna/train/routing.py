"""Routers in training: float32, their load watched and balanced. No token is dropped, however uneven the load.

Legend: N tokens, E experts.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model import Decoder
from puna.model.feedforward import MixtureOfExperts
from puna.model.linear import Linear


class _Float32Router(nn.Module):
    """The router's product in float32, of the weights as they are."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND.float(), self.weight.float())


def balance_loss(router_logits_NE: Tensor, chosen_Nk: Tensor) -> Tensor:
    """Switch Transformer's term E * sum_e share_e * probability_e, which is 1 where even (arXiv 2101.03961, eq. 4)."""
    experts = router_logits_NE.shape[-1]
    share_E = chosen_Nk.flatten().bincount(minlength=experts).float() / chosen_Nk.numel()
    return experts * (share_E * router_logits_NE.float().softmax(-1).mean(0)).sum()


class Routing:
    """All mixtures of a model during training: float32 routers, the counts of each step, and one of three balancings.

    "auxiliary": `balance_loss` joins each pass's loss. "bias": a bias an expert joins the logits where experts are
    chosen, not in their gates; after each step it rises by `strength` where the load was below the mean and falls where
    above (arXiv 2408.15664). Llama 4 has no place for it, so it is scaled by the schedule and is gone when the rate is:
    what was trained is what is served. "none": neither.
    """

    def __init__(self, model: Decoder, balancing: str, strength: float) -> None:
        self.balancing, self.strength = balancing, strength
        self.mixtures: dict[int, MixtureOfExperts] = {}
        for number, block in enumerate(model.layers):
            mixture = block.get_submodule("feed_forward")
            if isinstance(mixture, MixtureOfExperts):
                self.mixtures[number] = mixture
                if isinstance(mixture.router, Linear):
                    mixture.router = _Float32Router(mixture.router.weight)
                mixture.watch = self._watcher(number)
        count = next((mixture.num_experts for mixture in self.mixtures.values()), 0)
        self.loads = {number: torch.zeros(count, dtype=torch.long) for number in self.mixtures}  # of the step so far
        self.biases = {number: torch.zeros(count) for number in self.mixtures}
        self._pass: dict[int, tuple[Tensor, Tensor]] | None = None
        self._tokens = 0

    def _watcher(self, number: int) -> Callable[[Tensor, Tensor], None]:
        def watch(logits_NE: Tensor, chosen_Nk: Tensor) -> None:
            if self._pass is not None:
                self._pass[number] = logits_NE[: self._tokens], chosen_Nk[: self._tokens]

        return watch

    def begin(self, schedule: float) -> None:
        """A step begins, at this multiplier of the rates."""
        for number, mixture in self.mixtures.items():
            self.loads[number].zero_()
            if self.balancing == "bias":
                mixture.bias_E = (self.biases[number] * schedule).to(next(mixture.parameters()).device)

    def open(self, tokens: int) -> None:
        """A pass begins: what goes through the routers until `close` counts, but for what fills it up after so many
        tokens."""
        self._pass, self._tokens = {}, tokens

    def close(self, counts: bool = True) -> Tensor | None:
        """The pass's forward part is over: count its load, if it `counts`; the term that joins its loss, weighted, if
        any. What the backward part computes again does not count."""
        seen, self._pass = self._pass or {}, None
        for number, (_, chosen_Nk) in seen.items() if counts else ():
            self.loads[number] += chosen_Nk.flatten().bincount(minlength=len(self.loads[number])).cpu()
        if self.balancing != "auxiliary" or not seen or not self.strength:
            return None
        return self.strength * torch.stack([balance_loss(*each) for each in seen.values()]).mean()

    def add_up(self, sums: Callable[[Tensor], Tensor]) -> None:
        """The load of the step becomes that of all processes, which have trained on other passes."""
        for number, load_E in self.loads.items():
            self.loads[number] = sums(load_E.double()).long()

    def end(self) -> None:
        """A step is over: the biases follow its load."""
        if self.balancing == "bias":
            for number, load_E in self.loads.items():
                self.biases[number] += self.strength * (load_E.float().mean() - load_E).sign()

    def imbalance(self) -> dict[int, float]:
        """Of each layer, the busiest expert's load in the step, 1 where even."""
        return {number: float(load_E.max() / load_E.float().mean().clamp(min=1e-9))
                for number, load_E in self.loads.items()}  # fmt: skip

    def idle(self) -> dict[int, int]:
        """Of each layer, how many experts served no token in the step."""
        return {number: int((load_E == 0).sum()) for number, load_E in self.loads.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The biases, by layer."""
        return {f"bias/{number}": bias for number, bias in self.biases.items()} if self.balancing == "bias" else {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for name, bias in self.state_dict().items():
            bias.copy_(tensors[name])

    def remove(self) -> None:
        """Leave the model as it serves: plain routers without biases."""
        for mixture in self.mixtures.values():
            mixture.watch, mixture.bias_E = None, None
            if isinstance(mixture.router, _Float32Router):
                weight = mixture.router.weight
                with torch.device("meta"):
                    mixture.router = Linear(weight.shape[1], weight.shape[0])
                mixture.router.register_parameter("weight", nn.Parameter(weight))
