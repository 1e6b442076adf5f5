"""What an episode is played with: the task, the student, the environment, and the agent that acts in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from preceptor.language import Chat
from preceptor.methods.data_env import policies
from preceptor.methods.data_env.agents import OpenEndedAgent, SkillForestAgent, SkillListAgent
from preceptor.methods.data_env.chat_writer import ChatWriter, Draw
from preceptor.methods.data_env.environment import DataEnvironment, OpenEnded, RoundInfo, as_action
from preceptor.methods.data_env.exam import SCHOOL_SEED, Questions, answer_length, skills_named
from preceptor.methods.data_env.policies import Policy
from preceptor.methods.data_env.pretraining import pretrain
from preceptor.methods.data_env.rounds import ITERATIONS
from preceptor.methods.data_env.skill_environments import SkillForest, SkillList
from preceptor.methods.data_env.small_models import SMALL, ImagePrefixModel, load_task_model, reads_characters
from preceptor.methods.data_env.student import TaskStudent, Teach
from preceptor.methods.data_env.writers import Symbolic, Writer
from preceptor.models.loading import load
from preceptor.models.student_spec import LoraSpec, parse_student
from preceptor.tasks.contamination import leaks
from preceptor.tasks.records import Task

if TYPE_CHECKING:
    from preceptor.methods.data_env.recipe import Config

SYMBOLIC = "symbolic"


MATH = ("reversal", "units/length", "units/mass", "multiplication/powers_of_ten")


Act = Callable[[RoundInfo], tuple[Any, list[str]]]


"""From what is seen (``info``) to an action of the environment, and why items were lost on the way."""


def make_task(config: Config) -> Task:
    """The task, in the short form for a character model and in the worded one for a language model."""
    chosen = () if config.discovers else config.skills
    form: Literal["compact", "worded"] = "compact" if reads_characters(config.student) else "worded"
    if config.task == "code":
        from preceptor.tasks.programs import Programs

        return Programs(form, chosen or ())
    if config.task == "visual":
        from preceptor.tasks.figures import Figures

        return Figures(form, chosen or ())
    from preceptor.tasks.arithmetic import Arithmetic

    return Arithmetic(form, MATH if chosen is None else chosen)


def drawing(config: Config, task: Task) -> Draw | None:
    """Who draws the images that a chat teacher describes."""
    if config.task != "visual":
        return None
    from preceptor.tasks.figures import Figures

    assert isinstance(task, Figures)
    return task.draw


def make_task_student(config: Config, task: Task, questions: Questions, teach: Teach, folder: Path) -> TaskStudent:
    """The student at the start; ``small`` is pretrained first, once for each ``folder``."""
    spec, adapter = parse_student(config.student), None
    if config.student == SMALL:
        if not (folder / "student").exists():
            pretrain(config.school, task, questions, teach, folder, seed=config.training.seed)
        first = load_task_model(folder / "student")
    elif isinstance(spec, LoraSpec) and spec.base is not None:
        adapter, first = replace(spec, base=None), load(spec.base)
    else:
        first = load_task_model(Path(config.student))
    batch = 256 if config.student == SMALL else 16
    tokenizer = (first.language if isinstance(first, ImagePrefixModel) else first).tokenizer
    length = answer_length(config.exam, task, [*questions.validation, *questions.test], tokenizer)
    return TaskStudent(first, task, config.training, teach, adapter=adapter, answer_length=length, batch_size=batch)


def make_world(
    config: Config, task: Task, student: TaskStudent, questions: Questions, chat: Chat | None
) -> tuple[DataEnvironment, Act]:
    """The environment, and the agent that acts in it."""
    seen, seed = config.agent == "with_state", config.training.seed
    writer: Writer = ChatWriter(chat, task, draw=drawing(config, task), least=config.least) if chat else Symbolic(task)
    episode = replace(config.episode, reject_known=config.episode.reject_known and seen, blind=not seen)
    folder, asked, test = Path(config.output) / ITERATIONS, questions.validation, questions.test
    skills = skills_named(questions) if config.discovers else task.skills
    if config.environment == "open_ended":
        drawn = task.items(60, seed=SCHOOL_SEED - 1 - seed)
        held_out = leaks(drawn, [*asked, *test])  # the pool is shown with its answers
        pool = tuple(item for item in drawn if item.id not in held_out)[:30]
        writes = OpenEndedAgent(writer, config.agent, pool, skills, items=config.items, seed=seed)

        def hand_over(info: RoundInfo) -> tuple[Any, list[str]]:
            data, lost = writes(info)
            return as_action(data), lost

        return OpenEnded(task, student, asked, folder=folder, test=test, episode=episode), hand_over
    if config.environment == "skill_list":
        listed = SkillList(
            task, student, asked, writer=writer, folder=folder, test=test, episode=episode, hypotheses=config.hypotheses
        )
        allots = SkillListAgent(config.agent, listed.skills, items=config.items, seed=seed)
        return listed, lambda info: (allots(info), [])
    forest = SkillForest(task, student, asked, writer=writer, folder=folder, test=test, episode=episode)
    chooses = SkillForestAgent(lambda skill: choose_policy(config, skill, forest.steps, chat))
    return forest, lambda info: (forest.action(chooses(info)), [])


def choose_policy(config: Config, skill: str, step: int, chat: Chat | None) -> Policy:
    """Who acts for one skill of a tree in one round."""
    if config.agent == "random":
        return policies.Chance(Random(f"{config.training.seed} {skill} {step}"), items=config.items // 3)
    if config.policy in ("train_retrain", "accumulate"):
        assert chat is not None
        return policies.Asked(chat, skill, "accumulate" if config.policy == "accumulate" else "train_retrain")
    start = max(1, config.items // 15)
    chosen: dict[str, Policy] = {
        "proportional": policies.Proportional(start=start, items=config.items * 2 // 3),
        "alternating": policies.Alternating(),
        "fill_balanced": policies.FillBalanced(),
        "threshold": policies.Threshold(),
    }
    return chosen[config.policy]
