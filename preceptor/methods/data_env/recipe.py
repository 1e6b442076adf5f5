"""DataEnvGym: an agent watches a student fail and writes what it is taught next.

Paper: DataEnvGym: Data Generation Agents in Teacher Environments with Student Feedback (Khan et al., ICLR 2025),
https://arxiv.org/abs/2410.06215
Reproduction: holds over 3 seeds, on math in all environments, on code and on visual questions, control included
Command: ``preceptor run data_env --environment skill_tree``

With student weights θ_0, all items accepted so far D_t, and validation accuracy A(θ):

    action_t = agent(what is seen of θ_t)      D_{t+1} = D_t + checked(written(action_t))
    θ_{t+1} = argmin_θ -Σ_{(x, y) ∈ D_{t+1}} log p_θ(y | x), from θ_0      reward = A(θ_{t+1}) - A(θ_t)

Three environments differ in what is seen and in what an action is (``preceptor.environment``). The writer is a language
model (``--teacher.model``), or ``symbolic``, which knows every skill exactly, so that the loop itself can be verified.

Decided here, where the sources differ, are silent, or misbehave:

* A lesson always starts from the first weights (a new adapter on the base), on all items accepted so far.
* An item that fails a check is left out and counted with its reason. The budget counts accepted items, in total.
* To leave out what the student knows is to look at its answers. An agent without state must not, so that check goes
  with ``with_state`` alone; in the reproduction no arm has it, and all are taught equally many accepted items. A small
  student that is never taught what it knows forgets it: beware of ``episode.reject_known`` there.
* The student that is kept is the one of the round with the best validation accuracy; the test items are asked once.
* ``small`` is a character transformer that has been to school: many items of most subskills, few of the ``weak`` ones.

The reproduction (``reproductions.data_env``) chose its budgets and epochs on the seeds that it reports; on visual
questions the open-ended environment did not show a difference, so it holds the tree. This file is long: it puts
together three environments, three tasks and two kinds of student.

Every round has a folder under ``iterations/``: its items, data, rejections and report, and the lesson in ``training/``;
a stopped run goes on from the last whole one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from preceptor.catalogue import repeat
from preceptor.engine.run_folder import check_folder, open_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.language import TAUGHT, UNTAUGHT
from preceptor.evaluation.result import write_result
from preceptor.language import Chat, ChatSettings, open_chat
from preceptor.methods.data_env.agents import Kind, OpenEndedAgent, SkillForestAgent, SkillListAgent
from preceptor.methods.data_env.chat_writer import ChatWriter, Draw
from preceptor.methods.data_env.environment import DataEnvironment, Episode, OpenEnded, as_action
from preceptor.methods.data_env.exam import SCHOOL_SEED, Exam, Questions, answer_length, draw_questions
from preceptor.methods.data_env.pictures import draw_episode
from preceptor.methods.data_env.policies import (
    Alternating,
    Asked,
    Chance,
    FillBalanced,
    Policy,
    Proportional,
    Threshold,
)
from preceptor.methods.data_env.pretraining import School, check_weak, go_to_school
from preceptor.methods.data_env.rounds import Iteration, drop_later, read_iterations, write_iteration
from preceptor.methods.data_env.skill_environments import SkillForest, SkillList
from preceptor.methods.data_env.small_models import SMALL, ImagePrefixModel, load_pupil_model, reads_characters
from preceptor.methods.data_env.student import TaskStudent
from preceptor.methods.data_env.writers import Symbolic, Writer
from preceptor.models.loading import load
from preceptor.models.student_spec import LoraSpec, parse_student
from preceptor.report import write_report
from preceptor.report.table import Table
from preceptor.statistics import Value
from preceptor.tasks.contamination import leaks
from preceptor.tasks.records import Completed, Task, complete, report

REQUIRES = "teachers"


SYMBOLIC = "symbolic"


ITERATIONS = "iterations"


Act = Callable[[Mapping[str, Any]], tuple[Any, list[str]]]


"""From what is seen (``info``) to an action of the environment, and why items were lost on the way."""


TRAINING = Training(epochs=16, batch_size=16, learning_rate=5e-4, warmup=0.1)


MATH = ("reversal", "units/length", "units/mass", "multiplication/powers_of_ten")


@dataclass(frozen=True)
class Config:
    """Settings of one episode."""

    task: Literal["math", "code", "visual"] = "math"
    """What the student is to learn."""
    skills: tuple[str, ...] | None = None
    """Skills or ``skill/subskill`` that it is examined in; empty: all of the task's. None: four of math's, else all."""
    environment: Literal["open_ended", "skill_list", "skill_tree"] = "open_ended"
    """What the agent sees and what it can do."""
    agent: Kind = "with_state"
    """with_state sees the student's answers; no_state is the same agent that does not; random leaves it to chance."""
    policy: Literal["proportional", "alternating", "fill_balanced", "threshold", "train_retrain", "accumulate"] = (
        "proportional"
    )
    """Who explores and exploits in a skill tree; the last two ask the teacher."""
    teacher: ChatSettings = ChatSettings(model=SYMBOLIC)
    """The writer of items: ``symbolic``, or any chat model."""
    student: str = SMALL
    """``small``, a folder or name of a model, or ``lora:rank=16,base=NAME`` for an adapter on one."""
    school: School = School()
    """What ``small`` knows at the start."""
    exam: Exam = Exam()
    """How it is examined."""
    episode: Episode = Episode(budget=180, rounds=30)
    """Budget, rounds and checks."""
    items: int = 60
    """Items that an agent asks for in a round (Open-Ended, Skill-List)."""
    hypotheses: int = 5
    """H, hypotheses about weak subskills for each skill (Skill-List)."""
    least: float = 0.1
    """Share of a chat teacher's calls that must give an item, below which the run stops."""
    output: str = "runs/data_env/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = TRAINING
    """How the student is taught, in each round anew."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        if min(self.items, self.hypotheses) < 1:
            raise UserError(f"items is {self.items} and hypotheses {self.hypotheses}: both must be 1 or more.")
        if self.policy in ("train_retrain", "accumulate") and self.teacher.model == SYMBOLIC:
            raise UserError(f"The policy {self.policy} asks a language model: set teacher.model.")
        spec = parse_student(self.student)
        if self.task == "visual" and isinstance(spec, LoraSpec):
            raise UserError("Visual questions need a student that sees: set student to small, or to the folder of one.")
        if isinstance(spec, LoraSpec) and spec.base is None:
            raise UserError("The student's adapter needs a base: give lora:rank=16,base=NAME.")


tiny = Config(
    skills=("reversal/three_digits", "units/mass"),
    school=School(weak=("reversal/three_digits",), items=60, few=8),
    exam=Exam(validation=6, test=10, answer_length=6),
    episode=Episode(budget=16, rounds=2),
    items=8,
    output="runs/data_env/tiny",
    training=Training(steps=6, batch_size=8, learning_rate=5e-4),
)


# Math in the paper: 120 items a round of Gemma-2-2B-it, its LoRA and splits; GPT-4o writes.
paper = Config(
    skills=(),
    teacher=ChatSettings(
        model="gpt-4o", base_url="https://api.openai.com/v1", key_variable="OPENAI_API_KEY", cache="gpt-4o.sqlite"
    ),
    student="lora:rank=16,alpha=32,base=google/gemma-2-2b-it",
    exam=Exam(validation=150, test=500, answer_length=350),
    episode=Episode(budget=1200, rounds=10),
    items=120,
    output="runs/data_env/paper",
    training=Training(
        epochs=3, batch_size=16, accumulate=8, learning_rate=1e-4, schedule="cosine", warmup=0.1, precision="bf16"
    ),
)


def main(config: Config) -> Table:
    """Let an agent teach a student for an episode; write rounds, student, table, pictures and report.

    Raises:
        UserError: a skill or a model is unknown, the folder holds another run, or the teacher fails too often.
    """
    folder = Path(config.output)
    check_folder(folder, config, resume=config.resume)
    check_weak(config.school, make_task(replace(config, skills=())))
    task = make_task(config)
    questions = draw_questions(config.exam, task, seed=config.training.seed)
    chat = None if config.teacher.model == SYMBOLIC else open_chat(config.teacher)
    open_folder(folder, config, resume=config.resume)
    pupil = make_pupil(config, task, questions, folder / "school")
    environment, act = make_world(config, task, pupil, questions, chat)
    info = begin(environment, config.training.seed)
    while not environment.over:
        action, lost = act(info)  # the agent sees the student, and acts
        _, reward, _, _, info = environment.step(action)  # written, checked, taught anew on everything, examined
        write_iteration(environment, info, reward, lost)
        print(summary(environment, info, reward), flush=True)
    return examine(config, pupil, questions)


def begin(environment: DataEnvironment, seed: int) -> dict[str, Any]:
    """The first round's ``info``, or that of the last whole round on the disk."""
    rounds = read_iterations(environment.folder)
    drop_later(environment.folder, len(rounds))
    if rounds:
        return environment.restore(rounds[-1].report["state"], [datum for one in rounds for datum in one.data])
    _, info = environment.reset(seed=seed)
    write_iteration(environment, info, 0.0, [])
    return info


