"""Bytes a token against KL(teacher ‖ decoded), for the three kinds of cache and for DistillKit's compression.

The text is GSM8K (questions with the answers people wrote) under SmolLM2's chat template; encodings are fitted on other
sequences than those they are measured on. The teacher runs in bfloat16, its head and every KL in float32. A truncated
distribution is read alike for everyone: the mass that is not listed is spread evenly over the tokens not listed; for
DistillKit spreading it by the tokens' mean probability is tried too, and the better of the two counts. It is measured
with the settings that it recommends, and at four sizes with the best of 31 settings on the sample. Our bytes include
row lengths and the index; DistillKit's are its payload alone.

    git clone https://github.com/arcee-ai/distillkit
    python benchmarks/cache.py --distillkit distillkit [--quick] [--work FOLDER] [--save]

What is finished is kept in the work folder, so that a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from preceptor.cache import Cache, CapturePlan, Wanted, capture
from preceptor.cache.choice import fit
from preceptor.cache.codecs import codebook, codec_from, encode
from preceptor.cache.decoding_error import LogProbs
from preceptor.cache.soft import kl_to_topk
from preceptor.cache.store import ENTRY
from preceptor.data.embedded_prompts import make_prompts
from preceptor.data.encoding import encode as tokenise
from preceptor.data.readers import Example
from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.distillation.teachers import CachedTeacher, FrozenTeacher, Teacher
from preceptor.knowledge import Head, TopKTargets
from preceptor.losses.divergences import divergence
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student

DATA = Path(os.environ.get("PRECEPTOR_DATA") or "nowhere") / "gsm8k" / "train.jsonl"
BUDGETS = {"hidden": (92, 288, 432, 578), "top_k": (25, 50, 100, 200), "sampled": (25, 50, 100)}
# DistillKit's settings as it recommends them at about 114 and 300 bytes: k, values kept exactly, terms, normalised t.
RECOMMENDED = {"k=50": (50, 1, (0, 1, "sqrt"), False), "k=128": (128, 16, (0, 1, 2, 3, 4, "sqrt"), False)}
# At larger k its powers of t overflow what float32 can fit, so at these sizes its best settings are looked for.
SIZES = (100, 300, 450, 600)
BARS = {100: 1.0, 300: 0.75, 450: 0.2, 600: 0.2}
BLOCK = 1024  # rows


def main() -> None:
    """Parse the command line, run what is not yet done, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, fewer points: under a minute, says little")
    parser.add_argument("--tokens", type=int, default=50_000, help="response tokens to measure on")
    parser.add_argument("--sample", type=int, default=16_384, help="other response tokens to fit on")
    parser.add_argument("--distillkit", type=Path, help="a clone of DistillKit")
    parser.add_argument("--work", type=Path, help="where finished pieces are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/cache.json and cache.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.tokens, options.sample = 512, 1_536
    with tempfile.TemporaryDirectory() as temporary:
        run(options, options.work or Path(temporary))


def run(options: argparse.Namespace, work: Path) -> None:
    """The whole benchmark; ends with one line of JSON."""
    work.mkdir(parents=True, exist_ok=True)
    teacher = load("smollm2", dtype="bfloat16")
    sequences = text(teacher, options.sample + options.tokens)
    states, lengths = states_of(teacher, sequences, work / "states.safetensors")
    cut = int(np.searchsorted(np.cumsum(lengths), options.sample)) + 1
    first = int(sum(lengths[:cut]))
    sample, measured = states[:first], states[first : first + options.tokens]
    extra = (1 + ENTRY.itemsize) * len(lengths[cut:]) / sum(lengths[cut:])
    weight = teacher.head.weight.detach().float()
    head = Head(weight)
    with torch.inference_mode():
        contestants = {
            f"{kind}/{budget}": ours(kind, budget, sample, head, work, extra)
            for kind, budgets in BUDGETS.items()
            for budget in budgets[: 1 if options.quick else None]
        }
        if options.distillkit and (options.distillkit / "distillkit/compression").is_dir():
            sys.path.insert(0, str(options.distillkit))
            chosen = {
                f"best at {size}": best_settings(size, sample, head, work)
                for size in SIZES[: 1 if options.quick else None]
            }
            for name, settings in {**RECOMMENDED, **chosen}.items():
                contestants[f"distillkit/{name}"] = theirs(settings, sample, head)
        else:
            print("DistillKit is not compared: give its clone with --distillkit.", file=sys.stderr)
        points = measure(contestants, measured, head, work / "points.json")
    result: dict[str, Any] = {"tokens": len(measured), "points": points}
    kept = work / "speed.json"
    if not kept.exists():
        kept.write_text(json.dumps(speed(sequences, quick=options.quick)), encoding="utf-8")
    result["ratios"] = ratios(result["points"]) | json.loads(kept.read_text())
    show(result["points"])
    if options.save:
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(result["points"], len(measured), Path(__file__).with_suffix(".png"))
    print(json.dumps({"tokens": result["tokens"], **result["ratios"]}))


def text(teacher: LanguageModel, tokens: int) -> list[Sequence]:
    """At least ``tokens`` response tokens of GSM8K; of answers that the teacher writes where the data is absent."""
    if DATA.exists():
        rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(rows)
        pairs = [(row["question"], row["answer"]) for row in rows[: tokens // 100]]
    else:
        prompts = make_prompts(tokens // 40)
        from preceptor.data.encoding import encode_prompt

        answers = teacher.generate([encode_prompt(one, teacher.tokenizer) for one in prompts], max_new_tokens=96)
        said = teacher.tokenizer.batch_decode(answers, skip_special_tokens=True)
        pairs = [(one[-1]["content"], answer) for one, answer in zip(prompts, said)]
    examples = [
        Example(messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
        for question, answer in pairs
    ]
    return tokenise(examples, teacher.tokenizer, max_length=512)


def states_of(teacher: LanguageModel, sequences: list[Sequence], path: Path) -> tuple[Tensor, list[int]]:
    """The teacher's last hidden states at all response positions, (N, D), and how many each sequence has."""
    lengths = [sum(sequence.response[1:]) for sequence in sequences]
    parts: list[Tensor] = [load_file(path)["states"]] if path.exists() else []
    done = int(np.searchsorted(np.cumsum(lengths), sum(map(len, parts)), side="right")) if parts else 0
    with torch.inference_mode():
        for start in range(done, len(sequences), 8):
            batch = collate(sequences[start : start + 8], teacher.pad_id)
            parts.append(teacher(batch)[batch.predicts].float())
            if start % 128 == 120 or start + 8 >= len(sequences):
                parts = [torch.cat(parts)]
                beside = path.with_suffix(".part")
                save_file({"states": parts[0]}, beside)
                beside.replace(path)
    return torch.cat(parts), lengths


Contestant = Callable[[Tensor, LogProbs], tuple[float, Tensor]]
"""Rows and their distributions in; bytes of them all and KL of each out."""


def measure(contestants: dict[str, Contestant], rows: Tensor, head: Head, path: Path) -> dict[str, dict[str, float]]:
    """Bytes a token, and mean KL with its standard error, of every contestant; sums are kept after every block."""
    sums: dict[str, list[list[float]]] = json.loads(path.read_text()) if path.exists() else {}
    for place, block in enumerate(torch.split(rows, BLOCK)):
        new = {name: one for name, one in contestants.items() if len(sums.setdefault(name, [])) == place}
        totals = {name: [float(len(block)), 0.0, 0.0, 0.0] for name in new}
        for part in torch.split(block, 256) if new else ():
            teacher = LogProbs.of(part, head)
            for name, one in new.items():
                size, kl = one(part, teacher)
                kl = kl.double()
                for at, value in enumerate((size, float(kl.sum()), float(kl.square().sum())), start=1):
                    totals[name][at] += value
        for name, total in totals.items():
            sums[name].append(total)
        path.write_text(json.dumps(sums), encoding="utf-8")
    return {name: mean_of(sums[name]) for name in contestants}


def mean_of(sums: list[list[float]]) -> dict[str, float]:
    """Of blocks of rows, bytes, KL and its square."""
    rows, size, kl, square = (sum(column) for column in zip(*sums))
    error = math.sqrt(max(0.0, square / rows - (kl / rows) ** 2) / rows)
    return {"bytes": round(size / rows, 2), "kl": kl / rows, "error": error}


def ours(kind: Any, budget: float, sample: Tensor, head: Head, work: Path, extra: float) -> Contestant:
    """A kind of cache fitted to a budget; ``extra``: bytes a token of the index."""
    told, tensors = work / f"{kind}-{budget}.json", work / f"{kind}-{budget}.safetensors"
    if told.exists():
        codec = codec_from(kind, json.loads(told.read_text()), load_file(tensors))
    else:
        codec = fit(kind, sample, head, Wanted(budget, 2048))
        parameters, codes = codebook(codec)
        save_file(codes, tensors)
        told.write_text(json.dumps(parameters), encoding="utf-8")
    generator = np.random.default_rng(0)

    def one(rows: Tensor, teacher: LogProbs) -> tuple[float, Tensor]:
        encoded = encode(codec, rows, head, torch.from_numpy(generator.random(len(rows))), known=teacher)
        width = 2 if encoded.lengths.max() > 255 else 1
        return 2 * float(encoded.lengths.sum()) + (width + extra) * len(rows), encoded.kl

    return one


Settings = tuple[int, int, tuple[int | str, ...], bool]


def best_settings(size: int, sample: Tensor, head: Head, work: Path) -> Settings:
    """DistillKit's settings of at most ``size`` bytes a token that are nearest on rows of the sample."""
    kept = work / f"distillkit-{size}.json"
    if kept.exists():
        k, exact, terms, normalised = json.loads(kept.read_text())
        return k, exact, tuple(terms), normalised
    index = math.ceil(math.log2(head.weight.shape[0])) / 8
    tried: list[Settings] = [(int(size / (index + 2)), int(size / (index + 2)), (), False)]
    for exact in (1, 8, 16, 32, 64):
        for terms in ((0, 1, "sqrt"), (0, 1, 2, "sqrt"), (0, 1, 2, 3, 4, "sqrt")):
            k = int((size - 2 * exact - 4 * len(terms)) / index)
            if k > exact + len(terms):
                tried += [(k, exact, terms, False), (k, exact, terms, True)]
    rows = sample[:: len(sample) // 256][:256]
    teacher = LogProbs.of(rows, head)
    found = {one: float(theirs(one, sample, head)(rows, teacher)[1].mean()) for one in tried}
    best = min(found, key=lambda one: found[one] if math.isfinite(found[one]) else math.inf)
    kept.write_text(json.dumps(best), encoding="utf-8")
    print(f"DistillKit at {size} bytes: k, exact, terms, normalised = {best}", file=sys.stderr, flush=True)
    return best


def theirs(settings: Settings, sample: Tensor, head: Head) -> Contestant:
    """DistillKit's compression of the k likeliest tokens, and the better reading of its tail."""
    from distillkit.compression import (  # type: ignore[import-not-found]
        DistributionQuantizationConfig,
        LogprobCompressor,
    )

    k, exact, terms, normalised = settings
    config = DistributionQuantizationConfig(
        d=head.weight.shape[0], k=k, exact_k=exact, exact_dtype="bfloat16", polynomial_terms=list(terms) or None,
        term_dtype="float32", residual_bins=[], delta_encoding=False, error_diffusion=False, normalize_t=normalised,
    )  # fmt: skip
    compressor = LogprobCompressor(config=config)
    unigram = unigram_of(sample, head)
    totals = [0.0, 0.0]

    def one(rows: Tensor, teacher: LogProbs) -> tuple[float, Tensor]:
        kept = compressor.compress(teacher.logits - teacher.log_normaliser[:, None])
        ids, log_p = compressor.decompress_to_sparse(kept)
        mass = log_p.float().exp().sum(-1, keepdim=True)
        targets = TopKTargets(ids, log_p.float() - torch.log(mass / (1 - 1e-6)).clamp_min(0))
        even, shaped = kl_to_topk(teacher, targets), kl_to_unigram(teacher, targets, unigram)
        totals[0], totals[1] = totals[0] + float(even.sum()), totals[1] + float(shaped.sum())
        size = sum(part.shape[-1] for part in kept.values())
        return float(size * len(rows)), even if totals[0] <= totals[1] else shaped

    return one


@functools.cache
def unigram_of(sample: Tensor, head: Head) -> Tensor:
    """The mean probability of each token, (V,), on rows of the sample."""
    return LogProbs.of(sample[:: len(sample) // 512], head).probabilities.mean(0)


def kl_to_unigram(teacher: LogProbs, targets: TopKTargets, unigram: Tensor) -> Tensor:
    """KL(teacher ‖ decoded), the tail's mass spread over the tokens not listed by their mean probability."""
    even = kl_to_topk(teacher, targets)
    p, log_u = teacher.probabilities, unigram.clamp_min(1e-12).log()
    listed = p.gather(-1, targets.ids)
    tail = (1 - listed.sum(-1)).clamp_min(0)
    rest = (1 - unigram[targets.ids].sum(-1)).clamp_min(1e-9).log()
    flat = -math.log(p.shape[-1] - targets.ids.shape[-1])
    return even - (p @ log_u - (listed * log_u[targets.ids]).sum(-1) - tail * rest - tail * flat)


def at_bytes(points: dict[str, dict[str, float]], kinds: tuple[str, ...], size: float) -> float:
    """The least KL of some kinds at a size, log-linear between points; the largest point stands for sizes above it."""
    found = []
    for kind in kinds:
        curve = sorted((one["bytes"], one["kl"]) for name, one in points.items() if name.startswith(kind + "/"))
        sizes, values = [one[0] for one in curve], [math.log(one[1]) for one in curve]
        if curve and sizes[0] <= size:
            found.append(math.exp(float(np.interp(size, sizes, values))))
    return min(found, default=math.nan)


def ratios(points: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Our KL over DistillKit's at DistillKit's bytes, nearest to the sizes of the bars."""
    peers = [one for name, one in points.items() if name.startswith("distillkit/")]
    found: dict[str, Any] = {}
    for size, bar in BARS.items():
        near = min(peers, key=lambda one: abs(one["bytes"] - size), default=None)
        if near is None or abs(near["bytes"] - size) > 0.1 * size:
            continue
        for name, kinds in (("best", ("hidden", "top_k")), ("top_k", ("top_k",))):
            value = at_bytes(points, kinds, near["bytes"]) / near["kl"]
            if not math.isnan(value):
                found[f"kl_{name}_over_distillkit_at_{size}"] = round(value, 5)
        if f"kl_best_over_distillkit_at_{size}" in found:
            found[f"bar_at_{size}_holds"] = found[f"kl_best_over_distillkit_at_{size}"] <= bar
    return found


def speed(sequences: list[Sequence], *, quick: bool) -> dict[str, float]:
    """A training step from the cache against one with the teacher online, and the share of it that reading takes."""
    teacher = load("smollm2")
    rounds, size, length = (1, 3, 96) if quick else (5, 5, 96)
    short = [Sequence(one.ids[:length], one.response[:length]) for one in sequences]
    short = [one for one in short if sum(one.response) >= length // 4][: 3 * size]
    batch = collate(short[:size], teacher.pad_id)
    student = make_student("teacher:layers=10", teacher, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        teachers: dict[str, Teacher] = {"online": FrozenTeacher(teacher)}
        caches = {}
        for kind in ("hidden", "top_k"):
            plan = CapturePlan(Wanted(100, 2048), kind, sample=1024)
            caches[kind] = capture(
                teacher, short, Path(folder) / kind, name="smollm2", max_length=length, plan=plan, say=lambda _: None
            )
            teachers[kind] = CachedTeacher(caches[kind])
        times: dict[str, list[float]] = {name: [] for name in teachers}
        for _ in range(rounds + 1):
            for name, one in teachers.items():
                times[name].append(step(student, optimizer, one, batch))
        reads = {name: timed(cache, batch) for name, cache in caches.items()}
    rows = int(batch.predicts.sum())
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    found: dict[str, float] = {"step_rows": rows, "step_tokens": int(batch.attention_mask.sum())}
    for kind in caches:
        found[f"step_online_over_{kind}"] = round(medians["online"] / medians[kind], 3)
        found[f"decode_{kind}_microseconds_a_token"] = round(1e6 * reads[kind] / rows, 1)
        found[f"decode_{kind}_share_of_step"] = round(reads[kind] / medians[kind], 4)
    return found


def step(student: LanguageModel, optimizer: torch.optim.Optimizer, teacher: Teacher, batch: Batch) -> float:
    """Seconds of one whole step: what the teacher says, forward, backward, optimizer."""
    began = time.perf_counter()
    said = teacher(batch)
    loss = student(batch, lambda hidden, head: divergence(hidden, head, said, mask=batch.predicts))
    (loss.sum / loss.count).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def timed(cache: Cache, batch: Batch) -> float:
    """Seconds to read and decode a batch, the median of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        cache.targets(batch)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def show(points: dict[str, dict[str, float]]) -> None:
    """The curve as a table."""
    print("| kind | asked | bytes a token | KL(teacher ‖ decoded), nat |\n| --- | --- | --- | --- |")
    for name, one in points.items():
        kind, _, asked = name.partition("/")
        print(f"| {kind} | {asked} | {one['bytes']:.1f} | {one['kl']:.3g} ± {one['error']:.1g} |")


def draw(points: dict[str, dict[str, float]], tokens: int, path: Path) -> None:
    """The curve as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    looks = {
        "hidden/": ("o-", "hidden states"),
        "top_k/": ("s-", "top-k with tail"),
        "sampled/": ("^-", "samples"),
        "distillkit/best": ("x--", "DistillKit, the best of its settings"),
        "distillkit/k": ("+", "DistillKit, recommended"),
    }
    for kind, (look, label) in looks.items():
        curve = sorted((one["bytes"], one["kl"]) for name, one in points.items() if name.startswith(kind))
        if curve:
            axes.plot(*zip(*curve), look, label=label)
    axes.set(xscale="log", yscale="log", xlabel="bytes a token", ylabel="KL(teacher ‖ decoded), nat a token")
    axes.set_title(f"SmolLM2 on GSM8K, {tokens:,} response tokens")
    axes.set_xticks([30, 50, 100, 200, 300, 450, 600], ["30", "50", "100", "200", "300", "450", "600"])
    axes.set_xticks([], minor=True)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
