"""The compiled form of `rows` for CPUs: built from ``rows.c`` on first use, kept in the user's cache folder.

Without a C compiler, or where the build does not reproduce `rows` on a small example, there is no kernel and the
PyTorch form is used; `status` gives which and why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from preceptor.losses.rows import STATS, Kind, Logits, RowObjective, RowTargets, bucket_rows, dense_rows, with_tail

FLAGS = (
    "-O3",
    "-std=c11",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)


NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


TYPES = {torch.float32: 0, torch.bfloat16: 1}


MODES = ("labels", "dense", "bucket", "sampled")


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("vocabulary", "k")),
        *((n, ctypes.c_int32) for n in ("kind", "mode", "student_type", "teacher_type", "gradient", "cross_entropy")),
        *((name, ctypes.c_float) for name in ("mix", "temperature", "gain", "label_gain")),
        *((name, ctypes.c_float) for name in ("student_scale", "student_cap", "teacher_scale", "teacher_cap")),
    ]


def usable(product: Tensor) -> bool:
    """Whether the kernel takes these logits: on a CPU, float32 or bfloat16, and built."""
    return product.device.type == "cpu" and product.dtype in TYPES and _library()[0] is not None


def status() -> str:
    """One sentence for `doctor`: whether the kernel is in use, and why not."""
    return _library()[1]


def score(
    product: Tensor, form: Logits, targets: RowTargets, labels: Tensor | None, objective: RowObjective, *,
    gradient: bool,
) -> Tensor:  # fmt: skip
    """As `rows.dense_rows` and its siblings: statistics (rows, 5); ``product`` becomes its gradient."""
    library = _library()[0]
    if library is None:
        raise RuntimeError(status())
    return _run(library, product, form, targets, labels, objective, gradient=gradient)


def _run(
    library: ctypes.CDLL, product: Tensor, form: Logits, targets: RowTargets, labels: Tensor | None,
    objective: RowObjective, *, gradient: bool,
) -> Tensor:  # fmt: skip
    rows, vocabulary = product.shape
    logits = _plain(targets.logits, TYPES)
    ids = None if targets.ids is None else targets.ids.contiguous()
    values = None if targets.values is None else targets.values.to(torch.float32).contiguous()
    labels = None if labels is None else labels.contiguous()
    job = _Job(
        vocabulary=vocabulary,
        k=0 if ids is None else ids.shape[-1],
        kind=get_args(Kind).index(objective.kind),
        mode=MODES.index(targets.mode),
        student_type=TYPES[product.dtype],
        teacher_type=0 if logits is None else TYPES[logits.dtype],
        gradient=gradient,
        cross_entropy=labels is not None,
        mix=objective.mix,
        temperature=objective.temperature,
        gain=objective.gain,
        label_gain=objective.label_gain,
        student_scale=form.scale,
        student_cap=form.softcap or 0.0,
        teacher_scale=targets.form.scale,
        teacher_cap=targets.form.softcap or 0.0,
    )
    stats = torch.zeros(rows, len(STATS), dtype=torch.float64, device="cpu")
    where = [
        None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (product, logits, ids, values, labels, stats)
    ]

    def part(first: int, last: int) -> int:
        return int(library.divergence_rows(ctypes.byref(job), first, last, *where))

    threads = min(torch.get_num_threads(), rows)
    cuts = [rows * i // max(threads, 1) for i in range(threads + 1)]
    if threads < 2:
        failed = part(0, rows)
    else:
        with ThreadPoolExecutor(threads) as pool:
            failed = any(pool.map(part, cuts[:-1], cuts[1:]))
    if failed:
        raise MemoryError(f"No memory for {4 * vocabulary * 4} bytes of scratch.")
    return stats


def _plain(logits: Tensor | None, types: dict[torch.dtype, int]) -> Tensor | None:
    if logits is None:
        return None
    return (logits if logits.dtype in types else logits.float()).contiguous()


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded kernel and a sentence about it."""
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        return None, "Divergences run in PyTorch: there is no C compiler (cc, gcc, clang) to build their CPU kernel."
    source = Path(__file__).with_name("rows.c")
    try:
        path = _build(compiler, source)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"Divergences run in PyTorch: their CPU kernel could not be built ({error})."
    library.divergence_rows.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 6]
    library.divergence_rows.restype = ctypes.c_int
    if not _agrees(library):
        return None, f"Divergences run in PyTorch: their CPU kernel, as {compiler} built it, computes something else."
    return library, f"Divergences run in a compiled CPU kernel ({path})."


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether a fresh build gives the values and gradients of `rows` on two rows of 70 logits, kind by kind."""
    student = torch.linspace(-9.0, 7.0, 140, dtype=torch.float32, device="cpu").sin().mul(6.0).view(2, 70)
    teacher = torch.linspace(-5.0, 8.0, 140, dtype=torch.float32, device="cpu").cos().mul(6.0).view(2, 70)
    labels = torch.tensor([3, 69], device="cpu")
    kept, ids = torch.log_softmax(teacher, -1).topk(5)
    form = Logits(0.8, 9.0)
    targets = (RowTargets("dense", logits=teacher), RowTargets("bucket", ids=ids, values=with_tail(kept, 70, 1.5)))
    cases = [(kind, one, dtype) for kind in get_args(Kind) for one in targets for dtype in TYPES]
    for kind, one, dtype in cases:
        objective = RowObjective(kind, mix=0.3, temperature=1.5, gain=1.0, label_gain=0.5)
        ours, theirs = student.to(dtype, copy=True), student.to(dtype, copy=True)
        stats = _run(library, ours, form, one, labels, objective, gradient=True)
        rows = dense_rows if one.mode == "dense" else bucket_rows
        wanted = rows(theirs, form, one, labels, objective, work=torch.float32, gradient=True)
        near = 1e-4 if dtype == torch.float32 else 1e-2
        if not (torch.allclose(stats.float(), wanted, atol=1e-4) and torch.allclose(ours, theirs, near, near)):
            return False
    return True


def _build(compiler: str, source: Path) -> Path:
    """Compile once for this source, compiler and processor; written beside and renamed, so that racing is safe."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preceptor"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    about = (version, platform.machine(), _processor(), *FLAGS)
    name = hashlib.sha256(source.read_bytes() + "\n".join(about).encode()).hexdigest()[:16]
    path = folder / f"rows-{name}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, beside = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        for native in NATIVE:
            command = [compiler, *FLAGS, *native, str(source), "-o", beside, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(beside, path)
                return path
        raise OSError(done.stderr.strip().splitlines()[0] if done.stderr else f"{compiler} failed")
    finally:
        Path(beside).unlink(missing_ok=True)


def _processor() -> str:
    """What -march=native depends on, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))
