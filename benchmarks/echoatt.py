"""SmolLM2-135M with shared attention against the unshared model, eager and fused (sdpa): reading, writing, training.

23 of its 30 layers (77 %) share, those that ``similar=23`` chooses on the embedded text. Every round runs each arm
once, one after the other, on the same tokens, on one thread. Figures are medians over rounds of the process's CPU time,
and ratios are ratios of these. ``ours, unshared`` is this project's implementation with no follower, which tells what
sharing itself brings.

* read: one forward over a prompt with a new cache and the logits of the last position, as ``generate`` begins.
* write: 8 tokens one by one with the cache, after a prompt (of a batch, each row the same).
* train: forward, cross-entropy over all positions, backward, AdamW; bfloat16 is autocast over float32 weights.

``limit`` is what leaving out the followers' queries and keys can bring at most, whoever implements it: the unshared
model's multiplications over the shared one's, causal attention counted once (read, train), or its bytes of weights and
cache (write). A ratio to sdpa above it is the implementation's; eager does more than the unshared model must.

    python benchmarks/echoatt.py [--quick] [--rounds 5] [--save] [--only read write train] [--dtypes float32 bfloat16]

What is saved is added to what was saved before, so that the parts can be run apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preceptor.models.loading import load
from preceptor.models.shared_attention.model import share

FOLLOWERS = (4, 5, 6, 7, 8, 9, 10, 13, *range(15, 30))
ARMS = ("shared", "sdpa", "eager", "ours, unshared")
LENGTHS = (512, 1024, 2048, 4096)
WRITING = ((1, 128), (1, 512), (1, 1024), (16, 128), (16, 512), (16, 1024))
TRAINING = ((4, 256), (1, 2048))
LONG = 20.0  # seconds; an arm that takes longer runs once
WRITTEN = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest size of each, 3 rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=4096, help="tokens of a prompt, or of a step, at most")
    parser.add_argument("--save", action="store_true", help="write benchmarks/echoatt.json and .md")
    parser.add_argument("--only", nargs="*", default=["read", "write", "train"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, path = 3 if options.quick else options.rounds, Path(__file__).with_suffix(".json")
    found: dict[str, Any] = json.loads(path.read_text()) if options.save and path.exists() else {}
    for dtype in options.dtypes:
        for kind in options.only:
            for name, prepare in _cases(kind, dtype, options):
                found[name] = {**_take_turns(prepare, rounds), "limit": _limit(name)}
                print(name, _line(found[name]), flush=True)
                if options.save:
                    path.write_text(json.dumps(found, indent=1) + "\n")
    if options.save:
        path.with_suffix(".md").write_text(_table(found))


def _models(dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    base = load("smollm2").causal.to(dtype)
    models = {"shared": share(base, FOLLOWERS), "ours, unshared": share(base, ())}
    for kind in ("sdpa", "eager"):
        models[kind] = copy.deepcopy(base)
        models[kind].set_attn_implementation(kind)
    return {arm: models[arm] for arm in ARMS}


def _cases(
    kind: str, dtype: str, options: argparse.Namespace
) -> list[tuple[str, Callable[[], dict[str, Callable[[], object]]]]]:
    precision = torch.float32 if kind == "train" else getattr(torch, dtype)
    models = _models(precision)
    ids = torch.randint(5, 40_000, (16, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    if kind == "read":
        lengths = [t for t in LENGTHS if t <= (LENGTHS[0] if options.quick else options.largest)]
        return [(f"{dtype} read {t}", lambda t=t: _reading(models, ids[:1, :t])) for t in lengths]
    if kind == "write":
        sizes = WRITING[:1] if options.quick else WRITING
        return [(f"{dtype} write {b} x after {t}", lambda b=b, t=t: _writing(models, ids[:b, :t])) for b, t in sizes]
    sizes = [(b, t) for b, t in TRAINING if b * t <= (LENGTHS[1] if options.quick else options.largest)]
    autocast = dtype == "bfloat16"
    return [
        (f"{dtype} train {b} x {t}", lambda b=b, t=t: _training(models, ids[:b, :t], autocast=autocast))
        for b, t in sizes
    ]


def _reading(models: dict[str, PreTrainedModel], ids: Tensor) -> dict[str, Callable[[], object]]:
    @torch.no_grad()
    def read(model: PreTrainedModel) -> object:
        return model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)

    return {arm: lambda model=model: read(model) for arm, model in models.items()}


def _writing(models: dict[str, PreTrainedModel], ids: Tensor) -> dict[str, Callable[[], object]]:
    with torch.no_grad():
        caches = {
            arm: model.eval()(input_ids=ids[:1], use_cache=True, logits_to_keep=1).past_key_values
            for arm, model in models.items()
        }
    for cache in caches.values():
        cache.batch_repeat_interleave(len(ids))

    @torch.no_grad()
    def write(arm: str) -> object:
        token = ids[:, :1]
        for _ in range(WRITTEN):
            told = models[arm](input_ids=token, past_key_values=caches[arm], use_cache=True)
            token = told.logits[:, -1:].argmax(-1)
        return token

    return {arm: lambda arm=arm: write(arm) for arm in models}


def _training(models: dict[str, PreTrainedModel], ids: Tensor, *, autocast: bool) -> dict[str, Callable[[], object]]:
    optimizers = {arm: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) for arm, model in models.items()}

    def step(arm: str) -> object:
        model, optimizer = models[arm].train(), optimizers[arm]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {arm: lambda arm=arm: step(arm) for arm in models}


def _take_turns(prepare: Callable[[], dict[str, Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each arm."""
    arms = prepare()
    first = {arm: _timed(run) for arm, run in arms.items()}
    times: dict[str, list[float]] = {arm: [first[arm]] if first[arm] > 1e3 * LONG else [] for arm in arms}
    for _ in range(rounds):
        for arm, run in arms.items():
            if first[arm] <= 1e3 * LONG:
                times[arm].append(_timed(run))
    return {arm: statistics.median(values) for arm, values in times.items()}


