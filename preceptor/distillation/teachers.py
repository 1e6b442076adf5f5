"""Teachers: what informs. Each turns a batch into soft targets and is never trained.

Targets have the batch's leading shape (B, T), or are packed: one row for each position that ``batch.predicts`` selects,
in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Listed
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from preceptor.data.sequences import Batch, Sequence
from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SoftTargets, moved, rows_of
from preceptor.models.language_model import LanguageModel, in_evaluation, project

if TYPE_CHECKING:
    from preceptor.engine.run import Run


CHUNK_BYTES = 64 << 20  # of float32 logits that an ensemble holds for one of its teachers


class Teacher(Protocol):
    """Anything that gives soft targets for a batch."""

    def __call__(self, batch: Batch) -> SoftTargets:
        """Soft targets with leading shape (B, T), or packed in the order of ``batch.predicts``."""
        ...


class StoredTargets(Protocol):
    """A store of a teacher's soft targets, found by the content of token sequences (see ``preceptor.cache``)."""

    def rows(self, sequences: Listed[Sequence]) -> SoftTargets:
        """The packed rows of all response positions of the sequences, one sequence after the other."""
        ...


class FrozenTeacher:
    """A language model that is no longer trained. Its parameters are frozen here, for good.

    It computes in its own precision: give it a bfloat16 model to halve its memory.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval().requires_grad_(False)
        _keep_head(model)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenTargets:
        """Last hidden states (B, T, width) and the head that reads them; no logits are made here.

        Raises:
            UserError: somebody made a parameter of the teacher trainable again.
        """
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(
                "A parameter of the teacher is trainable: the teacher and the student must not share a model."
            )
        with in_evaluation(self.model):
            targets: HiddenTargets = self.model(batch, hidden_targets)
        return targets


class AdapterOff:
    """A LoRA student with its adapter switched off: the base model teaches, without memory of its own.

    Raises:
        UserError: the student carries no adapter.
    """

    def __init__(self, student: LanguageModel) -> None:
        if not student.adapted:
            raise UserError("The student has no adapter to switch off: make it with `lora:rank=...`.")
        self.student = student
        _keep_head(student)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenTargets:
        """Last hidden states (B, T, width) of the base model, and its head."""
        with in_evaluation(self.student), self.student.model.disable_adapter():  # type: ignore[operator]
            targets: HiddenTargets = self.student(batch, hidden_targets)
        return targets


class CachedTeacher:
    """A teacher's targets, read from a store; the teacher itself need not be loaded."""

    def __init__(self, store: StoredTargets) -> None:
        self.store = store

    def __call__(self, batch: Batch) -> SoftTargets:
        """Packed rows in the order of ``batch.predicts``, on the batch's device."""
        targets = self.store.rows(batch.sequences())
        return moved(targets, batch.input_ids.device)


class MemoisedTeacher:
    """A teacher whose targets for sequences that come again are kept in memory; others are computed anew.

    Its outputs are kept as packed rows, ``limit`` bytes of them at most.
    """

    def __init__(self, teacher: Teacher, again: Listed[Sequence], *, limit: int = 1 << 30) -> None:
        self.teacher, self.again, self.left = teacher, set(again), limit
        self.kept: dict[Sequence, Tensor] = {}
        self.head: Head | None = None

    def __call__(self, batch: Batch) -> SoftTargets:
        """Packed rows, in the order of ``batch.predicts``."""
        sequences = batch.sequences()
        if not all(sequence in self.kept for sequence in sequences):
            targets = rows_of(self.teacher(batch), batch.predicts)
            self.head = targets.head if isinstance(targets, HiddenTargets) else None
            rows = targets.hidden if isinstance(targets, HiddenTargets) else targets.logits
            self._keep(sequences, torch.split(rows, batch.predicts.sum(-1).tolist()))
            return targets
        rows = torch.cat([self.kept[sequence] for sequence in sequences])
        return LogitTargets(rows) if self.head is None else HiddenTargets(rows, self.head)

    def _keep(self, sequences: list[Sequence], rows: tuple[Tensor, ...]) -> None:
        for sequence, part in zip(sequences, rows):
            if sequence in self.again and sequence not in self.kept and part.nbytes <= self.left:
                self.kept[sequence] = part.clone()
                self.left -= part.nbytes


class Ensemble:
    """Several teachers of one vocabulary as one: the weighted mean of their probabilities at temperature 1.

    The mean has no head of its own, so it is held as log-probabilities: rows x vocabulary x 4 bytes of the positions
    that predict a response token, and one chunk of ``CHUNK_BYTES`` more while it is made.

    Args:
        teachers: at least one; each gives hidden states or logits.
        weights: one for each teacher, positive; they are divided by their sum. Equal by default.

    Raises:
        UserError: no teachers, or weights that do not fit them.
    """

    def __init__(self, teachers: Listed[Teacher], weights: Listed[float] | None = None) -> None:
        shares = [1.0] * len(teachers) if weights is None else list(weights)
        if not teachers or len(shares) != len(teachers) or min(shares) <= 0:
            raise UserError(f"An ensemble of {len(teachers)} teachers needs as many positive weights, not {shares}.")
        self.teachers = list(teachers)
        self.log_weights = [math.log(share / sum(shares)) for share in shares]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> LogitTargets:
        """Log-probabilities (rows, vocabulary), packed in the order of ``batch.predicts``, in float32."""
        predicts = batch.predicts
        mean: Tensor | None = None
        for teacher, log_weight in zip(self.teachers, self.log_weights):
            mean = _add(mean, teacher(batch), predicts, log_weight)
        assert mean is not None
        return LogitTargets(mean)


def answer_online(run: Run, teacher: LanguageModel, student: LanguageModel, spec: str) -> AdapterOff | FrozenTeacher:
    """The teacher of every step: the student's own base where its ``spec`` adapts the teacher itself, else the teacher.

    The teacher lies in shards where the run's student does.
    """
    if student.adapted and "base=" not in spec:
        return AdapterOff(student)
    targets = FrozenTeacher(teacher)
    run.shard(teacher)
    return targets


def hidden_targets(hidden: Tensor, head: Head) -> HiddenTargets:
    """Targets of a model's last hidden states and its head, which gets no gradient."""
    return HiddenTargets(hidden, replace(head, weight=head.weight.detach()))


def _keep_head(model: LanguageModel) -> None:
    """The head of a sharded teacher is read after its forward: it stays whole, as FSDP does by default."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False, recurse=False)


def _add(mean: Tensor | None, targets: SoftTargets, predicts: Tensor, log_weight: float) -> Tensor:
    """log(exp(mean) + weight * p) for one more teacher, in place, in chunks of rows."""
    if isinstance(targets, HiddenTargets):
        values, head, size = targets.hidden, targets.head, targets.head.weight.shape[0]
    elif isinstance(targets, LogitTargets):
        values, head, size = targets.logits, None, targets.logits.shape[-1]
    else:
        raise UserError(f"An ensemble averages dense targets, not {type(targets).__name__}: use loaded teachers.")
    packed = values[predicts] if values.dim() == 3 else values
    if mean is None:
        mean = torch.full((len(packed), size), -torch.inf, device=packed.device)
    if mean.shape[-1] != size:
        raise UserError(f"The teachers of an ensemble have {mean.shape[-1]} and {size} tokens: choose one family.")
    step = max(1, CHUNK_BYTES // (4 * size))
    for start in range(0, len(packed), step):
        rows = packed[start : start + step]
        logits = rows if head is None else project(rows, head)
        into = mean[start : start + step]
        torch.logaddexp(into, logits.float().log_softmax(-1).add_(log_weight), out=into)
    return mean
