"""A run killed at any instant and resumed ends as one never stopped: same bytes, one metrics line a step."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from preceptor.engine import checkpoint
from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError

TIMED = ("items_per_second", "count_per_second", "memory_mib")
SETTINGS = Training(epochs=4, batch_size=8, accumulate=2, learning_rate=3e-3, warmup=3, save_every=3, evaluate_every=4)


class Reader(nn.Module):
    """A small causal transformer with dropout."""

    def __init__(self, width: int = 16, vocabulary: int = 23) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.2, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(self.embedding(ids), mask=mask, is_causal=True))


class Momentum:
    """A teacher that follows the student, and counts."""

    def __init__(self, student: nn.Module) -> None:
        self.weights = {name: value.clone() for name, value in student.state_dict().items()}
        self.followed = 0

    def follow(self, student: nn.Module) -> None:
        self.followed += 1
        for name, value in student.state_dict().items():
            self.weights[name].lerp_(value, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "followed": self.followed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.followed = state["weights"], state["followed"]


def learn(
    folder: Path,
    *,
    resume: bool,
    width: int = 16,
    training: Training = SETTINGS,
    watch: Callable[[FrameType, str, object], None] | None = None,
) -> None:
    """Trains with every source of chance in the loop: dropout, torch, numpy and Python; `watch` sees each call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = Reader(width)
    data = torch.randint(0, 23, (37, 12), generator=torch.Generator().manual_seed(1))
    run = Run(training, student=student, folder=folder, resume=resume)
    teacher = Momentum(student)
    run.remember("teacher", teacher)
    torch.rand(3 if run.step else 5)
    sys.setprofile(watch)
    for rows in run.steps(range(37)):
        keep = [row for row in rows if np.random.rand() < 0.9] or rows
        for ids in run.split(keep, lambda part: data[part]):
            noise = random.random() * 0.01
            logits = run.student(ids[:, :-1]) + noise * torch.randn(23)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            run.update(loss, ids[:, 1:].numel(), {"noise": noise * len(ids)})
        teacher.follow(run.student)
        if run.evaluate_due:
            run.log(followed=teacher.followed, drawn=float(torch.rand(())))
    run.finish()
    sys.setprofile(None)
    (folder / "student").mkdir(exist_ok=True)
    save_file(run.state_dict(), folder / "student" / "model.safetensors")
    save_file(teacher.weights, folder / "student" / "teacher.safetensors")


def count_events(folder: Path, report: Path) -> None:
    """Trains once and writes down how many calls a run and one save make."""
    counts = {"all": 0, "save": 0, "saves": 0}

    def step(inside: bool, entered: bool) -> None:
        counts["all"] += 1
        counts["save"] += inside
        counts["saves"] += entered

    learn(folder, resume=False, watch=watcher(step))
    report.write_text(json.dumps(counts))


def learn_until_killed(folder: Path, resume: bool, at: int, in_save: bool) -> None:
    """Trains, and dies of SIGKILL at call number `at` of the run, or of its saves."""
    seen = [0]

    def step(inside: bool, entered: bool) -> None:
        seen[0] += inside or not in_save
        if seen[0] >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    learn(folder, resume=resume, watch=watcher(step))


def watcher(step: Callable[[bool, bool], None]) -> Callable[[FrameType, str, object], None]:
    """Calls `step(inside a save, entering one)` at every call and return, of Python and of C."""
    save: CodeType = checkpoint.write.__code__
    inside = [False]

    def look(frame: FrameType, event: str, argument: object) -> None:
        entered = event == "call" and frame.f_code is save
        inside[0] = (inside[0] or entered) and not (event == "return" and frame.f_code is save)
        step(inside[0], entered)

    return look


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preceptor.engine.run"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def finish(target: Callable[..., None], *arguments: Any) -> int | None:
    process = start(target, *arguments)
    process.join(120)
    return process.exitcode


