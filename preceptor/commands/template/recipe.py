"""template: a small network learns from a large one's soft targets, without an image of one of the digits.

Paper: Distilling the Knowledge in a Neural Network (Hinton, Vinyals and Dean, 2015), https://arxiv.org/abs/1503.02531
Reproduction: not yet run

    L = T² · KL(p ‖ q),    p = softmax(v / T),    q = softmax(z / T)

v are the teacher's logits, z the student's, T is the temperature. At a high T the teacher's small probabilities weigh
more: how much each image resembles a 3, say. So a student that has never seen a 3 recognises it (section 3).

Simplified here: scikit-learn's digits (8 × 8 pixels) for MNIST, no dropout in the teacher, and the student's bias of
the unseen digit is not corrected.

Command: ``preceptor run ./template --tiny``
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax

from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.result import write_result
from preceptor.losses import Loss
from preceptor.report import write_report
from preceptor.report.table import Table

from .digits import Digits, accuracy, fit_teacher, perceptron, read_digits

REQUIRES = "vision"


@dataclass(frozen=True)
class Config:
    """What the student learns from, and how."""

    temperature: float = 8.0
    """T in the equation, which divides the logits of both."""
    widths: tuple[int, int] = (256, 32)
    """Units of each of the two hidden layers: the teacher's, the student's."""
    unseen: int = 3
    """The digit of which the student sees no image."""
    output: str = "runs/template/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = Training(steps=600, batch_size=64, learning_rate=3e-3)
    """Steps, optimizer, precision, seed."""

    def __post_init__(self) -> None:
        """Refuse a temperature that is not positive, and what is not a digit."""
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}: it must be more than 0.")
        if self.unseen not in range(10):
            raise UserError(f"unseen is {self.unseen}: it must be a digit, 0 to 9.")


tiny = Config(output="runs/template/tiny", training=Training(steps=300, batch_size=64, learning_rate=3e-3))
paper = Config(temperature=20.0, widths=(1200, 800), output="runs/template/paper")


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Loss:
    """T² · KL(p ‖ q) summed over rows, and their number; both arguments are logits (rows, classes)."""
    p, log_p = softmax(teacher / temperature, -1), log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    total = temperature**2 * (p * (log_p - log_q)).sum()
    return Loss(total, torch.tensor(len(student)), {})


def teach(config: Config, student: nn.Module, images: Tensor, logits: Tensor) -> None:
    """Train the student on images (rows, 64) with the teacher's logits (rows, 10)."""
    run = Run(config.training, student=student, folder=config.output, config=config, resume=config.resume)
    images, logits = images.to(run.device), logits.to(run.device)
    for rows in run.batches(range(len(images)), torch.tensor):
        loss = soft_targets(run.student(images[rows]), logits[rows], config.temperature)
        run.update(*loss)
    run.finish()


def main(config: Config) -> None:
    """Fit a teacher to all digits, teach a student without one of them, and write its table and its page."""
    folder, seed = Path(config.output), config.training.seed
    check_folder(folder, config, resume=config.resume)
    digits = read_digits(seed)
    teacher, student = fit_teacher(digits, config.widths[0], seed), perceptron(config.widths[1], seed + 1)
    images = digits.images[digits.labels != config.unseen]
    teach(config, student, images, teacher(images))
    student.eval().cpu()
    save_file(student.state_dict(), folder / "student.safetensors")
    table = examine(config, teacher, student, digits)
    share = accuracy(student, digits, config.unseen)
    headline = f"The student names {share:.0f} % of the images of {config.unseen} correctly, without having seen one."
    write_result(folder, table, headline=headline)
    table.print()
    print(f"The page: {write_report(folder)}")


def examine(config: Config, teacher: nn.Module, student: nn.Module, digits: Digits) -> Table:
    """Accuracy on held-out images, beside the student's before it was taught."""
    networks = {
        "untaught student": perceptron(config.widths[1], config.training.seed + 1),
        "taught student": student,
        "teacher": teacher,
    }
    unseen = f"the digit {config.unseen}, which the student never saw"
    rows: dict[str, dict[str, float]] = {
        "all digits": {name: accuracy(network, digits) for name, network in networks.items()},
        unseen: {name: accuracy(network, digits, config.unseen) for name, network in networks.items()},
    }
    table = Table("Held-out images named correctly", list(networks), units=dict.fromkeys(rows, "%"))
    table.rows |= {name: dict(cells) for name, cells in rows.items()}
    table.better |= dict.fromkeys(rows, "higher")
    return table
