"""The answers that a pass of the distillation reads."""

from __future__ import annotations

from typing import Any

import torch

from preceptor.data.sequences import Sequence
from preceptor.methods.teacher_hacking.text_models import TextModel


class AnswerSet:
    """The answers that a pass reads: ``fixed`` ones, and with probability λ an example's new one.

    An empty new answer leaves the fixed one in its place; ``empty`` counts them.
    """

    def __init__(self, fixed: list[Sequence], online: float) -> None:
        self.fixed, self.now, self.online = fixed, fixed, online
        self.turned, self.empty = -1, 0

    def turn(self, number: int, writer: TextModel, length: int) -> None:
        """Open pass ``number``: the online answers are written, all at once, once for each pass."""
        if number == self.turned:
            return
        self.turned = number
        new = (torch.rand(len(self.fixed)) < self.online).nonzero().flatten().tolist() if self.online else []
        if not new:
            self.now = self.fixed
            return
        answers = writer.answer([self.fixed[place].prompt for place in new], length)
        self.now = list(self.fixed)
        for place, sequence in zip(new, answers):
            self.now[place] = sequence if any(sequence.response) else self.fixed[place]
            self.empty += not any(sequence.response)

    def state_dict(self) -> dict[str, Any]:
        """The open pass; the fixed answers are in the run's folder."""
        new = {str(place): one for place, one in enumerate(self.now) if one is not self.fixed[place]}
        answers = {place: list(one.ids[len(one.prompt) :]) for place, one in new.items()}
        return {"turned": self.turned, "empty": self.empty, "answers": answers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.turned, self.empty, self.now = state["turned"], state["empty"], list(self.fixed)
        for place, ids in state["answers"].items():
            prompt = self.fixed[int(place)].prompt
            self.now[int(place)] = Sequence((*prompt, *ids), (False,) * len(prompt) + (True,) * len(ids))
