"""OBoW: an image backbone learns without labels to guess, from crops, which visual words its momentum copy sees.

Paper: OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning (Gidaris et al., CVPR 2021),
https://arxiv.org/abs/2012.11552
Reproduction: holds over 3 seeds, but with 100 labels a class its features tell no more than raw pixels
Command: ``preceptor run obow --data fashion-mnist``

Each step, for images x, student θ, teacher θ', levels l with vocabularies V_l of K words (``visual_words.py``):

    1. predict      p_l = softmax(κ f(crops of x) g_l(V_l)ᵀ)          f: pooled last map of the student, not normalised
    2. teacher      θ' ← α θ' + (1 - α) θ,    α(i) = 1 - (1 - α₀)(1 + cos(π i / I)) / 2 at step i of I
    3. targets      d = ‖A_u - v_k‖² for inner positions u of the teacher's map;  m ← 0.99 m + 0.01 mean_u min_k d;
                    y_l = max_u softmax_k(-d / (δ m)), divided by its sum
    4. vocabulary   one 3x3 average of each image's map takes the oldest words' place (before the codes of 3 are
                    pooled, which need d alone: it was taken against the words as they were in 1)
    5. student      minimise Σ_kinds of view mean_l KL(y_l ‖ p_l), the mean over views and images

Only parameters are averaged: the teacher's batch norms keep statistics of their own. The student is what is kept.

Decided here, where the sources differ or are silent:

* K need not be a multiple of the batch: the queue wraps around. Distances are made in chunks of images.
* Views are cut from the batch in plain torch (``vision/views.py``): crops from the square image that is kept, not from
  the file; patches by one bilinear cut; hue turns in the YIQ plane. Images stay in [0, 1]: a batch norm follows.
* A run stops with a clear word when a vocabulary collapses, when its codes become uniform, or when the loss is not a
  number.
* The features that are examined are the mean of the student's last map on whole images.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from preceptor.distillation.momentum import MomentumTeacher
from preceptor.engine.run import NonFiniteLoss, Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.methods.obow.examination import examine
from preceptor.methods.obow.visual_words import (
    Assignment,
    DynamicHead,
    Pooling,
    Vocabularies,
    VocabularyWatch,
    bag_divergence,
    perplexities,
)
from preceptor.report.table import Table
from preceptor.vision.backbones import levels_of, make_backbone, pooled
from preceptor.vision.images import Images, read_images
from preceptor.vision.views import Views, student_views, teacher_view

REQUIRES = "vision"


@dataclass(frozen=True)
class Config:
    """Settings of one training."""

    data: str = ""
    """``fashion-mnist``, ``digits``, a folder of images or a hub name; empty: Fashion-MNIST if installed, or digits."""
    limit: int = 0
    """At most so many images to learn from; 0 takes all."""
    backbone: str = "conv"
    """``conv[:width=32]``, ``resnet18``, ``resnet50``, ``timm:NAME``, a folder, or a transformers backbone's name."""
    levels: tuple[str, ...] = ("block3", "block4")
    """Feature levels with a vocabulary each."""
    words: int = 256
    """K, visual words of a level."""
    inv_delta: float = 15.0
    """1/δ, inverse temperature of the codes, relative to the running distance m."""
    kappa: float = 5.0
    """κ, length of the generated weights."""
    momentum: float = 0.99
    """α₀, where the teacher's momentum starts; it ends at 1."""
    assignment: Assignment = "soft"
    """Soft codes, or 1 at the nearest word."""
    pooling: Pooling = "max"
    """How the codes of an image's positions become one bag."""
    vocabulary: Literal["queue", "frozen"] = "queue"
    """``frozen`` keeps the first, random words: a control."""
    views: Views = Views()
    """What teacher and student see."""
    output: str = "runs/obow/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=5, batch_size=64, optimizer="sgd", learning_rate=0.05, weight_decay=5e-4, clip=None
        )
    )
    """Steps, optimizer, precision, seed."""

    def __post_init__(self) -> None:
        """Refuse settings that no run can have, before anything is read."""
        if not 0 <= self.momentum <= 1:
            raise UserError(f"momentum is {self.momentum}: it must lie in [0, 1].")
        if self.inv_delta <= 0 or self.kappa <= 0:
            raise UserError(f"inv_delta is {self.inv_delta} and kappa {self.kappa}: both must be above 0.")
        if self.words < 2 or not self.levels:
            raise UserError("There is nothing to predict: give at least one level and two words.")
        if self.training.batch_size < 2 or self.training.accumulate > 1:
            raise UserError(
                "A batch norm needs a batch of at least 2 images, and the words are renewed once a step: raise "
                "training.batch_size, and leave training.accumulate at 1."
            )


tiny = Config(
    data="digits",
    limit=128,
    backbone="conv:width=8",
    words=48,
    views=Views(patches=2),
    output="runs/obow/tiny",
    training=replace(Config().training, epochs=None, steps=6, batch_size=32),
)


# valeoai/obow, config/ImageNetFull/ResNet50_OBoW_full.yaml; its warm-up of 10 epochs of 200 ends at 3e-5, here at 0.
paper = Config(
    data="imagenet",
    backbone="resnet50",
    levels=("stage3", "stage4"),
    words=8192,
    inv_delta=15.0,
    kappa=8.0,
    views=Views(side=256, size=224, crops=2, crop_size=160, crop_scale=(0.08, 0.6), patches=5, patch_size=96),
    output="runs/obow/paper",
    training=Training(
        epochs=200,
        batch_size=256,
        optimizer="sgd",
        learning_rate=0.03,
        weight_decay=1e-4,
        warmup=0.05,
        clip=None,
        save_every=5000,
    ),
)


