"""What a student loses by learning from a cache: held-out KL after training online and from caches of two sizes.

A 10-layer copy of SmolLM2 learns by forward KL from what its teacher says of answers to instructions: online (exact
hidden states in float32), and from caches of at most 450 and about 100 bytes a token, in the same steps on the
same text in the same order. Seeds change the order of the text. Lower is better.

    python benchmarks/cache_training.py [--quick] [--seeds 3] [--folder runs/cache_training] [--save]

Finished arms are kept in the folder, so that a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

from preceptor.cache import Cache, CapturePlan, Wanted, capture
from preceptor.distillation.lessons import Lessons, Text, prepare
from preceptor.distillation.teachers import CachedTeacher, MemoisedTeacher, Teacher
from preceptor.engine.run import Run
from preceptor.evaluation.language import ask, evaluate_language
from preceptor.files import write_whole
from preceptor.methods.gkd import recipe as gkd
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report.table import Table
from preceptor.statistics import compare, mean_of

BUDGETS = (430, 100)  # bytes a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: under a minute, says little")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/cache_training"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/cache_training.json and .md")
    options = parser.parse_args()
    seeds, steps, limit, length = (1, 4, 24, 12) if options.quick else (options.seeds, 40, 256, 48)
    folder = options.folder / "quick" if options.quick else options.folder
    if options.quick and folder.exists():
        shutil.rmtree(folder)
    text = Text(limit=limit, held_out=16 if options.quick else 48, answer_length=length)
    exact = load("smollm2")
    lessons = prepare(text, load("smollm2", dtype="bfloat16"), seed=0, path=folder / "lessons.jsonl")
    teachers, bytes_a_token = _teachers(exact, lessons, folder, text.max_length)
    figures = _taught(teachers, lessons, exact, folder, seeds=seeds, steps=steps, text=text)
    table = Table("Learning from a cache", ["bytes a token", "held-out KL"], units={"held-out KL": "nat/token"})
    for arm, values in figures.items():
        table.rows[arm] = {"bytes a token": bytes_a_token[arm], "held-out KL": mean_of(values)}
    result = {"seeds": seeds, "steps": steps}
    for arm in list(figures)[1:]:
        result[arm] = _against(figures[arm], figures["online"]) | {"bytes": bytes_a_token[arm]}
        apart = compare(figures[arm], figures["online"], "").claim.figure
        table.notes.append(f"{arm}: {apart} against online (below 0: nearer to the teacher).")
    table.print()
    if options.save:
        write_whole(Path(__file__).with_suffix(".json"), json.dumps(result | {"table": table.json()}, indent=2) + "\n")
        write_whole(Path(__file__).with_suffix(".md"), table.markdown())
    print(json.dumps(result))


def _teachers(
    exact: LanguageModel, lessons: Lessons, folder: Path, max_length: int
) -> tuple[dict[str, Teacher], dict[str, float | None]]:
    """The teacher itself, and caches of what it said."""
    teachers: dict[str, Teacher] = {"online": MemoisedTeacher(exact, lessons.train)}
    sizes: dict[str, float | None] = {"online": None}
    for budget in BUDGETS:
        plan = CapturePlan(Wanted(budget=budget, k=2048))
        name = f"cache, {budget} bytes"
        place = folder / f"cache-{budget}"
        cache: Cache = capture(exact, lessons.train, place, name="smollm2", max_length=max_length, plan=plan)
        teachers[name] = CachedTeacher(cache)
        sizes[name] = float(cache.summary()["bytes_per_token"])
    return teachers, sizes


def _taught(
    teachers: dict[str, Teacher],
    lessons: Lessons,
    exact: LanguageModel,
    folder: Path,
    *,
    seeds: int,
    steps: int,
    text: Text,
) -> dict[str, list[float]]:
    """Held-out KL by arm, one figure a seed."""
    done = folder / "figures.json"
    figures: dict[str, list[float]] = json.loads(done.read_text()) if done.exists() else {}
    exam = ask(exact, lessons.exam)
    for seed in range(seeds):
        for arm, teacher in teachers.items():
            if len(figures.setdefault(arm, [])) > seed:
                continue
            training = replace(gkd.TRAINING, steps=steps, learning_rate=1e-3, warmup=0.1, seed=seed)
            config = gkd.Config(text=text, output=str(folder / f"{arm}, seed {seed}"), resume=True, training=training)
            student = make_student(config.student, exact, seed=seed)
            run = Run(training, student=student, folder=Path(config.output), config=config, resume=True)
            gkd.teach(run, student, teacher, lessons, config)
            measures = evaluate_language(student.eval(), exam, lessons.exam, speed=False)
            assert measures.kl is not None
            figures[arm].append(measures.kl.mean)
            write_whole(done, json.dumps(figures, indent=2))
            shutil.rmtree(Path(config.output) / "checkpoints")
    return figures


def _against(cached: list[float], online: list[float]) -> dict[str, float | bool | None]:
    """The difference from learning online: its mean, and in standard errors of two independent means."""
    ours, theirs = mean_of(cached), mean_of(online)
    difference = ours.mean - theirs.mean
    error = None if ours.error is None or theirs.error is None else math.hypot(ours.error, theirs.error)
    within = None if error is None else abs(difference) <= 2 * error
    return {"difference": difference, "standard_error": error, "within_two_standard_errors": within}


if __name__ == "__main__":
    main()
