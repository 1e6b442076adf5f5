"""A teacher that is an exponential moving average of its student.

Source: Mean Teacher (Tarvainen and Valpola, NeurIPS 2017, https://arxiv.org/abs/1703.01780).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from preceptor.data.sequences import Batch
from preceptor.distillation.teachers import hidden_targets
from preceptor.errors import UserError
from preceptor.knowledge import HiddenTargets


class MomentumTeacher:
    """An exponential moving average of a student: θ_T ← m θ_T + (1 - m) θ_S (Tarvainen & Valpola, 2017, eq. 1).

    The copy is kept in float32: in bfloat16 an average with m near 1 would stand still. Buffers are copied as they are,
    unless the copy keeps statistics of its own. ``model`` is the copy, for modules that are not language models. With
    ``Run.remember`` it survives a resume.

    Args:
        student: the module to follow; it is copied, not shared.
        momentum: m, in [0, 1].
        own_statistics: leave the copy in training mode, so that its batch norms use and track what it sees itself.

    Raises:
        UserError: the momentum is outside [0, 1].
    """

    def __init__(self, student: nn.Module, momentum: float, *, own_statistics: bool = False) -> None:
        self.momentum = _checked(momentum)
        self.own_statistics = own_statistics
        self.model = copy.deepcopy(student).float().train(own_statistics).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenTargets:
        """Last hidden states (B, T, width) of the averaged language model, and its head."""
        targets: HiddenTargets = self.model(batch, hidden_targets)
        return targets

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float | None = None) -> None:
        """Take one step towards the student, wrapped (DDP) or not, with another momentum for this step if given."""
        share = 1.0 - (self.momentum if momentum is None else _checked(momentum))
        for mine, other in zip(self.model.parameters(), student.parameters()):
            mine.lerp_(other.detach().to(mine), share)
        if not self.own_statistics:
            for kept, given in zip(self.model.buffers(), student.buffers()):
                kept.copy_(given)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, each tied tensor once."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def _checked(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise UserError(f"The teacher's momentum is {momentum}; it must lie in [0, 1].")
    return momentum
