"""Policies of the Skill-Tree environment: from what was done to a skill so far to Explore or Exploit.

Each is called once a skill and round with that skill's own history. Source: DataEnvGym (Khan et al., ICLR 2025,
arXiv 2410.06215); ``Proportional`` is ours, the exact counterpart of the paper's language-model policy that looks for
the subskills with the lowest training accuracy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, Protocol

from preceptor.errors import UserError
from preceptor.language import Chat, Request
from preceptor.methods.data_env.skill_tree import Action, Experience, Exploit, Explore

HUNDREDTH = 0.01


class Policy(Protocol):
    """Chooses what happens to one skill next."""

    def __call__(self, history: Sequence[Experience], performance: float | None) -> Action:
        """The next action, given all that was done to this skill, oldest first, and its validation accuracy now."""


def written(history: Sequence[Experience]) -> int:
    """How many items were written for the skill in all."""
    return sum(len(ids) for experience in history for ids in experience.tree.data.values())


def _nothing(history: Sequence[Experience]) -> Exploit:
    """The action that leaves no item to any subskill."""
    return Exploit({name: -count for name, count in history[-1].tree.allocation.items()})


@dataclass(frozen=True)
class Alternating:
    """Explore, then nothing, in turn; nothing for ever once ``cap`` items were written.

    Every second round writes nothing; the environment does not count such a round.
    """

    new: int = 2
    items: int = 30
    cap: int = 200

    def __call__(self, history: Sequence[Experience], performance: float | None) -> Action:
        """Explore first, and after each Exploit while there is room."""
        if not history or (isinstance(history[-1].action, Exploit) and written(history) < self.cap):
            return Explore(self.new, self.items)
        return _nothing(history)


@dataclass(frozen=True)
class FillBalanced:
    """Alternate until there are ``subskills``, then bring each to ``target`` items, ``cap`` a round."""

    new: int = 2
    items: int = 10
    subskills: int = 6
    target: int = 60
    cap: int = 20

    def __call__(self, history: Sequence[Experience], performance: float | None) -> Action:
        """Explore, nothing, or what each subskill still lacks."""
        if not history:
            return Explore(min(self.new, self.subskills), self.items)
        tree = history[-1].tree
        lacking = self.subskills - len(tree.subskills)
        if lacking > 0 and isinstance(history[-1].action, Exploit):
            return Explore(min(self.new, lacking), self.items)
        if lacking > 0:
            return _nothing(history)
        had = {name: sum(len(one.tree.data.get(name, ())) for one in history) for name in tree.subskills}
        wanted = {name: min(self.cap, max(0, self.target - had[name])) for name in tree.subskills}
        return Exploit({name: wanted[name] - tree.allocation[name] for name in tree.subskills})


@dataclass
class Chance:
    """A coin decides; so does chance about the numbers, with at most ``active`` subskills that get items."""

    random: Random
    items: int = 30
    active: int = 10

    def __call__(self, history: Sequence[Experience], performance: float | None) -> Action:
        """Explore of random size, or random new allocations."""
        tree = history[-1].tree if history else None
        going = sum(count > 0 for count in tree.allocation.values()) if tree else 0
        if tree is None or not tree.subskills or (going < self.active and self.random.random() < 0.5):
            return Explore(self.random.randint(1, max(1, min(3, self.active - going))), self._items())
        chosen = set(self.random.sample(list(tree.subskills), min(self.active, len(tree.subskills))))
        wanted = {name: self._items() if name in chosen else 0 for name in tree.subskills}
        return Exploit({name: wanted[name] - count for name, count in tree.allocation.items()})

    def _items(self) -> int:
        return self.random.randint(0, self.items)


@dataclass(frozen=True)
class Threshold:
    """``more`` items for every subskill where the last round's reward was above ``reward``; else explore."""

    reward: float = HUNDREDTH
    more: int = 10
    new: int = 5
    items: int = 10

    def __call__(self, history: Sequence[Experience], performance: float | None) -> Action:
        """Exploit what helped, else explore; an unknown reward did not help."""
        gained = history[-1].reward if history else None
        if history and gained is not None and gained > self.reward:
            return Exploit(dict.fromkeys(history[-1].tree.subskills, self.more))
        return Explore(self.new, self.items)


@dataclass(frozen=True)
class Proportional:
    """Explore once, then give each subskill items in proportion to what the student gets wrong in it.

    a[s] = ``items`` · (1 - training accuracy of s), but at least ``least``: what the student once knew is asked about
    again. A subskill of unknown accuracy counts as half right; an agent without state knows none, so it spreads evenly.
    """

    new: int = 4
    start: int = 5
    items: int = 30
    least: int = 2

    def __call__(self, history: Sequence[Experience], performance: float | None) -> Action:
        """Explore first; afterwards move the allocation to where the errors are."""
        if not history:
            return Explore(self.new, self.start)
        tree = history[-1].tree
        known: dict[str, float] = {}
        for experience in history:
            known |= {name: value for name, value in experience.tree.training_accuracy.items() if value is not None}
        wanted = {name: max(self.least, round(self.items * (1 - known.get(name, 0.5)))) for name in tree.subskills}
        return Exploit({name: wanted[name] - count for name, count in tree.allocation.items()})


