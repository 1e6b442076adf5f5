"""What the student is examined on at the end, the table of it, and a round in one line."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.catalogue import repeat
from preceptor.evaluation.language import TAUGHT, UNTAUGHT
from preceptor.evaluation.result import write_result
from preceptor.methods.data_env.environment import DataEnvironment, RoundInfo
from preceptor.methods.data_env.exam import Questions
from preceptor.methods.data_env.pictures import draw_episode
from preceptor.methods.data_env.rounds import ITERATIONS, Iteration, read_iterations
from preceptor.methods.data_env.student import TaskStudent
from preceptor.report import write_report
from preceptor.report.table import Table
from preceptor.statistics import Value
from preceptor.tasks.records import Completed, complete, report

if TYPE_CHECKING:
    from preceptor.methods.data_env.recipe import Config


def examine(config: Config, student: TaskStudent, questions: Questions) -> Table:
    """Ask the student of the best round and the untaught one the test items; write what a run leaves."""
    folder = Path(config.output)
    rounds = read_iterations(folder / ITERATIONS)
    best = max((one for one in rounds if one.report["state"]["taught"]), key=_validation, default=rounds[0])
    state = best.report["state"]
    student.restart()
    answers = {UNTAUGHT: complete(student.task, questions.test, student.answer(questions.test))}
    if state["taught"]:
        data = [datum for one in rounds for datum in one.data][: state["taught"]]
        student.learn(data, folder / ITERATIONS / state["lesson"])
        for name in ("metrics.jsonl", "environment.json"):
            shutil.copy(folder / ITERATIONS / state["lesson"] / name, folder / name)
    answers[TAUGHT] = complete(student.task, questions.test, student.answer(questions.test))
    card = {"teacher": config.teacher.model, "method": "data_env", "items": state["taught"], "round": best.number}
    student.save(folder / "student", card=card)
    table = compare_students(config, answers, rounds, best)
    before, after = (report(one).accuracy for one in answers.values())
    headline = f"Accuracy on test items went from {before:.1%} to {after:.1%} with {state['taught']} written items."
    answered = [
        {"prompt": item.instruction, "answers": {name: done[place].response for name, done in answers.items()}}
        for place, item in list(enumerate(questions.test))[:: max(1, len(questions.test) // 6)][:6]
    ]
    write_result(folder, table, answered, headline=headline, command=repeat("data_env", folder))
    draw_episode(folder / "pictures", rounds)
    table.print()
    print(f"The student: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def _validation(one: Iteration) -> float:
    return float(one.report["accuracy"])


def compare_students(
    config: Config, answers: Mapping[str, list[Completed]], rounds: list[Iteration], best: Iteration
) -> Table:
    """Accuracy on test items by skill, untaught and taught, beside the items written for it and why others were not."""
    table = Table(f"data_env: {config.environment}, {config.task}, {config.agent}", [*answers, "items", "rejected"])
    reports = {name: report(done) for name, done in answers.items()}
    kept = [datum for one in rounds for datum in one.data]
    lost = [one for part in rounds for one in part.rejected]
    for skill in reports[UNTAUGHT].skills:
        table.rows[skill] = {
            name: _share(one.skills[skill].accuracy, one.skills[skill].count) for name, one in reports.items()
        }
        table.rows[skill] |= {"items": sum(datum.skill == skill for datum in kept)}
        table.rows[skill] |= {"rejected": sum(one.get("skill") == skill for one in lost)}
    table.rows["all"] = {name: _share(one.accuracy, one.count) for name, one in reports.items()}
    table.rows["all"] |= {"items": len(kept), "rejected": len(lost)}
    table.units = dict.fromkeys(answers, "%")
    table.better = dict.fromkeys(answers, "higher")
    reasons: dict[str, int] = {}
    for one in lost:
        reasons[one["reason"]] = reasons.get(one["reason"], 0) + 1
    table.notes = [
        f"Test items, ± binomial standard error. The student of round {best.number} of {len(rounds) - 1}, the best on "
        f"validation ({best.report['accuracy']:.1%}; {rounds[0].report['accuracy']:.1%} before).",
        "Rejected: "
        + ("; ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items())) or "nothing")
        + ".",
    ]
    return table


def summary(environment: DataEnvironment, info: RoundInfo, reward: float) -> str:
    """A round in one line."""
    return (
        f"round {environment.steps}: {len(info['accepted'])} items accepted, "
        f"{len(info['rejected']) + len(info['failures'])} rejected, {info['data']} in all; "
        f"validation accuracy {info['report'].accuracy:.1%} ({reward:+.1%})"
    )


def _share(share: float, count: int) -> Value:
    return Value(100 * share, 100 * (share * (1 - share) / count) ** 0.5, count)
