"""DataEnvGym's claim: an agent that sees the student fail teaches more with as many items than one that does not.

It runs the method as it ships: task, student, environment and agent are those of the recipe.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

from preceptor.files import write_whole
from preceptor.methods.data_env.environment import Episode
from preceptor.methods.data_env.exam import Exam, Questions, draw_questions
from preceptor.methods.data_env.pretraining import School
from preceptor.methods.data_env.recipe import TRAINING, Config, teach
from preceptor.methods.data_env.rounds import datum_from, datum_json, read_lines
from preceptor.methods.data_env.student import TaskStudent
from preceptor.methods.data_env.world import make_task, make_task_student, make_world
from preceptor.report.table import Table
from preceptor.statistics import Claim, compare, mean_of
from preceptor.tasks.records import Datum, Task, complete, report

# What the reproduction compares, at an equal number of accepted items
ARMS = {
    "with_state": "the agent sees the student's answers",
    "no_state": "the same agent, shown nothing: evenly over skills and subskills; mean of 3 draws",
    "random": "chance decides how many items each skill gets; mean of 3 draws",
    "shuffled": "control: the items of with_state, their answers exchanged within each subskill",
}


SHORT = Exam(answer_length=12)


STUDIES = {
    "open-ended, math": Config(exam=SHORT, training=replace(TRAINING, epochs=8)),
    "skill list, math": Config(environment="skill_list", exam=SHORT),
    "skill tree, math": Config(environment="skill_tree", exam=SHORT),
    "open-ended, code": Config(
        task="code",
        skills=("arithmetic", "strings/joining", "strings/ending"),
        school=School(weak=("arithmetic/precedence", "strings/ending"), items=6000, few=20),
        exam=Exam(answer_length=20),
        episode=Episode(budget=120, rounds=30),
        items=40,
        training=replace(TRAINING, epochs=12),
    ),
    "skill tree, visual": Config(
        task="visual",
        environment="skill_tree",
        skills=("comparison",),
        school=School(
            weak=("comparison/colours",), items=6000, few=20, training=replace(School().training, batch_size=16)
        ),
        exam=Exam(test=600, answer_length=10),
        episode=Episode(budget=120, rounds=30),
        items=40,
        training=replace(TRAINING, epochs=12),
    ),
}


DRAWS = {"no_state": 3, "random": 3}


"""How often an arm that sees nothing is let loose on each student: its figures are the mean, its luck evens out."""


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """With state against without, against chance and against a control, in the three environments, with exact teachers.

    A small student that was taught unevenly is taught on until the budget of accepted items is used up, the same number
    in every arm; no arm leaves out what the student knows, since to know that is to see its state. Arms without state
    are taught once, at the end: nothing that they do depends on what would come between; each is the mean of several
    such agents (``DRAWS``). Figures are means over
    subskills, on at least 200 test items of each skill, of the last student, without a choice among rounds. ``full``:
    twice the items.
    """
    done = {name: [one_seed(name, seed, folder, full=full) for seed in range(seeds)] for name in STUDIES}
    columns = ["test accuracy", "gain", "accepted", "written"]
    table = Table("data_env: agents that write what a small student is taught", columns)
    table.units, table.better = {"test accuracy": "%", "gain": "%"}, {"test accuracy": "higher", "gain": "higher"}
    for name, figures in done.items():
        for arm in ("untaught", *ARMS):
            cells = {column: [one[arm][column] for one in figures] for column in columns}
            table.rows[f"{name}: {arm}"] = {column: mean_of(values) for column, values in cells.items()}
        table.claims += claims(name, figures)
    table.notes = [f"{arm}: {what}." for arm, what in ARMS.items()]
    table.notes.append(f"Mean ± standard error over {seeds} seeds; comparisons are paired by seed.")
    return table


def claims(name: str, figures: list[dict[str, dict[str, float]]]) -> list[Claim]:
    """What must be observed in one study."""
    seen, blind, chance, control = ([one[arm]["test accuracy"] for one in figures] for arm in ARMS)
    start = [one["untaught"]["test accuracy"] for one in figures]
    gain = compare(control, start, "", better="higher")
    taught = [{one[arm]["accepted"] for arm in ARMS} for one in figures]
    numbers = ", ".join(sorted({f"{number:g}" for each in taught for number in each}))
    return [
        Claim(f"{name}: every arm learns as many accepted items", numbers, all(len(each) == 1 for each in taught)),
        compare(seen, blind, f"{name}: seeing the student beats the same agent without state", better="higher").claim,
        compare(seen, chance, f"{name}: seeing the student beats chance", better="higher").claim,
        Claim(f"{name}: shuffled answers teach nothing", gain.claim.figure, not gain.claim.holds),
    ]


def one_seed(name: str, seed: int, folder: Path, *, full: bool) -> dict[str, dict[str, float]]:
    """The figures of a study's arms for one seed; each arm's are kept once it is done."""
    config = STUDIES[name]
    size = 2 if full else 1
    config = replace(
        config,
        episode=replace(config.episode, budget=config.episode.budget * size, reject_known=False),
        training=replace(config.training, seed=seed),
    )
    task = make_task(config)
    questions = draw_questions(config.exam, task, seed=config.training.seed)
    student = make_task_student(config, task, questions, teach, folder / f"school-{config.task}-{seed}")
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}{'-full' if full else ''}"
    figures: dict[str, dict[str, float]] = {}
    for arm in ("untaught", *ARMS):
        draws = []
        for draw in range(DRAWS.get(arm, 1)):
            kept = path / (f"{arm}-{draw}" if draw else arm) / "figures.json"
            if not kept.exists():
                shutil.rmtree(kept.parent, ignore_errors=True)
                kept.parent.mkdir(parents=True)
                counts = teach_arm(replace(config, output=str(kept.parent)), arm, task, student, questions, draw=draw)
                subskills = report(complete(task, questions.test, student.answer(questions.test))).subskills.values()
                accuracy = 100 * sum(one.accuracy for one in subskills) / len(subskills)
                gain = accuracy - figures["untaught"]["test accuracy"] if figures else 0.0
                write_whole(kept, json.dumps({"test accuracy": accuracy, "gain": gain, **counts}) + "\n")
                print(f"{name}, seed {seed}, {kept.parent.name}: {accuracy:.1f} % ({gain:+.1f})", flush=True)
            draws.append(json.loads(kept.read_text(encoding="utf-8")))
        figures[arm] = {column: sum(one[column] for one in draws) / len(draws) for column in draws[0]}
    return figures


def teach_arm(
    config: Config, arm: str, task: Task, student: TaskStudent, questions: Questions, *, draw: int
) -> dict[str, float]:
    """Teach the student as an arm has it; how many items were accepted, and how many written for that."""
    folder = Path(config.output)
    student.restart()
    if arm == "untaught":
        return {"accepted": 0, "written": 0}
    if arm == "shuffled":
        data = [datum_from(row) for row in read_lines(folder.parent / "with_state" / "data.jsonl")]
        student.learn(shuffled(data, config.training.seed), folder / "training")
        return {"accepted": len(data), "written": len(data)}
    seen = arm == "with_state"
    episode = replace(config.episode, train_every=1 if seen else config.episode.rounds)
    config = replace(config, agent="with_state" if seen else "no_state" if arm == "no_state" else "random")
    for again in range(10):
        luck = config.training.seed + 1000 * draw + 100 * again  # of the agent alone: student and lessons keep theirs
        student.restart()
        shutil.rmtree(folder / "iterations", ignore_errors=True)  # an earlier try's lesson must not be taken up
        world = replace(config, episode=episode, training=replace(config.training, seed=luck))
        environment, act = make_world(world, task, student, questions, None)
        _, info = environment.reset(seed=luck)
        written = 0
        while not environment.over:
            action, _ = act(info)
            _, _, _, _, info = environment.step(action)
            written += len(info["checks"])
        if len(environment.data) >= episode.budget:
            break  # an agent whom chance lets stop before the budget is used up is no match: draw another
    lines = [json.dumps(datum_json(datum)) + "\n" for datum in environment.data]
    write_whole(folder / "data.jsonl", "".join(lines))
    shutil.rmtree(environment.folder, ignore_errors=True)
    return {"accepted": len(environment.data), "written": written}


def shuffled(data: list[Datum], seed: int) -> list[Datum]:
    """The same items, each with another one's answer: answers move on by one in a random order of each subskill."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, datum in enumerate(data):
        groups.setdefault((datum.skill, datum.subskill), []).append(place)
    answers = [datum.response for datum in data]
    for places in groups.values():
        order = Random(seed).sample(places, len(places))
        for here, there in zip(order, order[1:] + order[:1]):
            answers[here] = data[there].response
    return [replace(datum, response=answer) for datum, answer in zip(data, answers)]
