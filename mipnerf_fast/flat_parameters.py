"""A model's parameters and gradients in one tensor each: one reduction, one clipping, one optimiser kernel a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Every parameter starts at a multiple of this many elements: 256 bytes, as kernels with wide loads want it.
_ALIGNMENT = 64


class FlatParameters:
    """Moves the parameters of a model into one tensor; they become views of it, and so do their gradients.

    Whatever writes to a parameter in place (`load_state_dict`, an optimiser on `values`) is seen by both sides. The
    gaps that alignment leaves are zero and stay so.

    Args:
        model: on its device, all parameters of one dtype.
        extra: numbers to add behind the gradients, for what is to be reduced along with them.

    values: nn.Parameter [P], its .grad is `gradients`. gradients: [P]. sums: [P + extra], the gradients and what
    follows them.
    """

    def __init__(self, model: nn.Module, extra: int = 0) -> None:
        self.named = dict(model.named_parameters())
        starts, end = {}, 0
        for name, parameter in self.named.items():
            starts[name] = end
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        first = next(iter(self.named.values()))
        self._starts = starts
        values = torch.zeros(end, dtype=first.dtype, device=first.device)
        self.sums = torch.zeros(end + extra, dtype=first.dtype, device=first.device)
        self.gradients = self.sums[:end]
        gradients = self.split(self.gradients)
        self._views = list(gradients.values())
        for name, view in self.split(values).items():
            parameter = self.named[name]
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = gradients[name]
        self.values = nn.Parameter(values)
        self.values.grad = self.gradients
        self.size = sum(parameter.numel() for parameter in self.named.values())

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor like `values`, one per parameter and in its shape: views."""
        return {
            name: flat[self._starts[name] : self._starts[name] + parameter.numel()].view(parameter.shape)
            for name, parameter in self.named.items()
        }

    def add_gradients(self, losses: Sequence[Tensor]) -> None:
        """Add to `gradients` those of the sum of some losses, which share nothing but the parameters.

        To the last bit as sum(losses).backward(), which launches two additions for every parameter and not two in all.
        """
        parameters = list(self.named.values())
        total: tuple[Tensor, ...] = ()
        for loss in reversed(losses):
            found = torch.autograd.grad(loss, parameters, materialize_grads=True)
            total = torch._foreach_add(total, found) if total else found
        torch._foreach_add_(self._views, total)
