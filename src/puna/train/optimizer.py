"""Muon for the hidden matrices, AdamW for the rest, over float32 master weights."""

import torch
from torch import Tensor, nn

# Newton-Schulz coefficients of Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/)
_A, _B, _C = 3.4445, -4.7750, 2.0315


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


class Optimizer:
    """Steps a model's parameters. Weights may be bfloat16; masters and momenta are float32 and are the state.

    Hidden matrices (attention and feed-forward, each expert by itself) take orthogonalised momentum; embeddings, norms,
    output and routers take AdamW. `rate` in `step` multiplies both learning rates.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        matrix_rate: float,
        vector_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.matrix_rate, self.vector_rate = matrix_rate, vector_rate
        self.weight_decay, self.momentum, self.betas = weight_decay, momentum, betas
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.state = {name: self._fresh(name, p) for name, p in self.parameters.items()}
        self.steps = 0

    @staticmethod
    def is_matrix(name: str) -> bool:
        """Whether a parameter takes Muon."""
        return (name.startswith("layers.") and name.rsplit(".", 1)[0].endswith("_proj")) or ".experts." in name

    def _fresh(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        master = parameter.detach().float().clone()
        names = ("momentum",) if self.is_matrix(name) else ("first", "second")
        return {"master": master, **{n: torch.zeros_like(master) for n in names}}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the accumulated gradients, which are then cleared."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            state, grad = self.state[name], parameter.grad.float()
            master = state["master"]
            if self.is_matrix(name):
                state["momentum"].lerp_(grad, 1 - self.momentum)
                update = self._matrix_update(name, grad.lerp_(state["momentum"], self.momentum))
                size = rate * self.matrix_rate
                master.mul_(1 - size * self.weight_decay).add_(update, alpha=-size)
            else:
                first, second = self.betas
                state["first"].lerp_(grad, 1 - first)
                state["second"].lerp_(grad.square(), 1 - second)
                mean = state["first"] / (1 - first**self.steps)
                scale = (state["second"] / (1 - second**self.steps)).sqrt_().add_(1e-10)
                master.add_(mean / scale, alpha=-rate * self.vector_rate)
            parameter.copy_(master)
            parameter.grad = None

    @staticmethod
    def _matrix_update(name: str, grad: Tensor) -> Tensor:
        # gate and up are two matrices stored as one; experts are stored [in, out], linears [out, in]
        if name.endswith("experts.gate_up_proj"):
            update = torch.cat([orthogonalised(half) for half in grad.chunk(2, -1)], -1)
            rows, columns = grad.shape[-1] // 2, grad.shape[-2]
        else:
            update = orthogonalised(grad)
            rows, columns = grad.shape[-2:] if grad.dim() == 2 else (grad.shape[-1], grad.shape[-2])
        return update.float() * max(1.0, rows / columns) ** 0.5

    def state_dict(self) -> dict[str, Tensor]:
        """All state as flat tensors: `NAME/master`, `NAME/momentum`, ... ."""
        return {f"{name}/{kind}": t for name, kinds in self.state.items() for kind, t in kinds.items()}

    def load_state_dict(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take back what `state_dict` gave; the parameters follow their masters."""
        self.steps = steps
        with torch.no_grad():
            for name, kinds in self.state.items():
                for kind, tensor in kinds.items():
                    tensor.copy_(tensors[f"{name}/{kind}"])
                self.parameters[name].copy_(kinds["master"])
