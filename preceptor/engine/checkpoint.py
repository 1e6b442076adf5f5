"""Checkpoints: a folder for each saved step, written beside and renamed, with safetensors and JSON only.

A checkpoint that can be seen under its own name is whole: its files are on the disk before the folder is renamed, and
the header lists their sizes. An unfinished one starts with a dot and is removed by the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from preceptor.files import writable

WEIGHTS = "state.safetensors"


HEADER = "checkpoint.json"


_SAMPLE = 4096


class RandomState(TypedDict):
    """The states of the generators of one process; ``cuda`` is None without a device."""

    torch: Tensor
    cuda: Tensor | None
    numpy: list[Any]
    python: list[Any]


class CheckpointHeader(TypedDict, total=False):
    """What stands in a checkpoint's JSON; states are nested lists that name tensors (`take_tensors`).

    ``random`` and ``apart`` hold one state for each process, ``remembered`` one for all; ``frozen`` is a fingerprint of
    each module's frozen weights; ``metrics_bytes`` is the length of metrics.jsonl.
    """

    step: int
    files: dict[str, int]
    random: list[Any]
    remembered: dict[str, Any]
    apart: list[Any]
    frozen: dict[str, str]
    metrics_bytes: int


def write(folder: Path, step: int, tensors: dict[str, Tensor], header: CheckpointHeader, *, keep: int) -> Path:
    """Writes ``folder/step-00000100`` so that it is there whole or not at all, then removes all but the newest `keep`.

    Args:
        folder: where the checkpoints of one run lie; made if absent.
        step: optimizer steps done.
        tensors: what goes into safetensors; contiguous, on any device.
        header: what is not a tensor; ``step`` and ``files`` (name to bytes) are added.
        keep: how many whole checkpoints stay.

    Raises:
        UserError: the disk is full or the folder cannot be written; former checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".step-{step:08d}"
    with writable(folder, f"the checkpoint of step {step}", partial):
        sweep(folder)
        partial.mkdir(parents=True)
        save_file(tensors, str(partial / WEIGHTS))
        files = {WEIGHTS: (partial / WEIGHTS).stat().st_size}
        (partial / HEADER).write_text(json.dumps({**header, "step": step, "files": files}), encoding="utf-8")
        for name in (WEIGHTS, HEADER, "."):
            _flush_to_disk(partial / name)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _flush_to_disk(folder)
    for old in _by_age(folder)[keep:]:
        shutil.rmtree(old)
    return final


def sweep(folder: Path) -> None:
    """Removes what a killed run left half-written."""
    for partial in folder.glob(".step-*"):
        shutil.rmtree(partial)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all there at their full size, or None."""
    return next((path for path in _by_age(folder) if _whole(path)), None)


def read_header(path: Path) -> CheckpointHeader:
    """The JSON header of the checkpoint at `path`."""
    header: CheckpointHeader = json.loads((path / HEADER).read_text(encoding="utf-8"))
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint at `path`, on the CPU."""
    with safe_open(str(path / WEIGHTS), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Moves every tensor of a nested state into `tensors` and returns the rest, ready for JSON.

    Raises:
        TypeError: a value is neither a tensor, nor JSON, nor a list or dict of these.
    """
    if isinstance(value, Tensor):
        tensors[name] = full(value).detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[key, take_tensors(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"items": pairs}
    if isinstance(value, (list, tuple)):
        return [take_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: states hold tensors, numbers, text, lists and dicts.")


def put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The nested state that `take_tensors` took apart (tuples come back as lists)."""
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: put_tensors(item, tensors) for key, item in value["items"]}
    if isinstance(value, list):
        return [put_tensors(item, tensors) for item in value]
    return value


def random_state() -> RandomState:
    """The states of the generators of torch (CPU and the current CUDA device), numpy and Python, of this process."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, state, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(state), gauss_next],
    }


def restore_random_state(state: RandomState) -> None:
    """Puts the generators back into the states that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, inner, gauss_next = state["python"]
    random.setstate((version, tuple(inner), gauss_next))


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, types and up to 4096 evenly spaced values of each tensor.

    It shows whether weights that a checkpoint leaves out (the frozen base under an adapter) are those it was made with,
    without reading all of them.
    """
    digest = hashlib.sha256()
    for name, value in parameters:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = full(value).detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor (every process must call this), or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device of `target`, and sharded as `target` is if it has its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor) and value.shape == target.shape:
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _by_age(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _whole(path: Path) -> bool:
    try:
        files: dict[str, int] = read_header(path)["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False
