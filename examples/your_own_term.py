"""A loop with a term of your own: the divergence, and the distance of the last hidden states beside it.

python examples/your_own_term.py --steps 100 --weight 0.1
"""

from functools import partial
from pathlib import Path

import tyro
from torch import Tensor

from preceptor import FrozenTeacher, Run, Training, collate, divergence, load, make_student
from preceptor.data.sequences import Batch
from preceptor.distillation.lessons import Text, prepare
from preceptor.knowledge import Head, HiddenTargets
from preceptor.losses import Loss


def objective(hidden: Tensor, head: Head, *, said: HiddenTargets, batch: Batch, weight: float) -> Loss:
    """Forward KL plus ``weight`` times the mean squared distance of hidden states, summed over response tokens."""
    loss = divergence(hidden, head, said, kind="forward_kl", mask=batch.predicts)
    distance = (hidden - said.hidden)[batch.predicts].square().mean(-1).sum()
    return Loss(loss.sum + weight * distance, loss.count, {**loss.parts, "distance": distance.detach()})


def main(
    teacher: str = "smollm2",
    student: str = "teacher:layers=10",
    steps: int = 100,
    weight: float = 0.1,
    folder: Path = Path("runs/own_term"),
):
    large = load(teacher)
    small = make_student(student, large, seed=0)
    text = Text(source="prompts", limit=64, held_out=8, answer_length=32)
    lessons = prepare(text, large, seed=0, path=folder / "lessons.jsonl")
    says = FrozenTeacher(large)
    run = Run(Training(steps=steps, batch_size=8, learning_rate=5e-4), student=small, folder=folder)
    for batch in run.batches(lessons.train, partial(collate, pad_id=large.pad_id)):
        run.update(*run.student(batch, partial(objective, said=says(batch), batch=batch, weight=weight)))
    run.finish()
    small.save(folder / "student")


if __name__ == "__main__":
    tyro.cli(main)
