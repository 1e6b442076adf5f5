"""A first student: the teacher writes answers, a copy with fewer layers learns them, and both are compared.

python examples/first_student.py --steps 100
"""

from functools import partial
from pathlib import Path

import tyro

from preceptor import FrozenTeacher, Run, Training, collate, divergence, load, make_student
from preceptor.distillation.lessons import Text, prepare
from preceptor.evaluation.language import ask, evaluate_language


def main(
    teacher: str = "smollm2", student: str = "teacher:layers=10", steps: int = 100, folder: Path = Path("runs/first")
):
    large = load(teacher)
    small = make_student(student, large, seed=0)
    text = Text(source="prompts", limit=64, held_out=8, answer_length=32)
    lessons = prepare(text, large, seed=0, path=folder / "lessons.jsonl")
    said = ask(large, lessons.exam)
    before = evaluate_language(small, said, lessons.exam, speed=False)

    says = FrozenTeacher(large)
    run = Run(Training(steps=steps, batch_size=8, learning_rate=5e-4), student=small, folder=folder)
    for batch in run.batches(lessons.train, partial(collate, pad_id=large.pad_id)):
        loss = run.student(batch, partial(divergence, teacher=says(batch), kind="forward_kl", mask=batch.predicts))
        run.update(loss.sum, loss.count, loss.parts)
    run.finish()

    after = evaluate_language(small, said, lessons.exam, speed=False)
    small.save(folder / "student")
    print(f"KL(teacher ‖ student) on held-out topics: {before.kl} before, {after.kl} after {steps} steps")
    answer = small.generate([lessons.exam[0].prompt], max_new_tokens=32, temperature=0.0)[0]
    print(f"The student says: {small.tokenizer.decode(answer, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    tyro.cli(main)
