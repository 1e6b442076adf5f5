"""Sampling answers in a batch: `LanguageModel.generate` beside transformers' own `generate`, on the same model.

SmolLM2-135M in bfloat16, prompts of different lengths (padded on the left), temperature 1, the whole vocabulary, on one
thread. ``whole``: no token ends a row, so both write the same number. ``ended``: rows end where their end of turn is
drawn, as in use; ours leaves out the rows that have ended, and the time is given a token that was written. The arms
take turns and change places from round to round; figures are medians of the process's CPU time.

    python benchmarks/generation.py [--quick] [--rounds 7] [--save]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from preceptor.data.embedded_prompts import make_prompts
from preceptor.data.encoding import encode_prompt
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.sampling import Sampling, left_pad, sample
from preceptor.report.table import Table

OURS, THEIRS = "ours", "transformers"
SIZES = ((1, 48), (16, 48), (32, 128))  # prompts, tokens of an answer at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller sizes, 3 rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="keep the figures beside this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load("smollm2", dtype="bfloat16")
    table = Table("Sampling, CPU ms a token", [OURS, THEIRS, "ratio"], units={OURS: "ms", THEIRS: "ms"})
    ended = model.stop_ids
    for count, length in SIZES[:2] if options.quick else SIZES:
        prompts = [encode_prompt(asked, model.tokenizer) for asked in make_prompts(count, 0, held_out=True)]
        for name, ends in (("whole", frozenset[int]()), ("ended", ended)):
            if count > 1 or not ends:  # one answer alone has a length by chance
                median = measure(model, prompts, length, ends, 3 if options.quick else options.rounds)
                table.rows[f"{count} x {length}, {name}"] = {**median, "ratio": median[THEIRS] / median[OURS]}
    table.notes = ["Rows: prompts at a time x tokens of an answer at most. Ratio: theirs over ours."]
    table.print()
    if options.save:
        path = Path(__file__)
        path.with_suffix(".json").write_text(json.dumps(table.json(), indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table.markdown(), encoding="utf-8")


def measure(
    model: LanguageModel, prompts: list[tuple[int, ...]], length: int, stop: frozenset[int], rounds: int
) -> dict[str, float]:
    ids, mask = left_pad(prompts, model.device)
    ends, sampling = sorted(stop), Sampling(length)
    model.causal.generation_config.eos_token_id = ends or None

    @torch.no_grad()
    def ours() -> int:
        told = sample(model, prompts, sampling, stop=stop, batch_size=len(prompts), device=model.device)
        return sum(map(len, told))

    @torch.no_grad()
    def theirs() -> int:
        told = model.causal.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=length, pad_token_id=0,
        )[:, ids.shape[1] :]  # fmt: skip
        ended = torch.isin(told, torch.tensor(ends)).int()
        return int((ended.cumsum(-1) - ended == 0).sum())  # up to and with the first token that ends a row

    arms: dict[str, Callable[[], int]] = {OURS: ours, THEIRS: theirs}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            torch.manual_seed(turn)
            begun = time.process_time()
            tokens = arms[name]()
            if turn:  # the first turn warms up
                times[name].append(1e3 * (time.process_time() - begun) / tokens)
    return {name: statistics.median(taken) for name, taken in times.items()}


if __name__ == "__main__":
    main()
