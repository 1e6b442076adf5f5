"""Environments in which an agent improves a student by writing what it is taught: DataEnvGym's three, as Gymnasium's.

Paper: DataEnvGym (Khan et al., ICLR 2025), https://arxiv.org/abs/2410.06215. The agent sees how the student does on
validation items, and acts; what it asks for is written and checked; the student is taught, from its first weights,
everything accepted so far; the reward is what its validation accuracy gained.

============ ============================================== ====================================================
             observation                                    action
============ ============================================== ====================================================
OpenEnded    every item: question, answer, truth, right?    any list of training items
SkillList    the items with their skill, accuracies         items for each skill; a writer makes them
SkillForest  the forest: allocations, rewards, accuracies   Explore or Exploit for each skill; a writer fills it
============ ============================================== ====================================================

``OpenEnded`` is here, the other two are in ``skill_environments``. The words have Gymnasium's meaning, and the
published code's defects are left behind: ``reset`` gives the student its first weights back; ``terminated`` tells that
the budget of *accepted* items, over all rounds, is used up (the last batch is cut to it); ``truncated`` that the rounds
are; ``info`` holds the records behind the observation, what was accepted, and what was rejected and why. An accuracy
that is not known is -1 in a Box and None elsewhere, never 0.

A round that asks for nothing is idle: nothing is trained, it does not count, and the second in a row truncates.
With ``train_every`` k only each k-th round trains (the paper's accumulate-then-train loop); in between, the reward is 0
and the observation is that of the cycle's start, but for what the tree learned of the student on the new items.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import gymnasium
import numpy as np
from gymnasium import spaces

from preceptor.errors import UserError
from preceptor.methods.data_env.checks import Checks, named
from preceptor.tasks.records import (
    Check,
    Completed,
    Datum,
    Item,
    PerformanceReport,
    Task,
    complete,
    report,
    same_length,
)

TEXT = 4000  # characters of a text in a space


UNKNOWN = -1.0


FIELDS = ("instruction", "response", "truth", "skill", "subskill", "starter", "tests")


class RoundInfo(TypedDict):
    """The records behind a round's observation.

    ``completed``: every validation item with the student's answer. ``report`` and ``accuracy``: how right they are, the
    latter by skill, None where it is unknown. ``accepted``, ``rejected`` (with the check) and ``failures`` (why an item
    could not be written): what became of what was written; ``checks``: all of them. ``round`` counts those that were
    not idle, ``data`` all accepted items, and ``budget_left`` those that may still be accepted.
    """

    completed: tuple[Completed, ...]
    report: PerformanceReport
    accuracy: dict[str, float | None]
    accepted: tuple[Datum, ...]
    rejected: tuple[tuple[Datum, Check], ...]
    failures: tuple[str, ...]
    checks: tuple[Check, ...]
    round: int
    data: int
    budget_left: int


class Outcome(NamedTuple):
    """What became of what was written in a round; see ``RoundInfo``."""

    accepted: Sequence[Datum] = ()
    rejected: Sequence[tuple[Datum, Check]] = ()
    failures: Sequence[str] = ()
    checks: Sequence[Check] = ()


NOTHING = Outcome()


class TaughtStudent(Protocol):
    """What is taught and examined; see ``student.TaskStudent``."""

    def restart(self) -> None:
        """Take the first weights back."""

    def answer(self, items: Sequence[Item]) -> list[str]:
        """An answer to each item, in order."""

    def learn(self, data: Sequence[Datum], folder: Path) -> None:
        """Learn exactly these data, from the first weights; ``folder`` holds the training."""


@dataclass(frozen=True)
class Episode:
    """How long an episode is, and which items may be taught."""

    budget: int = 600
    """Accepted training items in all."""
    rounds: int = 10
    """Rounds that write something."""
    train_every: int = 1
    """Rounds between two trainings; more than 1 accumulates."""
    reject_known: bool = True
    """Leave out what the student answers right already. It shows the student's state to the checks."""
    blind: bool = False
    """Show the student's errors to no writer and its answers to no tree: the conditions of an agent without state."""

    def __post_init__(self) -> None:
        """Refuse what is no episode."""
        if self.blind and self.reject_known:
            raise UserError(
                "To reject what the student knows is to see its state: set reject_known to False, or blind."
            )
        if min(self.budget, self.rounds, self.train_every) < 1:
            raise UserError("budget, rounds and train_every must be 1 or more.")


class AnyText(spaces.Text):
    """Texts of any characters, up to a length; samples are printable ASCII."""

    def __init__(self, max_length: int = TEXT) -> None:
        super().__init__(max_length, min_length=0, charset="".join(map(chr, range(32, 127))))

    def contains(self, x: Any) -> bool:
        """Whether it is a text that is short enough."""
        return isinstance(x, str) and len(x) <= self.max_length


