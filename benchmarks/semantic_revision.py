"""What a correction of a student's samples costs, beside writing them anew from the prompt.

A round of correction reads the samples once with each model, keeps the student's key cache up to the corrected token,
and writes on from there; it is compared with the same round without the cache (the prefix is read again), and with
plain generation from the prompt. The ways take turns and change places from round to round; a ratio is one of medians.

    python benchmarks/semantic_revision.py [--student teacher:layers=15] [--prompts 16] [--length 64] [--save]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from preceptor.data.embedded_prompts import make_prompts
from preceptor.data.encoding import encode_prompt
from preceptor.data.sequences import collate
from preceptor.distillation.lessons import write_answers
from preceptor.distillation.teachers import FrozenTeacher
from preceptor.methods.semantic_revision.correction import Correction, correct, differences
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report.table import Table

HERE = Path(__file__).parent
ANEW, CUT, AGAIN = "written anew from the prompt", "corrected, cache kept", "corrected, prefix read again"
READ, ON = "of which: both models read and are compared", "of which: going on from the cut cache"


def measure(args: argparse.Namespace) -> tuple[Table, dict[str, list[float]]]:
    model = load("smollm2", dtype="bfloat16")
    student, teacher = make_student(args.student, model, seed=0).eval(), FrozenTeacher(model)
    prompts = [encode_prompt(messages, model.tokenizer) for messages in make_prompts(args.prompts, 0, held_out=True)]
    longest = max(map(len, prompts)) + args.length
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        raw = write_answers(student, prompts, args.length, max_length=longest)
    batch = collate(raw, student.pad_id)
    told = {"share": 0.0}

    def corrected(*, keep_cache: bool) -> None:
        done = correct(student, teacher, raw, Correction(), length=args.length, keep_cache=keep_cache)
        kept = sum(places[0] for places in done.places if places)
        told["share"] = 1 - kept / sum(sum(one.response) for one, places in zip(raw, done.places) if places)

    def compared() -> None:
        with torch.no_grad():
            read = student.causal.base_model(input_ids=batch.input_ids, use_cache=True)
            differences(read.last_hidden_state, student, teacher, batch)

    ways: dict[str, Callable[[], object]] = {
        ANEW: lambda: write_answers(student, prompts, args.length, max_length=longest),
        CUT: lambda: corrected(keep_cache=True),
        AGAIN: lambda: corrected(keep_cache=False),
        READ: compared,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        names = list(ways) if turn % 2 else list(reversed(ways))
        for name in names:
            torch.manual_seed(turn)
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                ways[name]()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in times.items()}
    median[ON] = median[CUT] - median[READ]
    table = Table("semantic_revision: the cost of a correction", ["seconds", "of writing anew"], units={"seconds": "s"})
    table.rows = {name: {"seconds": value, "of writing anew": value / median[ANEW]} for name, value in median.items()}
    table.better = {"seconds": "lower", "of writing anew": "lower"}
    table.notes = [
        f"{args.prompts} samples of at most {args.length} tokens, a student of "
        f"{student.causal.config.num_hidden_layers} layers of smollm2, bfloat16, "
        f"{torch.get_num_threads()} thread(s), {platform.machine()}; medians of {args.rounds} turns, interleaved.",
        f"{told['share']:.0%} of the samples' tokens lie after the corrected one and are written again.",
    ]
    return table, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="teacher:layers=15")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="keep the figures beside this file")
    args = parser.parse_args()
    table, times = measure(args)
    table.print()
    if args.save:
        kept = {"table": table.json(), "seconds": times}
        (HERE / "semantic_revision_cost.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        (HERE / "semantic_revision_cost.md").write_text(table.markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
