"""The checkpoints of one run: what they hold, and where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from preceptor.engine import checkpoint
from preceptor.engine.distribution import Learner, gather_objects
from preceptor.engine.metrics import Metrics
from preceptor.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Stateful(Protocol):
    """What `Run.remember` keeps: a state of tensors, numbers, text, lists and dicts."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Takes the state back."""


class Snapshots:
    """Saves what learns, its optimizers, the random numbers and what is remembered; puts all of it back.

    ``folder`` is that of the checkpoints, ``keep`` how many stay. Frozen weights are not saved: a fingerprint shows
    whether those of a resumed run are the same.
    """

    def __init__(self, folder: Path, learners: Mapping[str, Learner], accelerator: Accelerator, *, keep: int) -> None:
        self.folder = folder
        self._learners, self._accelerator, self._keep = learners, accelerator, keep
        self._frozen = {name: checkpoint.fingerprint(learner.frozen) for name, learner in learners.items()}
        self._remembered: dict[str, Stateful] = {}
        self._apart: set[str] = set()
        self._waiting: dict[str, Any] = {}
        self._random: checkpoint.RandomState | None = None
        self._saved = -1

    def remember(self, name: str, thing: Stateful, *, apart: bool) -> None:
        """Saves the state of `thing` from now on, and gives it the one of the checkpoint resumed from, if any."""
        self._remembered[name] = thing
        if apart:
            self._apart.add(name)
        if name in self._waiting:
            thing.load_state_dict(self._waiting.pop(name))

    def save(self, step: int, metrics: Metrics | None) -> None:
        """Writes the checkpoint of `step`, once; `metrics` is None in every process but the main one."""
        if self._saved == step:
            return
        tensors: dict[str, Tensor] = {}
        for learner in self._learners.values():
            learner.take_state(tensors)
        states = gather_objects(checkpoint.random_state(), self._accelerator)
        things = {name: thing.state_dict() for name, thing in self._remembered.items()}
        apart = gather_objects({name: things.pop(name) for name in self._apart}, self._accelerator)
        header: checkpoint.CheckpointHeader = {
            "random": checkpoint.take_tensors(states, "random", tensors),
            "remembered": checkpoint.take_tensors(things, "remembered", tensors),
            "apart": checkpoint.take_tensors(apart, "apart", tensors),
            "frozen": self._frozen,
        }
        if metrics is not None:
            header["metrics_bytes"] = metrics.flush(to_disk=True)
            checkpoint.write(self.folder, step, tensors, header, keep=self._keep)
        self._accelerator.wait_for_everyone()
        self._saved = step

    def restore(self) -> tuple[int, int]:
        """Takes up the newest whole checkpoint; its step, and how long metrics.jsonl was then, in bytes.

        Raises:
            UserError: the weights do not fit, or the frozen ones are others.
        """
        path = checkpoint.newest(self.folder)
        if path is None:
            return 0, 0
        header, tensors = checkpoint.read_header(path), checkpoint.read_tensors(path)
        if header["frozen"] != self._frozen:
            raise UserError(f"The frozen weights are not those {path} was trained on: resume with the same base model.")
        for learner in self._learners.values():
            learner.put_state(tensors)
        rank, states = self._accelerator.process_index, checkpoint.put_tensors(header["random"], tensors)
        if len(states) == self._accelerator.num_processes:
            self._random = states[rank]
        apart = checkpoint.put_tensors(header.get("apart", []), tensors) or [{}]
        self._waiting = checkpoint.put_tensors(header["remembered"], tensors) | apart[rank % len(apart)]
        self._saved = header["step"]
        return header["step"], header["metrics_bytes"]

    def restore_random(self) -> None:
        """Puts the random generators back into the checkpoint's states, once, at the first step of a resumed run.

        Not earlier: what the recipe does ahead of its loop draws random numbers too.
        """
        if self._random is not None:
            checkpoint.restore_random_state(self._random)
            self._random = None
