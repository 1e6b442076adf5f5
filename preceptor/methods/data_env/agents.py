"""Agents of the three environments: what is seen goes in, an action comes out.

Each comes in three kinds. ``with_state`` sees how the student did. ``no_state`` is the same agent that is shown
nothing: it spreads its items evenly. ``random`` leaves the choice to chance. All are reproducible: what chance decides
follows from the seed and the round. Source: DataEnvGym (Khan et al., ICLR 2025, arXiv 2410.06215).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from preceptor.errors import UserError
from preceptor.methods.data_env.policies import Policy
from preceptor.methods.data_env.skill_environments import MOST, gather
from preceptor.methods.data_env.skill_tree import Action, Experience
from preceptor.methods.data_env.writers import Order, Writer
from preceptor.tasks.records import Datum, Item

Kind = Literal["with_state", "no_state", "random"]


SHOWN = 3  # examples, and errors, in a call of the Open-Ended agent


@dataclass(frozen=True)
class OpenEndedAgent:
    """Hands over items, ``per_call`` a call of the writer, the last call with what is left.

    With state, each call shows ``SHOWN`` items of the training pool and as many errors, or all there are: the errors
    are drawn evenly, so that a skill is shown as often as it fails. Without errors it hands over nothing, and the
    episode ends. A random agent draws a skill a call.
    """

    writer: Writer
    kind: Kind
    pool: tuple[Item, ...]
    skills: Mapping[str, tuple[str, ...]]
    items: int = 120
    per_call: int = 10
    seed: int = 0

    def __call__(self, info: Mapping[str, Any]) -> tuple[list[Datum], list[str]]:
        """The items for the next round, and why others were lost."""
        stream = np.random.default_rng((self.seed, int(info["round"])))
        errors = [one for one in info["completed"] if not one.correct]
        if self.kind == "with_state" and not errors:
            return [], []
        sizes = [min(self.per_call, self.items - start) for start in range(0, self.items, self.per_call)]
        skills, luck = list(self.skills), stream.dirichlet([0.5] * max(1, len(self.skills)))
        orders = []
        for size in sizes:
            order = Order(size, int(stream.integers(2**31)))
            if self.kind == "with_state":
                shown = _draw(stream, errors, SHOWN)
                order = Order(size, order.seed, examples=tuple(_draw(stream, self.pool, SHOWN)), errors=tuple(shown))
            elif self.kind == "random" and skills:
                order = Order(size, order.seed, skills[stream.choice(len(skills), p=luck)])
            orders.append(order)
        return gather(self.writer.write(orders))


@dataclass(frozen=True)
class SkillListAgent:
    """Says how many items each skill gets: with state in proportion to its errors, else evenly, or by chance."""

    kind: Kind
    skills: tuple[str, ...]
    items: int = 120
    seed: int = 0

    def __call__(self, info: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """Items a skill, ``items`` in all. A skill whose accuracy is unknown counts as half wrong."""
        stream = np.random.default_rng((self.seed, int(info["round"])))
        weights = np.ones(len(self.skills))
        if self.kind == "random":
            weights = stream.dirichlet([0.5] * len(self.skills))
        if self.kind == "with_state":
            accuracy = info["accuracy"]
            weights = np.array([0.5 if accuracy[skill] is None else 1 - accuracy[skill] for skill in self.skills])
        asked: np.ndarray[Any, Any] = np.minimum(shares(weights, self.items), MOST)
        return asked


@dataclass(frozen=True)
class SkillForestAgent:
    """Explores or exploits in each skill, as that skill's policy says."""

    policy: Callable[[str], Policy]

    def __call__(self, info: Mapping[str, Any]) -> dict[str, Action]:
        """One action a skill."""
        history: Mapping[str, Sequence[Experience]] = info["history"]
        return {skill: self.policy(skill)(past, info["accuracy"][skill]) for skill, past in history.items()}


def shares(weights: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """``count`` split in proportion to weights, whole numbers, by largest remainders; nothing where all are 0.

    Raises:
        UserError: a weight is negative.
    """
    if (weights < 0).any():
        raise UserError("A share cannot be negative: give weights of 0 or more.")
    if not weights.sum():
        return np.zeros(len(weights), np.int64)
    exact = weights / weights.sum() * count
    whole: np.ndarray[Any, Any] = np.floor(exact).astype(np.int64)
    for place in np.argsort(-(exact - whole), kind="stable")[: count - int(whole.sum())]:
        whole[place] += 1
    return whole


def _draw(stream: np.random.Generator, things: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the things, without repetition, or all there are."""
    return [things[place] for place in stream.permutation(len(things))[:count]]
