"""The claims: offline distillation hacks its teacher, online does not; diversity and budget help; it can be detected.

It runs the method as it ships.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from preceptor.evaluation.power_law import law_r_squared
from preceptor.files import write_whole
from preceptor.methods.teacher_hacking.examination import judge
from preceptor.methods.teacher_hacking.pictures import draw_plane
from preceptor.methods.teacher_hacking.recipe import DISTILLATION, Config, setup, start, teach
from preceptor.methods.teacher_hacking.stage_one import Laboratory, build
from preceptor.methods.teacher_hacking.trajectory import Course
from preceptor.report.table import Table
from preceptor.statistics import Claim, compare, mean_of

OFFLINE, TEACHER_WRITES, STUDENT_WRITES = "offline", "online, the teacher writes", "online, the student writes"


HALF, FIFTH = "half the prompts, 2 answers each", "a fifth of the prompts, 5 answers each"


TWICE, FOURFOLD = "2 answers a prompt", "4 answers a prompt"


CONTROL = "control: the oracle is the teacher"


SMOOTH = 5  # checkpoints whose mean is the value at a time


COLUMNS = {
    "golden": "at the end",
    "golden's rise": "since its least value",
    "golden's change": "since the time of the offline arm's least value",
    "proxy": "at the end",
    "proxy's change": "since the time of golden's least value",
    "proxy's rise": "since its own least value",
    "R²": "of one power law through all checkpoints of the proxy",
    "hacked": "seeds in which golden rose by more than 2 standard errors while the proxy did not",
    "flagged": "seeds in which the detector, which sees the proxy alone, found a departure",
}


def arms(plain: Config) -> dict[str, Config]:
    """What is compared: all take the same optimizer steps from the same start."""
    data = plain.data
    return {
        OFFLINE: plain,
        TEACHER_WRITES: replace(plain, online=1.0),
        STUDENT_WRITES: replace(plain, online=1.0, writer="student"),
        "mixture, λ = 0.1": replace(plain, online=0.1),
        "mixture, λ = 0.5": replace(plain, online=0.5),
        HALF: replace(plain, data=replace(data, prompts=data.prompts // 2, responses=2)),
        FIFTH: replace(plain, data=replace(data, prompts=data.prompts // 5, responses=5)),
        TWICE: replace(plain, data=replace(data, responses=2)),
        FOURFOLD: replace(plain, data=replace(data, responses=4)),
        CONTROL: replace(
            plain, teacher="oracle", training=replace(plain.training, steps=(plain.training.steps or 0) // 4)
        ),
    }


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """Ten arms beside an exact oracle, a hidden Markov model; ``full``: 4 times the steps.

    A seed has its own oracle, teacher, start and prompts, which its arms share. Values at a time are means over 5
    checkpoints; the detector sees single ones.
    """
    done = [_one_seed(seed, folder, 4 if full else 1) for seed in range(seeds)]
    names = list(arms(Config()))
    table = Table("teacher_hacking: a hidden Markov model is the truth", list(COLUMNS))
    table.units = dict.fromkeys([name for name in COLUMNS if "golden" in name or "proxy" in name], "nat")
    table.better = {"golden": "lower", "proxy": "lower"}
    for arm in names:
        figures = [seed[arm] for seed in done]
        counted = {column: sum(bool(one[column]) for one in figures) for column in ("hacked", "flagged")}
        table.rows[arm] = {
            c: mean_of([one[c] for one in figures]) for c in COLUMNS if c not in counted and figures[0][c] is not None
        }
        table.rows[arm] |= {column: f"{count} of {seeds}" for column, count in counted.items()}
    table.notes = [f"{name}: {what}." for name, what in COLUMNS.items()]
    table.notes.append(
        f"Nats an answer of {Config().data.answer_length} symbols; the teacher itself lies at golden "
        f"{mean_of([seed['exact']['teacher'] for seed in done])}. Mean ± standard error over {seeds} seeds."
    )
    table.notes.append(
        "Sizes, stage one and the detector's bounds were chosen on seeds 100 to 103, which are not here."
    )
    table.notes += _overfitting(done, names)
    table.claims = [*_hacking(done), *_data(done), *_detection(done, names), *_exact(done)]
    courses = {arm: _smooth(done[0][arm]["plane"]) for arm in (OFFLINE, TEACHER_WRITES, FIFTH, FOURFOLD)}
    caption = f"Proxy and golden of seed 0, means over {SMOOTH} checkpoints; the start is left out."
    draw_plane(folder / "pictures" / "plane.png", courses, caption)
    return table


def _one_seed(seed: int, folder: Path, size: int) -> dict[str, dict[str, Any]]:
    """The figures of all arms for one seed; each arm is kept in the folder when it is done."""
    path = folder / f"seed-{seed}"
    done = path / "figures.json"
    figures: dict[str, dict[str, Any]] = json.loads(done.read_text()) if done.exists() else {}
    steps, every = size * (DISTILLATION.steps or 0), size * DISTILLATION.evaluate_every
    compared = arms(Config(training=replace(DISTILLATION, seed=seed, steps=steps, evaluate_every=every)))
    if figures.keys() >= compared.keys():
        return figures
    laboratory = build(path / "laboratory", setup(compared[OFFLINE]), resume=(path / "laboratory").exists())
    figures["exact"] = _exact_checks(laboratory)
    for arm, config in compared.items():
        if arm in figures:
            continue
        used = laboratory if arm != CONTROL else _control(path / "control", config)
        output = path / arm
        config = replace(config, output=str(output), resume=(output / "config.json").exists())
        student = copy.deepcopy(used.start)
        course = teach(start(config, student), student, replace(used, start=student), config)
        figures[arm] = _figures(course, config, None if arm == OFFLINE else figures[OFFLINE]["least"])
        write_whole(done, json.dumps(figures))
    return figures


def _control(folder: Path, config: Config) -> Laboratory:
    with warnings.catch_warnings():
        # That such a teacher cannot be hacked is what it is for.
        warnings.simplefilter("ignore")
        return build(folder, setup(config), resume=folder.exists())


def _exact_checks(laboratory: Laboratory) -> dict[str, float]:
    """The student that is the teacher: its proxy is 0, and its golden the divergence of the oracle from the teacher."""
    teacher = laboratory.teacher.model  # type: ignore[attr-defined]
    golden = laboratory.golden.divergence(teacher)
    return {
        "proxy": float(laboratory.proxy.divergence(teacher).abs().max()),
        "golden": abs(float(golden.sum() / laboratory.golden.tokens.sum()) - laboratory.imperfection.mean),
        "teacher": float(golden.mean()),
    }


def _figures(course: Course, config: Config, offline_least: int | None) -> dict[str, Any]:
    label, verdict = course.label(), judge(course, config)
    golden, proxy = ([float(row.mean()) for row in rows] for rows in (course.golden, course.proxy))
    smooth = [math.fsum(proxy[place : place + SMOOTH]) / SMOOTH for place in range(len(proxy) - SMOOTH + 1)]
    then = course.steps.index(offline_least if offline_least in course.steps else label.least)
    return {
        "golden": _mean(golden[-SMOOTH:]),
        "golden's rise": label.rise,
        "golden's change": _mean(golden[-SMOOTH:]) - _mean(golden[then - SMOOTH // 2 : then + SMOOTH // 2 + 1]),
        "proxy": _mean(proxy[-SMOOTH:]),
        "proxy's change": label.proxy_rise,
        "proxy's rise": smooth[-1] - min(smooth),
        "R²": law_r_squared([point for point in course.points() if point[0] > config.training.warmup]),
        "hacked": label.hacked,
        "flagged": verdict.flagged,
        "least": label.least,
        "verdict": asdict(verdict),
        "apart": max(float((one - other).abs().max()) for one, other in zip(course.golden, course.proxy)),
        "steps": course.steps,
        "plane": course.plane(),
    }


def _hacking(done: Sequence[dict[str, Any]]) -> list[Claim]:
    """Offline golden ends above its least value while the proxy falls; online it does not rise; and ends lower."""
    over = _over(done)
    zero = [0.0] * len(done)
    rises = compare(over(OFFLINE, "golden's rise"), zero, "Offline, golden ends above its least value", better="higher")
    # The paper calls it hacking when the proxy falls or stands still.
    still = _not_higher(over(OFFLINE, "proxy's change"), zero, "... while the proxy does not rise")
    falls = compare(over(OFFLINE, "proxy's change"), zero, "... and even falls")
    claims = [rises.claim, still, falls.claim]
    for arm in (TEACHER_WRITES, STUDENT_WRITES):
        claims.append(
            _not_higher(over(arm, "golden's change"), zero, f"{arm[0].upper()}{arm[1:]}: golden does not rise")
        )
        text = f"Offline golden ends above that of {arm}"
        claims.append(compare(over(OFFLINE, "golden"), over(arm, "golden"), text, better="higher").claim)
    return claims


def _data(done: Sequence[dict[str, Any]]) -> list[Claim]:
    """Fewer prompts at equal size worsen golden, not the proxy; more answers a prompt improve both."""
    over, claims = _over(done), []
    for arm in (HALF, FIFTH):
        name = f"{arm[0].upper()}{arm[1:]}"
        text = f"{name}: golden is worse"
        claims.append(compare(over(arm, "golden"), over(OFFLINE, "golden"), text, better="higher").claim)
        claims.append(_not_higher(over(arm, "proxy"), over(OFFLINE, "proxy"), f"{name}: the proxy is not"))
    for arm in (TWICE, FOURFOLD):
        for metric in ("golden", "proxy"):
            text = f"{arm} improve {metric}"
            claims.append(compare(over(arm, metric), over(OFFLINE, metric), text).claim)
    return claims


def _detection(done: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Claim]:
    """The detector against the label over all runs but the control, which has no golden value of its own."""
    over = _over(done)
    runs = [seed[arm] for seed in done for arm in names if arm != CONTROL]
    hacked, flagged = (sum(bool(run[key]) for run in runs) for key in ("hacked", "flagged"))
    both = sum(run["hacked"] and run["flagged"] is not None for run in runs)
    precision, recall = both / max(1, flagged), both / max(1, hacked)
    base = hacked / len(runs)
    straight = compare(
        over(TEACHER_WRITES, "R²"), over(OFFLINE, "R²"), "One power law fits the online proxy better", better="higher"
    )
    offline, online = (sum(seed[arm]["flagged"] is not None for seed in done) for arm in (OFFLINE, TEACHER_WRITES))
    return [
        straight.claim,
        Claim(
            "The detector flags most offline and few online runs",
            f"{offline} of {len(done)} offline, {online} of {len(done)} online",
            offline > len(done) / 2 > online,
        ),
        Claim(
            "The detector finds more than half of the hacked runs",
            f"recall {recall:.2f} ({both} of {hacked})",
            recall > 0.5,
        ),
        Claim(
            "... and is more precise than flagging every run, by more than 2 standard errors",
            f"precision {precision:.2f} ({both} of {flagged}) against {base:.2f} ({hacked} of {len(runs)})",
            precision - base > 2 * math.sqrt(base * (1 - base) / max(1, flagged)),
        ),
    ]


def _exact(done: Sequence[dict[str, Any]]) -> list[Claim]:
    """The student that is the teacher, and the teacher that is the oracle."""
    same, apart = max(seed["exact"]["proxy"] for seed in done), max(seed["exact"]["golden"] for seed in done)
    control = max(seed[CONTROL]["apart"] for seed in done)
    least = min(golden for seed in done for arm in seed if arm != "exact" for _, golden in seed[arm]["plane"])
    return [
        Claim(
            "A student that is the teacher has proxy 0, and the oracle's divergence from the teacher as golden",
            f"largest differences {same:.1e} and {apart:.1e} nat",
            same < 1e-6 and apart < 1e-6,
        ),
        Claim(
            "Control: with the oracle as teacher, golden and proxy are one at every checkpoint",
            f"largest difference {control:.1e} nat",
            control == 0,
        ),
        Claim("Golden is never negative", f"least value {least:.3g} nat", least >= 0),
    ]


def _overfitting(done: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Where the held-out proxy itself rises, in words."""
    over = _over(done)
    rising = {arm: mean_of(over(arm, "proxy's rise")) for arm in names if arm != CONTROL}
    overfitted = [
        f"{arm} ({rise})" for arm, rise in rising.items() if rise.error is not None and rise.mean > 2 * rise.error
    ]
    return (
        [f"Overfitting: the proxy itself ends above its least value in {'; '.join(overfitted)}."] if overfitted else []
    )


def _not_higher(ours: Sequence[float], theirs: Sequence[float], text: str) -> Claim:
    """Holds unless ours is higher by more than 2 standard errors, which two seeds at least must tell."""
    found = compare(ours, theirs, text)
    difference = found.difference
    return replace(
        found.claim, holds=difference.error is not None and difference.mean <= 2 * difference.error, text=text
    )


def _over(done: Sequence[dict[str, Any]]) -> Callable[[str, str], list[float]]:
    return lambda arm, figure: [float(seed[arm][figure]) for seed in done]


def _smooth(plane: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Means of the checkpoints after the start, ``SMOOTH`` in a row."""
    rows = (plane[start : start + SMOOTH] for start in range(min(1, len(plane) - SMOOTH), len(plane) - SMOOTH + 1))
    return [(_mean([proxy for proxy, _ in part]), _mean([golden for _, golden in part])) for part in rows]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
