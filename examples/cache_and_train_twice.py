"""Ask the teacher once, then train two students from what it said: the teacher is not needed again.

python examples/cache_and_train_twice.py --steps 100
"""

from functools import partial
from pathlib import Path

import tyro

from preceptor import CachedTeacher, Run, Training, collate, divergence, load, make_student
from preceptor.cache import CapturePlan, Wanted, capture
from preceptor.distillation.lessons import Text, prepare

MAX_LENGTH = 256


def main(
    teacher: str = "smollm2", layers: tuple[int, int] = (6, 10), steps: int = 100, folder: Path = Path("runs/cached")
):
    large = load(teacher)
    text = Text(source="prompts", limit=64, held_out=8, answer_length=32, max_length=MAX_LENGTH)
    lessons = prepare(text, large, seed=0, path=folder / "lessons.jsonl")
    plan = CapturePlan(Wanted(budget=200, k=2048), kind="auto")
    cache = capture(large, lessons.train, folder / "cache", name=teacher, max_length=MAX_LENGTH, plan=plan)
    told = cache.summary()
    print(
        f"{told['tokens']} tokens, {told['kind']}: {told['bytes_per_token']:.0f} bytes each, {told['kl']:.2g} nat off"
    )

    says = CachedTeacher(cache)
    for depth in layers:
        student = make_student(f"teacher:layers={depth}", large, seed=0)
        training = Training(steps=steps, batch_size=8, learning_rate=5e-4)
        run = Run(training, student=student, folder=folder / f"{depth}-layers")
        for batch in run.batches(lessons.train, partial(collate, pad_id=large.pad_id)):
            run.update(*run.student(batch, partial(divergence, teacher=says(batch), mask=batch.predicts)))
        run.finish()
        student.save(folder / f"{depth}-layers" / "student")


if __name__ == "__main__":
    tyro.cli(main)
