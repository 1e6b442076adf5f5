"""Rollouts: several answers that a model draws to each question, verified, and what can be made of them.

Many prompts are continued in one batch, and a prompt that stands in it several times is read once: its key cache is
handed to all copies, as is that of a beginning which all prompts of the batch share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence as Listed
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from preceptor.errors import UserError
from preceptor.methods.soft_bootstrapping.sampling import write
from preceptor.models.language_model import LanguageModel
from preceptor.models.sampling import Sampling
from preceptor.statistics import Value, mean_of
from preceptor.tasks.boxed import Verifier
from preceptor.tasks.records import Item

Outcome = Literal[
    "kept", "all right", "none right", "none wrong", "no answer", "hint failed", "hint leaked", "hint unfinished"
]


MEANING: dict[Outcome, str] = {
    "kept": "a right and a wrong rollout, and a verified answer to the hinted prompt",
    "all right": "every rollout is right",
    "none right": "some rollouts answer, none rightly",
    "none wrong": "some rollouts are right and the others give no answer, which is no wrong one",
    "no answer": "no rollout gives an answer",
    "hint failed": "the answer to the hinted prompt is wrong or missing",
    "hint leaked": "the answer to the hinted prompt speaks of the attempts that were shown",
    "hint unfinished": "the answer to the hinted prompt is empty, or was cut off before its end of turn",
}


@dataclass(frozen=True)
class Rollout:
    """One answer: the ids that were generated, its text, the final answer in it (None: none), whether it is right."""

    ids: tuple[int, ...]
    text: str
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Tried:
    """A question, its rollouts, and what came of it.

    ``right`` and ``wrong``: the places of the two exemplars among the rollouts, and ``reply`` what the model answered
    when it was shown both; None where it did not come to that.
    """

    item: Item
    rollouts: tuple[Rollout, ...]
    outcome: Outcome
    right: int | None = None
    wrong: int | None = None
    reply: Rollout | None = None


@dataclass(frozen=True)
class Statistics:
    """What was kept and why: ``outcomes`` counts questions, ``pass_rate`` is the mean share of right rollouts.

    ``boxed``: the share of rollouts with an answer. ``tokens``: of a rollout, on average. ``hinted``: the share of
    hinted replies that were right. ``spread``: of how many questions so many rollouts were right.
    """

    outcomes: dict[str, int]
    pass_rate: Value
    boxed: float
    tokens: float
    hinted: float | None
    spread: dict[int, int] = field(default_factory=dict)

    @property
    def questions(self) -> int:
        """How many questions were tried."""
        return sum(self.outcomes.values())

    def __str__(self) -> str:
        """One sentence with all counts."""
        outcomes = ", ".join(f"{count} {name}" for name, count in self.outcomes.items() if count)
        hinted = "" if self.hinted is None else f"; of the hinted answers {100 * self.hinted:.0f} % are right"
        return (
            f"{self.questions} questions: {outcomes}; a rollout is right in {100 * self.pass_rate.mean:.0f} % and "
            f"gives an answer in {100 * self.boxed:.0f} % of the cases{hinted}"
        )

    def advice(self) -> str:
        """What to change where too few questions were kept."""
        counts = Counter(self.outcomes)
        easy, hard, silent = (counts[name] for name in ("all right", "none right", "none wrong"))
        failed, leaked, cut = (counts[f"hint {name}"] for name in ("failed", "leaked", "unfinished"))
        mixed = counts["kept"] + failed + leaked + cut
        if self.boxed < 0.5:
            return (
                "most rollouts give no answer: allow longer ones (rolling.length), or show in prompts.system or "
                "prompts.shots how an answer is boxed"
            )
        if easy > max(hard, silent, mixed):
            return "the questions are too easy: give harder ones, or raise rolling.temperature"
        if hard > max(silent, mixed):
            return "the questions are too hard: give easier ones, a stronger model, or more rollouts (rolling.copies)"
        if silent > mixed:
            return (
                "what is not right has no answer, and cannot be a wrong attempt: allow longer rollouts "
                "(rolling.length), or draw more of them (rolling.copies)"
            )
        if counts["kept"] >= failed + leaked + cut:
            return "the questions are too few: raise questions.count, or give more"
        if leaked > max(failed, cut):
            return "the hinted answers speak of the hint: change prompts.hint"
        if cut > failed:
            return "the hinted answers are cut off: allow longer ones (rolling.length), or change prompts.hint"
        return "the hinted answers are not verified: change prompts.hint, or allow longer answers (rolling.length)"


def statistics(tried: Listed[Tried]) -> Statistics:
    """What was kept of the questions, and why the others were not.

    Raises:
        UserError: no question was tried.
    """
    if not tried:
        raise UserError("No question was tried: give at least one.")
    rollouts = [one for question in tried for one in question.rollouts]
    replies = [question.reply for question in tried if question.reply is not None]
    marks = [[one.correct for one in question.rollouts] for question in tried]
    counts = Counter(question.outcome for question in tried)
    return Statistics(
        outcomes={name: counts[name] for name in MEANING},
        pass_rate=mean_of([sum(row) / len(row) for row in marks]),
        boxed=sum(one.answer is not None for one in rollouts) / len(rollouts),
        tokens=sum(len(one.ids) for one in rollouts) / len(rollouts),
        hinted=sum(reply.correct for reply in replies) / len(replies) if replies else None,
        spread=dict(sorted(Counter(map(sum, marks)).items())),
    )


def judged(item: Item, ids: tuple[int, ...], model: LanguageModel, verify: Verifier) -> Rollout:
    """What was generated to a question, decoded without special tokens, and the verifier's word on it."""
    text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    verdict = verify(item, text)
    return Rollout(ids, text, verdict.answer, verdict.correct)


def roll_out(
    model: LanguageModel,
    items: Listed[Item],
    prompt: Callable[[Item], tuple[int, ...]],
    sampling: Sampling,
    verify: Verifier,
    *,
    copies: int,
    batch_size: int,
) -> list[tuple[Rollout, ...]]:
    """``copies`` verified answers to each item, in order, drawn with torch's global generator.

    Args:
        model: who answers.
        items: the questions.
        prompt: an item's prompt, as token ids.
        sampling: length, temperature, top-k, top-p.
        verify: reads and judges an answer.
        copies: K, answers to a question.
        batch_size: answers that are written at a time.
    """
    prompts = [ids for ids in map(prompt, items) for _ in range(copies)]
    answers = write(model, prompts, sampling, batch_size=batch_size)
    listed = [judged(items[place // copies], ids, model, verify) for place, ids in enumerate(answers)]
    return [tuple(listed[start : start + copies]) for start in range(0, len(listed), copies)]


def pair(rollouts: Listed[Rollout], stream: Random) -> tuple[int, int] | Outcome:
    """The places of a right and of a wrong exemplar, or why there are not both.

    The right one is the first. The wrong one is the first with the most frequent wrong answer if that was given more
    than once, else the first with one drawn at random. A rollout without an answer is neither.
    """
    right = [place for place, one in enumerate(rollouts) if one.correct]
    wrong = [place for place, one in enumerate(rollouts) if one.answer is not None and not one.correct]
    if len(right) == len(rollouts):
        return "all right"
    if not right:
        return "none right" if wrong else "no answer"
    if not wrong:
        return "none wrong"
    answers = [rollouts[place].answer for place in wrong]
    (answer, count) = Counter(answers).most_common(1)[0]
    if count == 1:
        answer = stream.choice(answers)
    return right[0], wrong[answers.index(answer)]
