"""Correcting what a student wrote where its teacher disagrees most, and letting it go on from there (SCRG).

Liu et al., Multi-Granularity Semantic Revision for Large Language Model Distillation (https://arxiv.org/abs/2407.10068),
eq. 3. With y ~ student(. | x), and p_i, q_i the two models' distributions after x and the student's own y_1 .. y_{i-1}:

    y^t_i = argmax p_i                              the token that the teacher would have chosen
    C     = { i : y_i ≠ y^t_i }                     candidates
    j     = argmax_{i in C} KL(p_i ‖ q_i)
    x, y_1 .. y_{j-1}, y^t_j, and from there on the student again

repeated, from the second time on with positions after the last j only, so that no correction undoes another. The
teacher writes nothing but the one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Listed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.distillation.teachers import Teacher
from preceptor.errors import UserError
from preceptor.losses.chunked import CHUNK_BYTES, blocks, packed, product_type, teacher_log_probs
from preceptor.models.language_model import LanguageModel, in_evaluation, project
from preceptor.models.sampling import Prefix, Sampling, draw, go_on, left_pad

TOGETHER = 32  # sequences that are corrected at a time


@dataclass(frozen=True)
class Correction:
    """How a student's own sample is corrected."""

    rounds: int = 1
    """n_rep, corrections of a sample, one after the other; 0 leaves it as it is."""
    choice: Literal["likeliest", "sampled"] = "likeliest"
    """The teacher's token y^t: its likeliest one, or drawn from its distribution."""

    def __post_init__(self) -> None:
        """Refuse a number of rounds that cannot be."""
        if self.rounds < 0:
            raise UserError(f"correction.rounds is {self.rounds}; it must be 0 or more.")


@dataclass(frozen=True)
class Corrected:
    """Sequences after correction, in the order given.

    ``places``: for each, the positions in its response (from 0) that were corrected, in order. ``without``: how often a
    sequence had no candidate, out of ``tried`` looks at one; it then stays as it is, for good.
    """

    sequences: list[Sequence]
    places: list[tuple[int, ...]]
    without: int
    tried: int


