"""SwiGLU, dense or as a mixture of experts in which only the chosen experts compute.

Legend: N tokens, D model width, F feed-forward width, E experts, C (token, expert) choices.
"""

from collections.abc import Callable
from operator import is_

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from puna.family.config import ModelConfig
from puna.model.differentiable import FILL, reordered, swiglu
from puna.model.elementwise import fast, sigmoid, silu_mul
from puna.model.linear import Linear
from puna.model.mixture import MixtureCall, mixture_call, run_mixture


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj: nn.Module = Linear(width, hidden)
        self.up_proj: nn.Module = Linear(width, hidden)
        self.down_proj: nn.Module = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up)


class Experts(nn.Module):
    """The routed experts' weights, fused as Hugging Face stores them: gate_up [E, D, 2F], down [E, F, D]."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, width, 2 * hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        if not self.gate_up_proj.is_meta:
            nn.init.normal_(self.gate_up_proj, std=width**-0.5)
            nn.init.normal_(self.down_proj, std=hidden**-0.5)

    def forward(self, x_CD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> [C, D]. Experts without rows are not touched."""
        # unbind: its backward gathers all experts' gradients once, where indexing would add a full tensor an expert
        weights = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        outputs = []
        for rows, (gate_up, down) in zip(x_CD.split(counts), weights, strict=True):
            if len(rows):
                filled = F.pad(rows, (0, 0, 0, -len(rows) % FILL)) if torch.is_grad_enabled() else rows
                outputs.append((silu_mul(filled @ gate_up) @ down)[: len(rows)])
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """Llama 4: y = shared(x) + sum over chosen e of expert_e(sigmoid(logit_e) * x); the gate scales the expert's INPUT.

    Token choice on raw router logits, no softmax, no renormalisation (llama-models `llama4/moe.py`). The reference
    runs every expert on inputs scaled by zero where not chosen; without biases these give zero, so skipping is exact.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.num_experts = config.num_experts
        self.router: nn.Module = Linear(config.hidden_size, config.num_experts)
        self.experts: nn.Module = Experts(config.num_experts, config.hidden_size, config.expert_intermediate_size)
        self.shared_expert: nn.Module = FeedForward(config.hidden_size, config.expert_intermediate_size)
        self.load_E = np.zeros(config.num_experts, np.int64)  # tokens that each expert has served
        self.bias_E: Tensor | None = None  # training's, added where experts are chosen, not in their gates
        self.watch: Callable[[Tensor, Tensor], None] | None = None  # training's, told logits [N, E] and choices
        self._seen: list[object] = []
        self._call: MixtureCall | None = None

    def call(self, dtype: torch.dtype) -> MixtureCall | None:
        """All of it as one call of the kernels, where each part is just what they compute; looked at anew whenever a
        part has been exchanged."""
        if self.bias_E is not None or self.watch is not None:
            return None
        router, experts, shared = self.router, self.experts, self.shared_expert
        seen: list[object] = [dtype, router, experts, shared, *shared._modules.values()]
        if len(seen) != len(self._seen) or not all(map(is_, seen, self._seen)):
            self._call = mixture_call(router, shared, experts, self.top_k, self.load_E, dtype == torch.bfloat16)
            self._seen = seen
        return self._call

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (x's dtype) and expert indices of each token's choices, both [N, top_k]."""
        logits_NE = self.router(x_ND)
        if self.bias_E is None:
            experts_Nk = first_of_largest(logits_NE, self.top_k)
        else:
            experts_Nk = first_of_largest(logits_NE + self.bias_E, self.top_k)
        logits_Nk = logits_NE.gather(-1, experts_Nk)
        if self.watch is not None:
            self.watch(logits_NE, experts_Nk)
        return sigmoid(logits_Nk.float()).to(x_ND.dtype), experts_Nk

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.flatten(0, -2)
        native = fast(x_ND)
        if native and (call := self.call(x_ND.dtype)):
            return run_mixture(native, call, x_ND).view_as(x_BSD)
        gates_Nk, experts_Nk = self.route(x_ND)
        experts_C = experts_Nk.flatten().cpu().numpy()  # a few numbers: NumPy sorts them in a tenth of PyTorch's time
        served_E = np.bincount(experts_C, minlength=self.num_experts)
        self.load_E += served_E
        if len(experts_C) == 1:
            routed_ND = self.experts(x_ND * gates_Nk, served_E.tolist())
        else:
            routed_ND = self._sorted(x_ND, gates_Nk, experts_C, served_E.tolist())
        return self.shared_expert(x_BSD) + routed_ND.view_as(x_BSD)

    def _sorted(self, x_ND: Tensor, gates_Nk: Tensor, experts_C: NDArray[np.int64], counts: list[int]) -> Tensor:
        """What the chosen experts give [N, D]: each serves its rows together; a row's choices are added in their order,
        so that its bits depend on nothing beside it."""
        order_C = experts_C.argsort(kind="stable")
        back_C = np.empty_like(order_C)
        back_C[order_C] = np.arange(len(order_C))
        order, back = (torch.from_numpy(each).to(x_ND.device) for each in (order_C, back_C))
        scaled_CD = (x_ND[:, None] * gates_Nk[..., None]).flatten(0, 1)
        routed_CD = reordered(self.experts(reordered(scaled_CD, order, back), counts), back, order)
        if self.top_k == 1:
            return routed_CD
        return sum(routed_CD.unflatten(0, (-1, self.top_k)).unbind(1), start=torch.zeros_like(x_ND))


def first_of_largest(x_NE: Tensor, count: int) -> Tensor:
    """Where each row's `count` largest are, the first of equals first, as in the kernels (`topk` leaves it open)."""
    return x_NE.sort(dim=-1, descending=True, stable=True).indices[:, :count]
