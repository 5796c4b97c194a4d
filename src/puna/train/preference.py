"""Losses of preference tuning, from each answer's log-probability. TRL's formulas (`trl/trainer/dpo_trainer.py` and
`trl/experimental/{cpo,orpo}`), which are the papers'.

Legend: P pairs of a chosen and a rejected answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities in nats, each [P]: summed over an answer's tokens, under the policy and under the reference
    (zeros where a loss takes none), and how many tokens an answer has."""

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def margin(self) -> Tensor:
        """How much more the policy prefers the chosen answer than the reference does."""
        return (self.chosen - self.chosen_reference) - (self.rejected - self.rejected_reference)

    @property
    def averages(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probabilities a token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def sigmoid(pairs: Pairs, beta: float, extra: float) -> Tensor:
    """DPO (arXiv 2305.18290), with `extra` the label smoothing of conservative DPO."""
    scaled = beta * pairs.margin
    return -F.logsigmoid(scaled) * (1 - extra) - F.logsigmoid(-scaled) * extra


def hinge(pairs: Pairs, beta: float, extra: float) -> Tensor:  # noqa: ARG001
    """SLiC (arXiv 2305.10425)."""
    return F.relu(1 - beta * pairs.margin)


def ipo(pairs: Pairs, beta: float, extra: float) -> Tensor:  # noqa: ARG001
    """IPO (arXiv 2310.12036), on log-probabilities a token."""
    chosen = (pairs.chosen - pairs.chosen_reference) / pairs.chosen_tokens
    rejected = (pairs.rejected - pairs.rejected_reference) / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo(pairs: Pairs, beta: float, extra: float) -> Tensor:
    """SimPO (arXiv 2405.14734) without a reference; `extra` is gamma, the margin in the units of beta * log p."""
    chosen, rejected = pairs.averages
    return -F.logsigmoid(beta * (chosen - rejected) - extra)


def orpo(pairs: Pairs, beta: float, extra: float) -> Tensor:  # noqa: ARG001
    """ORPO (arXiv 2403.07691) without a reference: the chosen answer's loss a token, and the odds ratio."""
    chosen, rejected = pairs.averages
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0."""
    return (-x.expm1()).log()


LOSSES: Mapping[str, Callable[[Pairs, float, float], Tensor]] = {
    "sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "simpo": simpo, "orpo": orpo,
}  # fmt: skip
WITHOUT_REFERENCE = ("simpo", "orpo")
EXTRA = {"sigmoid": 0.0, "simpo": 1.0}  # label smoothing, gamma; others have none
