"""The fused divergence against trl's two paths, the plain formula and the bare matrix products.

One step of a Jensen-Shannon divergence (β = 0.5) between a student and a frozen teacher, from hidden states through
both output heads, forward and backward, on one thread. Every figure comes from a fresh process that first warms up on a
few rows; the arms take turns. CPU seconds are medians; memory is the peak of the resident set above the inputs, without
the gradients that every arm has to return (of the hidden states and of the head). ``floor`` is the bare products over
the same chunks of rows: student forward, teacher forward, two backward.

    python benchmarks/divergence.py [--quick] [--rounds 3] [--peer-rounds 3] [--save] [--skip trl_dense ...]

At the largest size the peers run once. Without trl its arms are left out, and the dense one where the machine has not
twice the memory that it needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARMS = ("ours", "floor", "plain", "trl_chunked", "trl_dense")
VARIANTS = ("ours_half_masked", "ours_frozen_head", "ours_top_64")
SIZES = ((1024, 49_152, 576), (512, 151_936, 896), (4096, 49_152, 576))
QUICK = ((256, 16_384, 256),)
LARGE = 4096
DENSE_COPIES = 16  # float32 matrices of rows x vocabulary that trl's dense path holds, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size: under a minute")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and of the floor")
    parser.add_argument("--peer-rounds", type=int, default=3, help="of the others; one at the largest size")
    parser.add_argument("--save", action="store_true", help="write benchmarks/divergence.json and .md")
    parser.add_argument("--skip", nargs="*", default=[], help="arms to leave out")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        arm, dtype, *size = options.child
        print(json.dumps(_measure(arm, getattr(torch, dtype), *map(int, size))))
        return
    skip = set(options.skip) | (set() if importlib.util.find_spec("trl") else {"trl_chunked", "trl_dense"})
    if skip:
        print(f"left out: {', '.join(sorted(skip))}")
    found: dict[str, Any] = {}
    for rows, vocabulary, width in QUICK if options.quick else SIZES:
        for dtype in ("float32", "bfloat16"):
            arms = [arm for arm in ARMS if arm not in skip]
            if "trl_dense" in arms and 2 * DENSE_COPIES * rows * vocabulary * 4 > _available():
                print(f"trl_dense is left out at {rows} x {vocabulary}: not enough memory", flush=True)
                arms.remove("trl_dense")
            arms += VARIANTS if rows in (1024, 256) and dtype == "float32" else []
            rounds = 1 if options.quick else options.rounds
            peer_rounds = 1 if rows == LARGE else min(rounds, options.peer_rounds)
            figures = _rounds(arms, dtype, (rows, vocabulary, width), rounds, peer_rounds)
            found[f"{rows} x {vocabulary}, {dtype}"] = _ratios(figures)
            print(_table(f"{rows} x {vocabulary}, hidden {width}, {dtype}", figures), flush=True)
    if options.save:
        Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: row["ratios"] for name, row in found.items()}))


def _rounds(
    arms: list[str], dtype: str, size: tuple[int, int, int], rounds: int, peer_rounds: int
) -> dict[str, list[dict[str, float]]]:
    figures: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm in arms:
            if turn >= peer_rounds and arm not in ("ours", "floor"):
                continue
            words = [sys.executable, __file__, "--child", arm, dtype, *map(str, size)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["killed: out of memory?"])[-1]
                print(f"{arm} at {size}, {dtype} failed: {reason}", file=sys.stderr)
                continue
            figures[arm].append(json.loads(done.stdout.splitlines()[-1]))
    return {arm: taken for arm, taken in figures.items() if taken}


def _median(figures: list[dict[str, float]], name: str) -> float:
    return statistics.median(figure[name] for figure in figures)


def _ratios(figures: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What the arms took, and ours as a ratio: to the floor, and against the better of trl's paths."""
    arms = {
        arm: {"cpu_seconds": _median(taken, "cpu"), "peak_mib": _median(taken, "mib"), "loss": taken[0]["loss"]}
        for arm, taken in figures.items()
    }
    ours = arms["ours"]
    ratios = {"cpu_to_floor": ours["cpu_seconds"] / arms["floor"]["cpu_seconds"], "peak_mib": ours["peak_mib"]}
    peers = [arms[arm] for arm in ("trl_chunked", "trl_dense") if arm in arms]
    if peers:
        ratios["trl_cpu_to_ours"] = min(peer["cpu_seconds"] for peer in peers) / ours["cpu_seconds"]
        ratios["trl_memory_to_ours"] = min(peer["peak_mib"] for peer in peers) / ours["peak_mib"]
    if "plain" in arms:
        ratios["plain_cpu_to_ours"] = arms["plain"]["cpu_seconds"] / ours["cpu_seconds"]
    for arm in VARIANTS:
        if arm in arms:
            ratios[f"{arm}_cpu_to_ours"] = arms[arm]["cpu_seconds"] / ours["cpu_seconds"]
    return {"ratios": {name: round(ratio, 4) for name, ratio in ratios.items()}, "arms": arms}