@dataclass(frozen=True)
class Asked:
    """A language model chooses, given everything that was done to the skill.

    ``form``: ``train_retrain`` shows the reward of each round; ``accumulate`` shows training accuracies instead, and
    asks for the subskills where they are lowest. An answer that is no action is asked for again, ``tries`` times in
    all; after that an error says what was wrong.
    """

    chat: Chat
    skill: str
    form: Literal["train_retrain", "accumulate"] = "train_retrain"
    tries: int = 8
    items: int = 30

    def __call__(self, history: Sequence[Experience], performance: float | None) -> Action:
        """The action that the model chose.

        Raises:
            UserError: none of the answers is an action.
        """
        problem, there = "", history[-1].tree.allocation if history else {}
        for attempt in range(self.tries):
            text = self._prompt(history, performance)
            text += f"\n\nYour last answer was no action: {problem}" if problem else ""
            reply = self.chat.ask([Request(({"role": "user", "content": text},), 1024, seed=attempt, schema=SCHEMA)])[0]
            if reply.error:
                problem = reply.error
                continue
            try:
                return read_action(reply.data, there, most=self.items if self.form == "accumulate" else None)
            except UserError as error:
                problem = str(error)
        raise UserError(f"The teacher chose no action for {self.skill} in {self.tries} tries ({problem}).")

    def _prompt(self, history: Sequence[Experience], performance: float | None) -> str:
        retrain = self.form == "train_retrain"
        goal = (
            "Raise the student's validation accuracy in this skill."
            if retrain
            else f"Find the subskills with the LOWEST training accuracy and practise them. Prefer many subskills to "
            f"many items of one; a subskill may have at most {self.items} items an action."
        )
        rounds = "\n".join(self._round(place, one, retrain=retrain) for place, one in enumerate(history, 1))
        now = "not known" if performance is None else f"{performance:.3f}"
        return "\n".join([
            f'You choose the practice data of a student, for the skill "{self.skill}". {goal}',
            FIELDS[self.form],
            f"Rounds so far:\n{rounds or 'none'}\nValidation accuracy now: {now}",
            ACTIONS,
        ])  # fmt: skip

    def _round(self, place: int, one: Experience, *, retrain: bool) -> str:
        figures = {"past performance": one.performance, "reward": one.reward} if retrain else {}
        shown = "; ".join(f"{name} {_figure(value)}" for name, value in figures.items())
        known = one.tree.training_accuracy
        subskills = ", ".join(
            f"{name}: {count}" + ("" if retrain else f" (training accuracy {_figure(known.get(name))})")
            for name, count in one.tree.allocation.items()
        )
        total = one.tree.total
        return f"{place}. skill {self.skill}; {shown + '; ' if shown else ''}{one.action}; {subskills}; total {total}"


def read_action(data: Any, there: Mapping[str, int], *, most: int | None = None) -> Action:
    """The action that a structured answer describes. Subskills that an Exploit leaves out keep their items, warned of.

    Args:
        data: the parsed answer.
        there: the skill's subskills with the items that each has.
        most: items that a subskill may have after the action, which are those then written; None sets no limit.

    Raises:
        UserError: Explore lacks one of its integers, Exploit its map, or a subskill is unknown; the text says which.
    """
    kind = str(data.get("action", "")).lower() if isinstance(data, Mapping) else ""
    if kind == "explore":
        new, items = data.get("new_subskills"), data.get("items_each")
        if not isinstance(new, int) or not isinstance(items, int):
            raise UserError("Explore needs the two integers new_subskills and items_each: give both.")
        return Explore(new, items if most is None else min(items, most))
    if kind != "exploit":
        raise UserError(f"The action {kind!r} is neither explore nor exploit: choose one of them.")
    delta = data.get("delta")
    if not isinstance(delta, Mapping) or not all(isinstance(change, int) for change in delta.values()):
        raise UserError("Exploit needs the map delta, from each subskill to a whole number: give it.")
    unknown = [name for name in delta if name not in there]
    if unknown:
        raise UserError(f"There is no subskill {unknown[0]!r}: choose among {', '.join(there) or 'none; explore'}.")
    missing = [name for name in there if name not in delta]
    if missing:
        warnings.warn(f"Exploit says nothing of {', '.join(missing)}: they keep their number of items.", stacklevel=2)
    changes = {name: int(delta.get(name, 0)) for name in there}
    return Exploit(changes if most is None else {name: min(changes[name], most - there[name]) for name in there})


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "action": {"enum": ["explore", "exploit"]},
        "new_subskills": {"type": "integer"},
        "items_each": {"type": "integer"},
        "delta": {"type": "object", "additionalProperties": {"type": "integer"}},
    },
    "required": ["reasoning", "action"],
}


FIELDS = {
    "train_retrain": (
        "A round shows: the validation accuracy before it (past performance), what the accuracy gained after teaching "
        "(reward), the action, the items that each subskill then had, and their total."
    ),
    "accumulate": (
        "A round shows: the action, the items that each subskill then had, the share of them that the student answered "
        "right before it was taught them (training accuracy), and their total."
    ),
}


ACTIONS = (
    "Actions: explore adds new_subskills subskills, each with items_each items, and leaves the others as they are. "
    "exploit adds delta[subskill] to the items of each subskill you have.\n"
    "Patterns: start fresh (set every old subskill to 0, then explore); prune (a negative delta); revive (a positive "
    "delta for a subskill at 0); create (explore).\n"
    "Give your reasoning, then one action."
)