def make_task(config: Config) -> Task:
    """The task, in the short form for a character model and in the worded one for a language model."""
    form: Literal["compact", "worded"] = "compact" if reads_characters(config.student) else "worded"
    if config.task == "code":
        from preceptor.tasks.programs import Programs

        return Programs(form, config.skills or ())
    if config.task == "visual":
        from preceptor.tasks.figures import Figures

        return Figures(form, config.skills or ())
    from preceptor.tasks.arithmetic import Arithmetic

    return Arithmetic(form, MATH if config.skills is None else config.skills)


def drawing(config: Config, task: Task) -> Draw | None:
    """Who draws the images that a chat teacher describes."""
    if config.task != "visual":
        return None
    from preceptor.tasks.figures import Figures

    assert isinstance(task, Figures)
    return task.draw


def make_pupil(config: Config, task: Task, questions: Questions, folder: Path) -> TaskStudent:
    """The student at the start; ``small`` goes to school first, once for each ``folder``."""
    spec, adapter = parse_student(config.student), None
    if config.student == SMALL:
        if not (folder / "student").exists():
            go_to_school(config.school, task, questions, folder, seed=config.training.seed)
        first = load_pupil_model(folder / "student")
    elif isinstance(spec, LoraSpec) and spec.base is not None:
        adapter, first = replace(spec, base=None), load(spec.base)
    else:
        first = load_pupil_model(Path(config.student))
    batch = 256 if config.student == SMALL else 16
    tokenizer = (first.language if isinstance(first, ImagePrefixModel) else first).tokenizer
    length = answer_length(config.exam, task, [*questions.validation, *questions.test], tokenizer)
    return TaskStudent(first, task, config.training, adapter=adapter, answer_length=length, batch_size=batch)


