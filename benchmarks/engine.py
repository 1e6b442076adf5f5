"""What `Run` costs a step over a bare hand-written loop, and beside a transformers Trainer.

The bare loop shuffles, runs forward and backward, clips, steps the same fused AdamW at a cosine rate, and reads the
loss once a step; it writes nothing. `Run` does that and writes its metrics. No arm saves. Blocks of steps interleave
and change places from round to round; a ratio is the median over rounds of one block over that round's bare block.

    python benchmarks/engine.py [--quick] [--threads 1] [--save]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.models import language_model as models


@dataclass(frozen=True)
class Task:
    """A student with its rows: ``loss(student, rows)`` is a sum over as many terms as it says."""

    name: str
    rows: int
    batch: int
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, list[int]], tuple[Tensor, int]]


def cnn_task() -> Task:
    """Two convolutions on handwritten digits (scikit-learn's 1797), scaled up to 28x28; batch 128."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(28, 28), mode="bilinear", antialias=False)
    labels = torch.tensor(digits.target)

    def make() -> nn.Module:
        torch.manual_seed(0)
        first = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(*first, nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 10))

    def loss(student: nn.Module, rows: list[int]) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(student(images[rows]), labels[rows], reduction="sum"), len(rows)

    return Task("CNN, 128 x 28 x 28", len(labels), 128, make, loss)


def language_task(batch: int, length: int) -> Task:
    """SmolLM2 (135M, float32) on this package's own source text, plain cross-entropy over the whole vocabulary."""
    student = models.load("smollm2")
    sources = sorted((Path(__file__).parent.parent / "preceptor").rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    ids = torch.tensor(student.tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // length * length].view(-1, length)

    def make() -> nn.Module:
        # One model for all arms (each with its own optimizer): two gigabytes a copy would measure the memory.
        return student.model

    def loss(model: nn.Module, rows: list[int]) -> tuple[Tensor, int]:
        logits = model(input_ids=ids[rows]).logits[:, :-1]
        labels = ids[rows][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), labels.numel()

    return Task(f"SmolLM2, {batch} x {length}", len(ids), batch, make, loss)


def bare_steps(task: Task) -> Iterator[None]:
    """The loop that a careful person writes by hand; every ``next`` is one step."""
    student = task.make().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    step = 0
    while True:
        order = torch.randperm(task.rows).tolist()
        for start in range(0, task.rows, task.batch):
            loss, count = task.loss(student, order[start : start + task.batch])
            loss = loss / count
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 10**6))
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise ValueError("not finite")
            step += 1
            yield


def run_steps(task: Task, folder: Path) -> Iterator[None]:
    """The same through `Run`."""
    training = Training(steps=10**6, batch_size=task.batch, learning_rate=1e-3, weight_decay=0.01)
    run = Run(training, student=task.make(), folder=folder)
    for rows in run.batches(range(task.rows), list):
        loss, count = task.loss(run.student, rows)
        run.update(loss, count, {"nll": loss})
        yield


class Clock(TrainerCallback):
    """Reads the clocks at the end of the Trainer's steps, so that what it does before the first is left out."""

    def __init__(self) -> None:
        self.reads: list[tuple[float, float]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.reads.append((time.process_time(), time.perf_counter()))


class Wrapped(nn.Module):
    """A task as the Trainer wants it: a module that takes rows and returns its mean loss."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.student = task.make()

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        loss, count = self.task.loss(self.student, rows.tolist())
        return {"loss": loss / count}


def trainer_block(task: Task, steps: int, folder: Path) -> tuple[float, float]:
    """Seconds of CPU and of wall time that a Trainer needs for `steps` steps, logging each, saving none."""
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps + 2,
        per_device_train_batch_size=task.batch,
        learning_rate=1e-3,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=Wrapped(task),
        args=arguments,
        train_dataset=list(range(task.rows)),
        data_collator=lambda rows: {"rows": torch.tensor(rows)},
        callbacks=[clock],
    )
    trainer.log = lambda logs, start_time=None: None  # type: ignore[method-assign] # its lines would drown the table
    trainer.train()
    (cpu, wall), (cpu_end, wall_end) = clock.reads[1], clock.reads[steps + 1]
    return cpu_end - cpu, wall_end - wall


def block(steps: Iterator[None], count: int) -> tuple[float, float]:
    """Seconds of CPU and of wall time for `count` steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        next(steps)
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(
    one: Callable[[int], tuple[float, float]], bare: Callable[[int], tuple[float, float]], *, rounds: int, steps: int
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Seconds a step, (CPU, wall), of one arm and of the bare loop beside it, round by round; the order alternates."""
    bare(2)
    one(2)
    pairs = []
    for number in range(rounds):
        if number % 2:
            mine, plain = one(steps), bare(steps)
        else:
            plain, mine = bare(steps), one(steps)
        pairs.append(((mine[0] / steps, mine[1] / steps), (plain[0] / steps, plain[1] / steps)))
    return pairs


def ratios(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, float]:
    """Median over rounds of an arm's time over the bare loop's, quartiles of the CPU ratio, and milliseconds a step."""
    low, middle, high = statistics.quantiles([mine[0] / plain[0] for mine, plain in pairs], n=4)
    wall = statistics.median(mine[1] / plain[1] for mine, plain in pairs)
    found = {"cpu": round(middle, 4), "low": round(low, 4), "high": round(high, 4), "wall": round(wall, 4)}
    cpu = [statistics.median(pair[side][0] for pair in pairs) * 1e3 for side in (0, 1)]
    return found | {"ms": round(cpu[0], 2), "bare_ms": round(cpu[1], 2), "rounds": len(pairs)}


def measure(task: Task, *, quick: bool) -> dict[str, dict[str, float]]:
    """`Run` beside the bare loop, and for the small student the Trainer too."""
    small = task.batch == 128
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bare, run = bare_steps(task), run_steps(task, Path(folder) / "run")
        rounds = (60 if quick else 300) if small else (8 if quick else 40)
        plain = partial(block, bare)
        pairs = compare(partial(block, run), plain, rounds=rounds, steps=4 if small else 1)
        found["Run"] = ratios(pairs)
        if small:
            trainer = partial(trainer_block, task, folder=Path(folder) / "trainer")
            found["transformers Trainer"] = ratios(compare(trainer, plain, rounds=4 if quick else 16, steps=20))
    return found


def main() -> None:
    """Measures both tasks, prints a table, and ends with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer rounds, shorter text")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--only", choices=["cnn", "language"], help="one task only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/engine.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, dict[str, dict[str, float]]] = {}
    if options.only != "language":
        task = cnn_task()
        results[task.name] = measure(task, quick=options.quick)
    if options.only != "cnn":
        task = language_task(*((1, 64) if options.quick else (4, 128)))
        results[task.name] = measure(task, quick=options.quick)
    table = Table("task", "arm", "ms (CPU)", "bare ms", "CPU ratio", "quartiles", "wall ratio")
    for name, arms in results.items():
        for arm, r in arms.items():
            between = f"{r['low']:.3f} {r['high']:.3f}"
            table.add_row(
                name, arm, f"{r['ms']:.1f}", f"{r['bare_ms']:.1f}", f"{r['cpu']:.3f}", between, f"{r['wall']:.3f}"
            )
    Console(width=110).print(table)
    line = {"benchmark": "engine", "threads": options.threads, "quick": options.quick, "ratios": results}
    if options.save:
        path = Path(__file__).parent / "engine.json"
        before = json.loads(path.read_text(encoding="utf-8"))["ratios"] if path.exists() and options.only else {}
        saved = {**line, "ratios": {**before, **results}}
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
