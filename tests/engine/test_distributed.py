"""Two processes under `accelerate launch` (gloo, CPU) equal one: DDP, FSDP2, uneven batches, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from preceptor.engine.run import Run
from preceptor.engine.settings import Training

WORDS = 29
# 21 examples in batches of 8 leave 5, and 17 in batches of 8 leave 1: a process then has none.
SETTINGS = Training(epochs=2, batch_size=8, accumulate=3, learning_rate=0.02, weight_decay=0.1, save_every=2, warmup=2)
KINDS = ("ddp", "fsdp2")


class Reader(nn.Module):
    """A small causal transformer with tied embeddings; its loss is taken inside ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]).to(hidden)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


class Book:
    """Which process took which step: something that differs from process to process."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def note(self, rank: int, step: int) -> None:
        if [rank, step] not in self.rows:
            self.rows.append([rank, step])

    def state_dict(self) -> dict[str, list[list[int]]]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, list[list[int]]]) -> None:
        self.rows = state["rows"]


def learn(
    folder: Path,
    examples: int,
    training: Training,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    processes: int = 1,
) -> None:
    torch.manual_seed(11)
    rank = int(os.environ.get("RANK", "0"))
    # Double, since the keys' bias has no gradient but rounding, which Adam would blow up to a step in single precision.
    student, teacher = Reader().double(), Reader().double().requires_grad_(False).eval()
    for parameter in student.parameters():
        # DDP and FSDP2 take the first process's weights, whatever the others were made with.
        parameter.data += rank
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(0, WORDS, (examples, 9), generator=generator)
    lengths = torch.randint(2, 9, (examples,), generator=generator)
    run = Run(training, student=student, folder=folder, resume=resume)
    teacher = run.shard(teacher)
    book = Book()
    run.remember("book", book, apart=True)
    # Each process goes on with the rows that it has seen itself; alone it takes up those of the main one.
    assert book.rows == [[rank, step] for step in range(run.step)]
    exchanges: list[tuple[int, bool]] = []
    assert run.accelerator.num_processes == processes
    if processes == 2:
        assert isinstance(run.student, FSDPModule if training.shard else DistributedDataParallel)
        assert isinstance(teacher, FSDPModule) == training.shard
    for rows in run.batches(range(examples), list):
        if run.step == stop_at:
            break
        book.note(rank, run.step)
        if isinstance(run.student, DistributedDataParallel):
            exchanges.append((run.step, run.student.require_backward_grad_sync))
        ids, labels = data[rows, :-1], data[rows, 1:].clone()
        labels[torch.arange(8)[None] >= lengths[rows][:, None]] = -100
        logits, targets = run.student(ids), teacher(ids).softmax(-1)
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        soft = -(targets * logits.log_softmax(-1)).sum(-1)[labels >= 0].sum()
        run.update(nll + soft, (labels >= 0).sum(), {"soft": soft})
    else:
        run.finish()
        assert len({step for step, exchanged in exchanges if exchanged}) == sum(on for _, on in exchanges)
        assert not exchanges or any(not on for _, on in exchanges)
        state = run.state_dict()
        if run.is_main:
            save_file({name: value.clone() for name, value in state.items()}, folder / "student.safetensors")


def in_two_processes(folder: Path) -> None:
    """All that the tests look at, in one launch: whole runs, and stopped ones of which all but one are resumed."""
    for shard in (False, True):
        training, name = dataclasses.replace(SETTINGS, shard=shard), KINDS[shard]
        learn(folder / name / "whole", 21, training, processes=2)
        learn(folder / name / "stopped", 17, training, processes=2, stop_at=3)
        assert not (folder / name / "stopped" / "student.safetensors").exists()
        learn(folder / name / "stopped", 17, training, processes=2, resume=True)
        learn(folder / name / "left", 17, training, processes=2, stop_at=3)


pytestmark = pytest.mark.slow  # the first test starts two processes


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", __file__]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def same(folder: Path, other: Path) -> None:
    one, two = load_file(folder / "student.safetensors"), load_file(other / "student.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-8)
    for line, expected in zip(lines(folder), lines(other), strict=True):
        for name in ("step", "loss", "soft", "count", "gradient_norm", "learning_rate"):
            assert line[name] == pytest.approx(expected[name], rel=1e-8), name


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(launched: Path, tmp_path: Path, kind: str) -> None:
    learn(tmp_path / "one", 21, SETTINGS)
    assert len(lines(tmp_path / "one")) == 6
    same(launched / kind / "whole", tmp_path / "one")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_resume(launched: Path, tmp_path: Path, kind: str) -> None:
    learn(tmp_path / "one", 17, SETTINGS)
    same(launched / kind / "stopped", tmp_path / "one")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_two_processes_saved_one_takes_up(launched: Path, tmp_path: Path, kind: str) -> None:
    learn(tmp_path / "one", 17, SETTINGS)
    learn(launched / kind / "left", 17, dataclasses.replace(SETTINGS, shard=kind == "fsdp2"), resume=True)
    same(launched / kind / "left", tmp_path / "one")


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_two_processes(Path(sys.argv[1]))
