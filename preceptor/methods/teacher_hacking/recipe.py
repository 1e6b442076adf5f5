"""Teacher hacking: does a student that gets closer to an imperfect teacher move away from the truth?

Paper: On Teacher Hacking in Language Model Distillation (Tiapkin et al., ICML 2025), https://arxiv.org/abs/2502.02671
Reproduction: mostly over 5 seeds: offline hacks, online does not rise; fewer prompts cost proxy too; weak detector

A laboratory. An oracle μ stands for the truth. Its answers to prompts x fine-tune both the teacher π_T and the student
π_S (stage one); then the student is distilled from the teacher on prompts of the same kind (stage two),

    L = E_{x, y} Σ_t D( π_T(. | x, y_<t), π_S(. | x, y_<t) ),

and on held-out prompts two distances are read at every checkpoint (``sequence_divergence.py``):

    proxy  = E_x E_{y ~ π_T(. | x)} Σ_t KL( π_T(. | x, y_<t) ‖ π_S(. | x, y_<t) )      what distillation lowers
    golden = E_x E_{y ~ μ(. | x)}   Σ_t KL( μ(. | x, y_<t) ‖ π_S(. | x, y_<t) )        what is wanted

The teacher is *hacked* when golden rises while proxy does not. When the proxy on held-out prompts rises too, the
student overfits, which is something else and is called so. Who wrote y decides:

* offline (``online`` = 0): one fixed set of the teacher's answers, read again in every pass: hacking, the paper finds;
* online (``online`` = 1): new answers to the same prompts in every pass, of the ``writer``, teacher or student: none;
* 0 < λ = ``online`` < 1: each answer is new with probability λ, drawn for each example in every pass.

Fewer prompts with more answers each, at equal size, make it worse; more answers to the same prompts, better.

Decided here, where the paper's text, figures and one table of settings leave it open (no code was released):

* Both metrics are the forward KL over whole answers, exact over the vocabulary, in nats a sequence, and a token as
  well; ``reverse`` adds KL(π_S ‖ .) on the student's own answers. Held-out sequences are written once.
* Hacked means: h = golden(end) - min golden > 2 s.e. (of the paired differences over the held-out sequences), and
  proxy(end) ≤ proxy(where golden was least); all of them means over 5 checkpoints in a row, since the least of many
  single ones is low by the noise of training alone.
* Without an oracle a healthy run's proxy follows a power law; ``evaluation/power_law.py`` decides what leaves it.
* The learning rate is constant after the warm-up: a rate that decays bends that law by itself.
* ``teacher = "oracle"`` is the control: then proxy and golden are one.
* Long prompts, short answers and an oracle whose hidden states stay long: what is to be answered lies in the prompt.
  These sizes, those of stage one and the detector's bounds were chosen on seeds 100 to 103.

An oracle is exact (``markov:..``, ``hmm:..``: see ``markov_sources.py``; models over its symbols are small
transformers) or a language model by name. ``teacher:layers=N`` copies layers of the oracle, ``fresh:..`` takes its
architecture.

``paper`` keeps the paper's sizes (200,000 distilled sequences of at most 1024 + 128 tokens, 390,625 steps of 32 at 3e-4
after 100 of warm-up) but not its models: those are T5 encoder-decoders (T5-large teaches T5-base, the oracle is a
larger Flan-T5), which do not fit ``LanguageModel``. Decoder-only counterparts of one tokenizer stand for them,
SmolLM2-1.7B-Instruct as oracle, 360M as teacher, 135M as student; and Reddit TL;DR, which our readers can read, for
XSum, with 50,000 oracle pairs and 50,000 prompts of 4 answers. It was never run at that size.

Command: ``preceptor run teacher_hacking``
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from preceptor.data.sequences import collate
from preceptor.distillation.objective import Objective
from preceptor.distillation.teachers import MemoisedTeacher
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.power_law import WatchBounds
from preceptor.methods.teacher_hacking.answer_set import AnswerSet
from preceptor.methods.teacher_hacking.examination import backwards, conclude
from preceptor.methods.teacher_hacking.stage_one import TOGETHER, Data, Laboratory, Setup, build, written
from preceptor.methods.teacher_hacking.text_models import LanguageAuthor
from preceptor.methods.teacher_hacking.trajectory import Course
from preceptor.models.identity import tokenizer_hash
from preceptor.models.language_model import LanguageModel
from preceptor.report.table import Table

REQUIRES = "text"


FINE_TUNING = Training(steps=130, batch_size=64, learning_rate=3e-3, schedule="constant", warmup=20.0)


DISTILLATION = Training(
    steps=400, batch_size=50, learning_rate=2e-3, schedule="constant", warmup=20.0, evaluate_every=10
)


@dataclass(frozen=True)
class Config:
    """Settings of one distillation in a laboratory."""

    oracle: str = "hmm:states=16,vocabulary=32,concentration=0.3,stickiness=0.9"
    """μ: ``markov:order=..`` or ``hmm:states=..`` (see ``markov_sources.py``), or a language model by name."""
    teacher: str = "fresh:layers=2,hidden=64"
    """π_T before stage one: ``fresh:..``, ``teacher:layers=N`` (layers of the oracle), a name, or ``oracle`` itself."""
    student: str = "fresh:layers=1,hidden=48"
    """π_S before stage one, of the same forms."""
    data: Data = Data()
    """Prompts and answers of both stages and of the exams."""
    objective: Objective = Objective()
    """D, what the distillation minimises at each token."""
    online: float = 0.0
    """λ, the probability that an answer is written anew in a pass: 0 is offline, 1 online."""
    writer: Literal["teacher", "student"] = "teacher"
    """Who writes new answers."""
    reverse: bool = False
    """Also measure KL(student ‖ oracle) and KL(student ‖ teacher) on the student's own answers."""
    teacher_training: Training = FINE_TUNING
    """Stage one of the teacher."""
    student_training: Training = replace(FINE_TUNING, steps=28, learning_rate=5e-3)
    """Stage one of the student."""
    watch: WatchBounds = WatchBounds()
    """How closely the proxy is watched for a departure from its power law."""
    output: str = "runs/teacher_hacking/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = DISTILLATION
    """The distillation, and the seed of everything."""

    def __post_init__(self) -> None:
        """Refuse what no distillation can be."""
        if not 0.0 <= self.online <= 1.0:
            raise UserError(f"online is {self.online}; λ is a probability, in [0, 1].")
        if self.objective.weight == 0:
            raise UserError("objective.weight is 0: the teacher is not asked, so there is nothing to hack.")
        if not self.training.evaluate_every:
            raise UserError("A course needs checkpoints: set training.evaluate_every.")


