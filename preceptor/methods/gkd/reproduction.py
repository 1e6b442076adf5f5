"""GKD's claim: soft targets teach more than labels, own samples more than given text; a shuffled teacher does not.

It runs the method as it ships.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from preceptor.data.sequences import Batch, Sequence
from preceptor.distillation.lessons import Text, prepare
from preceptor.distillation.objective import LABELS
from preceptor.distillation.on_policy import OwnSamples
from preceptor.distillation.teachers import FrozenTeacher, MemoisedTeacher, Teacher
from preceptor.engine.settings import Training
from preceptor.evaluation.language import ModelOutputs, ask, evaluate_language, evaluate_own_samples
from preceptor.files import read_kept, write_whole
from preceptor.knowledge import HiddenTargets, rows_of
from preceptor.methods.gkd.recipe import Config, start, teach
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report.table import Table
from preceptor.statistics import compare, mean_of

# What the reproduction compares: arm -> (where it starts, what it learns from)
ARMS = {
    "untaught": "the pruned student before it is taught",
    "soft targets": "forward KL to the teacher on the given text",
    "labels": "cross-entropy on the same text, as many steps",
    "shuffled teacher": "control: forward KL to the teacher's targets for another position of the batch",
    "then the given text": "the soft-target student taught on: same loss, the given text again",
    "then its own samples": "the soft-target student taught on: same loss, λ = 1",
}


class ShuffledRows:
    """The control: a teacher's targets, assigned to the wrong positions."""

    def __init__(self, teacher: MemoisedTeacher) -> None:
        self.teacher = teacher

    def __call__(self, batch: Batch) -> HiddenTargets:
        """The rows of the batch in random order."""
        dense = rows_of(self.teacher(batch), batch.predicts)
        assert isinstance(dense, HiddenTargets)
        return HiddenTargets(dense.hidden[torch.randperm(len(dense.hidden))], dense.head)


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """Soft targets against labels, own samples against more of the same text, and a control, on SmolLM2.

    A 10-layer copy of SmolLM2-135M-Instruct reads what the teacher wrote to instructions. Every arm takes its optimizer
    steps from the same start in the same order; the last two start from the soft-target student. ``full``: 4 times the
    text and the steps.
    """
    done = [_one_seed(seed, folder, 4 if full else 1) for seed in range(seeds)]
    columns = ["KL", "agreement", "KL on own samples"]
    table = Table(
        "gkd: a 10-layer student of SmolLM2-135M-Instruct", columns, units={"KL": "nat/token", "agreement": "%"}
    )
    for arm in ARMS:
        cells = {column: [seed[arm][column] for seed in done if column in seed[arm]] for column in columns}
        table.rows[arm] = {column: mean_of(values) for column, values in cells.items() if values}
    table.better = {"KL": "lower", "agreement": "higher", "KL on own samples": "lower"}
    table.notes = [f"{arm}: {what}." for arm, what in ARMS.items()]
    table.notes.append(f"KL(teacher ‖ student) on held-out topics; mean ± standard error over {seeds} seeds.")

    def claim(text: str, better: str, than: str, column: str) -> None:
        ours, theirs = ([seed[arm][column] for seed in done] for arm in (better, than))
        table.claims.append(compare(ours, theirs, text, better=table.better[column]).claim)

    claim("Soft targets bring the student closer to its teacher than labels do (KL)", "soft targets", "labels", "KL")
    claim("... and to agree with it more often", "soft targets", "labels", "agreement")
    claim(
        "Its own samples teach it more about its own samples than the given text does",
        "then its own samples",
        "then the given text",
        "KL on own samples",
    )
    claim("A teacher whose words are shuffled teaches less than labels", "labels", "shuffled teacher", "KL")
    return table


def _one_seed(seed: int, folder: Path, size: int) -> dict[str, dict[str, float]]:
    """The figures of all arms for one seed; each arm is kept in the folder when it is done."""
    path = folder / f"seed-{seed}"
    done = path / "figures.json"
    figures = read_kept(done)
    if figures.keys() >= ARMS.keys():
        return figures
    steps, text = 80 * size, Text(limit=320 * size, held_out=96, answer_length=48)
    teacher, exact = load("smollm2", dtype="bfloat16"), load("smollm2")
    lessons = prepare(text, teacher, seed=seed, path=path / "lessons.jsonl")
    memoised, answers = MemoisedTeacher(FrozenTeacher(teacher), lessons.train), ask(exact, lessons.exam)
    training = Training(
        steps=steps, batch_size=8, learning_rate=1e-3, schedule="linear", warmup=0.1, precision="bf16", seed=seed
    )
    plain = Config(text=text, training=training)
    soft = str(path / "soft targets" / "student")
    onward = replace(plain, student=soft, training=replace(training, steps=steps * 3 // 10, learning_rate=3e-4))
    arms: dict[str, tuple[Config, Teacher | None]] = {
        "soft targets": (plain, memoised),
        "labels": (replace(plain, objective=LABELS), None),
        "shuffled teacher": (plain, ShuffledRows(memoised)),
        "then the given text": (onward, memoised),
        "then its own samples": (replace(onward, own=OwnSamples(share=1.0)), FrozenTeacher(teacher)),
    }
    for arm in ARMS:
        if arm in figures:
            continue
        config, knows = arms.get(arm, (plain, None))
        student = make_student(config.student, exact, seed=seed)
        if arm in arms:
            config = replace(config, output=str(path / arm))
            resume = (path / arm / "config.json").exists()
            teach(start(replace(config, resume=resume), student, teacher), student, knows, lessons, config)
            student.save(path / arm / "student")
        figures[arm] = _figures(student.eval(), exact, answers, lessons.exam, own=arm.startswith("then"))
        write_whole(done, json.dumps(figures, indent=2))
    return figures


def _figures(
    student: LanguageModel, teacher: LanguageModel, outputs: ModelOutputs, exam: list[Sequence], *, own: bool
) -> dict[str, float]:
    measures = evaluate_language(student, outputs, exam, speed=False)
    assert measures.kl is not None
    assert measures.agreement is not None
    figures = {"KL": measures.kl.mean, "agreement": 100 * measures.agreement.mean}
    if own:
        prompts = [sequence.prompt for sequence in exam]
        figures["KL on own samples"] = evaluate_own_samples(
            student, teacher, prompts, max_new_tokens=48
        ).forward_kl.mean
    return figures
