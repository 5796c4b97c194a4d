"""AdamW, or Muon for the hidden matrices beside it; float32 masters at two bytes more than bfloat16 weights.

A bfloat16 weight is the upper half of its float32 master, rounded; what rounding took away is kept as a 16-bit integer.
So weight, master and two moments take 2 + 2 + 8 bytes a parameter where separate masters take 14.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from puna.model.native_steps import AdamStep, adam, square_sum, steps_for
from puna.train.pieces import Piece

# Newton-Schulz coefficients of Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/)
_A, _B, _C = 3.4445, -4.7750, 2.0315
_BLOCK = 1 << 18  # elements that are updated at once: what they need beside the state stays in a CPU's cache


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately, of each [..., R, C]; bfloat16 inside."""
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


def is_matrix(name: str) -> bool:
    """Whether a parameter takes Muon: attention and feed-forward, each expert by itself."""
    return (name.startswith("layers.") and name.rsplit(".", 1)[0].endswith("_proj")) or ".experts." in name


class Optimizer:
    """Steps the trainable parameters of a model. Weights may be bfloat16; masters and moments are float32.

    Gradients of several passes are summed in float32 (`passes` says how many a step has), those of a single one are
    taken as they are. `schedule` in `step` multiplies all rates.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        muon: bool,
        rate: float,
        matrix_rate: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.rate, self.matrix_rate, self.weight_decay, self.clip = rate, matrix_rate, weight_decay, clip
        self.momentum, self.betas, self.eps = momentum, betas, eps
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.groups: dict[str, list[str]] = {"adamw": []}  # names by who steps them
        for name in self.parameters:
            self.groups.setdefault("muon" if muon and is_matrix(name) else "adamw", []).append(name)
        self.state: dict[str, dict[str, Tensor]] = {}
        for who, names in self.groups.items():
            moments = ("momentum",) if who == "muon" else ("first", "second")
            self.state |= {name: self._fresh(self.parameters[name], moments) for name in names}
        self.steps = 0
        self.passes = 1
        self._sums: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._collector(name))

    @staticmethod
    def _fresh(parameter: Tensor, moments: tuple[str, ...]) -> dict[str, Tensor]:
        state = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in moments}
        if parameter.dtype == torch.bfloat16:
            state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
        elif parameter.dtype != torch.float32:
            raise TypeError(f"parameters train in bfloat16 or float32, not {parameter.dtype}")
        return state

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            if self.passes > 1 and parameter.grad is not None:
                if name in self._sums:
                    self._sums[name] += parameter.grad
                else:
                    self._sums[name] = parameter.grad.float()
                parameter.grad = None

        return collect

    def gradients(self) -> dict[str, Tensor]:
        """Of the step so far, those that there are: float32 sums, or the single pass's."""
        given = {name: self._sums.get(name, p.grad) for name, p in self.parameters.items()}
        return {name: grad for name, grad in given.items() if grad is not None}

    @torch.no_grad()
    def step(self, schedule: float) -> float:
        """One update from the gathered gradients, which are then cleared. Gives their norm before clipping."""
        self.steps += 1
        grads = self.gradients()
        norm = self.norm(grads)
        scale = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
        muon = set(self.groups.get("muon", ()))
        for name, update in self.updates({name: grad for name, grad in grads.items() if name in muon}, scale):
            self._step_muon(name, update, schedule)
        for name, grad in grads.items():
            if name not in muon:
                self._step_adamw(name, grad, scale, schedule)
            self.parameters[name].grad = None
            self._sums.pop(name, None)
        return norm

    def norm(self, grads: Mapping[str, Tensor]) -> float:
        """Of all gradients together."""
        return sum(_square_sum(grad) for grad in grads.values()) ** 0.5

    def updates(self, grads: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
        """Muon's update of each matrix, from its gradient times `scale`, which joins its momentum."""
        for name, grad in grads.items():
            yield name, matrix_update(name, self.direction(name, grad, scale))

    def direction(self, name: str, grad: Tensor, scale: float) -> Tensor:
        """Where a gradient and its momentum, which takes it in, lead."""
        grad, momentum = grad.float() * scale, self.state[name]["momentum"]
        momentum.lerp_(grad, 1 - self.momentum)
        return grad.lerp_(momentum, self.momentum)

    def pieces(self) -> dict[str, Piece]:
        """What this process holds of each trainable parameter."""
        return {name: Piece.whole(p.shape) for name, p in self.parameters.items()}

    def _step_adamw(self, name: str, grad: Tensor, scale: float, schedule: float) -> None:
        """AdamW as PyTorch's fused one, by our kernels or block by block."""
        parameter, state = self.parameters[name].data, self.state[name]
        decay = self.weight_decay if parameter.dim() > 1 else 0.0
        rate, grad = schedule * self.rate, grad.contiguous()
        native = steps_for(parameter, grad) if parameter.is_contiguous() else None
        if native:
            first, second = (1 - beta**self.steps for beta in self.betas)
            by = AdamStep(scale, 1 - rate * decay, rate / first, second**-0.5, self.betas, self.eps)
            adam(native, parameter, state.get("low"), grad, state["first"], state["second"], by)
            return
        done = torch.tensor(float(self.steps), device=grad.device)
        parts = [x.view(-1).split(_BLOCK) for x in (parameter, grad, state["first"], state["second"])]
        lows = state["low"].view(-1).split(_BLOCK) if "low" in state else [None] * len(parts[0])
        for weight, g, first, second, low in zip(*parts, lows, strict=True):
            master = weight if low is None else _joined(weight, low)
            gradient = g.float() if scale == 1.0 else g * scale if g.dtype == torch.float32 else g.float().mul_(scale)
            torch._fused_adamw_(
                [master], [gradient], [first], [second], [], [done], lr=rate, beta1=self.betas[0],
                beta2=self.betas[1], weight_decay=decay, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            if low is not None:
                _split(master, weight, low)

    def _step_muon(self, name: str, update: Tensor, schedule: float) -> None:
        parameter, low = self.parameters[name], self.state[name].get("low")
        size = schedule * self.matrix_rate
        master = parameter.data if low is None else _joined(parameter.data, low)
        master.mul_(1 - size * self.weight_decay).add_(update, alpha=-size)
        if low is not None:
            _split(master, parameter.data, low)

    def state_dict(self) -> dict[str, Tensor]:
        """All state as flat tensors: `NAME/master`, `NAME/momentum`, ... ."""
        found = {}
        for name, kinds in self.state.items():
            weight = self.parameters[name].data
            found[f"{name}/master"] = _joined(weight, kinds["low"]) if "low" in kinds else weight
            found |= {f"{name}/{kind}": tensor for kind, tensor in kinds.items() if kind != "low"}
        return found

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take back what `state_dict` gave; the parameters follow their masters."""
        self.steps = steps
        with torch.no_grad():
            for name, kinds in self.state.items():
                take_master(self.parameters[name], tensors[f"{name}/master"], kinds.get("low"))
                for kind in kinds.keys() - {"low"}:
                    kinds[kind].copy_(tensors[f"{name}/{kind}"])


def take_master(parameter: Tensor, master: Tensor, low: Tensor | None) -> None:
    """Give a parameter the value of its float32 master; `low` gets what a bfloat16 one can't hold."""
    if parameter.dtype == torch.bfloat16:
        _split(master.to(parameter.device), parameter.data, torch.empty_like(parameter, dtype=torch.int16)
               if low is None else low)  # fmt: skip
    else:
        parameter.data.copy_(master)


def _square_sum(x: Tensor) -> float:
    native = steps_for(x) if x.is_contiguous() else None
    return square_sum(native, x) if native else float(x.norm(dtype=torch.float32)) ** 2


def _joined(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 masters of bfloat16 weights and what their rounding took."""
    return (weight.view(torch.int16).int() << 16).add_(low).view(torch.float32)


def _split(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write masters back as weights, rounded to the nearest (halves away from zero), and the rest."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    weight.view(torch.int16).copy_(upper)
    low.copy_(bits - (upper << 16))


def matrix_update(name: str, grad: Tensor) -> Tensor:
    """Muon's update of a whole matrix's gradient, or of those of some whole experts."""
    # gate and up are two matrices stored as one; experts are stored [in, out], linears [out, in]
    if name.endswith("experts.gate_up_proj"):
        update = torch.cat([orthogonalised(half) for half in grad.chunk(2, -1)], -1)
        rows, columns = grad.shape[-1] // 2, grad.shape[-2]
    else:
        update = orthogonalised(grad)
        rows, columns = grad.shape[-2:] if grad.dim() == 2 else (grad.shape[-1], grad.shape[-2])
    return update.float() * max(1.0, rows / columns) ** 0.5
