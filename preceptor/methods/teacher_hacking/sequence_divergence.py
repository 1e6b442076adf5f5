"""How far a student is from an author over whole answers: exact sums over the vocabulary at every prefix.

By the chain rule the divergence of two distributions over answers y to prompts x is the expected sum of those at each
token,

    KL(author ‖ student) = E_x E_{y ~ author(. | x)}  Σ_t KL( author(. | x, y_<t) ‖ student(. | x, y_<t) ),

estimated by the mean over sequences that the author wrote once. They are read at every checkpoint again (common random
numbers), so that two checkpoints differ by the student alone. The sampled tokens serve as prefixes only: each term sums
over the whole vocabulary, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

import torch
from torch import Tensor

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SoftTargets, moved, rows_of
from preceptor.methods.teacher_hacking.text_models import TextModel
from preceptor.models.language_model import LanguageModel, in_evaluation, project

CHUNK_BYTES = 128 << 20  # of float64 matrices (rows, vocabulary) at a time; three of them are held


class DivergenceExam:
    """Sequences that an author wrote once, with what it says of them.

    ``tokens``: (N,) float64, how many response tokens each sequence has.

    Args:
        author: says dense soft targets (hidden states or logits); it is asked here, once.
        sequences: with at least one response token each.
        pad_id: what batches are padded with.
        device: of the students.
        batch_size: sequences at a time.

    Raises:
        UserError: there is no sequence, or one without a response token.
    """

    def __init__(
        self, author: TextModel, sequences: Listed[Sequence], *, pad_id: int, device: torch.device, batch_size: int = 64
    ) -> None:
        if not sequences or not all(any(sequence.response[1:]) for sequence in sequences):
            raise UserError("An exam needs sequences with at least one response token each: leave out empty answers.")
        self.sequences = list(sequences)
        self.tokens = torch.tensor([sum(one.response[1:]) for one in sequences], dtype=torch.float64)
        self.parts: list[tuple[Batch, SoftTargets]] = []
        for start in range(0, len(sequences), batch_size):
            batch = collate(sequences[start : start + batch_size], pad_id).to(device)
            self.parts.append((batch, moved(rows_of(author(batch), batch.predicts), device)))

    def divergence(self, student: LanguageModel) -> Tensor:
        """Σ_t KL(author ‖ student) of each sequence, in nats: (N,) float64."""
        return torch.cat([_sums(student, batch, targets, reverse=False) for batch, targets in self.parts])


def own_divergence(
    student: LanguageModel, author: TextModel, sequences: Listed[Sequence], *, batch_size: int = 64
) -> Tensor:
    """The other direction, Σ_t KL(student ‖ author) of each sequence (N,), which the student must have written."""
    exam = DivergenceExam(author, sequences, pad_id=student.pad_id, device=student.device, batch_size=batch_size)
    return torch.cat([_sums(student, batch, targets, reverse=True) for batch, targets in exam.parts])


@torch.no_grad()
def _sums(student: LanguageModel, batch: Batch, targets: SoftTargets, *, reverse: bool) -> Tensor:
    assert isinstance(targets, HiddenTargets | LogitTargets)
    with in_evaluation(student):
        hidden, head = student(batch)[batch.predicts], student.head
    theirs = targets.hidden if isinstance(targets, HiddenTargets) else targets.logits
    size = head.weight.shape[0]
    tokens = targets.head.weight.shape[0] if isinstance(targets, HiddenTargets) else targets.logits.shape[-1]
    if tokens != size:
        raise UserError(f"The author has {tokens} tokens and the student {size}: choose models of one tokenizer.")
    step = max(1, CHUNK_BYTES // (8 * size))
    rows = []
    for start in range(0, len(hidden), step):
        log_q = _log_probs(hidden[start : start + step], head)
        log_p = _log_probs(theirs[start : start + step], targets.head if isinstance(targets, HiddenTargets) else None)
        rows.append(_kl(log_q, log_p) if reverse else _kl(log_p, log_q))
    counts = batch.predicts.sum(-1).tolist()
    return torch.stack([part.sum() for part in torch.split(torch.cat(rows), counts)]).cpu()


def _log_probs(rows: Tensor, head: Head | None) -> Tensor:
    logits = rows if head is None else project(rows, head)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return logits.to(wide).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) (rows,); a token without mass under p counts nothing, one that only q excludes makes it infinite."""
    terms = (log_p - log_q) * log_p.exp()
    return terms.masked_fill_(log_p == -torch.inf, 0.0).sum(-1)
