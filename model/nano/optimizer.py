"""Muon for the matrices inside the network, AdamW for the rest; fp32 masters of bf16 weights.

Muon: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon: the momentum of a matrix is
replaced by the orthogonal matrix nearest to it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz step, from the post
_STEPS = 5

# Tables, and the gate, whose rows are not mixed as those of other matrices are.
_NOT_MATRICES = ("embed_tokens", "position_embedding", "lm_head", "moe.gate", "heads.")

# What may be trained alone: its matrices are not stacked with others.
_TOWER = ("vision_tower.", "projector.")


class Optimizer:
    """`rate` 1 is the full learning rate of both."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        matrix_rate: float = 0.02,
        other_rate: float = 0.003,
        momentum: float = 0.95,
        decay: float = 0.01,
    ) -> None:
        self._matrix_rate, self._other_rate = matrix_rate, other_rate
        self._momentum, self._decay = momentum, decay
        by_shape: dict[tuple, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        others: list[tuple[str, nn.Parameter]] = []
        for name, parameter in named:
            is_matrix = parameter.ndim > 1 and not any(n in name for n in _NOT_MATRICES)
            if is_matrix:
                by_shape[name.startswith(_TOWER), _matrix(parameter)].append((name, parameter))
            else:
                others.append((name, parameter))
        self._stacks = [_Stack(group) for group in by_shape.values()]
        self._names = [name for name, _ in others]
        self._others = [parameter for _, parameter in others]
        self._masters = [p.detach().float().clone().requires_grad_() for p in self._others]
        self._adam = torch.optim.AdamW(
            self._masters, betas=(0.9, 0.98), weight_decay=0.0, fused=self._masters[0].is_cuda
        )

    def step(self, rate: float) -> None:
        """Take the gradients of the weights, and update the weights that have one."""
        for stack in self._stacks:
            if stack.has_gradients():
                stack.step(self._matrix_rate * rate, self._momentum, self._decay)
        for master, parameter in zip(self._masters, self._others, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._adam.param_groups[0]["lr"] = self._other_rate * rate
        self._adam.step()
        with torch.no_grad():
            _copy(self._masters, self._others)

    def state_dict(self) -> dict[str, Any]:
        """In bf16, so that it travels: half the bytes, and what is lost is less than one step."""
        state: dict[str, Any] = {}
        for stack in self._stacks:
            state |= stack.state()
        for name, master in zip(self._names, self._masters, strict=True):
            moments = self._adam.state.get(master, {})
            kept = {"master": master.detach(), **moments}
            state[name] = {k: v if k == "step" else v.bfloat16() for k, v in kept.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stack in self._stacks:
            stack.load(state)
        with torch.no_grad():
            for name, master, weight in zip(self._names, self._masters, self._others, strict=True):
                saved = dict(state[name])
                master.copy_(saved.pop("master"))
                weight.copy_(master)
                if saved:
                    self._adam.state[master] = {
                        k: v.clone() if k == "step" else v.to(master) for k, v in saved.items()
                    }


class _Stack:
    """All matrices of one shape, updated as one."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self._names = [name for name, _ in named]
        self._weights = [parameter for _, parameter in named]
        self._master = self._stacked([p.detach() for p in self._weights])
        self._momentum = torch.zeros_like(self._master)

    @staticmethod
    def _stacked(tensors: list[Tensor]) -> Tensor:
        """fp32 [n, rows, columns]; stacks of experts are so many matrices."""
        return torch.cat([t.reshape(-1, *_matrix(t)) for t in tensors]).float()

    def has_gradients(self) -> bool:
        """Not when they are no part of what is trained now."""
        return any(weight.grad is not None for weight in self._weights)

    @torch.no_grad()
    def step(self, rate: float, momentum: float, decay: float) -> None:
        gradient = self._stacked([_gradient(p) for p in self._weights])
        self._momentum.lerp_(gradient, 1 - momentum)
        update = orthogonal(gradient.lerp_(self._momentum, momentum))
        rows, columns = update.shape[1:]
        self._master.mul_(1 - rate * decay)
        self._master.sub_(update, alpha=rate * max(1, rows / columns) ** 0.5)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        _copy(self._parts(self._master), self._weights)

    def _parts(self, stack: Tensor) -> list[Tensor]:
        counts = [len(w) if w.ndim == 3 else 1 for w in self._weights]
        parts = stack.split(counts)
        return [p.view(w.shape) for p, w in zip(parts, self._weights, strict=True)]

    def state(self) -> dict[str, dict[str, Tensor]]:
        parts = zip(self._names, self._parts(self._master), self._parts(self._momentum),
                    strict=True)  # fmt: skip
        return {n: {"master": a.bfloat16(), "momentum": b.bfloat16()} for n, a, b in parts}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, master, momentum in zip(
            self._names, self._parts(self._master), self._parts(self._momentum), strict=True
        ):
            master.copy_(state[name]["master"])
            if "momentum" in state[name]:  # else it was trained by AdamW until now
                momentum.copy_(state[name]["momentum"])
        self._write()


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """In one launch, not one each."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def _matrix(weight: Tensor) -> tuple[int, ...]:
    """(rows, columns): of each expert, and of a convolution's patches as rows."""
    return tuple(weight.flatten(1).shape if weight.ndim == 4 else weight.shape[-2:])


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T for every U S V^T, [n, rows, columns], with singular values near 1."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if is_tall else x).float()
