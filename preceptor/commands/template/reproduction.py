"""The claim of template: soft targets teach a digit that the student never saw; hard and shuffled targets do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from preceptor.engine.settings import Training
from preceptor.report.table import Table
from preceptor.statistics import compare, mean_of

from .digits import accuracy, fit_teacher, perceptron, read_digits
from .recipe import Config, teach

ARMS = {
    "soft targets": "the teacher's logits at the temperature of the recipe",
    "hard targets": "baseline: the teacher's likeliest digit alone",
    "shuffled targets": "control, which must fail: the teacher's logits of another image",
}
ALL, UNSEEN = "all digits", "unseen digit"


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """Three arms from the same start on the same images; ``full``: four times the steps."""
    training = Training(steps=2400 if full else 600, batch_size=64, learning_rate=3e-3)
    done = [one_seed(replace(training, seed=seed), folder / f"seed-{seed}") for seed in range(seeds)]
    table = Table("template: held-out digits named correctly", [ALL, UNSEEN], units={ALL: "%", UNSEEN: "%"})
    table.better = {ALL: "higher", UNSEEN: "higher"}
    for arm in ARMS:
        table.rows[arm] = {column: mean_of([seed[arm][column] for seed in done]) for column in (ALL, UNSEEN)}
    table.notes = [f"{arm}: {what}." for arm, what in ARMS.items()]
    claims = (
        ("Soft targets teach the unseen digit, hard targets do not", "soft targets", "hard targets", UNSEEN),
        ("Shuffled targets teach less than hard ones", "hard targets", "shuffled targets", ALL),
    )
    for text, better, than, column in claims:
        ours, theirs = ([seed[arm][column] for seed in done] for arm in (better, than))
        table.claims.append(compare(ours, theirs, text, better="higher").claim)
    return table


def one_seed(training: Training, folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy in per cent of every arm of one seed; an arm that is there already is not trained again."""
    config = Config(training=training)
    digits = read_digits(training.seed)
    images = digits.images[digits.labels != config.unseen]
    order = torch.Generator().manual_seed(training.seed)
    logits = fit_teacher(digits, config.widths[0], training.seed)(images)
    arms: dict[str, tuple[float, Tensor]] = {
        "soft targets": (config.temperature, logits),
        # Logits so far apart that the softmax is a one-hot vector: the loss is then the cross-entropy.
        "hard targets": (1.0, 100.0 * one_hot(logits.argmax(-1), 10)),
        "shuffled targets": (config.temperature, logits[torch.randperm(len(logits), generator=order)]),
    }
    figures = {}
    for arm, (temperature, targets) in arms.items():
        place = folder / arm.replace(" ", "_")
        settings = replace(config, temperature=temperature, output=str(place), resume=place.exists())
        student = perceptron(config.widths[1], training.seed + 1)
        teach(settings, student, images, targets)
        student.eval().cpu()
        figures[arm] = {ALL: accuracy(student, digits), UNSEEN: accuracy(student, digits, config.unseen)}
    return figures
