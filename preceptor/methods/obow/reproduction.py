"""OBoW's mechanism, and what features it gives beside random weights, raw pixels and a frozen vocabulary.

It runs the method as it ships.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from preceptor.distillation.momentum import MomentumTeacher
from preceptor.engine.run import Run
from preceptor.evaluation.frozen_features import LABELS, embed, figures, warmed_up
from preceptor.files import write_whole
from preceptor.methods.obow.examination import draw
from preceptor.methods.obow.recipe import Config, make, teach
from preceptor.methods.obow.visual_words import Vocabularies
from preceptor.report.table import Table
from preceptor.statistics import Claim, compare, mean_of
from preceptor.vision.images import FASHION_MNIST, Images, read_images
from preceptor.vision.views import whole

ARMS = {
    "obow": "the method",
    "frozen vocabulary": "control: the first, random words stay for ever",
    "random weights": "the same network untaught; its batch norms have seen the images",
    "raw pixels": "no network",
}


USE, FIRST, LAST = "batch perplexity", "first loss", "last loss"


# What did not show over three seeds; the notes have the figures.
UNCLAIMED = {("frozen vocabulary", "probe, 10 labels a class"), ("raw pixels", "probe, 100 labels a class")}


EXAMINED = (*(f"probe, {each} labels a class" for each in LABELS), "few-shot, 5 a class", "nearest neighbours")


COLUMNS = {**dict.fromkeys(EXAMINED, "%"), USE: "% of K"}


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """A network of four blocks learns from 20,000 images of Fashion-MNIST (digits where it is not installed).

    Its frozen features are probed with 10 and 100 labels a class, beside those of the same network with a vocabulary of
    random words, of random weights, and beside raw pixels. ``full``: 60,000 images and 5 times the steps.
    """
    done = [one_seed(seed, folder / ("full" if full else "arms"), full=full) for seed in range(seeds)]
    config, data = study(0, full=full)
    ceiling = math.log(config.words)
    table = Table(f"obow: a small network on {data}", [*COLUMNS, FIRST, LAST])
    table.units = {**COLUMNS, FIRST: "nat", LAST: "nat"}
    table.better = dict.fromkeys([*COLUMNS], "higher")
    for arm in ARMS:
        cells = {column: [seed[arm][column] for seed in done if column in seed[arm]] for column in table.columns}
        table.rows[arm] = {column: mean_of(values) for column, values in cells.items() if values}
    table.notes = [f"{arm}: {what}." for arm, what in ARMS.items()]
    table.notes.append(
        f"{config.training.steps} steps of {config.training.batch_size} images. Loss: KL, mean over the first and the "
        f"last tenth of the steps; ln K = {ceiling:.2f}. Batch perplexity: the lower of two levels, over the last "
        f"quarter. Mean ± standard error over {seeds} seeds."
    )
    claims, notes = usefulness(done)
    table.claims, table.notes = [*mechanism(done, ceiling), *claims], [*table.notes, *notes]
    return table


def mechanism(done: list[dict[str, dict[str, float]]], ceiling: float) -> list[Claim]:
    """What the method does to its loss and its words."""
    ours, frozen = [seed["obow"] for seed in done], [seed["frozen vocabulary"] for seed in done]
    cross = [arm["last cross-entropy"] for arm in ours]
    first, last = ([arm[name] for arm in ours] for name in (FIRST, LAST))
    off = max(arm["largest deviation from 1"] for arm in ours)
    below = compare(last, [ceiling] * len(done), "The loss is below ln K").claim
    return [
        below,
        compare(cross, [ceiling] * len(done), "... and so is the cross-entropy, the loss and the bags' entropy").claim,
        compare(last, first, "The loss falls from the first to the last tenth of the steps").claim,
        Claim("The bags sum to 1", f"within {off:.1e}", off < 1e-5),
        _bound("A batch uses 40 % of the words or more, at both levels", [arm[USE] for arm in ours], above=True),
        _bound("With a frozen vocabulary it uses less than 40 %", [arm[USE] for arm in frozen], above=False),
    ]


def _bound(text: str, shares: list[float], *, above: bool) -> Claim:
    worst = min(shares) if above else max(shares)
    return Claim(text, f"{mean_of(shares)} % of K, worst {worst:.0f} %", worst >= 40 if above else worst < 40)


def usefulness(done: list[dict[str, dict[str, float]]]) -> tuple[list[Claim], list[str]]:
    """What its features are good for, against every other arm; and, as notes, the comparisons that are not claimed."""
    claims, notes = [], []
    for column in (f"probe, {each} labels a class" for each in LABELS):
        for arm in (arm for arm in ARMS if arm != "obow"):
            ours, theirs = ([seed[name][column] for seed in done] for name in ("obow", arm))
            claim = compare(ours, theirs, f"Its features tell more than {arm} ({column})", better="higher").claim
            if (arm, column) in UNCLAIMED:
                notes.append(f"Not claimed: {claim.text} ({claim.figure}).")
            else:
                claims.append(claim)
    return claims, notes


def study(seed: int, *, full: bool) -> tuple[Config, str]:
    """The settings of the reproduction, and the name of its data."""
    there = (FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file()
    config = replace(
        Config(),
        data="fashion-mnist" if there else "digits",
        limit=0 if full else 20_000,
        training=replace(Config().training, epochs=None, steps=6000 if full else 1200, save_every=200, seed=seed),
    )
    return config, "Fashion-MNIST" if there else "digits"


def one_seed(seed: int, folder: Path, *, full: bool) -> dict[str, dict[str, float]]:
    """The figures of all arms for one seed; each arm's are kept in the folder once it is done."""
    config, _ = study(seed, full=full)
    lessons, exam = read_images(config.data, config.views.side, limit=config.limit)
    found = {}
    for arm in ARMS:
        path = folder / f"{arm.replace(' ', '_')}_{seed}"
        path.mkdir(parents=True, exist_ok=True)
        done = path / "figures.json"
        if not done.exists():
            here = replace(config, output=str(path), vocabulary="frozen" if arm == "frozen vocabulary" else "queue")
            write_whole(done, json.dumps(one_arm(arm, here, lessons, exam), indent=2) + "\n")
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
        found[arm] = json.loads(done.read_text(encoding="utf-8"))
    return found