def make_world(
    config: Config, task: Task, pupil: TaskStudent, questions: Questions, chat: Chat | None
) -> tuple[DataEnvironment, Act]:
    """The environment, and the agent that acts in it."""
    seen, seed = config.agent == "with_state", config.training.seed
    writer: Writer = ChatWriter(chat, task, draw=drawing(config, task), least=config.least) if chat else Symbolic(task)
    episode = replace(config.episode, reject_known=config.episode.reject_known and seen, blind=not seen)
    folder, asked, test = Path(config.output) / ITERATIONS, questions.validation, questions.test
    if config.environment == "open_ended":
        drawn = task.items(60, seed=SCHOOL_SEED - 1 - seed)
        held_out = leaks(drawn, [*asked, *test])  # the pool is shown with its answers
        pool = tuple(item for item in drawn if item.id not in held_out)[:30]
        writes = OpenEndedAgent(writer, config.agent, pool, task.skills, items=config.items, seed=seed)

        def hand_over(info: Mapping[str, Any]) -> tuple[Any, list[str]]:
            data, lost = writes(info)
            return as_action(data), lost

        return OpenEnded(task, pupil, asked, folder=folder, test=test, episode=episode), hand_over
    if config.environment == "skill_list":
        listed = SkillList(
            task, pupil, asked, writer=writer, folder=folder, test=test, episode=episode, hypotheses=config.hypotheses
        )
        allots = SkillListAgent(config.agent, listed.skills, items=config.items, seed=seed)
        return listed, lambda info: (allots(info), [])
    forest = SkillForest(task, pupil, asked, writer=writer, folder=folder, test=test, episode=episode)
    chooses = SkillForestAgent(lambda skill: choose_policy(config, skill, forest.steps, chat))
    return forest, lambda info: (forest.action(chooses(info)), [])


