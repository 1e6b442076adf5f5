"""The course of a distillation beside an oracle: golden and proxy of every held-out sequence at every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preceptor.methods.teacher_hacking.label import Label, reference_label

TOGETHER = 5  # checkpoints in a row whose mean decides a label


@dataclass
class Course:
    """``golden`` and ``proxy``: for each of ``steps``, the divergence on each held-out sequence (N,), in nats."""

    steps: list[int] = field(default_factory=list)
    golden: list[Tensor] = field(default_factory=list)
    proxy: list[Tensor] = field(default_factory=list)

    def see(self, step: int, golden: Tensor, proxy: Tensor) -> None:
        """Write down one checkpoint."""
        self.steps.append(step)
        self.golden.append(golden)
        self.proxy.append(proxy)

    def points(self) -> list[tuple[int, float]]:
        """(step, proxy), the mean over the sequences."""
        return [(step, float(values.mean())) for step, values in zip(self.steps, self.proxy)]

    def plane(self) -> list[tuple[float, float]]:
        """(proxy, golden) of each checkpoint, means over the sequences."""
        return [(float(proxy.mean()), float(golden.mean())) for proxy, golden in zip(self.proxy, self.golden)]

    def label(self) -> Label:
        """The reference label, of means over ``TOGETHER`` checkpoints in a row (see ``departure.reference_label``)."""
        golden, proxy = ([row.tolist() for row in rows] for rows in (self.golden, self.proxy))
        return reference_label(self.steps, golden, proxy, together=TOGETHER)

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint or a file."""
        state: dict[str, Any] = {"steps": list(self.steps)}
        return state | ({"golden": torch.stack(self.golden), "proxy": torch.stack(self.proxy)} if self.steps else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.steps = list(state["steps"])
        self.golden = list(state["golden"]) if self.steps else []
        self.proxy = list(state["proxy"]) if self.steps else []
