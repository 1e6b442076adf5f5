"""DataEnvGym: an agent watches a student fail and writes what it is taught next.

Paper: DataEnvGym: Data Generation Agents in Teacher Environments with Student Feedback (Khan et al., ICLR 2025),
https://arxiv.org/abs/2410.06215
Reproduction: holds over 3 seeds, on math in all environments, on code and on visual questions, control included
Command: ``preceptor run data_env --environment skill_tree``

With student weights θ_0, all items accepted so far D_t, and validation accuracy A(θ):

    action_t = agent(what is seen of θ_t)      D_{t+1} = D_t + checked(written(action_t))
    θ_{t+1} = argmin_θ -Σ_{(x, y) ∈ D_{t+1}} log p_θ(y | x), from θ_0      reward = A(θ_{t+1}) - A(θ_t)

Three environments differ in what is seen and in what an action is (``environment.py``, ``skill_environments.py``).
The writer is a language model (``--teacher.model``), or ``symbolic``, which knows every skill exactly, so that the loop
itself can be verified.

Decided here, where the sources differ, are silent, or misbehave:

* A lesson always starts from the first weights (a new adapter on the base), on all items accepted so far.
* An item that fails a check is left out and counted with its reason. The budget counts accepted items, in total.
* To leave out what the student knows is to look at its answers. An agent without state must not, so that check goes
  with ``with_state`` alone; in the reproduction no arm has it, and all are taught equally many accepted items. A small
  student that is never taught what it knows forgets it: beware of ``episode.reject_known`` there.
* The student that is kept is the one of the round with the best validation accuracy; the test items are asked once.
* ``small`` is a character transformer that is pretrained on many items of most subskills, and few of the ``weak`` ones.
* ``--skills discovered`` lets the teacher name the skills of the validation items and sort them into categories, which
  are then the skills of the episode; they are kept in ``skills.json``.

The reproduction chose its budgets and epochs on the seeds that it reports; on visual questions the open-ended
environment did not show a difference, so it holds the tree.

Every round has a folder under ``iterations/``: its items, data, rejections and report, and the lesson in ``training/``;
a stopped run goes on from the last whole one. Task, student, environment and agent are put together in ``world.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Listed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from preceptor.data.sequences import Batch
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder, open_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.language import ChatSettings, open_chat
from preceptor.losses.divergences import divergence
from preceptor.methods.data_env.agents import Kind
from preceptor.methods.data_env.environment import Episode
from preceptor.methods.data_env.exam import Exam, discover_skills, draw_questions
from preceptor.methods.data_env.examination import examine, summary
from preceptor.methods.data_env.pretraining import School, check_weak
from preceptor.methods.data_env.rounds import begin, write_iteration
from preceptor.methods.data_env.small_models import SMALL
from preceptor.methods.data_env.world import SYMBOLIC, make_task, make_task_student, make_world
from preceptor.models.student_spec import LoraSpec, parse_student
from preceptor.report.table import Table
from preceptor.tasks.records import Datum

REQUIRES = "teachers"


DISCOVERED = "discovered"


TRAINING = Training(epochs=16, batch_size=16, learning_rate=5e-4, warmup=0.1)


@dataclass(frozen=True)
class Config:
    """Settings of one episode."""

    task: Literal["math", "code", "visual"] = "math"
    """What the student is to learn."""
    skills: tuple[str, ...] | None = None
    """Skills or ``skill/subskill`` of the exam; empty: all of the task's; None: four of math's, else all.
    ``discovered``: all items, with the skills that the teacher finds in them."""
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
        if self.discovers and (len(self.skills or ()) > 1 or self.teacher.model == SYMBOLIC):
            raise UserError(
                "Skills are discovered by a language model, in all items: set teacher.model to one, and skills to "
                "'discovered' alone."
            )
        spec = parse_student(self.student)
        if self.task == "visual" and isinstance(spec, LoraSpec):
            raise UserError("Visual questions need a student that sees: set student to small, or to the folder of one.")
        if isinstance(spec, LoraSpec) and spec.base is None:
            raise UserError("The student's adapter needs a base: give lora:rank=16,base=NAME.")

    @property
    def discovers(self) -> bool:
        """Whether the teacher finds the skills."""
        return DISCOVERED in (self.skills or ())


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
    if config.discovers and chat is not None:
        questions = discover_skills(questions, chat, folder / "skills.json")
    student = make_task_student(config, task, questions, teach, folder / "school")
    environment, act = make_world(config, task, student, questions, chat)
    info = begin(environment, config.training.seed)
    while not environment.over:
        action, lost = act(info)  # the agent sees the student, and acts
        _, reward, _, _, info = environment.step(action)  # written, checked, taught on everything (teach), examined
        write_iteration(environment, info, reward, lost)
        print(summary(environment, info, reward), flush=True)
    return examine(config, student, questions)


def teach(run: Run, data: Listed[Datum], collate: Callable[[list[Datum]], Batch]) -> None:
    """One lesson, from the first weights on all of D_{t+1}: -Σ log p_θ(y | x), a mean over a step's response tokens."""
    for batch in run.batches(data, collate):
        cross_entropy = partial(
            divergence, teacher=None, mask=batch.predicts, labels=batch.labels, weight=0.0, label_weight=1.0
        )
        loss = run.student(batch, cross_entropy)
        run.update(loss.sum, loss.count)
    run.finish()
