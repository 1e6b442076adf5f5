"""EchoAtt's claim: similar layers can share attention, and distillation heals it better than text alone does.

It imports ``recipes.echoatt``, its own, to run the method as it ships (see ``preceptor.reproductions``).
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from preceptor.data import Batch, Sequence, collate
from preceptor.evaluation import Said as Answers, Table, ask, compare, evaluate_language, mean_of
from preceptor.folder import write_whole
from preceptor.knowledge import HiddenTargets
from preceptor.models import LanguageModel, load
from preceptor.passages import Passages, read_passages
from preceptor.recipes.echoatt import Config, Original, Said, compare_layers, share_layers, start, teach
from preceptor.sharing.choice import block_ends, choose_followers
from preceptor.training import Training

COUNTS = (7, 12, 23)
DRAWS = 3

# What each arm learns from: name -> (followers, share of the steps in stage 2, how far the targets of L_I are off)
ARMS = {
    "7 followers, distilled": (7, 0.2, 0),
    "12 followers, distilled": (12, 0.2, 0),
    "12 followers, text alone": (12, 1.0, 0),
    "23 followers, distilled": (23, 0.2, 0),
    "23 followers, text alone": (23, 1.0, 0),
    "23 followers, L_I off by one": (23, 0.2, -1),
}


@dataclass(frozen=True)
class Kept:
    """What the teacher said of one piece of text: last hidden states, likeliest tokens, outputs of layers."""

    hidden: torch.Tensor
    likeliest: torch.Tensor
    inner: dict[int, torch.Tensor]


class Recital:
    """The teacher, asked once about each piece of text; it repeats from memory for any choice of layers."""

    def __init__(self, teacher: LanguageModel, pieces: list[Sequence], layers: tuple[int, ...]) -> None:
        self.kept: dict[Sequence, Kept] = {}
        original = Original(teacher, layers)
        for piece in pieces:
            said = original(collate([piece], teacher.pad_id))
            inner = {layer: states[0].clone() for layer, states in zip(layers, said.inner)}
            self.kept[piece] = Kept(said.soft.hidden[0], said.likeliest[0], inner)
        self.head = teacher.head

    def of(self, layers: tuple[int, ...]) -> RecitalOf:
        """The same memory, asked for the outputs of these layers."""
        return RecitalOf(self, layers)


class RecitalOf:
    """A teacher's memory, asked for the outputs of some layers."""

    def __init__(self, recital: Recital, layers: tuple[int, ...]) -> None:
        self.recital, self.layers = recital, layers

    def __call__(self, batch: Batch) -> Said:
        """What the teacher said of a batch."""
        kept = [self.recital.kept[sequence] for sequence in batch.sequences()]
        hidden = torch.stack([one.hidden for one in kept])
        inner = [torch.stack([one.inner[layer] for one in kept]) for layer in self.layers]
        likeliest = torch.stack([one.likeliest for one in kept])
        return Said(HiddenTargets(hidden, self.recital.head), likeliest, inner)


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """Similar layers against random ones, distillation against text alone, and a control, on SmolLM2-135M-Instruct.

    Each seed has its own text, calibration text and random draws. All arms of a seed take as many steps on the same
    pieces in the same order. ``full``: 8 times the text and the steps.
    """
    done = [_one_seed(seed, folder, 8 if full else 1) for seed in range(seeds)]
    columns = ["before", "after", "KL before", "KL after", "parameters"]
    table = Table("echoatt: SmolLM2-135M-Instruct with shared attention", columns)
    table.units = {
        "before": "nat/token",
        "after": "nat/token",
        "KL before": "nat/token",
        "KL after": "nat/token",
        "parameters": "fewer",
    }
    table.better = dict.fromkeys(columns[:4], "lower")
    names = ["teacher", *(f"{count} random followers" for count in COUNTS), *ARMS]
    for name in names:
        cells = {column: [seed[name][column] for seed in done if column in seed[name]] for column in columns}
        table.rows[name] = {column: mean_of(values) for column, values in cells.items() if values}
        if values := cells["parameters"]:
            table.rows[name]["parameters"] = int(values[0])
    table.notes = [
        "Cross-entropy to held-out text, and KL(teacher ‖ model) there; 'before' and 'after' training.",
        f"Random followers: the mean of {DRAWS} draws a seed. Mean ± standard error over {seeds} seeds.",
        "Perplexities: " + "; ".join(f"{name} {_perplexity(done, name)}" for name in ("teacher", *ARMS)) + ".",
    ]
    _claim(table, done)
    return table


def _perplexity(done: list[dict[str, dict[str, float]]], name: str) -> str:
    found = [
        math.exp(mean_of([seed[name][column] for seed in done]).mean)
        for column in ("before", "after")
        if column in done[0][name]
    ]
    return " → ".join(f"{value:.1f}" for value in found)