tiny = Config(
    oracle="hmm:states=4,vocabulary=8",
    teacher="fresh:layers=1,hidden=16,heads=2",
    student="fresh:layers=1,hidden=8,heads=1",
    data=Data(oracle=32, prompts=16, held_out=8, prompt_length=4, answer_length=4),
    online=0.5,
    reverse=True,
    teacher_training=replace(FINE_TUNING, steps=4, batch_size=16),
    student_training=replace(FINE_TUNING, steps=2, batch_size=16),
    output="runs/teacher_hacking/tiny",
    training=replace(DISTILLATION, steps=24, batch_size=8, warmup=2.0, evaluate_every=2),
)


_PAPER = Training(steps=390_625, batch_size=32, learning_rate=3e-4, schedule="constant", warmup=100.0, precision="bf16")


paper = Config(
    oracle="HuggingFaceTB/SmolLM2-1.7B-Instruct",
    teacher="HuggingFaceTB/SmolLM2-360M",
    student="HuggingFaceTB/SmolLM2-135M",
    data=Data("trl-lib/tldr", 50_000, 50_000, responses=4, held_out=1000, prompt_length=1024, answer_length=128),
    teacher_training=replace(_PAPER, steps=None, epochs=3.0, accumulate=4),
    student_training=replace(_PAPER, steps=None, epochs=1.0, accumulate=4),
    output="runs/teacher_hacking/paper",
    training=replace(_PAPER, accumulate=4, evaluate_every=6_250, save_every=6_250),
)


