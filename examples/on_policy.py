"""On-policy distillation: at every step the student writes, and learns what the teacher would have said there.

python examples/on_policy.py --steps 50
"""

from functools import partial
from pathlib import Path

import tyro

from preceptor import FrozenTeacher, Run, Training, collate, divergence, load, make_prompts, make_student
from preceptor.data.encoding import encode_prompt
from preceptor.data.sequences import Sequence


def main(
    teacher: str = "smollm2", student: str = "teacher:layers=20", steps: int = 50, folder: Path = Path("runs/own")
):
    large = load(teacher)
    small = make_student(student, large, seed=0)
    prompts = [encode_prompt(list(messages), large.tokenizer) for messages in make_prompts(256, seed=0)]
    says = FrozenTeacher(large)
    run = Run(Training(steps=steps, batch_size=8, accumulate=2, learning_rate=2e-4), student=small, folder=folder)
    for asked in run.steps(prompts):
        answers = small.generate(asked, max_new_tokens=32)
        written = [
            Sequence(prompt + answer, (False,) * len(prompt) + (True,) * len(answer))
            for prompt, answer in zip(asked, answers)
        ]
        for batch in run.split(written, partial(collate, pad_id=large.pad_id)):
            loss = run.student(batch, partial(divergence, teacher=says(batch), kind="reverse_kl", mask=batch.predicts))
            run.update(loss.sum, loss.count, loss.parts)
    run.finish()
    small.save(folder / "student")


if __name__ == "__main__":
    tyro.cli(main)
