"""Teacher hacking: does a student that gets closer to an imperfect teacher move away from the truth?

Paper: On Teacher Hacking in Language Model Distillation (Tiapkin et al., ICML 2025), https://arxiv.org/abs/2502.02671
Reproduction: mostly over 5 seeds: offline hacks, online does not rise; fewer prompts cost proxy too; weak detector

A laboratory. An oracle μ stands for the truth. Its answers to prompts x fine-tune both the teacher π_T and the student
π_S (stage one); then the student is distilled from the teacher on prompts of the same kind (stage two),

    L = E_{x, y} Σ_t D( π_T(. | x, y_<t), π_S(. | x, y_<t) ),

and on held-out prompts two distances are read at every checkpoint (``sequence_divergence``):

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
* Without an oracle a healthy run's proxy follows a power law; ``departure`` decides what leaves it.
* The learning rate is constant after the warm-up: a rate that decays bends that law by itself.
* ``teacher = "oracle"`` is the control: then proxy and golden are one.
* Long prompts, short answers and an oracle whose hidden states stay long: what is to be answered lies in the prompt.
  These sizes, those of stage one and the detector's bounds were chosen on seeds 100 to 103.

An oracle is exact (``markov:..``, ``hmm:..``: see ``sources``; models over its symbols are small transformers) or a
language model by name. ``teacher:layers=N`` copies layers of the oracle, ``fresh:..`` takes its architecture.

``paper`` keeps the paper's sizes (200,000 distilled sequences of at most 1024 + 128 tokens, 390,625 steps of 32 at 3e-4
after 100 of warm-up) but not its models: those are T5 encoder-decoders (T5-large teaches T5-base, the oracle is a
larger Flan-T5), which do not fit ``LanguageModel``. Decoder-only counterparts of one tokenizer stand for them,
SmolLM2-1.7B-Instruct as oracle, 360M as teacher, 135M as student; and Reddit TL;DR, which our readers can read, for
XSum, with 50,000 oracle pairs and 50,000 prompts of 4 answers. It was never run at that size.

The loop is ``distil``; the file is long because what a pass reads, and what is seen at the end, are the method.

Command: ``preceptor run teacher_hacking``
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from preceptor.catalogue import repeat
from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.objective import Objective
from preceptor.distillation.teachers import MemoisedTeacher
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.power_law import PowerLawVerdict, WatchBounds, constant_part, find_departure
from preceptor.evaluation.power_law_picture import draw_law
from preceptor.evaluation.result import write_result
from preceptor.methods.teacher_hacking.label import Label
from preceptor.methods.teacher_hacking.pictures import draw_plane
from preceptor.methods.teacher_hacking.sequence_divergence import own_divergence
from preceptor.methods.teacher_hacking.stage_one import TOGETHER, Data, Laboratory, Setup, build, written
from preceptor.methods.teacher_hacking.text_models import LanguageAuthor, TextModel
from preceptor.methods.teacher_hacking.trajectory import Course
from preceptor.models.identity import tokenizer_hash
from preceptor.models.language_model import LanguageModel
from preceptor.report import write_report
from preceptor.report.table import Table
from preceptor.statistics import Value, mean_of, ratio_of

REQUIRES = "text"


FINE_TUNING = Training(steps=130, batch_size=64, learning_rate=3e-3, schedule="constant", warmup=20.0)


DISTILLATION = Training(
    steps=400, batch_size=50, learning_rate=2e-3, schedule="constant", warmup=20.0, evaluate_every=10
)


@dataclass(frozen=True)
class Config:
    """Settings of one distillation in a laboratory."""

    oracle: str = "hmm:states=16,vocabulary=32,concentration=0.3,stickiness=0.9"
    """μ: ``markov:order=..`` or ``hmm:states=..`` (see ``sources``), or a language model by name."""
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


class AnswerSet:
    """The answers that a pass reads: ``fixed`` ones, and with probability λ an example's new one.

    An empty new answer leaves the fixed one in its place; ``empty`` counts them.
    """

    def __init__(self, fixed: list[Sequence], online: float) -> None:
        self.fixed, self.now, self.online = fixed, fixed, online
        self.turned, self.empty = -1, 0

    def turn(self, number: int, writer: TextModel, length: int) -> None:
        """Open pass ``number``: the online answers are written, all at once, once for each pass."""
        if number == self.turned:
            return
        self.turned = number
        new = (torch.rand(len(self.fixed)) < self.online).nonzero().flatten().tolist() if self.online else []
        if not new:
            self.now = self.fixed
            return
        answers = writer.answer([self.fixed[place].prompt for place in new], length)
        self.now = list(self.fixed)
        for place, sequence in zip(new, answers):
            self.now[place] = sequence if any(sequence.response) else self.fixed[place]
            self.empty += not any(sequence.response)

    def state_dict(self) -> dict[str, Any]:
        """The open pass; the fixed answers are in the run's folder."""
        new = {str(place): one for place, one in enumerate(self.now) if one is not self.fixed[place]}
        answers = {place: list(one.ids[len(one.prompt) :]) for place, one in new.items()}
        return {"turned": self.turned, "empty": self.empty, "answers": answers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.turned, self.empty, self.now = state["turned"], state["empty"], list(self.fixed)
        for place, ids in state["answers"].items():
            prompt = self.fixed[int(place)].prompt
            self.now[int(place)] = Sequence((*prompt, *ids), (False,) * len(prompt) + (True,) * len(ids))


def distil(run: Run, student: LanguageModel, laboratory: Laboratory, config: Config) -> Course:
    """The loop of stage two; everything that is drawn online is drawn here."""
    data = config.data
    asked = [prompt for prompt in laboratory.prompts[: data.prompts] for _ in range(data.responses)]
    with run.accelerator.main_process_first():
        path, seed = run.folder / "offline.jsonl", config.training.seed + 2
        answers = AnswerSet(written(path, laboratory.teacher, asked, data.answer_length, seed=seed), config.online)
    writer = laboratory.teacher if config.writer == "teacher" else LanguageAuthor(student, together=TOGETHER)
    said, course = MemoisedTeacher(laboratory.teacher, answers.fixed), Course()
    run.remember("book", answers)
    run.remember("course", course)
    if run.step == 0:
        run.log(**look(student, laboratory, course, config, step=0))
    a_pass = -(-len(answers.fixed) // config.training.batch_size)
    for places in run.steps(range(len(answers.fixed))):
        answers.turn(run.step // a_pass, writer, data.answer_length)
        for batch in run.split([answers.now[place] for place in places], partial(collate, pad_id=student.pad_id)):
            loss = run.student(batch, config.objective.against(said(batch), batch))
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


def backwards(student: LanguageModel, laboratory: Laboratory, config: Config) -> dict[str, Value]:
    """KL(student ‖ oracle) and KL(student ‖ teacher), nats a sequence, on answers that the student writes now.

    The draws begin at the same seed at every checkpoint, and leave torch's random state as it was.
    """
    prompts = [sequence.prompt for sequence in laboratory.golden.sequences]
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed + 3)
        answers = LanguageAuthor(student, together=TOGETHER).answer(prompts, config.data.answer_length)
    own = [sequence for sequence in answers if any(sequence.response)]
    assert laboratory.oracle is not None
    sides = {"reverse_golden": laboratory.oracle, "reverse_proxy": laboratory.teacher}
    return {name: mean_of(own_divergence(student, author, own).tolist()) for name, author in sides.items()}


def main(config: Config) -> Table | None:
    """Build the laboratory, distil, and write student, table, pictures and report. Returns the main process's table.

    Raises:
        UserError: the folder holds another run, vocabularies differ, or a specification or size does not fit.
    """
    check_folder(Path(config.output), config, resume=config.resume)
    folder = Path(config.output) / "laboratory"
    laboratory = build(folder, setup(config), resume=config.resume, keep_oracle=config.reverse)
    run = start(config, laboratory.start)
    course = distil(run, laboratory.start, laboratory, config)
    return conclude(laboratory, course, config) if run.is_main else None


def setup(config: Config) -> Setup:
    """What stage one needs of the settings."""
    seed, trained = config.training.seed, (config.teacher_training, config.student_training)
    teacher, student = (replace(training, seed=seed + place) for place, training in enumerate(trained))
    return Setup(config.oracle, config.teacher, config.student, config.data, teacher, student, seed)


def start(config: Config, student: LanguageModel) -> Run:
    """The run of stage two, with what it rests on written down."""
    told = {name: value for name, value in vars(config).items() if name in ("oracle", "teacher", "student")}
    return Run(
        config.training,
        student=student,
        folder=Path(config.output),
        config=config,
        resume=config.resume,
        provenance={**told, "tokenizer": tokenizer_hash(student.tokenizer)},
    )


def judge(course: Course, config: Config) -> PowerLawVerdict:
    """What the detector says of the proxy alone."""
    total = course.steps[-1]
    return find_departure(constant_part(course.points(), config.training, total), config.watch)


def conclude(laboratory: Laboratory, course: Course, config: Config) -> Table:
    """The table of both metrics at the start, at the least golden value and at the end, the pictures, the report."""
    folder, student = Path(config.output), laboratory.start
    card = {"teacher": config.teacher, "student": config.student, "oracle": config.oracle, "method": "teacher_hacking"}
    student.save(folder / "student", card=card)
    label, verdict = course.label(), judge(course, config)
    least = course.steps.index(label.least)
    table = Table(f"{config.student} distilled from {config.teacher}, beside {config.oracle}", ["golden", "proxy"])
    columns = {"golden": (laboratory.golden, course.golden), "proxy": (laboratory.proxy, course.proxy)}
    places = {"start": 0, f"least golden, step {label.least}": least, "end": -1}
    for name, place in places.items():
        table.rows[name] = {column: mean_of(values[place].tolist()) for column, (_, values) in columns.items()}
        table.rows[name] |= {
            f"{column} a token": ratio_of(values[place].tolist(), exam.tokens.tolist())
            for column, (exam, values) in columns.items()
        }
    table.rows["the teacher itself"] = {"golden a token": laboratory.imperfection, "proxy a token": 0.0}
    table.columns += [f"{column} a token" for column in columns]
    if config.reverse:
        named = {f"{name.replace('_', ' ')}": value for name, value in backwards(student, laboratory, config).items()}
        table.columns += list(named)
        table.rows["end"] |= named
    table.units = dict.fromkeys(table.columns, "nat")
    table.better = dict.fromkeys(table.columns, "lower")
    table.notes = [told(label), f"Without the oracle: {verdict}", "Mean ± standard error over prompts."]
    draw_plane(folder / "pictures" / "1_plane.png", {"this run": course.plane()}, told(label))
    draw_law(folder / "pictures" / "2_law.png", course.points(), verdict, str(verdict))
    command = repeat("teacher_hacking", folder)
    write_result(folder, table, headline=told(label), command=command)
    table.print()
    print(f"The student: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def told(label: Label) -> str:
    """The reference label in one sentence."""
    if label.rise <= 0:
        return "No hacking: golden ends at its least value."
    rose = f"golden rose by {label.rise:.3g} ± {label.error:.2g} nats a sequence after step {label.least}"
    if label.hacked:
        return f"The teacher is hacked: {rose}, while the proxy did not rise ({label.proxy_rise:+.2g})."
    if label.overfitted:
        return f"Overfitting, not hacking: {rose}, and the proxy on held-out prompts by {label.proxy_rise:.3g}."
    return f"No hacking: {rose}, within 2 standard errors or with the proxy."
