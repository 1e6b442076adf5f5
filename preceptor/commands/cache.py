"""Capture a teacher's soft targets for a text once, for any number of students and epochs.

A cache holds a teacher's soft targets on disk, found by the content of token sequences, so that shuffling, appending
and several epochs need no bookkeeping. Three kinds: the last hidden states, quantised where the output head looks, with
the head kept once (the nearest by far for teachers of moderate width); the likeliest tokens with the mass of the
others; and unbiased samples. With the kind ``auto`` a sample of each is measured at the byte budget, and the nearest is
taken.

A capture that was made with DistillKit is converted by ``--distillkit FOLDER``, without the teacher's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from preceptor.cache.capture import CapturePlan, capture
from preceptor.cache.choice import Wanted
from preceptor.cache.distillkit import import_distillkit
from preceptor.cache.reading import Cache
from preceptor.data.encoding import encode
from preceptor.data.readers import read
from preceptor.distillation.lessons import recorded
from preceptor.errors import UserError
from preceptor.models.loading import load, load_tokenizer


@dataclass(frozen=True)
class Config:
    """What to capture, and how compactly."""

    output: str
    """Folder of the cache; one that was interrupted, or that gets new data, is continued."""
    data: str = ""
    """A file (JSON lines, JSON, Parquet), a folder, a data set on the hub, with responses; or a run's lessons.jsonl."""
    teacher: str = "smollm2"
    """A model's name, folder or GGUF file."""
    kind: Literal["auto", "top_k", "sampled", "hidden"] = "auto"
    """Kind of targets; auto measures a sample of each at the budget and prints why it chose."""
    budget: float = 200.0
    """Bytes a token, from which every parameter follows that is not given."""
    tolerance: float | None = None
    """hidden: largest KL(teacher ‖ decoded) of a row, in nats."""
    k: int = 2048
    """top_k: most tokens of a row."""
    mass: float | None = None
    """top_k: the smallest set of tokens that holds this mass is kept."""
    floor: float | None = None
    """top_k: no token below this probability is kept."""
    draws: int | None = None
    """sampled: draws of a row."""
    max_length: int = 1024
    """Tokens to which a sequence is cut; train with the same."""
    batch_tokens: int = 8192
    """Padded tokens of a teacher's batch."""
    sample: int = 16384
    """Response tokens on which the encoding is fitted and measured before the capture."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The teacher's parameters."""
    distillkit: str = ""
    """Folder of a capture made with DistillKit, to convert to top_k; with ``data``, only the sequences of that text."""
    split: str = "train"
    """Split of a data set on the hub."""
    limit: int | None = None
    """Examples to read; all by default."""


def main(config: Config) -> int:
    """Run ``preceptor cache``: capture, then print what the cache holds.

    Raises:
        UserError: bad settings or data, another cache in the folder, a full disk.
    """
    if config.batch_tokens < 1 or config.sample < 64:
        raise UserError("batch_tokens must be at least 1 and sample at least 64 tokens.")
    if not config.data and not config.distillkit:
        raise UserError("There is nothing to capture: give a text with --data, or a capture of DistillKit's.")
    summary = (_convert(config) if config.distillkit else _capture(config)).summary()
    print(
        f"{config.output}: {summary['kind']}, {summary['sequences']} sequences, {summary['tokens']} response tokens, "
        f"{summary['bytes_per_token']:.1f} bytes a token with the index, KL(teacher ‖ decoded) {summary['kl']:.2g} "
        f"nat, mass {summary['mass']:.4f}."
    )
    return 0


def _capture(config: Config) -> Cache:
    wanted = Wanted(config.budget, config.k, config.mass, config.floor, config.draws, config.tolerance)
    sequences = recorded(config.data)
    examples = [] if sequences else read(config.data, split=config.split, limit=config.limit)
    teacher = load(config.teacher, dtype=config.dtype)
    sequences = sequences or encode(examples, teacher.tokenizer, max_length=config.max_length)
    plan = CapturePlan(wanted, config.kind, config.batch_tokens, config.sample)
    return capture(teacher, sequences, config.output, name=config.teacher, max_length=config.max_length, plan=plan)


def _convert(config: Config) -> Cache:
    if config.kind not in ("auto", "top_k"):
        raise UserError(f"A capture of DistillKit's holds the likeliest tokens: give --kind top_k, not {config.kind}.")
    tokenizer = load_tokenizer(config.teacher)
    sequences = recorded(config.data) if config.data else None
    if config.data and not sequences:
        examples = read(config.data, split=config.split, limit=config.limit)
        sequences = encode(examples, tokenizer, max_length=config.max_length)
    return import_distillkit(
        config.distillkit,
        config.output,
        tokenizer=tokenizer,
        teacher=config.teacher,
        max_length=config.max_length,
        sequences=sequences,
    )