def _table(title: str, figures: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"\n{title}", f"{'arm':<18}{'CPU s':>9}{'peak MiB':>11}{'loss a row':>14}"]
    for arm, taken in figures.items():
        lines.append(f"{arm:<18}{_median(taken, 'cpu'):>9.3f}{_median(taken, 'mib'):>11.0f}{taken[0]['loss']:>14.6f}")
    return "\n".join(lines)


def _measure(arm: str, dtype: torch.dtype, rows: int, vocabulary: int, width: int) -> dict[str, float]:
    """One step in this process: CPU seconds, peak memory above the inputs and gradients, and the loss a row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = [torch.randn(vocabulary, width).div_(math.sqrt(width)).to(dtype) for _ in range(2)]
    hidden = [(torch.randn(rows, width) * 3).to(dtype) for _ in range(2)]
    step = STEPS[arm.split("_")[0] if arm.startswith("ours") else arm]
    trained = [hidden[0].requires_grad_(), heads[0].requires_grad_("frozen" not in arm)]
    step(arm, *(states[:16].detach().requires_grad_(states.requires_grad) for states in hidden), *heads)
    for tensor in trained:
        tensor.grad = None
    before, started = _reset_peak(), time.process_time()
    loss = step(arm, *hidden, *heads)
    seconds = time.process_time() - started
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in trained if t.grad is not None)
    return {"cpu": seconds, "mib": (_status("VmHWM") - before) / 1024 - gradients / 2**20, "loss": loss}


def _available() -> int:
    """Bytes of memory that are free or can be freed (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def _reset_peak() -> int:
    """Forget the peak of the resident set (Linux), and give its size in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def _ours(arm: str, student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor) -> float:
    from preceptor.knowledge import Head, HiddenTargets, TopKTargets
    from preceptor.losses.divergences import divergence

    said: HiddenTargets | TopKTargets = HiddenTargets(teacher, Head(teacher_head))
    mask = None
    if "half_masked" in arm:
        mask = torch.arange(len(student)) % 2 == 0
    if "top" in arm:
        ids = torch.arange(64).repeat(len(student), 1)
        said = TopKTargets(ids, torch.full(ids.shape, math.log(0.9 / 64)))
    loss = divergence(student, Head(head), said, kind="jensen_shannon", beta=0.5, mask=mask)
    loss.sum.backward()
    return float(loss.sum.detach()) / int(loss.count)


def _floor(arm: str, student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor) -> float:
    from preceptor.losses import divergences, fused
    from preceptor.losses.rows import RowObjective

    objective = RowObjective("jensen_shannon", 0.5, 1.0, 1.0, 0.0)
    plan = fused.PassPlan(
        objective, "bucket", head.dtype, torch.float32, head.dtype, divergences.CHUNK_BYTES, compiled=True
    )
    chunk = fused.chunk_rows(len(student), len(head), plan, buffers=2)
    with torch.no_grad():
        z, t = (torch.empty(chunk, len(head), dtype=head.dtype) for _ in range(2))
        grad_hidden, grad_head = torch.empty_like(student), torch.zeros_like(head)
        for start in range(0, len(student), chunk):
            part = slice(start, min(start + chunk, len(student)))
            size = part.stop - part.start
            torch.mm(student[part], head.t(), out=z[:size])
            torch.mm(teacher[part], teacher_head.t(), out=t[:size])
            torch.mm(z[:size], head, out=grad_hidden[part])
            grad_head.addmm_(z[:size].t(), student[part])
    student.grad, head.grad = grad_hidden, grad_head
    return math.nan


def _plain(arm: str, student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor) -> float:
    s = torch.log_softmax((student @ head.t()).float(), -1)
    with torch.no_grad():
        t = torch.log_softmax((teacher @ teacher_head.t()).float(), -1)
    m = torch.logaddexp(s, t) - math.log(2)
    loss = 0.5 * (t.exp() * (t - m)).sum() + 0.5 * (s.exp() * (s - m)).sum()
    loss.backward()
    return float(loss.detach()) / len(student)


def _trl_dense(arm: str, student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor) -> float:
    from trl.experimental.gkd import GKDTrainer

    logits = student @ head.t()
    with torch.no_grad():
        taught = teacher @ teacher_head.t()
    labels = torch.zeros(1, len(student), dtype=torch.long)
    loss = GKDTrainer.generalized_jsd_loss(logits[None], taught[None], labels=labels, beta=0.5)
    loss.backward()
    return float(loss.detach())


def _trl_chunked(arm: str, student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor) -> float:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(student))
    loss, *_ = _chunked_divergence_loss(student[None], teacher[None], head, teacher_head, mask, 0.5)
    loss.backward()
    return float(loss.detach())


STEPS: dict[str, Callable[..., float]] = {
    "ours": _ours,
    "floor": _floor,
    "plain": _plain,
    "trl_dense": _trl_dense,
    "trl_chunked": _trl_chunked,
}


if __name__ == "__main__":
    main()
