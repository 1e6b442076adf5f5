"""The engine: `Training` holds the settings, `Run` owns all of a training that has nothing to do with the method.

That is the seed, device, precision, distribution, accumulation, clipping, schedule, metrics, progress, checkpoints and
resume. The loop stays with the recipe::

    run = Run(config.training, student=student, folder=config.output, config=config, resume=config.resume)
    for batch in run.batches(sequences, collate):
        loss = forward_kl(run.student(batch), head, teacher(batch))
        run.update(loss.sum, loss.count, loss.parts)
    run.finish()

A step ends when the loop asks for the next one (or for the end), so what stands after ``update``, a momentum teacher
that follows or an evaluation, belongs to the step, and to its checkpoint.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.engine import checkpoint, distribution
from preceptor.engine.metrics import Line, Metrics
from preceptor.engine.progress_bar import Bar, describe
from preceptor.engine.run_folder import open_folder, write_environment
from preceptor.engine.settings import Training
from preceptor.engine.snapshots import Snapshots, Stateful
from preceptor.errors import UserError

T = TypeVar("T")


B = TypeVar("B")


class NonFiniteLoss(UserError):
    """The loss or its gradient is infinite or not a number; the weights are still those of the step before.

    ``step``: the optimizer step, counted from 1. ``indices``: rows of the data in that step. ``checkpoint``: the last
    whole one, or None.
    """

    def __init__(self, text: str, *, step: int, indices: list[int], checkpoint: Path | None) -> None:
        """Keeps what the sentence names, for the caller that catches it."""
        super().__init__(text)
        self.step = step
        self.indices = indices
        self.checkpoint = checkpoint


class Run:
    """One training of one student: its settings, its folder on disk, its resumable state.

    ``student`` and ``modules`` are what the recipe calls (wrapped for several processes where there are any);
    ``unwrapped`` is the student itself. ``step`` counts finished optimizer steps of the student.
    """

    def __init__(
        self,
        training: Training,
        *,
        student: nn.Module,
        folder: Path | str,
        config: Any = None,
        modules: Mapping[str, nn.Module] | None = None,
        module_training: Mapping[str, Training] | None = None,
        resume: bool = False,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        """Opens the run's folder, places the modules on the device, and takes up the newest checkpoint if asked.

        Args:
            training: the settings.
            student: what learns; only parameters that require a gradient are trained and saved.
            folder: the run's folder; made if absent.
            config: the recipe's frozen dataclass, written to config.json; the settings alone if None.
            modules: further modules that learn, each with an optimizer of its own (``update(..., module=name)``).
            module_training: settings of their optimizers, where they differ from `training`.
            resume: go on from the newest whole checkpoint in the folder, or from the start where there is none.
            provenance: hashes of teacher, tokenizer and data, written to environment.json.

        Raises:
            UserError: the folder holds another run, cannot be written, or holds weights that do not fit.
        """
        # An earlier run of this process lies in a reference cycle, and with it weights and moments as large as these.
        gc.collect()
        self.training, self.folder = training, Path(folder)
        self.accelerator = distribution.start(training.precision, training.trackers, self.folder)
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        if self.is_main:
            open_folder(self.folder, config if config is not None else training, resume=resume)
        self.accelerator.wait_for_everyone()
        distribution.seed(training.seed, self.accelerator)
        self.unwrapped, own = student, module_training or {}
        self._learners = {
            name: distribution.prepare(name, module, own.get(name, training), self.accelerator, shard=training.shard)
            for name, module in {"student": student, **(modules or {})}.items()
        }
        self.student = self._learners["student"].module
        self.modules = {name: learner.module for name, learner in self._learners.items() if name != "student"}
        self._total = training.steps
        self._line: Line | None = None
        self._indices: list[int] = []
        self._micro: int | None = None
        self._items, self._last = 0, True
        self._idle = self._in_split = False
        self._begun = time.perf_counter()
        self._snapshots = Snapshots(self.folder / "checkpoints", self._learners, self.accelerator, keep=training.keep)
        self.step, length = self._snapshots.restore() if resume else (0, 0)
        self._bar = Bar("step", shown=self.is_main)
        if self.is_main:
            write_environment(self.folder, config, self.device, training.seed, provenance or {})
        self._metrics = Metrics(self.folder / "metrics.jsonl", length=length) if self.is_main else None
        if training.trackers:
            self.accelerator.init_trackers("preceptor", config=distribution.flat(training))

    @property
    def total(self) -> int:
        """Optimizer steps in all; with epochs, known once `steps` or `batches` has seen the data."""
        if self._total is None:
            raise ValueError("the number of steps follows from the data: call run.steps or run.batches first")
        return self._total

    @property
    def evaluate_due(self) -> bool:
        """True after the update that ends a step at which `evaluate_every` asks for an evaluation."""
        every = self.training.evaluate_every
        return self._line is not None and every > 0 and (self.step % every == 0 or self.step == self._total)

    def steps(self, data: Sequence[T], *, until: int | None = None) -> Iterator[list[T]]:
        """The examples of one optimizer step after another, this process's share of them.

        The order is a permutation of `data` a pass, drawn from the seed and the number of the pass; the last batch of a
        pass holds what is left. A resumed run goes on at the step where it stopped. A process for which a small batch
        has no example gets one that counts as nothing, so that it takes part in what all processes do together.

        Args:
            data: anything with a length and an index; ``range(n)`` gives row numbers.
            until: stop after this step of the run (for data that is written anew in rounds); the last step if None.

        Raises:
            UserError: `data` is empty.
        """
        if len(data) == 0:
            raise UserError("There is no example to learn from: check the data and its filters.")
        size = self.training.batch_size
        a_pass = -(-len(data) // size)
        if self._total is None:
            self._total = max(1, round((self.training.epochs or 1.0) * a_pass))
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        last = self._total if until is None else min(until, self._total)
        order, drawn = np.empty(0, dtype=np.int64), -1
        try:
            self._close_step()
            self._snapshots.restore_random()
            while self.step < last:
                epoch, batch = divmod(self.step, a_pass)
                if epoch != drawn:
                    order = np.random.default_rng((self.training.seed, epoch)).permutation(len(data))
                    drawn = epoch
                indices: list[int] = order[batch * size : (batch + 1) * size].tolist()
                share = indices[rank::world]
                self._indices, self._idle, self._items = indices, not share, len(indices)
                self._micro = min(self.training.accumulate, -(-len(indices) // world))
                before = self.step
                self._begun = time.perf_counter()
                yield [data[i] for i in share or indices[:1]]
                if self.step == before:
                    raise RuntimeError("the loop asked for the next step before run.update finished this one")
                self._close_step()
        finally:
            self._indices, self._micro, self._items, self._idle = [], None, 0, False
            if self._metrics is not None:
                self._metrics.flush()

    def split(self, examples: Sequence[T], collate: Callable[[list[T]], B]) -> Iterator[B]:
        """The micro-batches of one optimizer step, collated and on the device.

        `update` steps the optimizer at the last of them. Inside `steps` their number is the same in all processes.
        """
        if len(examples) == 0:
            raise UserError("A step without examples: every process needs at least one.")
        if self._micro is None:
            self._close_step()
            self._snapshots.restore_random()
            self._begun = time.perf_counter()
        idle, world = self._idle, self.accelerator.num_processes
        micro = self.training.accumulate if self._micro is None else self._micro
        micro = micro if world > 1 else min(micro, len(examples))
        self._items = self._items or len(examples) * world
        self._in_split = True
        try:
            for part in range(micro):
                chosen = list(examples[part::micro])
                self._idle = idle or not chosen
                self._last = part == micro - 1
                distribution.synchronise(self._learners.values(), self._last)
                batch = collate(chosen or [examples[0]])
                yield distribution.to_device(batch, self.device)
        finally:
            self._last, self._in_split, self._idle = True, False, idle

    def batches(self, data: Sequence[T], collate: Callable[[list[T]], B]) -> Iterator[B]:
        """The micro-batches of all steps: `steps` and `split` in one loop."""
        for examples in self.steps(data):
            yield from self.split(examples, collate)

    def update(
        self,
        loss_sum: Tensor,
        count: Tensor | float,
        parts: Mapping[str, Tensor | float] | None = None,
        *,
        module: str = "student",
    ) -> None:
        """Backward; at the step's last micro-batch divide once, clip, step, and write down what was measured.

        Args:
            loss_sum: scalar, a sum over `count` terms, not yet divided.
            count: how many terms (tokens, rows); the gradient is divided by their number over all micro-batches and
                processes, so accumulation and data parallelism equal one batch.
            parts: named sums over the same terms, logged divided by the same count.
            module: whose optimizer; the student's ends the step, so update further modules before or after it within
                the same micro-batch.

        Raises:
            NonFiniteLoss: the loss or its gradient is not finite; no weight has changed.
            UserError: the whole step counted nothing.
            RuntimeError: the student has been updated already in this step.
        """
        if self._micro is None and not self._in_split and module == "student":
            self._close_step()
        if self._stepped() and module == "student":
            raise RuntimeError("the student was updated already in this step: update once a micro-batch of run.split")
        learner = self._learners[module]
        learner.add(loss_sum, count, parts or {}, idle=self._idle, alone=len(self._learners) == 1)
        if not self._last:
            return
        step = self.step - int(self._stepped())
        measured = learner.measure(self.accelerator)
        self._guard(learner, measured, step + 1)
        rate = learner.training.rate(step, self.total)
        learner.apply(measured, rate, self.accelerator.num_processes)
        prefix = "" if module == "student" else f"{module}_"
        self._line = {**(self._line or {}), **{prefix + name: value for name, value in measured.items()}}
        if module == "student":
            self.step += 1
            seconds = time.perf_counter() - self._begun
            self._line |= {"learning_rate": rate, "items_per_second": self._items / seconds}
            self._line |= {"count_per_second": measured["count"] / seconds}
            self._begun = time.perf_counter()

    def remember(self, name: str, thing: Stateful, *, apart: bool = False) -> None:
        """Puts the state of `thing` into checkpoints; in a resumed run it gets its state back here, at once.

        Args:
            name: of the state.
            thing: what has it.
            apart: it differs from process to process, and each keeps its own; else that of the main one is kept.
        """
        self._snapshots.remember(name, thing, apart=apart)

    def log(self, **values: float | int | str | None) -> None:
        """Adds values (an evaluation, a setting that moves) to the step's line in metrics.jsonl."""
        if self._line is not None:
            self._line |= values
        elif self._metrics is not None:
            self._metrics.write({"step": self.step, **values})

    def shard(self, module: nn.Module) -> nn.Module:
        """Puts a module that does not learn (a teacher) on the device; splits it too where the student is split."""
        return distribution.place(module, self.accelerator, shard=self.training.shard)

    def state_dict(self) -> dict[str, Tensor]:
        """The student's whole state, gathered from the processes that hold its parts (all of them must call this)."""
        return {name: checkpoint.full(value) for name, value in self.unwrapped.state_dict().items()}

    def finish(self) -> None:
        """Ends the last step, saves, and closes what is open; the modules are out of autocast from here on."""
        self._close_step()
        self._snapshots.save(self.step, self._metrics)
        for learner in self._learners.values():
            learner.release()
        self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        for tracker in self.accelerator.trackers:
            # Not end_training, which would take the processes apart: a recipe may have a second run.
            tracker.finish()
        self.accelerator.wait_for_everyone()

    def _guard(self, learner: distribution.Learner, measured: dict[str, float], step: int) -> None:
        bad = [name for name in ("loss", "gradient_norm") if not np.isfinite(measured[name])]
        if not bad and measured["count"] > 0:
            return
        if not bad:
            raise UserError(f"Step {step} counted nothing to learn from (rows {self._indices}): check the masks.")
        last = checkpoint.newest(self._snapshots.folder)
        if self._metrics is not None:
            self._metrics.flush()
        place = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        text = (
            f"The {learner.name}'s {bad[0].replace('_', ' ')} is {measured[bad[0]]} at step {step} (rows "
            f"{self._indices} of the data): lower the learning rate or look at these rows; {place}."
        )
        raise NonFiniteLoss(text, step=step, indices=self._indices, checkpoint=last)

    def _stepped(self) -> bool:
        """Whether the student has taken the current step, which is not closed yet."""
        return self._line is not None and "loss" in self._line

    def _close_step(self) -> None:
        if self._line is None or not self._stepped():
            return
        line: Line = {"step": self.step, **self._line, "memory_mib": distribution.memory_mib(self.device)}
        self._line = None
        if self._metrics is not None:
            self._metrics.write(line)
        if self.training.trackers:
            self.accelerator.log(line, step=self.step)
        if self._total is not None and (self._bar.due or self.step >= self._total):
            self._bar.show(self.step, self._total, describe(line))
        if self.training.save_every and self.step % self.training.save_every == 0:
            self._snapshots.save(self.step, self._metrics)