def one_arm(arm: str, config: Config, lessons: Images, exam: Images) -> dict[str, float]:
    """Teach where there is something to teach, and examine."""
    student, teacher, words = make(config, lessons.channels)
    course: dict[str, float] = {}
    seed = config.training.seed
    if arm == "raw pixels":
        known, asked = (part.take(range(len(part))).flatten(1) for part in (lessons, exam))
        return figures(known, lessons, asked, exam, seed=seed)
    backbone = student.backbone
    if arm == "random weights":
        backbone = warmed_up(backbone, lessons)
    else:
        run = Run(config.training, student=student, folder=config.output, config=config, resume=True)
        teach(run, config, student, teacher, words, lessons)
        if arm == "obow":
            draw(Path(config.output), config, teacher, words, exam)
        course = history(Path(config.output), config, teacher, words, lessons)
    return {**figures(embed(backbone, lessons), lessons, embed(backbone, exam), exam, seed=seed), **course}


def history(
    folder: Path, config: Config, teacher: MomentumTeacher, words: Vocabularies, images: Images
) -> dict[str, float]:
    """Losses at the start and the end, the use of words in the last quarter, and how far bags are from a sum of 1."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tenth, quarter = max(1, len(lines) // 10), max(1, len(lines) // 4)

    def mean(name: str, some: list[dict[str, float]]) -> float:
        return mean_of([line[name] for line in some]).mean

    shares = [mean(f"batch_perplexity_{name}", lines[-quarter:]) / config.words for name in words.levels]
    with torch.no_grad():
        maps = teacher.model(whole(images.take(range(64)), config.views))
        off = max(float((bags.sum(1) - 1).abs().max()) for bags in words.eval()(maps).values())
    kl, entropy = (mean(name, lines[-tenth:]) for name in (f"kl_{config.views.kinds[0]}", "target_entropy"))
    return {
        FIRST: mean("loss", lines[:tenth]),
        LAST: mean("loss", lines[-tenth:]),
        "last cross-entropy": kl + entropy,
        USE: 100 * min(shares),
        "largest deviation from 1": off,
    }
