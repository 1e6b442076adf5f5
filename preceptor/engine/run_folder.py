"""A run's folder: its settings in config.json, its method and machine in environment.json; one folder holds one run."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from preceptor.catalogue import address_of, name_of
from preceptor.errors import UserError
from preceptor.files import writable, write_whole

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "datasets")


_FREE = ("resume", "output")


def open_folder(folder: Path, config: Any, *, resume: bool) -> None:
    """Makes the run's folder, or checks that it holds this same run; changes no file that is there.

    A recipe calls `check_folder` before it loads anything heavy.

    Args:
        folder: the run's folder.
        config: a dataclass. Its fields ``resume`` and ``output`` may differ from those on the disk.
        resume: the run may be there already.

    Raises:
        UserError: the folder holds another run, or a run and `resume` is False, or it cannot be written.
    """
    path = folder / "config.json"
    text = resolved(config)
    check_folder(folder, config, resume=resume)
    if path.exists():
        return
    with writable(folder, "a run"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
        write_whole(folder / "environment.json", json.dumps({"method": method_of(config)}) + "\n")


def check_folder(folder: Path, config: Any, *, resume: bool) -> None:
    """Refuses what `open_folder` refuses, before anything is loaded; writes nothing.

    Raises:
        UserError: the folder is a file, may not be read, holds another run, or holds a run and `resume` is False.
    """
    path = folder / "config.json"
    with writable(folder, "a run"):
        if folder.is_file():
            raise UserError(f"{folder} is a file: choose a folder with --output.")
        there = path.exists()
    if there:
        _same_run(folder, json.loads(resolved(config)), path, resume=resume)
        _same_method(folder, config)


def resolved(config: Any) -> str:
    """A config dataclass as JSON, every default filled in."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def method_of(config: Any) -> str | None:
    """The address (``gkd``, ``./mine``) of the method whose recipe defines the class of ``config``, or None."""
    module = type(config).__module__
    if module.startswith("preceptor.methods."):
        return module.split(".")[2]
    recipe = sys.modules.get(f"{module.split('.')[0]}.recipe") or sys.modules.get(module)
    file = getattr(recipe, "__file__", None)
    return address_of(Path(file)) if file and hasattr(recipe, "Config") and hasattr(recipe, "main") else None


def write_environment(
    folder: Path, config: Any, device: torch.device, seed: int, provenance: Mapping[str, str]
) -> None:
    """Writes environment.json: method, versions, device, threads, commit, seed, and the hashes that a recipe knows."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    environment = {
        "method": method_of(config),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {package: _version(package) for package in ("preceptor", *_PACKAGES)},
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "seed": seed,
        "provenance": dict(provenance),
    }
    with writable(folder, "environment.json"):
        write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _same_run(folder: Path, config: dict[str, Any], path: Path, *, resume: bool) -> None:
    if not resume:
        raise UserError(f"{folder} holds a run already: go on with --resume, or choose another folder.")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the settings of a run: choose another folder.") from error
    if not isinstance(there, dict) or set(there) != set(config):
        raise UserError(f"{folder} holds a run of another method or of another version: choose another folder.")
    different = _difference(there, config)
    if different:
        raise UserError(
            f"{folder} holds another run ({different}): resume it with its own settings, or choose another folder."
        )


def _same_method(folder: Path, config: Any) -> None:
    try:
        there = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # an older run, or one that was stopped before it wrote down its method
    here = method_of(config)
    if there and here and name_of(there) != name_of(here):
        raise UserError(f"{folder} holds a run of {name_of(there)}, not of {name_of(here)}: choose another folder.")


def _difference(there: Any, here: Any, name: str = "") -> str | None:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in {**there, **here} if name or key not in _FREE]
        differences = (_difference(there.get(key), here.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return next((text for text in differences if text), None)
    return None if there == here else f"{name} is {there!r} there and {here!r} here"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
