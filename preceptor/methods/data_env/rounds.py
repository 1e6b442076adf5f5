"""The rounds of an episode on disk: one folder each, from whose last whole one a stopped episode goes on.

A folder holds ``items.jsonl`` (the validation items with the student's answers), ``data.jsonl`` (what was accepted),
``rejected.jsonl`` (what was not, with the reason), ``training/`` and, written last, ``report.json``. A round without a
report, or with fewer lines than its report counts, is not whole.
"""

from __future__ import annotations

import base64
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.methods.data_env.environment import DataEnvironment, RoundInfo
from preceptor.tasks.records import Completed, Datum

ITERATIONS = "iterations"


@dataclass(frozen=True)
class Iteration:
    """One round: what was accepted and rejected in it, and its report."""

    number: int
    data: tuple[Datum, ...]
    rejected: tuple[dict[str, Any], ...]
    report: dict[str, Any]


def write_iteration(environment: DataEnvironment, info: RoundInfo, reward: float, lost: Sequence[str]) -> None:
    """Writes the round that ``environment`` has just made, as ``info`` describes it, into the environment's folder.

    ``lost``: why items that the agent had written itself were lost before the environment saw them.
    """
    place = environment.folder / f"{environment.steps:03d}"
    place.mkdir(parents=True, exist_ok=True)
    rejected = [{**datum_json(datum), "reason": check.reason} for datum, check in info["rejected"]]
    rejected += [{"reason": reason} for reason in (*lost, *info["failures"])]
    _lines(place / "items.jsonl", [_completed_json(one) for one in info["completed"]])
    _lines(place / "data.jsonl", [datum_json(datum) for datum in info["accepted"]])
    _lines(place / "rejected.jsonl", rejected)
    report = {
        "number": environment.steps,
        "accuracy": info["report"].accuracy,
        "skills": info["accuracy"],
        "reward": reward,
        "accepted": len(info["accepted"]),
        "rejected": len(rejected),
        "state": environment.state(),
    }
    write_whole(place / "report.json", json.dumps(report, indent=1) + "\n")


def begin(environment: DataEnvironment, seed: int) -> RoundInfo:
    """The first round's ``info``, or that of the last whole round on the disk."""
    rounds = read_iterations(environment.folder)
    drop_later(environment.folder, len(rounds))
    if rounds:
        return environment.restore(rounds[-1].report["state"], [datum for one in rounds for datum in one.data])
    _, info = environment.reset(seed=seed)
    write_iteration(environment, info, 0.0, [])
    return info


def read_iterations(folder: Path) -> list[Iteration]:
    """All whole rounds from the first on, up to the first that is not whole."""
    found: list[Iteration] = []
    while (iteration := _read(folder / f"{len(found):03d}", len(found))) is not None:
        found.append(iteration)
    return found


def drop_later(folder: Path, count: int) -> None:
    """Removes what lies there of rounds from number ``count`` on: none of it is whole."""
    for place in folder.glob("[0-9]*"):
        if place.name.isdecimal() and int(place.name) >= count:
            shutil.rmtree(place)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line that was cut off is left out, with a warning.

    Raises:
        UserError: another line is not JSON.
    """
    # Not splitlines: it cuts at U+2028 and others too, which JSON leaves in a text as they are.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON ({error}): mend or delete it.") from error
            warnings.warn(f"The last line of {path} was cut off: it is left out.", stacklevel=2)
    return found


def datum_json(datum: Datum) -> dict[str, Any]:
    """A datum as JSON; its image as base64 of its bytes, with its shape."""
    row = {name: value for name, value in vars(datum).items() if name != "image"}
    if datum.image is None:
        return row
    return row | {"image": base64.b64encode(datum.image.tobytes()).decode(), "shape": list(datum.image.shape)}


def datum_from(row: Mapping[str, Any]) -> Datum:
    """The datum that ``datum_json`` wrote."""
    fields = {name: value for name, value in row.items() if name not in ("image", "shape", "reason")}
    if "image" not in row:
        return Datum(**fields)
    image = np.frombuffer(base64.b64decode(row["image"]), np.uint8).reshape(row["shape"])
    return Datum(**fields, image=image)


def _read(place: Path, number: int) -> Iteration | None:
    try:
        report = json.loads((place / "report.json").read_text(encoding="utf-8"))
        data = tuple(datum_from(row) for row in read_lines(place / "data.jsonl"))
        rejected = tuple(read_lines(place / "rejected.jsonl"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) < report["accepted"] or len(rejected) < report["rejected"]:
        return None
    return Iteration(number, data, rejected, report)


def _completed_json(one: Completed) -> dict[str, Any]:
    item = one.item
    row = {"id": item.id, "skill": item.skill, "subskill": item.subskill, "question": item.instruction}
    return row | {"answer": one.response, "truth": item.truth, "correct": one.correct}


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
