"""Semantic revision's claims: corrections help, clipping keeps its bounds, phrases are matched, and all of it teaches.

It runs the method as it ships.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preceptor.data.sequences import Sequence
from preceptor.distillation.lessons import Lessons, Text, prepare
from preceptor.distillation.on_policy import OwnSamples
from preceptor.distillation.teachers import FrozenTeacher, MemoisedTeacher, Teacher
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.extras import missing_packages
from preceptor.files import write_whole
from preceptor.losses.dac_kl import Clipping
from preceptor.methods.semantic_revision.measurements import (
    CORRECTIONS,
    RAW,
    HeldOutStudy,
    clipping_measured,
    corrections_measured,
    pairs_elsewhere,
)
from preceptor.methods.semantic_revision.phrases import phrase_marker, phrases
from preceptor.methods.semantic_revision.recipe import Config, Weights, teach
from preceptor.methods.semantic_revision.student_run import start
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report.table import Table
from preceptor.statistics import Claim, compare, mean_of

PLAIN, NO_SPANS, SPANS = Clipping(mode="off"), Weights(spans=0.0), Weights(labels=0.0, divergence=0.0)


LABELS = Weights(divergence=0.0, spans=0.0)


FIXED = Clipping(mode="fixed", lower=0.01, upper=0.95)


START = "after fine-tuning"


RANDOM_SPANS = "random spans alone"


# What the reproduction teaches: arm -> (its settings, what it is); all start from the same fine-tuned student.
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "FKL": ({"clipping": PLAIN, "weights": NO_SPANS}, "labels and forward KL on the given text"),
    "RKL": ({"clipping": PLAIN, "weights": NO_SPANS, "divergence": "reverse_kl"}, "labels and reverse KL"),
    "fixed clipping": ({"clipping": FIXED, "weights": NO_SPANS}, "labels and DAC-KL, l = 0.01, u = 0.95"),
    "learned clipping": ({"weights": NO_SPANS}, "labels and DAC-KL, f_sub"),
    "FKL + spans": ({"clipping": PLAIN}, "labels, forward KL and span consistency"),
    "learned + spans": ({}, "labels, DAC-KL and span consistency"),
    "spans alone": ({"weights": SPANS}, "span consistency, nothing else"),
    RANDOM_SPANS: ({"weights": SPANS}, "control: the same, with spans of the same lengths at random places"),
    "FKL + correction": (
        {"clipping": PLAIN, "weights": NO_SPANS, "own": OwnSamples(share=0.5)},
        "as FKL, half of the answers the student's own, corrected once",
    ),
    "full": ({"own": OwnSamples(share=0.5)}, "as learned + spans, half of the answers its own, corrected once"),
}


ONLY_FULL = ("FKL + spans", "FKL + correction")


UNITS = {"KL": "nat/token", "ROUGE-L": "%", "NLL": "nat/token", "distinct-2": "%", "no candidate": "%"}


@dataclass(frozen=True)
class Sizes:
    """How much is read, and the optimizer steps of each arm and of the fine-tuning before it."""

    text: Text
    steps: int
    first_steps: int
    arms: tuple[str, ...]


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """Corrections, clipping and spans on SmolLM2, each by itself and together, against plain divergences.

    A 25-layer copy of SmolLM2-135M-Instruct is fine-tuned for 20 steps on what the teacher wrote to instructions; every
    arm takes its optimizer steps from there, in the same order. Layers and learning rates were chosen on seed 100,
    which is not among those reproduced: so that the student writes sensible text, and that the forward KL then brings
    it closer to its teacher. The rest is such that three seeds take 75 minutes of one core. ``full``: longer answers,
    twice the text, more steps, and each component alone beside the forward KL.
    """
    if missing := missing_packages("phrases"):
        raise UserError(f'This needs {", ".join(missing)}: pip install "preceptor[phrases]".')
    sizes = Sizes(Text(limit=320, held_out=128, answer_length=16), 80, 20, tuple(a for a in ARMS if a not in ONLY_FULL))
    if full:
        sizes = Sizes(Text(limit=640, held_out=128, answer_length=48), 320, 60, tuple(ARMS))
    return _table([_one_seed(seed, folder / f"seed-{seed}", sizes) for seed in range(seeds)], sizes)


def _table(done: list[dict[str, Any]], sizes: Sizes) -> Table:
    columns = ["KL", "ROUGE-L", "span", "NLL", "NLL elsewhere", "raw elsewhere", "distinct-2", "no candidate"]
    table = Table("semantic_revision: a 25-layer student of SmolLM2-135M-Instruct", columns, units=UNITS)
    for arm in (START, *sizes.arms):
        table.rows[arm] = {name: mean_of([seed["arms"][arm][name] for seed in done]) for name in columns[:3]}
    for way in (RAW, *CORRECTIONS):
        names = ("NLL", "NLL elsewhere", "raw elsewhere") if way in CORRECTIONS else ("NLL",)
        cells = {name: mean_of(_pooled(done, way, name)) for name in names}
        shares = {name: mean_of([seed["samples"][way][name] for seed in done]) for name in columns[6:]}
        table.rows[way] = {**cells, **shares}
    table.better = {"KL": "lower", "ROUGE-L": "higher", "span": "lower", "NLL": "lower", "NLL elsewhere": "lower"}
    table.notes = [f"{arm}: {ARMS[arm][1]}." for arm in sizes.arms]
    table.notes += [
        f"KL(teacher ‖ student), ROUGE-L to the teacher's greedy answers and the span term on held-out topics; mean ± "
        f"standard error over {len(done)} seeds; {sizes.first_steps} steps of 8 sequences, then {sizes.steps} of 4.",
        f"NLL: the teacher's, of what the fine-tuned student wrote on {sizes.text.held_out} prompts a seed, "
        f"{sizes.text.held_out * len(done)} in all, ± standard error over them; elsewhere: without the corrected "
        "tokens, and the raw samples without those same places. No candidate: looks that found no token to correct.",
        "f_sub alone, 300 steps on the fine-tuned student's text: the teacher's mass that is kept is "
        f"{mean_of([seed['clipping']['kept'] for seed in done])} with the guard and "
        f"{mean_of([seed['clipping']['kept without guard'] for seed in done])} without it.",
    ]
    table.claims = [*_correction_claims(done), *_clipping_claims(done), *_teaching_claims(done, table)]
    return table


def _pooled(done: list[dict[str, Any]], way: str, name: str) -> list[float]:
    return [value for seed in done for value in seed["samples"][way][name]]


def _correction_claims(done: list[dict[str, Any]]) -> list[Claim]:
    once, thrice, random_place = CORRECTIONS
    nll = {way: _pooled(done, way, "NLL") for way in (RAW, *CORRECTIONS)}
    return [
        compare(ours, theirs, text, better="lower").claim
        for ours, theirs, text in (
            (nll[once], nll[RAW], f"Corrected samples are likelier to the teacher (paired, {len(nll[RAW])} prompts)"),
            (nll[thrice], nll[once], "... and three corrections more so than one"),
            (nll[once], nll[random_place], "A correction at a random place helps less"),
            (
                _pooled(done, once, "NLL elsewhere"),
                _pooled(done, once, "raw elsewhere"),
                "The other tokens are likelier than all others of the raw samples were",
            ),
        )
    ]


def _clipping_claims(done: list[dict[str, Any]]) -> list[Claim]:
    rows, outside = (sum(seed["clipping"][name] for seed in done) for name in ("rows", "outside"))
    kept, lost = ([seed["clipping"][name] for seed in done] for name in ("kept", "kept without guard"))
    joint = [seed["arms"]["learned clipping"]["kept"] for seed in done]
    return [
        Claim("DAC-KL lies between 0 and the whole KL at every position", f"{outside} of {rows} outside", outside == 0),
        Claim(
            "With the guard f_sub keeps at least ρ = 0.9 of the teacher's mass, alone and jointly with the student",
            f"alone {mean_of(kept)}, jointly {mean_of(joint)}",
            min(kept + joint) >= 0.9,
        ),
        compare(lost, kept, "Without it f_sub keeps less", better="lower").claim,
    ]


def _teaching_claims(done: list[dict[str, Any]], table: Table) -> list[Claim]:
    def claim(text: str, better: str, than: str, column: str) -> Claim:
        ours, theirs = ([seed["arms"][arm][column] for seed in done] for arm in (better, than))
        return compare(ours, theirs, text, better=table.better[column]).claim

    claimed = (
        ("The span term by itself falls on held-out text", "spans alone", START, "span"),
        ("... further than with random spans of the same lengths", "spans alone", RANDOM_SPANS, "span"),
        ("Beside DAC-KL it is lower than without it", "learned + spans", "learned clipping", "span"),
        ("Fixed clipping brings the student closer to its teacher than FKL (KL)", "fixed clipping", "FKL", "KL"),
        ("Learned clipping does", "learned clipping", "FKL", "KL"),
        ("FKL with spans does better than FKL", "FKL + spans", "FKL", "KL"),
        ("FKL on corrected samples does better than FKL", "FKL + correction", "FKL", "KL"),
        ("All together do better than FKL (KL)", "full", "FKL", "KL"),
        ("All together do better than FKL (ROUGE-L)", "full", "FKL", "ROUGE-L"),
    )
    return [claim(*words) for words in claimed if words[1] in table.rows]


def _one_seed(seed: int, path: Path, sizes: Sizes) -> dict[str, Any]:
    """The figures of one seed; each part is kept in the folder when it is done."""
    kept = path / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"arms": {}}
    if figures["arms"].keys() >= {START, *sizes.arms} and {"samples", "clipping"} <= figures.keys():
        return figures
    teacher, exact = load("smollm2", dtype="bfloat16"), load("smollm2")
    lessons = prepare(sizes.text, teacher, seed=seed, path=path / "lessons.jsonl")
    study = HeldOutStudy(lessons, exact)
    training = Training(
        steps=sizes.first_steps, batch_size=8, learning_rate=3e-4, schedule="linear", warmup=0.1, precision="bf16",
        seed=seed,
    )  # fmt: skip
    first = Config(
        student="teacher:layers=25",
        text=sizes.text,
        weights=LABELS,
        own=OwnSamples(),
        output=str(path / START),
        training=training,
        chunker="textblob",
    )

    def keep(name: str, value: Any) -> None:
        figures["arms"] |= {name: value} if name in (START, *ARMS) else {}
        figures.update({name: value} if name in ("samples", "clipping") else {})
        write_whole(kept, json.dumps(figures, indent=2))

    if START not in figures["arms"]:
        keep(START, study.figures(_taught(first, exact, teacher, None, lessons)))
    begun = str(path / START / "student")
    if "samples" not in figures:
        prompts = [sequence.prompt for sequence in lessons.exam]
        keep("samples", corrections_measured(load(begun), teacher, prompts, sizes.text.answer_length, seed))
    memoised = MemoisedTeacher(FrozenTeacher(teacher), lessons.train)
    if "clipping" not in figures:
        keep("clipping", clipping_measured(load(begun), memoised, lessons, seed))
    plain = replace(first, student=begun, weights=Weights(), own=OwnSamples())
    plain = replace(plain, training=replace(training, steps=sizes.steps, batch_size=4, learning_rate=1e-4))
    for arm in sizes.arms:
        if arm not in figures["arms"]:
            config = replace(plain, output=str(path / arm), **ARMS[arm][0])
            targets = FrozenTeacher(teacher) if config.own.share else memoised
            known = pairs_elsewhere(exact, lessons.train, seed) if arm == RANDOM_SPANS else None
            student = _taught(config, exact, teacher, targets, lessons, known)
            keep(arm, study.figures(student) | _last_kept(path / arm))
            # Weights and moments of an arm take 1 GB, and nothing starts from them.
            shutil.rmtree(path / arm / "checkpoints")
    return figures


def _taught(
    config: Config,
    exact: LanguageModel,
    teacher: LanguageModel,
    targets: Teacher | None,
    lessons: Lessons,
    known: dict[Sequence, tuple[int, ...]] | None = None,
) -> LanguageModel:
    """One arm, taught; the student that the others start from is saved."""
    folder = Path(config.output)
    student = make_student(config.student, exact, seed=config.training.seed)
    run = start(replace(config, resume=(folder / "config.json").exists()), student, teacher)
    teach(run, phrase_marker(student, phrases, known), targets, lessons, config)
    if folder.name == START:
        student.save(folder / "student")
    return student.eval()


def _last_kept(folder: Path) -> dict[str, float]:
    """The kept mass of the last ten steps of a run, where it clips."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    masses = [line["kept_mass"] for line in lines if "kept_mass" in line][-10:]
    return {"kept": mean_of(masses).mean} if masses else {}
