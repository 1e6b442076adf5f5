"""What lies in a run's folder, read once and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from preceptor.catalogue import find_method
from preceptor.errors import UserError
from preceptor.report.table import Table

FILES = ("config.json", "metrics.jsonl", "result.json", "table.json")


class Answers(NamedTuple):
    """A prompt and what each model answers to it."""

    prompt: str
    answers: dict[str, str]


class Picture(NamedTuple):
    """A PNG that a run drew, and the words under it."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Contents:
    """A run's folder. ``metrics``: a mapping a step; ``method``: its address for the command, or empty."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, float]]
    table: Table | None
    headline: str
    command: str
    samples: list[Answers]
    pictures: list[Picture]
    method: str
    written: datetime

    @property
    def reproduction(self) -> bool:
        """Whether the table makes claims, as a reproduction's does."""
        return self.table is not None and bool(self.table.claims)

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return self.table is not None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(max((line["step"] for line in self.metrics), default=0))

    @property
    def total(self) -> int | None:
        """Optimizer steps asked for, where the settings say so."""
        training = self.config.get("training")
        steps = training.get("steps") if isinstance(training, Mapping) else None
        return steps if isinstance(steps, int) else None

    @property
    def seconds(self) -> float:
        """Time of the training steps together."""
        times = (line.get("count", 0.0) / line.get("count_per_second", math.inf) for line in self.metrics)
        return math.fsum(time for time in times if math.isfinite(time))


def read_contents(folder: Path) -> Contents:
    """Read a folder.

    Raises:
        UserError: no such folder, nothing of a run in it, or a file that is not what a run writes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, as runs/gkd/run.")
    there = [folder / name for name in FILES if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder} holds no run: none of {', '.join(FILES)} is in it; give the folder of a run.")
    config, result = _mapping(folder / "config.json"), _mapping(folder / "result.json")
    written = datetime.fromtimestamp(max(path.stat().st_mtime for path in there), timezone.utc)
    return Contents(
        folder=folder,
        config=config,
        environment=_mapping(folder / "environment.json"),
        metrics=_metrics(folder / "metrics.jsonl"),
        table=_table(folder, result),
        headline=str(result.get("headline") or ""),
        command=str(result.get("command") or ""),
        samples=_samples(folder / "samples.json"),
        pictures=_pictures(folder / "pictures"),
        method=method_of_run(folder),
        written=written,
    )


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its permissions.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): is this the folder of a run?") from error


def _mapping(path: Path) -> dict[str, Any]:
    data = _json(path)
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__} where a run writes an object: is this a run's folder?")
    return data or {}


def _table(folder: Path, result: Mapping[str, Any]) -> Table | None:
    data = result.get("table") or _mapping(folder / "table.json") or None
    return None if data is None else Table.from_json(data)


def _metrics(path: Path) -> list[dict[str, float]]:
    """The lines as numbers; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = float(values["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is not a line of metrics ({error!r}): mend or delete it."
            ) from error
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        found.append({**numbers, "step": step})
    return found


def _samples(path: Path) -> list[Answers]:
    data = _json(path)
    try:
        return [
            Answers(str(one["prompt"]), {str(label): str(text) for label, text in one["answers"].items()})
            for one in data or []
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds no samples of models ({error!r}): write it again with `preceptor evaluate`."
        ) from error


def _pictures(folder: Path) -> list[Picture]:
    """``*.png`` in order of their names; the caption is the text file beside one, or its name."""
    found = []
    try:
        for path in sorted(folder.glob("*.png")):
            beside = path.with_suffix(".txt")
            caption = beside.read_text(encoding="utf-8") if beside.is_file() else path.stem.replace("_", " ")
            found.append(Picture(caption.strip(), path.read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"A picture in {folder} cannot be read ({error}): mend or remove it.") from error
    return found


def method_of_run(folder: Path) -> str:
    """The method's address: as the run wrote it, else (an older run) as the layout ``runs/METHOD/NAME`` gives it.

    Raises:
        UserError: environment.json is not JSON.
    """
    written = _mapping(folder / "environment.json").get("method")
    if isinstance(written, str) and written:
        return written
    try:
        return find_method(folder.resolve().parent.name).address
    except UserError:
        return ""