@torch.no_grad()
def correct(
    student: LanguageModel,
    teacher: Teacher,
    sequences: Listed[Sequence],
    correction: Correction,
    *,
    length: int,
    max_length: int | None = None,
    temperature: float = 1.0,
    place: Literal["divergent", "random"] = "divergent",
    keep_cache: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Corrected:
    """Correct the student's own samples, each a prompt and one response; torch's global generator draws.

    A round costs a forward pass of each model and the tokens after the corrected one: the student's pass fills a cache
    of keys, which is cut back to the part that stays.

    Args:
        student: wrote the responses and continues them.
        teacher: gives its distribution, dense, at every position.
        sequences: the student's samples; a response may be empty.
        correction: how often, and which token of the teacher.
        length: tokens of a response, at most; one that is corrected at its last token stops there.
        max_length: tokens of a prompt and a response together, at most.
        temperature: of the student's sampling.
        place: the candidate where the two differ most, or, as a control, one drawn uniformly.
        keep_cache: False reads the prefix again (as is done where a model's cache cannot be cut: sliding windows,
            recurrent states).
        autocast: context in which the student reads and writes; teacher and comparison keep their own precision.

    Raises:
        UserError: the teacher is not dense, or has another vocabulary.
    """
    sampling = Sampling(length, temperature)
    sampling.check()
    now, places = list(sequences), [list[int]() for _ in sequences]
    open_ones = [index for index, sequence in enumerate(now) if any(sequence.response[1:])]
    tried = correction.rounds and len(now) - len(open_ones)
    without = tried
    for _ in range(correction.rounds):
        order = sorted(open_ones, key=lambda index: -len(now[index].ids))
        open_ones = []
        tried += len(order)
        for start in range(0, len(order), TOGETHER):
            chosen = order[start : start + TOGETHER]
            last = [places[index][-1] if places[index] else -1 for index in chosen]
            with autocast():
                look = _Comparison(student, [now[index] for index in chosen])
            look.compare(teacher, correction.choice)
            found = look.places(last, place)
            with autocast():
                written = look.go_on(found, sampling, max_length, keep_cache=keep_cache)
            for row, sequence in written.items():
                now[chosen[row]] = sequence
                places[chosen[row]].append(found[row])
                open_ones.append(chosen[row])
        without += len(order) - len(open_ones)
    return Corrected(now, [tuple(where) for where in places], without, tried)


class _Comparison:
    """Both models at some sequences: the teacher's tokens, the divergences, and the student's cache of keys."""

    def __init__(self, student: LanguageModel, sequences: list[Sequence]) -> None:
        self.student, self.sequences = student, sequences
        self.batch = collate(sequences, student.pad_id).to(student.device)
        with in_evaluation(student):
            read = student.causal.base_model(input_ids=self.batch.input_ids, use_cache=True)
        self.hidden, self.cache = read.last_hidden_state, read.past_key_values
        self.width = int(self.batch.input_ids.shape[1])

    def compare(self, teacher: Teacher, choice: str) -> None:
        """Compare with the teacher on the same sequences."""
        gaps, choices = differences(self.hidden, self.student, teacher, self.batch, choice)
        counts = self.batch.predicts.sum(-1).tolist()
        self.gaps = [part.tolist() for part in torch.split(gaps, counts)]
        self.choices = [part.tolist() for part in torch.split(choices, counts)]

    def places(self, last: list[int], place: str) -> dict[int, int]:
        """Row -> the position in its response to correct, after the last one; rows without a candidate are missing."""
        found = {}
        for row, sequence in enumerate(self.sequences):
            answer = sequence.ids[len(sequence.ids) - len(self.choices[row]) :]
            candidates = [
                i
                for i, (token, wanted) in enumerate(zip(answer, self.choices[row]))
                if token != wanted and i > last[row]
            ]
            if not candidates:
                continue
            if place == "random":
                found[row] = candidates[int(torch.randint(len(candidates), ()))]
            else:
                found[row] = max(candidates, key=lambda i: self.gaps[row][i])
        return found

    def go_on(
        self, found: dict[int, int], sampling: Sampling, max_length: int | None, *, keep_cache: bool
    ) -> dict[int, Sequence]:
        """Row -> its sequence with the teacher's token at the place found, and the student's continuation."""
        prompts = {row: len(self.sequences[row].ids) - len(self.choices[row]) for row in found}
        heads = {
            row: (*self.sequences[row].ids[: prompts[row] + place], self.choices[row][place])
            for row, place in found.items()
        }
        left = {row: sampling.max_new_tokens - place - 1 for row, place in found.items()}
        if max_length is not None:
            left = {row: min(left[row], max_length - len(heads[row])) for row in left}
        going = [row for row in found if left[row] > 0 and heads[row][-1] not in self.student.stop_ids]
        written = dict.fromkeys(found, list[int]())
        if going:
            prefix = self._prefix(going, [heads[row] for row in going], keep_cache)
            with in_evaluation(self.student):
                continued = go_on(
                    self.student, prefix, sampling, stop=self.student.stop_ids, limits=[left[row] for row in going]
                )
            written |= dict(zip(going, continued))
        ids = {row: heads[row] + tuple(written[row]) for row in found}
        return {
            row: replace(
                self.sequences[row],
                ids=ids[row],
                response=(False,) * prompts[row] + (True,) * (len(ids[row]) - prompts[row]),
            )
            for row in found
        }

    def _prefix(self, rows: list[int], heads: list[tuple[int, ...]], keep_cache: bool) -> Prefix:
        """The heads as the student goes on from them: their last token and a cache of the others, or all tokens."""
        ids, mask = left_pad(heads, self.student.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if not keep_cache or not can_be_cut(self.cache, self.width):
            return Prefix(ids, mask, positions, None)
        cut(self.cache, rows, [len(head) - 1 for head in heads])
        return Prefix(ids[:, -1:], mask, positions[:, -1:], self.cache)


def differences(
    hidden: Tensor, student: LanguageModel, teacher: Teacher, batch: Batch, choice: str = "likeliest"
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) and the teacher's token, both (rows,), at each position that predicts a response token."""
    mask, head = batch.predicts, student.head
    rows, outputs = packed(hidden, head, teacher(batch), mask)
    gaps, tokens = [], []
    for part in blocks(len(rows), head.weight.shape[0], CHUNK_BYTES):
        log_q = project(rows[part], head).float().log_softmax(-1)
        log_p = teacher_log_probs(outputs, part, product_type(rows))
        p = log_p.exp()
        gaps.append((p * (log_p - log_q)).sum(-1))
        tokens.append(log_p.argmax(-1) if choice == "likeliest" else draw(p))
    return torch.cat(gaps), torch.cat(tokens)


def can_be_cut(cache: Any, width: int) -> bool:
    """Whether a cache holds the keys and values of every position, and nothing else."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer and layer.keys is not None and layer.keys.shape[-2] == width
        for layer in cache.layers
    )


def cut(cache: Any, rows: list[int], lengths: list[int]) -> None:
    """Leave some rows in a cache, and of each its first positions, moved to the right end.

    They can be moved: a position is in the keys already (rotary embeddings), or in what was embedded (GPT-2, OPT), or
    follows from the order and the mask (BLOOM); the place in the cache has no meaning.

    Args:
        cache: of sequences that are padded on the right.
        rows: which to keep.
        lengths: how many positions of each, at least 1.
    """
    width = max(lengths)
    first = cache.layers[0].keys
    ends = torch.tensor(lengths, device=first.device).unsqueeze(-1)
    at = (torch.arange(width, device=first.device) - (width - ends)).clamp(min=0)[:, None, :, None]
    chosen = torch.tensor(rows, device=first.device)
    for layer in cache.layers:
        layer.keys, layer.values = (
            torch.take_along_dim(part[chosen], at.to(part.device), dim=2) for part in (layer.keys, layer.values)
        )