class DataEnvironment(gymnasium.Env[Any, Any]):
    """What the three environments share: evaluate, check, accumulate, teach, reward.

    ``data`` is all that was accepted, ``completed`` how the student did on validation, ``steps`` counts all rounds and
    ``round`` those that were not idle. ``taught``: how many data the student has learned, in ``lesson``.
    """

    def __init__(
        self,
        task: Task,
        student: TaughtStudent,
        validation: Sequence[Item],
        *,
        folder: Path,
        test: Sequence[Item] = (),
        episode: Episode | None = None,
    ) -> None:
        """Makes an environment.

        Args:
            task: what the student is examined in.
            student: who is taught.
            validation: the items that the agent sees the student's answers to.
            folder: where trainings lie, a folder a round.
            test: items that nobody sees; they only count as leaks.
            episode: budget and rounds.

        Raises:
            UserError: there is no validation item.
        """
        if not validation:
            raise UserError(
                f"The task {task.name} has no validation item: give at least one before anything is taught."
            )
        self.task, self.student, self.validation = task, student, list(validation)
        self.episode, self.folder = episode or Episode(), folder
        self.checks = Checks(task, (*validation, *test), self.episode.reject_known)
        self.skills = tuple(sorted({item.skill for item in validation}))
        self.data: list[Datum] = []
        self.completed: list[Completed] = []
        self.steps = self.round = self.idle = self.lives = self.taught = 0
        self.lesson = folder
        self.observation_space, self.action_space = self._spaces()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, RoundInfo]:  # type: ignore[override]
        """Forgets all data, gives the student its first weights back, and evaluates it."""
        super().reset(seed=seed)
        self.student.restart()
        self.data, self.steps, self.round, self.idle, self.taught = [], 0, 0, 0, 0
        self.lives += 1
        self.completed = self.evaluate(self.validation)
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, RoundInfo]:  # type: ignore[override]
        """Writes what the action asks for, checks it, teaches the student, and evaluates it.

        Raises:
            UserError: the action is not of this environment.
        """
        before = self.report
        written, failures = self._write(action)
        self.steps += 1
        self.idle = 0 if written or failures else self.idle + 1
        self.round += not self.idle
        data = named(written, f"{self.steps:03d}")
        checks = self.checks(data, self.data, self._ask if self._probes else None)
        accepted, rejected = self._sort(data, checks)
        self.data += accepted
        if len(self.data) > self.taught and (self.over or self.round % self.episode.train_every == 0):
            self._teach()
            self.completed = self.evaluate(self.validation)
        elif not accepted:
            warnings.warn("No item was accepted this round: the student is not taught again.", stacklevel=2)
        self._close_round(data, checks, before)
        reward = self.report.accuracy - before.accuracy
        used_up = len(self.data) >= self.episode.budget
        truncated = self.over and not used_up
        return (
            self._observation(),
            reward,
            used_up,
            truncated,
            self._info(Outcome(accepted, rejected, failures, checks)),
        )

    def state(self) -> dict[str, Any]:
        """What an episode needs to go on after a stop, beside ``data``: plain JSON."""
        return {
            "steps": self.steps,
            "round": self.round,
            "idle": self.idle,
            "taught": self.taught,
            "lesson": self.lesson.relative_to(self.folder).as_posix(),
            "answers": [one.response for one in self.completed],
            "random": self.np_random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any], data: Sequence[Datum]) -> RoundInfo:
        """Goes on where ``state`` was taken, in an environment made alike; the student learns its last lesson again.

        Returns the ``info`` of that moment.
        """
        super().reset()
        self.steps, self.round, self.idle = state["steps"], state["round"], state["idle"]
        self.taught, self.lesson, self.data = state["taught"], self.folder / state["lesson"], list(data)
        self.lives = max(1, self.lives)
        self.np_random.bit_generator.state = state["random"]
        self.completed = complete(self.task, self.validation, state["answers"])
        self.student.restart()
        if self.taught:
            self.student.learn(self.data[: self.taught], self.lesson)
        return self._info()

    @property
    def over(self) -> bool:
        """Whether the episode is: the budget is used up, the rounds are, or two rounds in a row asked for nothing."""
        limit = self.round >= self.episode.rounds or self.idle > 1
        return limit or len(self.data) >= self.episode.budget

    @property
    def report(self) -> PerformanceReport:
        """The student's performance on validation, as it was last examined."""
        return report(self.completed)

    @property
    def accuracy(self) -> dict[str, float | None]:
        """Validation accuracy of each skill; None where no item was answered."""
        skills = self.report.skills
        return {skill: skills[skill].accuracy if skill in skills else None for skill in self.skills}

    def evaluate(self, items: Sequence[Item]) -> list[Completed]:
        """The student's answers to items, scored.

        Raises:
            UserError: there are not as many answers as items.
        """
        return complete(self.task, items, self._ask(items))

    def _ask(self, items: Sequence[Item]) -> list[str]:
        answers = self.student.answer(items)
        same_length(items, answers)
        return answers

    def _teach(self) -> None:
        life = f"episode-{self.lives}" if self.lives > 1 else ""
        self.lesson = self.folder / life / f"{self.steps:03d}" / "training"
        self.taught = len(self.data)
        self.student.learn(self.data, self.lesson)

    @property
    def _probes(self) -> bool:
        """Whether the student is asked about the items written for it before it is taught."""
        return self.episode.reject_known

    def _sort(self, data: Sequence[Datum], checks: Sequence[Check]) -> tuple[list[Datum], list[tuple[Datum, Check]]]:
        accepted = [datum for datum, check in zip(data, checks, strict=True) if check.passed]
        rejected = [(datum, check) for datum, check in zip(data, checks, strict=True) if not check.passed]
        room = max(0, self.episode.budget - len(self.data))
        late = {datum.id for datum in accepted[room:]}
        rejected += [
            (datum, replace(check, passed=False, reason="the data budget is used up"))
            for datum, check in zip(data, checks, strict=True)
            if datum.id in late
        ]
        return accepted[:room], rejected

    def _info(self, written: Outcome = NOTHING) -> RoundInfo:
        return {
            "completed": tuple(self.completed),
            "report": self.report,
            "accuracy": self.accuracy,
            "accepted": tuple(written.accepted),
            "rejected": tuple(written.rejected),
            "failures": tuple(written.failures),
            "checks": tuple(written.checks),
            "round": self.round,
            "data": len(self.data),
            "budget_left": self.episode.budget - len(self.data),
        }

    def _seed(self) -> int:
        return int(self.np_random.integers(2**31))

    def _spaces(self) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
        """The spaces of observations and of actions."""
        raise NotImplementedError

    def _write(self, action: Any) -> tuple[list[Datum], list[str]]:
        """What an action asks for, written: items, and why others were lost."""
        raise NotImplementedError

    def _observation(self) -> Any:
        """What the agent sees, of ``observation_space``."""
        raise NotImplementedError

    def _close_round(self, data: Sequence[Datum], checks: Sequence[Check], before: PerformanceReport) -> None:
        """What an environment keeps of a round."""

    def _items(self, *, skill: bool = False) -> tuple[dict[str, Any], ...]:
        rows = []
        for one in self.completed:
            row: dict[str, Any] = {"question": self.task.prompt(one.item)[:TEXT], "answer": one.response[:TEXT]}
            row |= {"truth": one.item.truth[:TEXT], "correct": np.int64(one.correct)}
            row |= {"skill": np.int64(self.skills.index(one.item.skill))} if skill else {}
            row |= {"image": one.item.image.copy()} if one.item.image is not None else {}
            rows.append(row)
        return tuple(rows)

    def _item_space(self, *, skill: bool = False) -> spaces.Sequence:
        fields: dict[str, spaces.Space[Any]] = {name: AnyText() for name in ("question", "answer", "truth")}
        fields |= {"correct": spaces.Discrete(2)} | ({"skill": spaces.Discrete(len(self.skills))} if skill else {})
        return spaces.Sequence(spaces.Dict(fields | self._image_space()))

    def _image_space(self) -> dict[str, spaces.Space[Any]]:
        image = self.validation[0].image
        return {} if image is None else {"image": spaces.Box(0, 255, image.shape, np.uint8)}

    def _accuracies(self) -> np.ndarray:
        return np.array([UNKNOWN if value is None else value for value in self.accuracy.values()], np.float32)


class OpenEnded(DataEnvironment):
    """The agent sees every validation item with the student's answer, and hands over training items as it likes."""

    def _spaces(self) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
        fields: dict[str, spaces.Space[Any]] = {name: AnyText() for name in FIELDS}
        return self._item_space(), spaces.Sequence(spaces.Dict(fields | self._image_space()))

    def _observation(self) -> Any:
        return self._items()

    def _write(self, action: Any) -> tuple[list[Datum], list[str]]:
        return [Datum(id="", **{name: one[name] for name in (*FIELDS, "image") if name in one}) for one in action], []


def as_action(data: Sequence[Datum]) -> tuple[dict[str, Any], ...]:
    """Training items as an action of ``OpenEnded``."""
    rows = [{name: value for name, value in vars(datum).items() if name in FIELDS} for datum in data]
    return tuple(
        row if datum.image is None else row | {"image": datum.image} for row, datum in zip(rows, data, strict=True)
    )
