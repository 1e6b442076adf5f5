"""The environments with structure: a flat list of skills, and a tree of subskills under each (see ``environment``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from preceptor.errors import UserError
from preceptor.methods.data_env.environment import (
    NOTHING,
    UNKNOWN,
    DataEnvironment,
    Episode,
    Outcome,
    RoundInfo,
    TaughtStudent,
)
from preceptor.methods.data_env.skill_tree import Action, Experience, Exploit, Explore, SkillTree, act, read_experience
from preceptor.methods.data_env.writers import Order, Writer, Written
from preceptor.tasks.records import Check, Datum, Item, PerformanceReport, Task

MOST = 240  # items that an action may ask for, for a skill or a subskill


class SkillList(DataEnvironment):
    """The agent sees errors and accuracy by skill, and says how many items each skill gets.

    For each skill the writer sees the student's errors in it, makes ``hypotheses`` about the weak subskill, and
    writes the items. Only skills with errors show any; without (or in a blind episode) the writer chooses for itself.
    """

    def __init__(
        self, task: Task, student: TaughtStudent, validation: Sequence[Item], *, writer: Writer, folder: Path,
        test: Sequence[Item] = (), episode: Episode | None = None, hypotheses: int = 5,
    ) -> None:  # fmt: skip
        """As ``DataEnvironment``; ``writer`` makes the items, about so many ``hypotheses`` a skill."""
        super().__init__(task, student, validation, folder=folder, test=test, episode=episode)
        self.writer, self.hypotheses = writer, hypotheses

    def _spaces(self) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
        number = len(self.skills)
        seen = {
            "items": self._item_space(skill=True),
            "accuracy": spaces.Box(UNKNOWN, 1.0, (number,), np.float32),
            "count": spaces.Box(0, len(self.validation), (number,), np.int64),
        }
        return spaces.Dict(seen), spaces.MultiDiscrete([MOST + 1] * number)

    def _observation(self) -> Any:
        skills = self.report.skills
        counts = [skills[skill].count if skill in skills else 0 for skill in self.skills]
        return {
            "items": self._items(skill=True),
            "accuracy": self._accuracies(),
            "count": np.array(counts, np.int64),
        }

    def _write(self, action: Any) -> tuple[list[Datum], list[str]]:
        if len(action) != len(self.skills):
            raise UserError(f"The action has {len(action)} numbers for {len(self.skills)} skills: give one for each.")
        wrong = [one for one in self.completed if not one.correct and not self.episode.blind]
        orders = [
            Order(
                count=int(count),
                seed=self._seed(),
                skill=skill,
                errors=tuple(one for one in wrong if one.item.skill == skill),
                hypotheses=min(self.hypotheses, int(count)),
            )
            for skill, count in zip(self.skills, action, strict=True)
        ]
        return gather(self.writer.write(orders))


class ForestInfo(RoundInfo):
    """Also what each skill's tree has been through, round by round."""

    history: dict[str, tuple[Experience, ...]]


