"""GKD: distil a language model from soft targets, on given text, on the student's own samples, or on a mixture.

Paper: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (Agarwal et al., ICLR 2024),
https://arxiv.org/abs/2306.13649; with the losses of DistiLLM (Ko et al., ICML 2024), https://arxiv.org/abs/2402.03898.

With teacher p, student q, prompts x and responses y, and a divergence D by token (``losses/divergences.py``):

    L = (1 - λ) E_{y ~ data}[ D(p ‖ q)(y | x) ] + λ E_{y ~ q(. | x)}[ D(p ‖ q)(y | x) ] + w · CE(labels)

where D(p ‖ q)(y | x) is the mean over the response's tokens of D(p(. | x, y_<t) ‖ q(. | x, y_<t)).

* λ = 0 with the forward KL is plain distillation (Hinton et al. 2015; Sanh et al. 2019).
* λ = 0 on answers that the teacher wrote is sequence-level distillation with soft targets (Kim & Rush 2016).
* λ = 1 with the reverse KL (β → 1) is on-policy distillation, MiniLLM's single-step term.

Decided here, where the sources differ or are silent:

* λ is drawn for each example, not once for a batch, so that a step's loss does not jump between two kinds of text.
* No gradient flows through sampling (as in the paper). One batched generation serves a whole optimizer step.
* The loss is a mean over tokens of the whole step, over micro-batches and processes.
* Labels are the tokens of given answers: the student's own samples are distilled, not imitated.
* β = 0 and β = 1 are the forward and the reverse KL themselves (TRL's convention); the scale of JSD(β) vanishes towards
  both ends, so the learning rate must follow β: see ``losses/divergences.py``.
* Missing answers can be left to the teacher, which writes them before training starts, into ``lessons.jsonl``.
* With ``own.adaptive`` the share of own samples follows DistiLLM's adaptive off-policy schedule: a threshold φ that
  starts at 0 and grows by 0.1 whenever the held-out loss has risen by 0.1, and a replay buffer of 1,000 samples.
* ``watch_hacking`` checks at every evaluation whether the held-out loss has left its power law (Tiapkin et al. 2025,
  https://arxiv.org/abs/2502.02671; ``evaluation/power_law.py``), logs the step, and draws it into the report.
* A student ``lora:...`` without a base of its own learns on top of the teacher, which then is the student itself with
  its adapter off.

Reproduction: holds over 3 seeds, control included

Command: ``preceptor run gkd --teacher smollm2 --student teacher:layers=10``
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from preceptor.cache import Cache
from preceptor.cache.header import Header
from preceptor.distillation.held_out import held_out_loss
from preceptor.distillation.lessons import Lessons, Text, prepare_together
from preceptor.distillation.marked import Marker
from preceptor.distillation.objective import LABELS, Objective
from preceptor.distillation.on_policy import OnPolicyMixer, OwnSamples
from preceptor.distillation.pair import DISTILLM_TEXT, DISTILLM_TRAINING, load_pair
from preceptor.distillation.teachers import CachedTeacher, Teacher, answer_online
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.language import LABELS_ONLY, TAUGHT
from preceptor.evaluation.power_law import NEEDED, Watcher, readable
from preceptor.evaluation.power_law_picture import draw_law
from preceptor.methods.gkd.examination import examine_students
from preceptor.models.identity import provenance
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report.table import Table

REQUIRES = "text"


TRAINING = Training(steps=200, batch_size=8, learning_rate=5e-4, schedule="linear", warmup=0.05, precision="bf16")


@dataclass(frozen=True)
class Config:
    """Settings of one distillation."""

    teacher: str = "smollm2"
    """The teacher: ``smollm2`` (embedded), a folder, a GGUF file or a hub name."""
    student: str = "teacher:layers=10"
    """``teacher:layers=N`` or ``=0,3,..``, ``fresh:layers=..,hidden=..``, ``lora:rank=8[,base=..]``, or a name."""
    text: Text = Text()
    """What is read."""
    objective: Objective = Objective()
    """What is minimised."""
    own: OwnSamples = OwnSamples()
    """How often the student learns on its own samples."""
    cache: str = ""
    """Folder of a teacher's cache (``preceptor cache``); empty: the teacher answers online."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the teacher while it writes and answers online; evaluations use float32."""
    labels_arm: bool = False
    """Also train a student by the same text's labels alone, in as many steps, for one more column of the table."""
    watch_hacking: bool = False
    """Watch the held-out loss for a departure from its power law, a sign that the teacher is hacked."""
    output: str = "runs/gkd/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = TRAINING
    """Steps, optimizer, precision, seed."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.cache and (self.own.share or self.own.adaptive):
            raise UserError(
                "A cache holds the teacher's targets for given text, not for own samples: leave cache empty."
            )
        if self.own.adaptive and not self.training.evaluate_every:
            raise UserError("own.adaptive follows the held-out loss: set training.evaluate_every.")
        if not self.objective.weight and (self.own.share or self.own.adaptive):
            raise UserError(
                "Labels alone teach nothing on the student's own samples: set own.share to 0, or objective.weight "
                "above 0."
            )
        steady = self.training.schedule == "constant" and self.training.evaluate_every > 0
        if self.watch_hacking and (not steady or self.objective.label_weight or not self.objective.weight):
            raise UserError(
                "watch_hacking reads the distance to the teacher at a constant learning rate: give training.schedule "
                "constant, training.evaluate_every, and an objective without labels."
            )
        steps = self.training.steps
        if self.watch_hacking and steps is not None and (count := readable(self.training, steps)) < NEEDED:
            raise UserError(
                f"watch_hacking needs {NEEDED} evaluations after the warm-up, and this run has {count}: lower "
                "training.evaluate_every, or raise training.steps."
            )


tiny = Config(
    student="teacher:layers=2",
    text=Text(limit=8, held_out=4, answer_length=8),
    output="runs/gkd/tiny",
    training=replace(TRAINING, steps=4, batch_size=4, evaluate_every=2),
)


# As in DistiLLM's script for GPT-2: 1.5B teaches 0.1B on Dolly.
paper = Config(
    teacher="gpt2-xl",
    student="gpt2",
    text=DISTILLM_TEXT,
    objective=Objective(divergence="skew_kl", alpha=0.1),
    own=OwnSamples(adaptive=True),
    output="runs/gkd/paper",
    training=DISTILLM_TRAINING,
)


def teach(run: Run, student: LanguageModel, teacher: Teacher | None, lessons: Lessons, config: Config) -> Watcher:
    """The loop. ``teacher`` gives each batch's soft targets; without one, labels alone teach."""
    own, watcher = OnPolicyMixer(config.own), Watcher(config.training)
    run.remember("own", own, apart=True)
    run.remember("watcher", watcher)
    marker = Marker(student)
    for examples in run.steps(lessons.train):
        mixed = own.mix(student, examples, config.text, progress=run.step / run.total)
        for batch in run.split(marker.mark(mixed, given=examples), marker.collate):
            targets = teacher(batch.text) if teacher else None
            loss = run.student(batch.text, config.objective.against(targets, batch.text, batch.labels))
            run.update(loss.sum, loss.count, loss.parts)
        if run.evaluate_due:
            size = config.training.batch_size
            held_out = held_out_loss(
                run.student, teacher, lessons.exam, config.objective, batch_size=size, pad_id=student.pad_id
            )
            own.see(held_out)
            run.log(held_out_loss=held_out, own_share=own.share)
            verdict = watcher.see(run.step, held_out, total=run.total)
            if config.watch_hacking and verdict.flagged is not None:
                run.log(left_power_law_at=verdict.flagged)
    run.finish()
    return watcher