class ObowStudent(nn.Module):
    """The backbone and the head that predicts bags of words from its pooled features."""

    def __init__(self, backbone: nn.Module, head: DynamicHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: list[Tensor], vocabularies: list[Tensor]) -> list[list[Tensor]]:
        """Logits (B·n, K) by kind of view and level."""
        return self.head([pooled(self.backbone, view) for view in views], vocabularies)


def make(config: Config, channels: int) -> tuple[ObowStudent, MomentumTeacher, Vocabularies]:
    """Student, teacher and a vocabulary for each level, all drawn from the seed."""
    seed = config.training.seed
    backbone = make_backbone(config.backbone, channels, seed=seed)
    levels = levels_of(backbone, config.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        last = list(levels_of(backbone).values())[-1]
        head = DynamicHead(list(levels.values()), last, kappa=config.kappa)
        words = Vocabularies(
            levels,
            config.words,
            inv_delta=config.inv_delta,
            assignment=config.assignment,
            pooling=config.pooling,
            renewed=config.vocabulary == "queue",
        )
    return ObowStudent(backbone, head), MomentumTeacher(backbone, config.momentum, own_statistics=True), words


def momentum_at(start: float, step: int, total: int) -> float:
    """α(i) = 1 - (1 - α₀)(1 + cos(π i / I)) / 2."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))


def lesson(
    student: ObowStudent,
    predict: nn.Module,
    teacher: MomentumTeacher,
    words: Vocabularies,
    seen: Tensor,
    views: list[Tensor],
    momentum: float,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Steps 1 to 4 and the loss of a batch, in the paper's order.

    Args:
        student: what learns.
        predict: the student as it is called, which several processes wrap.
        teacher: its momentum copy, which moves.
        words: the vocabularies, which are renewed.
        seen: the teacher's views (B, C, H, W).
        views: the student's, by kind (B·n, C, h, w).
        momentum: α of this step.

    Returns:
        By kind of view the sum over images of the mean KL over levels and views; by level the bags (B, K).
    """
    predicted = predict(views, words.now())
    teacher.follow(student.backbone, momentum)
    with torch.no_grad():
        maps = teacher.model(seen)
    bags = words(maps)
    levels = [[bag_divergence(bag, logits) for bag, logits in zip(bags.values(), kind)] for kind in predicted]
    return [torch.stack(kl).mean(0).sum() for kl in levels], bags


def teach(
    run: Run, config: Config, student: ObowStudent, teacher: MomentumTeacher, words: Vocabularies, images: Images
) -> None:
    """The loop: one lesson a step; the perplexities and the distance of each vocabulary are logged."""
    watch = VocabularyWatch(config.words, config.training.batch_size)
    for name, thing in (("teacher", teacher), ("words", words), ("watch", watch)):
        run.remember(name, thing)
    for batch in run.batches(range(len(images)), images.take):
        seen, views = teacher_view(batch, config.views), student_views(batch, config.views)
        momentum = momentum_at(config.momentum, run.step, run.total)
        kinds, bags = lesson(student, run.student, teacher, words, seen, views, momentum)
        used = {name: (*perplexities(bag), float(words.of(name).distance)) for name, bag in bags.items()}
        parts = {f"kl_{kind}": kl for kind, kl in zip(config.views.kinds, kinds)}
        parts["target_entropy"] = torch.stack([torch.special.entr(bag).sum() for bag in bags.values()]).mean()
        try:
            run.update(torch.stack(kinds).sum(), len(batch), parts)
        except NonFiniteLoss as error:
            vocabularies = "; ".join(f"{n}: perplexities {b:.1f}, {i:.1f}, m {m:.3g}" for n, (b, i, m) in used.items())
            raise NonFiniteLoss(
                f"{error} ({vocabularies})", step=error.step, indices=error.indices, checkpoint=error.checkpoint
            ) from error
        for name, (of_batch, of_image, distance) in used.items():
            run.log(**{f"batch_perplexity_{name}": of_batch, f"image_perplexity_{name}": of_image})
            run.log(**{f"distance_{name}": distance})
            watch.see(name, of_batch, of_image, distance)
    run.finish()


def main(config: Config) -> Table | None:
    """Learn, examine the student beside itself untaught, and write student, table, pictures of words and report.

    Returns the table, on the main process.

    Raises:
        UserError: no such data, backbone or level; maps too small; another run in the folder; words that collapse.
    """
    folder = Path(config.output)
    check_folder(folder, config, resume=config.resume)
    lessons, exam = read_images(config.data, config.views.side, limit=config.limit)
    student, teacher, words = make(config, lessons.channels)
    check_fit(config, student, teacher, words, lessons)
    facts = {"data": config.data or "fashion-mnist or digits", "images": str(len(lessons))}
    run = Run(config.training, student=student, folder=folder, config=config, resume=config.resume, provenance=facts)
    for module in (teacher.model, words):
        run.shard(module)
    teach(run, config, student, teacher, words, lessons)
    return examine(config, student, teacher, words, lessons, exam) if run.is_main else None


def check_fit(
    config: Config, student: ObowStudent, teacher: MomentumTeacher, words: Vocabularies, images: Images
) -> None:
    """Find at the door what does not fit: a map too small for words, views too small for the network."""
    two = images.take([0, 0])
    try:
        maps = copy.deepcopy(teacher.model).eval()(teacher_view(two, config.views))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            copy.deepcopy(words).eval()(maps)
            for view in student_views(two, config.views):
                pooled(copy.deepcopy(student.backbone).eval(), view)
    except RuntimeError as error:
        raise UserError(f"The views are too small for {config.backbone} ({error}): enlarge them.") from error