def _timed(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return 1e3 * (time.process_time() - begun)


def _limit(name: str) -> float:
    """How many times the work of the shared model the unshared one has to do; ``name`` as the cases are called."""
    dtype, kind, *size = name.replace(" after", "").split()
    batch, length = (int(size[0]), int(size[-1])) if len(size) > 1 else (1, int(size[0]))
    config = load("smollm2").causal.config
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    weights = {"head": config.vocab_size * width, "qk": width * (width + keys)}
    weights["rest"] = weights["qk"] + 3 * width * config.intermediate_size  # values and outputs are as large
    reads = {"train": length, "read": 1, "write": 1}[kind]

    def work(layers_with_queries: int) -> float:
        matrices = config.num_hidden_layers * weights["rest"] + layers_with_queries * weights["qk"]
        attended = config.num_hidden_layers + layers_with_queries  # products with the values, and with the keys
        if kind == "write":
            size_of = torch.finfo(getattr(torch, dtype)).bits // 8
            return size_of * (matrices + weights["head"] + batch * length * keys * attended)
        return length * matrices + reads * weights["head"] + length * length / 2 * width * attended

    return work(config.num_hidden_layers) / work(config.num_hidden_layers - len(FOLLOWERS))


def _line(times: dict[str, float]) -> str:
    ratios = (f"{arm}/shared {times[arm] / times['shared']:.2f}" for arm in ARMS[1:])
    return f"shared {times['shared']:.1f} ms; {', '.join(ratios)}; limit {times['limit']:.2f}"


def _size(name: str) -> list[int]:
    return [int(word) for word in name.split()[2:] if word.isdigit()]


def _table(found: dict[str, dict[str, float]]) -> str:
    lines = [
        "# SmolLM2-135M with 23 of 30 layers sharing attention",
        "",
        f"`python benchmarks/echoatt.py --save`; {platform.machine()}, one thread, torch {torch.__version__}. "
        "CPU milliseconds (read: a prompt; write: 8 tokens; train: a step); of the others how many times as long.",
        "",
        "| | shared, ms | sdpa | eager | ours, unshared | limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, times in sorted(found.items(), key=lambda row: (row[0].split()[:2], _size(row[0]))):
        ratios = " | ".join(f"{times[arm] / times['shared']:.2f}" for arm in ARMS[1:])
        lines.append(f"| {name} | {times['shared']:,.0f} | {ratios} | {times['limit']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