def main(config: Config) -> Table | None:
    """Distil, evaluate beside the teacher and the untaught student, and write student, table and report.

    Returns the table, on the main process.

    Raises:
        UserError: the tokenizers differ, the folder holds another run, the cache is another teacher's, no text is left.
    """
    folder, seed = Path(config.output), config.training.seed
    check_folder(folder, config, resume=config.resume)
    if config.cache and (other := Header.read(Path(config.cache)).teacher) != config.teacher:
        raise UserError(
            f"The cache {config.cache} is of the teacher {other}, not of {config.teacher}: name that one, or capture "
            "a cache of this one."
        )
    teacher, student = load_pair(config.teacher, config.student, dtype=config.teacher_dtype, seed=seed)
    # Before the run begins, so that text which cannot be read leaves no run behind.
    lessons = prepare_together(config.text, teacher, config.training, folder)
    run = start(config, student, teacher)
    watcher = teach(run, student, teacher_of(config, run, teacher, student, lessons), lessons, config)
    if config.watch_hacking and run.is_main:
        print(watcher.verdict)
        draw_law(folder / "pictures" / "hacking.png", watcher.points, watcher.verdict, str(watcher.verdict))
    taught = {TAUGHT: gathered(run, student, config)}
    if config.labels_arm:
        taught[LABELS_ONLY] = taught_by_labels(config, teacher, lessons)
    return examine_students(config, taught, lessons) if run.is_main else None


def start(config: Config, student: LanguageModel, teacher: LanguageModel) -> Run:
    """The run of one student, which records its teacher, text and tokenizer."""
    return Run(
        config.training,
        student=student,
        folder=Path(config.output),
        config=config,
        resume=config.resume,
        provenance=provenance(config.teacher, config.text.source, teacher.tokenizer),
    )


def teacher_of(
    config: Config, run: Run, teacher: LanguageModel, student: LanguageModel, lessons: Lessons
) -> Teacher | None:
    """The teacher while the student learns: none, a cache, the student's own base, or the teacher itself."""
    if config.objective.weight == 0:
        return None
    if config.cache:
        cache = Cache.open(Path(config.cache), tokenizer=teacher.tokenizer)
        if missing := cache.missing([*lessons.train, *lessons.exam]):
            raise UserError(
                f"{missing} of the lessons are not in the cache {config.cache}: capture them with "
                f"`preceptor cache --data {Path(config.output) / 'lessons.jsonl'} --output {config.cache}`."
            )
        return CachedTeacher(cache.to(run.device))
    return answer_online(run, teacher, student, config.student)


def gathered(run: Run, student: LanguageModel, config: Config) -> LanguageModel:
    """The student in evaluation mode; one that lies in shards is gathered into a new model on the main process."""
    if not config.training.shard:
        return student.eval()
    state = run.state_dict()
    if not run.is_main:
        return student
    whole = make_student(config.student, load(config.teacher), seed=config.training.seed)
    whole.load_state_dict(state)
    return whole.eval()


def taught_by_labels(config: Config, teacher: LanguageModel, lessons: Lessons) -> LanguageModel:
    """A student of the same kind that reads the same text in as many steps, without the teacher's targets."""
    alone = replace(
        config,
        objective=LABELS,
        own=OwnSamples(),
        cache="",
        output=str(Path(config.output) / "labels"),
        labels_arm=False,
        watch_hacking=False,
    )
    # The teacher may lie in shards by now, which cannot be copied.
    student = make_student(config.student, load(config.teacher), seed=config.training.seed)
    run = start(alone, student, teacher)
    teach(run, student, None, lessons, alone)
    return gathered(run, student, alone)
