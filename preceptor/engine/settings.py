"""The settings of a training, the same for every method."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from preceptor.errors import UserError


@dataclass(frozen=True)
class Training:
    """How a student is trained, whatever the method. Give `steps` or `epochs`; neither means one epoch."""

    steps: int | None = None
    """Optimizer steps."""
    epochs: float | None = None
    """Passes over the data; may be a fraction."""
    batch_size: int = 32
    """Examples an optimizer step, over all micro-batches and processes."""
    accumulate: int = 1
    """Micro-batches an optimizer step and process; more of them need less memory and change nothing else."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule: adamw (decoupled decay), adam, or sgd (with `momentum`)."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decay of weights with two dimensions or more; biases and norms have none."""
    momentum: float = 0.9
    """Momentum of sgd; the first beta of adam and adamw."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or down to zero at the last step."""
    warmup: float = 0.0
    """Linear warm-up: below 1 a share of all steps, from 1 a number of steps."""
    clip: float | None = 1.0
    """Largest norm of the gradient of the mean loss; None does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights and optimizer keep their precision."""
    shard: bool = False
    """Split weights, gradients and optimizer over the processes (FSDP2) rather than copy them to each (DDP)."""
    seed: int = 0
    """Seed of initialisation, data order, dropout and sampling."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 saves at the end only."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations; 0 is never (the recipe evaluates at the end)."""
    keep: int = 2
    """Checkpoints that are kept on the disk."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers that receive the metrics too."""

    def __post_init__(self) -> None:
        """Refuses impossible settings, with one sentence each."""
        if self.steps is not None and self.epochs is not None:
            raise UserError("Both steps and epochs are given: set the other one to None, as in --training.epochs None.")
        for name in ("steps", "epochs", "batch_size", "accumulate", "learning_rate", "clip", "keep"):
            value = dataclasses.asdict(self)[name]
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}: it must be more than 0.")
        for name in ("weight_decay", "warmup", "save_every", "evaluate_every", "seed", "momentum"):
            value = dataclasses.asdict(self)[name]
            if not value >= 0:
                raise UserError(f"{name} is {value}: it must be 0 or more.")
        if self.momentum >= 1:
            raise UserError(f"momentum is {self.momentum}: it must be less than 1.")
        if self.accumulate > self.batch_size:
            raise UserError(
                f"accumulate is {self.accumulate} and batch_size {self.batch_size}: every micro-batch needs an "
                "example, so raise batch_size (it counts all micro-batches) or lower accumulate."
            )

    def rate(self, step: int, total: int) -> float:
        """The learning rate of optimizer step `step` (the first is 0) out of `total`."""
        warm = self.warmup * total if self.warmup < 1 else self.warmup
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        done = (step - warm) / max(1.0, total - warm)
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