class SkillForest(DataEnvironment):
    """The agent sees a tree for each skill, and explores or exploits in each; the writer fills the trees.

    ``history`` holds what was done to each skill so far, and what came of it; it is in ``info`` too. In a blind episode
    the student is not asked about new items, and rewards and accuracies of the history are unknown.
    """

    def __init__(
        self, task: Task, student: TaughtStudent, validation: Sequence[Item], *, writer: Writer, folder: Path,
        test: Sequence[Item] = (), episode: Episode | None = None, subskills: int = 12,
    ) -> None:  # fmt: skip
        """As ``DataEnvironment``; ``writer`` makes the items, for at most so many ``subskills`` of a skill."""
        self.subskills = subskills
        super().__init__(task, student, validation, folder=folder, test=test, episode=episode)
        self.writer = writer
        self.history: dict[str, tuple[Experience, ...]] = dict.fromkeys(self.skills, ())
        self._acted: dict[str, tuple[SkillTree, Action]] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, RoundInfo]:  # type: ignore[override]
        """Cuts all trees down, forgets all data, gives the student its first weights back, and evaluates it."""
        self.history = dict.fromkeys(self.skills, ())
        return super().reset(seed=seed, options=options)

    def state(self) -> dict[str, Any]:
        """As the other environments', with the history of each skill."""
        histories = {skill: [asdict(one) for one in past] for skill, past in self.history.items()}
        return super().state() | {"history": histories}

    def restore(self, state: dict[str, Any], data: Sequence[Datum]) -> RoundInfo:
        """As the other environments', with the history of each skill."""
        self.history = {skill: tuple(read_experience(one) for one in past) for skill, past in state["history"].items()}
        return super().restore(state, data)

    def tree(self, skill: str) -> SkillTree:
        """The tree of a skill as it is now, empty before the first action."""
        return self.history[skill][-1].tree if self.history[skill] else SkillTree(skill)

    def action(self, chosen: Mapping[str, Action]) -> tuple[dict[str, Any], ...]:
        """The action in its space, from one Explore or Exploit for each skill.

        Raises:
            UserError: a skill has no action, or an Exploit names a subskill that its tree does not have.
        """
        rows = []
        for skill in self.skills:
            if skill not in chosen:
                raise UserError(f"The skill {skill} has no action: give an Explore or an Exploit for each skill.")
            one, delta = chosen[skill], np.zeros(self.subskills, np.int64)
            if isinstance(one, Explore):
                new = min(one.new, self.subskills)
                rows.append(
                    {"explore": np.int64(1), "new": np.int64(new), "items": np.int64(one.items), "delta": delta}
                )
                continue
            places = {name: place for place, name in enumerate(self.tree(skill).subskills)}
            for name, change in one.delta.items():
                if name not in places:
                    raise UserError(f"Exploit names the subskill {name!r}, which {skill} does not have.")
                delta[places[name]] = change
            rows.append({"explore": np.int64(0), "new": np.int64(1), "items": np.int64(0), "delta": delta})
        return tuple(rows)

    def _spaces(self) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
        shape = (len(self.skills), self.subskills)
        seen: dict[str, spaces.Space[Any]] = {
            "accuracy": spaces.Box(UNKNOWN, 1.0, shape[:1], np.float32),
            "reward": spaces.Box(-2.0, 1.0, shape[:1], np.float32),
            "subskills": spaces.Box(0, self.subskills, shape[:1], np.int64),
            "allocation": spaces.Box(0, 2**31, shape, np.int64),
            "training_accuracy": spaces.Box(UNKNOWN, 1.0, shape, np.float32),
            "budget_left": spaces.Box(0, self.episode.budget, (1,), np.int64),
        }
        one = spaces.Dict({
            "explore": spaces.Discrete(2),
            "new": spaces.Discrete(self.subskills, start=1),
            "items": spaces.Discrete(MOST + 1),
            "delta": spaces.MultiDiscrete([2 * MOST + 1] * self.subskills, start=[-MOST] * self.subskills),
        })  # fmt: skip
        return spaces.Dict(seen), spaces.Tuple([one] * len(self.skills))

    def _observation(self) -> Any:
        """The forest in arrays, a row a skill; -1 is unknown, and a reward that is not known is -2."""
        shape = (len(self.skills), self.subskills)
        allocation, trained = np.zeros(shape, np.int64), np.full(shape, UNKNOWN, np.float32)
        reward = np.full(shape[:1], -2.0, np.float32)
        for row, skill in enumerate(self.skills):
            tree, history = self.tree(skill), self.history[skill]
            if history and history[-1].reward is not None:
                reward[row] = history[-1].reward
            for column, (name, count) in enumerate(tree.allocation.items()):
                allocation[row, column] = count
                known = tree.training_accuracy.get(name)
                trained[row, column] = UNKNOWN if known is None else known
        counts = [len(self.tree(skill).subskills) for skill in self.skills]
        return {
            "accuracy": self._accuracies(),
            "reward": reward,
            "subskills": np.array(counts, np.int64),
            "allocation": allocation,
            "training_accuracy": trained,
            "budget_left": np.array([self.episode.budget - len(self.data)], np.int64),
        }

    @property
    def _probes(self) -> bool:
        return not self.episode.blind

    def _write(self, action: Any) -> tuple[list[Datum], list[str]]:
        if len(action) != len(self.skills):
            raise UserError(f"The action is for {len(action)} skills, and there are {len(self.skills)}: give each one.")
        self._acted = {}
        for skill, row in zip(self.skills, action, strict=True):
            one = self._read(skill, row)
            tree = act(self.tree(skill), one, self.writer.propose)
            kept = dict(list(tree.allocation.items())[: self.subskills])
            self._acted[skill] = (SkillTree(skill, kept), one)
        orders = [
            Order(count, self._seed(), skill, name)
            for skill, (tree, _) in self._acted.items()
            for name, count in tree.allocation.items()
        ]
        return gather(self.writer.write(orders))

    def _read(self, skill: str, row: Mapping[str, Any]) -> Action:
        if row["explore"]:
            return Explore(int(row["new"]), int(row["items"]))
        names = self.tree(skill).subskills
        return Exploit({name: int(change) for name, change in zip(names, row["delta"])})

    def _close_round(self, data: Sequence[Datum], checks: Sequence[Check], before: PerformanceReport) -> None:
        """Adds an experience for each skill: the action, the tree with its data, and the reward it brought."""
        after = self.report
        for skill, (tree, one) in self._acted.items():
            mine = [(datum, check) for datum, check in zip(data, checks, strict=True) if datum.skill == skill]
            filled = tree.filled([datum for datum, _ in mine], [check for _, check in mine], probed=self._probes)
            past = before.skills[skill].accuracy if skill in before.skills else None
            now = after.skills[skill].accuracy if skill in after.skills else None
            reward = None if past is None or now is None else now - past
            hidden = self.episode.blind
            experience = Experience(filled, one, None if hidden else past, None if hidden else reward)
            self.history[skill] = (*self.history[skill], experience)

    def _info(self, written: Outcome = NOTHING) -> ForestInfo:
        return {**super()._info(written), "history": dict(self.history)}


def gather(written: Sequence[Written]) -> tuple[list[Datum], list[str]]:
    """All items and all failures of a round."""
    data = [datum for one in written for datum in one.data]
    return data, [text for one in written for text in one.failures]