def steady(folder: Path) -> list[dict[str, float]]:
    """The metrics without those that a clock makes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A run never stopped, and its numbers of calls."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(count_events, folder / "run", folder / "counts.json") == 0
    return folder / "run", json.loads((folder / "counts.json").read_text())


def same(folder: Path, other: Path) -> None:
    for name in ("model", "teacher"):
        one, two = ((path / "student" / f"{name}.safetensors").read_bytes() for path in (folder, other))
        assert one == two
    assert steady(folder) == steady(other)
    assert [line["step"] for line in steady(folder)] == list(range(1, 21))
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_five_kills_at_random_points_change_nothing(whole: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    reference, counts = whole
    chance = random.SystemRandom()
    one_save = counts["save"] // counts["saves"]
    points = [(chance.randint(1, counts["all"] // 6), False) for _ in range(3)]
    points += [(chance.randint(1, one_save), True) for _ in range(2)]
    chance.shuffle(points)
    print("killed at (call, of saves only):", points)
    for attempt, (at, in_save) in enumerate(points):
        assert finish(learn_until_killed, tmp_path / "run", attempt > 0, at, in_save) == -signal.SIGKILL
    assert finish(run_on, tmp_path / "run") == 0
    same(tmp_path / "run", reference)


def run_on(folder: Path) -> None:
    learn(folder, resume=True)


@pytest.mark.parametrize("part", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_a_kill_inside_a_save_changes_nothing(whole: tuple[Path, dict[str, int]], tmp_path: Path, part: float) -> None:
    """The third save of the run is cut at five places, from its first call to its last."""
    reference, counts = whole
    one_save = counts["save"] / counts["saves"]
    at = int(one_save * (2 + part))
    assert finish(learn_until_killed, tmp_path / "run", False, at, True) == -signal.SIGKILL
    assert not (tmp_path / "run" / "student").exists()
    assert finish(run_on, tmp_path / "run") == 0
    same(tmp_path / "run", reference)


def learn_wide(folder: Path, resume: bool) -> None:
    learn(folder, resume=resume, width=256, training=dataclasses.replace(SETTINGS, epochs=None, steps=3, save_every=2))


def test_a_kill_while_the_weights_are_written_leaves_no_checkpoint_to_see(tmp_path: Path) -> None:
    """From outside and at no call: as soon as the unfinished file has bytes, the process is gone."""
    process = start(learn_wide, tmp_path / "run", False)
    partial = tmp_path / "run" / "checkpoints" / ".step-00000002" / checkpoint.WEIGHTS
    while process.is_alive() and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.0002)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None or not partial.exists()
    assert finish(learn_wide, tmp_path / "run", True) == 0
    assert finish(learn_wide, tmp_path / "whole", False) == 0
    one, two = ((tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("run", "whole"))
    assert one == two
    assert steady(tmp_path / "run") == steady(tmp_path / "whole")


def small(folder: Path, *, resume: bool = False, steps: int = 6, student: nn.Module | None = None) -> Run:
    torch.manual_seed(0)
    student = student or nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    training = Training(steps=steps, batch_size=4, save_every=1, keep=3, schedule="constant")
    run = Run(training, student=student, folder=folder, resume=resume)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
    for rows in run.batches(range(16), lambda rows: x[rows]):
        run.update(run.student(rows).square().sum(), len(rows))
    return run


def test_the_last_ones_are_kept_and_hold_safetensors_and_json_only(tmp_path: Path) -> None:
    small(tmp_path).finish()
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000004", "step-00000005", "step-00000006"]
    for folder in folders:
        names = sorted(path.name for path in (tmp_path / "checkpoints" / folder).iterdir())
        assert names == [checkpoint.HEADER, checkpoint.WEIGHTS]
    tensors = checkpoint.read_tensors(tmp_path / "checkpoints" / folders[-1])
    assert {"student.1.running_mean", "student:exp_avg:0.weight", "random.0.torch"} <= tensors.keys()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    small(tmp_path).finish()
    path = tmp_path / "checkpoints" / "step-00000006" / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "checkpoints" / "step-00000005" / checkpoint.HEADER).write_text("{")
    assert checkpoint.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000004"
    before = [line["step"] for line in steady(tmp_path)]
    run = small(tmp_path, resume=True)
    run.finish()
    assert run.step == 6
    assert [line["step"] for line in steady(tmp_path)] == before == [1, 2, 3, 4, 5, 6]
    assert checkpoint.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000006"


def test_a_finished_run_resumes_to_nothing_to_do(tmp_path: Path) -> None:
    first = small(tmp_path)
    first.finish()
    again = small(tmp_path, resume=True)
    again.finish()
    assert len(steady(tmp_path)) == 6
    for one, two in zip(first.unwrapped.parameters(), again.unwrapped.parameters(), strict=True):
        assert torch.equal(one, two)


def test_lines_written_past_the_checkpoint_are_cut_and_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "stopped"

    def go(folder: Path, *, resume: bool, stop_at: int | None) -> None:
        torch.manual_seed(0)
        training = Training(steps=7, batch_size=4, save_every=3)
        run = Run(training, student=nn.Linear(4, 1), folder=folder, resume=resume)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
        for rows in run.batches(range(16), lambda rows: x[rows]):
            if run.step == stop_at:
                raise InterruptedError
            run.update(run.student(rows).square().sum(), len(rows))
        run.log(after=1.0)
        run.finish()

    with pytest.raises(InterruptedError):
        go(folder, resume=False, stop_at=5)
    assert [line["step"] for line in steady(folder)] == [1, 2, 3, 4, 5]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    go(folder, resume=True, stop_at=None)
    go(tmp_path / "whole", resume=False, stop_at=None)
    assert steady(folder) == steady(tmp_path / "whole")
    assert [line["step"] for line in steady(folder)] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_a_student_of_another_shape_is_refused(tmp_path: Path) -> None:
    small(tmp_path).finish()
    other = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 1))
    with pytest.raises(
        UserError, match=r"0\.weight of the student has the shape \(6, 4\) in the checkpoint, not \(7, 4\)"
    ):
        small(tmp_path, resume=True, student=other)


def adapted(seed: int) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 1))
    torch.manual_seed(9)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))


def test_an_adapter_is_saved_without_its_base_and_finds_it_again(tmp_path: Path) -> None:
    small(tmp_path, student=adapted(0), steps=3).finish()
    tensors = checkpoint.read_tensors(tmp_path / "checkpoints" / "step-00000003")
    learned = [name for name in tensors if name.startswith("student.")]
    assert len(learned) == 4
    assert all("lora_" in name for name in learned)
    (tmp_path / "config.json").unlink()
    again = small(tmp_path, student=adapted(0), steps=5, resume=True)
    assert again.step == 5
    again.finish()
    with pytest.raises(UserError, match="frozen weights are not those"):
        small(tmp_path, student=adapted(1), steps=5, resume=True)


def learn_on_a_full_disk(folder: Path, report: Path) -> None:
    """Saves once, then no file may grow beyond 8 KiB: what a full disk or a quota does."""
    run = small(folder, steps=1)
    run.finish()
    (folder / "config.json").unlink()
    before = {path.name: (path / checkpoint.WEIGHTS).read_bytes() for path in (folder / "checkpoints").iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        small(folder, steps=3, resume=True)
        message = "nothing"
    except UserError as error:
        message = str(error)
    after = {path.name: (path / checkpoint.WEIGHTS).read_bytes() for path in (folder / "checkpoints").iterdir()}
    report.write_text(json.dumps({"message": message, "untouched": before == after}))


def test_a_full_disk_is_one_sentence_and_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    assert finish(learn_on_a_full_disk, tmp_path / "run", tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["message"].startswith("No room on the disk for the checkpoint of step 2")
    assert "--resume" in report["message"]
    assert report["untouched"]
    run = small(tmp_path / "run", steps=3, resume=True)
    assert run.step == 3
    run.finish()


def learn_without_permission(folder: Path, report: Path) -> None:
    """As somebody who may not write there; root may write anywhere, so it becomes nobody first."""
    messages = []
    with report.open("w") as file:
        if os.geteuid() == 0:
            os.setuid(65534)
        for place in (folder, folder / "closed" / "run"):
            try:
                small(place)
            except UserError as error:
                messages.append(str(error))
        json.dump(messages, file)


def test_a_folder_without_permission_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert finish(learn_without_permission, tmp_path, tmp_path / "report.json") == 0
    messages = json.loads((tmp_path / "report.json").read_text())
    assert messages
    assert all("Permission denied" in text and "choose a folder that you may write" in text for text in messages)
    assert not list((tmp_path / "closed").iterdir())


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"set": {1, 2}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    run = Run(Training(steps=1), student=nn.Linear(4, 1), folder=tmp_path)
    run.remember("odd", Odd())
    with pytest.raises(TypeError, match=r"remembered\.odd\.set is a set"):
        run.finish()
