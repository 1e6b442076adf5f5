"""Pictures of an episode: the skill tree, the allocation over time, accuracy by skill, what was rejected and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.methods.data_env.rounds import Iteration
from preceptor.report.figures import COLOURS, INK, PALE, bare, blank, save

FILL = COLOURS[0]


ENTITLED = {
    "1_skill_tree": "The skill tree: accepted items of each subskill in all, and of how many of those written for it "
    "the student knew the answer before it was taught (where it was asked).",
    "2_allocation": "Allocation over time: accepted items of each subskill, round by round.",
    "3_accuracy": "Validation accuracy of each skill after each round; round 0 is before any lesson.",
    "4_rejected": "What was rejected in each round, and why.",
}


def draw_episode(folder: Path, rounds: Sequence[Iteration]) -> None:
    """Writes the pictures of an episode, PNG with their captions beside them; nothing without matplotlib.

    Args:
        folder: where they go; it is made.
        rounds: all rounds, from the one before any lesson on.
    """
    sizes = {"1_skill_tree": (7.6, 0.6 + 0.27 * len(_leaves(rounds))), "2_allocation": (7.6, 3.4)}
    sizes["2_allocation"] = (7.6, 1.2 + 0.25 * len(_leaves(rounds)))
    for name, paint in (
        ("1_skill_tree", _tree),
        ("2_allocation", _allocation),
        ("3_accuracy", _accuracy),
        ("4_rejected", _rejected),
    ):
        if (figure := blank(*sizes.get(name, (7.6, 3.2)))) is None:
            return
        paint(bare(figure.add_subplot()), rounds)
        save(figure, folder / f"{name}.png", ENTITLED[name])


def _leaves(rounds: Sequence[Iteration]) -> list[tuple[str, str]]:
    """Every (skill, subskill) that was written for, by skill; a skill without any, alone."""
    found = {(datum.skill, datum.subskill) for one in rounds for datum in one.data}
    found |= {(one["skill"], one["subskill"]) for part in rounds for one in part.rejected if "skill" in one}
    skills = {skill for skill, _ in found}
    return sorted(found | {(skill, "") for skill in rounds[0].report["skills"] if skill not in skills})


def _tree(axes: Any, rounds: Sequence[Iteration]) -> None:
    """Skills on the left, their subskills as branches with a bar each."""
    leaves = _leaves(rounds)
    counts = Counter((datum.skill, datum.subskill) for one in rounds for datum in one.data)
    most = max([1, *counts.values()])
    known = _known(rounds)
    rows: dict[str, list[int]] = {}
    for row, (skill, subskill) in enumerate(leaves):
        rows.setdefault(skill, []).append(row)
        count = counts[skill, subskill]
        axes.barh(row, 3.2 * count / most, left=4.6, height=0.62, color=FILL)
        share = known.get((skill, subskill))
        text = f"{count}" + ("" if share is None else f"   knew {share:.0%}")
        axes.text(4.7 + 3.2 * count / most, row, text, va="center", fontsize=8, color=INK)
        axes.text(4.5, row, subskill or "nothing yet", va="center", ha="right", fontsize=8, color=INK)
    for skill, places in rows.items():
        middle = sum(places) / len(places)
        axes.text(1.6, middle, skill or "any", va="center", ha="right", fontsize=9, weight="bold", color=INK)
        for row in places:
            axes.plot([1.7, 2.2, 2.2, 2.5], [middle, middle, row, row], color=PALE, linewidth=1.2)
    axes.set(xlim=(0, 9.4), ylim=(len(leaves) - 0.4, -0.6), xticks=[], yticks=[])


def _known(rounds: Sequence[Iteration]) -> dict[tuple[str, str], float]:
    """The last training accuracy of each subskill, from the histories of a skill forest."""
    history = rounds[-1].report["state"].get("history", {})
    found: dict[tuple[str, str], float] = {}
    for skill, past in history.items():
        for experience in past:
            accuracy = experience["tree"]["training_accuracy"]
            found |= {(skill, name): share for name, share in accuracy.items() if share is not None}
    return found


def _allocation(axes: Any, rounds: Sequence[Iteration]) -> None:
    """A row a subskill, a column a round; darker is more."""
    leaves, taught = _leaves(rounds), rounds[1:] or rounds
    table = [[sum((d.skill, d.subskill) == leaf for d in one.data) for one in taught] for leaf in leaves]
    most = max(1, *(max(row) for row in table))
    axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1.3 * most)
    for row, cells in enumerate(table):
        for column, count in enumerate(cells):
            axes.text(
                column,
                row,
                count or "",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if count > 0.6 * most else INK,
            )
    axes.set_yticks(range(len(leaves)), [f"{skill} / {subskill}" if subskill else skill for skill, subskill in leaves])
    axes.set_xticks(range(len(taught)), [str(one.number) for one in taught])
    axes.set_xlabel("round", color=INK, fontsize=8)


def _accuracy(axes: Any, rounds: Sequence[Iteration]) -> None:
    """A line a skill, and all of them together."""
    steps = [one.number for one in rounds]
    for place, skill in enumerate(rounds[0].report["skills"]):
        values = [one.report["skills"][skill] for one in rounds]
        points = [(step, 100 * value) for step, value in zip(steps, values, strict=True) if value is not None]
        axes.plot(
            *zip(*points, strict=True), color=COLOURS[place % len(COLOURS)], marker="o", markersize=3, label=skill
        )
    axes.plot(steps, [100 * one.report["accuracy"] for one in rounds], color=INK, linewidth=2.4, label="all")
    axes.set_ylim(0, 102)
    axes.set_ylabel("accuracy, %", color=INK, fontsize=8)
    _rounds_below(axes, steps)


def _rejected(axes: Any, rounds: Sequence[Iteration]) -> None:
    """A stacked bar a round: one colour a reason."""
    counts = [Counter(_short(str(one["reason"])) for one in part.rejected) for part in rounds]
    steps, below = [one.number for one in rounds], [0] * len(rounds)
    reasons = sorted({reason for count in counts for reason in count})
    for place, reason in enumerate(reasons):
        values = [count[reason] for count in counts]
        axes.bar(steps, values, bottom=below, color=COLOURS[place % len(COLOURS)], label=reason, width=0.6)
        below = [under + value for under, value in zip(below, values, strict=True)]
    if not reasons:
        axes.text(0.5, 0.5, "Nothing was rejected.", ha="center", transform=axes.transAxes, fontsize=9, color=INK)
        axes.set(xticks=[], yticks=[])
        return
    axes.set_ylabel("items", color=INK, fontsize=8)
    _rounds_below(axes, steps)


def _rounds_below(axes: Any, steps: Sequence[int]) -> None:
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xticks(list(steps))
    axes.set_xlabel("round", color=INK, fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK)


def _short(reason: str) -> str:
    """The reason without what differs from item to item."""
    return reason.partition("(")[0].partition(": '")[0].strip()[:60]