def teach(run: Run, student: LanguageModel, laboratory: Laboratory, config: Config) -> Course:
    """The loop of stage two; everything that is drawn online is drawn here."""
    data = config.data
    asked = [prompt for prompt in laboratory.prompts[: data.prompts] for _ in range(data.responses)]
    with run.accelerator.main_process_first():
        path, seed = run.folder / "offline.jsonl", config.training.seed + 2
        answers = AnswerSet(written(path, laboratory.teacher, asked, data.answer_length, seed=seed), config.online)
    writer = laboratory.teacher if config.writer == "teacher" else LanguageAuthor(student, together=TOGETHER)
    teacher, course = MemoisedTeacher(laboratory.teacher, answers.fixed), Course()
    run.remember("book", answers)
    run.remember("course", course)
    if run.step == 0:
        run.log(**look(student, laboratory, course, config, step=0))
    a_pass = -(-len(answers.fixed) // config.training.batch_size)
    for places in run.steps(range(len(answers.fixed))):
        answers.turn(run.step // a_pass, writer, data.answer_length)
        for batch in run.split([answers.now[place] for place in places], partial(collate, pad_id=student.pad_id)):
            loss = run.student(batch, config.objective.against(teacher(batch), batch))
            run.update(loss.sum, loss.count, loss.parts)
        if run.evaluate_due:
            run.log(empty_answers=answers.empty, **look(student, laboratory, course, config, step=run.step))
    run.finish()
    return course


def look(
    student: LanguageModel, laboratory: Laboratory, course: Course, config: Config, *, step: int
) -> dict[str, float]:
    """One checkpoint: both exams, written into the course; means in nats a sequence and in nats a token."""
    exams = {"golden": laboratory.golden, "proxy": laboratory.proxy}
    values = {name: exam.divergence(student) for name, exam in exams.items()}
    course.see(step, values["golden"], values["proxy"])
    line = {name: float(value.mean()) for name, value in values.items()}
    line |= {f"{name}_per_token": float(value.sum() / exams[name].tokens.sum()) for name, value in values.items()}
    if config.reverse:
        line |= {name: cell.mean for name, cell in backwards(student, laboratory, config).items()}
    return line


def main(config: Config) -> Table | None:
    """Build the laboratory, distil, and write student, table, pictures and report. Returns the main process's table.

    Raises:
        UserError: the folder holds another run, vocabularies differ, or a specification or size does not fit.
    """
    check_folder(Path(config.output), config, resume=config.resume)
    folder = Path(config.output) / "laboratory"
    laboratory = build(folder, setup(config), resume=config.resume, keep_oracle=config.reverse)
    run = start(config, laboratory.start)
    course = teach(run, laboratory.start, laboratory, config)
    return conclude(laboratory, course, config) if run.is_main else None


def setup(config: Config) -> Setup:
    """What stage one needs of the settings."""
    seed, trained = config.training.seed, (config.teacher_training, config.student_training)
    teacher, student = (replace(training, seed=seed + place) for place, training in enumerate(trained))
    return Setup(config.oracle, config.teacher, config.student, config.data, teacher, student, seed)


def start(config: Config, student: LanguageModel) -> Run:
    """The run of stage two, with what it rests on written down."""
    named = {name: value for name, value in vars(config).items() if name in ("oracle", "teacher", "student")}
    facts = {**named, "tokenizer": tokenizer_hash(student.tokenizer)}
    folder, resume = Path(config.output), config.resume
    return Run(config.training, student=student, folder=folder, config=config, resume=resume, provenance=facts)