def _claim(table: Table, done: list[dict[str, dict[str, float]]]) -> None:
    def claim(text: str, ours: tuple[str, str], theirs: tuple[str, str]) -> None:
        first, second = ([seed[arm][column] for seed in done] for arm, column in (ours, theirs))
        table.claims.append(compare(first, second, text).claim)

    for count in COUNTS:
        chosen, drawn = f"{count} followers, distilled", f"{count} random followers"
        claim(
            f"{count} similar followers cost less than random ones before training",
            (chosen, "before"),
            (drawn, "before"),
        )
    for count in COUNTS:
        arm = f"{count} followers, distilled"
        claim(f"Training heals much of what {count} followers break", (arm, "after"), (arm, "before"))
        claim(f"... and the teacher stays better than {count} followers", ("teacher", "before"), (arm, "after"))
    for few, more in ((7, 12), (12, 23)):
        for column, words in (("before", "Sharing costs more"), ("after", "... and heals less")):
            pair = ((f"{number} followers, distilled", column) for number in (few, more))
            claim(f"{words} with {more} followers than with {few}", *pair)
    for count in (12, 23):
        arms = f"{count} followers, distilled", f"{count} followers, text alone"
        claim(
            f"With {count} followers distillation beats text alone at equal tokens",
            (arms[0], "after"),
            (arms[1], "after"),
        )
        claim("... and comes closer to the teacher (KL)", (arms[0], "KL after"), (arms[1], "KL after"))
    wrong = "23 followers, L_I off by one"
    claim(
        "Targets of L_I from the layer below teach worse (control)",
        ("23 followers, distilled", "after"),
        (wrong, "after"),
    )
    claim("... also in KL", ("23 followers, distilled", "KL after"), (wrong, "KL after"))


def _one_seed(seed: int, folder: Path, size: int) -> dict[str, dict[str, float]]:
    """The figures of all rows for one seed; each is kept in the folder when it is known."""
    path = folder / f"seed-{seed}"
    done = path / "figures.json"
    figures: dict[str, dict[str, float]] = json.loads(done.read_text()) if done.exists() else {}
    if figures.keys() >= ARMS.keys():
        return figures
    steps, batch_size = 24 * size, 4
    training = Training(
        steps=steps,
        batch_size=batch_size,
        learning_rate=3e-4,
        schedule="cosine",
        warmup=0.1,
        precision="bf16",
        seed=seed,
    )
    text = Passages(held_out=10)
    plain = Config(text=text, calibration=8, training=training, output=str(path))
    teacher, exact = load("smollm2", dtype="bfloat16"), load("smollm2")
    train, exam = read_passages(text, exact.tokenizer, seed=seed)
    calibration, train = train[: plain.calibration], train[plain.calibration :][: steps * batch_size]
    path.mkdir(parents=True, exist_ok=True)
    chosen = {
        count: choose_followers(f"similar={count}", 30, lambda: compare_layers(plain, exact, calibration))[0]
        for count in COUNTS
    }
    answers = ask(exact, exam)

    def keep(name: str, found: dict[str, float]) -> None:
        figures[name] = figures.get(name, {}) | found
        write_whole(done, json.dumps(figures, indent=2))

    if "teacher" not in figures:
        keep("teacher", {"before": _measure(exact, answers, exam)["entropy"]})
    for count in COUNTS:
        name = f"{count} random followers"
        if name not in figures:
            draws = [random.Random(100 * seed + draw).sample(range(1, 30), count) for draw in range(DRAWS)]
            found = [_measure(share_layers(exact, drawn, seed=0), answers, exam) for drawn in draws]
            keep(name, {"before": _mean(found, "entropy"), "KL before": _mean(found, "KL")})
    recital: Recital | None = None
    for name, (count, continued, off) in ARMS.items():
        if name in figures:
            continue
        ends = block_ends(chosen[count])
        if recital is None:
            asked = {end + by for followers in chosen.values() for end in block_ends(followers) for by in (0, -1)}
            recital = Recital(teacher, [*train, *exam], tuple(sorted(asked)))
        config = replace(plain, continued=continued, output=str(path / name))
        config = replace(config, resume=(path / name / "config.json").exists())
        student = share_layers(exact, chosen[count], seed=seed)
        fewer = sum(p.numel() for p in exact.parameters()) - sum(p.numel() for p in student.parameters())
        before = _measure(student, answers, exam)
        said = recital.of(tuple(end + off for end in ends))
        teach(start(config, student, ends, exact), said, train, exam, student.pad_id, config)
        after = _measure(student, answers, exam)
        keep(name, {"before": before["entropy"], "KL before": before["KL"], "parameters": fewer})
        keep(name, {"after": after["entropy"], "KL after": after["KL"]})
    return figures


def _measure(model: LanguageModel, answers: Answers, exam: list[Sequence]) -> dict[str, float]:
    measures = evaluate_language(model.eval(), answers, exam, speed=False)
    assert measures.kl is not None
    return {"entropy": math.log(measures.perplexity.mean), "KL": measures.kl.mean}


def _mean(found: list[dict[str, float]], name: str) -> float:
    return math.fsum(one[name] for one in found) / len(found)