def choose_policy(config: Config, skill: str, step: int, chat: Chat | None) -> Policy:
    """Who acts for one skill of a tree in one round."""
    if config.agent == "random":
        return Chance(Random(f"{config.training.seed} {skill} {step}"), items=config.items // 3)
    if config.policy in ("train_retrain", "accumulate"):
        assert chat is not None
        return Asked(chat, skill, "accumulate" if config.policy == "accumulate" else "train_retrain")
    start = max(1, config.items // 15)
    policies: dict[str, Policy] = {
        "proportional": Proportional(start=start, items=config.items * 2 // 3),
        "alternating": Alternating(),
        "fill_balanced": FillBalanced(),
        "threshold": Threshold(),
    }
    return policies[config.policy]


def summary(environment: DataEnvironment, info: Mapping[str, Any], reward: float) -> str:
    """A round in one line."""
    return (
        f"round {environment.steps}: {len(info['accepted'])} items accepted, "
        f"{len(info['rejected']) + len(info['failures'])} rejected, {info['data']} in all; "
        f"validation accuracy {info['report'].accuracy:.1%} ({reward:+.1%})"
    )


def examine(config: Config, pupil: TaskStudent, questions: Questions) -> Table:
    """Ask the student of the best round and the untaught one the test items; write what a run leaves."""
    folder = Path(config.output)
    rounds = read_iterations(folder / ITERATIONS)
    best = max((one for one in rounds if one.report["state"]["taught"]), key=_validation, default=rounds[0])
    state = best.report["state"]
    pupil.restart()
    answers = {UNTAUGHT: complete(pupil.task, questions.test, pupil.answer(questions.test))}
    if state["taught"]:
        data = [datum for one in rounds for datum in one.data][: state["taught"]]
        pupil.learn(data, folder / ITERATIONS / state["lesson"])
        for name in ("metrics.jsonl", "environment.json"):
            shutil.copy(folder / ITERATIONS / state["lesson"] / name, folder / name)
    answers[TAUGHT] = complete(pupil.task, questions.test, pupil.answer(questions.test))
    card = {"teacher": config.teacher.model, "method": "data_env", "items": state["taught"], "round": best.number}
    pupil.save(folder / "student", card=card)
    table = compare_students(config, answers, rounds, best)
    before, after = (report(one).accuracy for one in answers.values())
    headline = f"Accuracy on test items went from {before:.1%} to {after:.1%} with {state['taught']} written items."
    told = [
        {"prompt": item.instruction, "answers": {name: done[place].response for name, done in answers.items()}}
        for place, item in list(enumerate(questions.test))[:: max(1, len(questions.test) // 6)][:6]
    ]
    write_result(folder, table, told, headline=headline, command=repeat("data_env", folder))
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


def _share(share: float, count: int) -> Value:
    return Value(100 * share, 100 * (share * (1 - share) / count) ** 0.5, count)
