"""MathDial's measures on the released dialogues, and tutors, moves and uptake beside their baselines.

It runs the method as it ships.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence as Listed
from dataclasses import replace
from functools import partial
from pathlib import Path

from preceptor.dialogue.tutors import Voice
from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.methods.mathdial import released_data as study
from preceptor.methods.mathdial.examination import examine, text_figures
from preceptor.methods.mathdial.recipe import TRAINING, Config, ReadingSettings, start, teach
from preceptor.methods.mathdial.text_metrics import TextEncoder
from preceptor.methods.mathdial.turns import lessons, read_data, split
from preceptor.models.loading import load
from preceptor.report.table import Table
from preceptor.statistics import compare, mean_of


def data_folder() -> Path:
    """Where the data of the reproduction lies: ``PRECEPTOR_DATA``.

    Raises:
        UserError: it is not set, or the dialogues are not there.
    """
    named = os.environ.get("PRECEPTOR_DATA")
    if not named:
        raise UserError("The reproduction reads MathDial: set PRECEPTOR_DATA to the folder with mathdial/test.jsonl.")
    test = Path(named) / "mathdial" / "test.jsonl"
    if not test.exists():
        raise UserError(f"There are no dialogues at {test}: set PRECEPTOR_DATA to the folder with mathdial/test.jsonl.")
    return Path(named)


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """The published evaluation on the released dialogues, exactly; moves, uptake, and a fine-tuned tutor.

    Needs the released test split (``mathdial/test.jsonl`` and ``mathdial/moves_*_window_1.csv``), GSM8K and the rated
    exchanges of ``uptake/uptake_data.csv`` in the folder ``PRECEPTOR_DATA``. Each part and each seed of the tutor is
    kept when it is done. The tutor reads the problem and the last two turns. ``full``: 20 times its steps, the worked
    solution and four turns too, all held-out turns.
    """
    data = data_folder()
    test = data / "mathdial" / "test.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = "minilm-l6"
    parts = [study.released_dialogues(test, folder), study.scripted_play(test), study.filters(data / "gsm8k")]
    moves = keep(folder / "moves.json", lambda: study.next_moves(data / "mathdial", seeds))
    rated = data / "uptake" / "uptake_data.csv"
    uptake = keep(folder / "uptake.json", lambda: study.uptake_ratings(rated, seeds, TextEncoder(encoder)))
    parts += [study.next_move_claims(moves), study.uptake_claims(uptake, encoder)]
    table = Table("MathDial: released dialogues, moves, uptake, and a tutor", ["known", "found"])
    for part in parts:
        table.rows |= part.rows
        table.claims += part.claims
    arms = [keep(folder / f"tutor_{seed}.json", partial(tutor_arm, test, folder, seed, full)) for seed in range(seeds)]
    add_tutors(table, arms)
    table.notes.append(f"{seeds} seeds, ± standard error. known: published, or counted by the published evaluation.")
    table.notes.append("Tutor: SmolLM2-135M-Instruct, conversations split 80/20; known is its loss before.")
    return table


def keep(path: Path, measure: Callable[[], dict[str, list[float]]]) -> dict[str, list[float]]:
    """What was measured before, or what is measured now and kept."""
    if not path.exists():
        write_whole(path, json.dumps(measure()) + "\n")
    found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def tutor_arm(test: Path, folder: Path, seed: int, full: bool) -> dict[str, list[float]]:
    """One seed of the fine-tuned tutor: each measure before and after."""
    reading = ReadingSettings(("problem",), history=2, max_length=224)
    size = Config(reading=reading, exam=40, written=8, voice=Voice(max_tokens=32))
    size = Config(reading=ReadingSettings(history=4), written=64) if full else size
    output = folder / "tutors" / str(seed)
    training = replace(TRAINING, steps=480 if full else 24, seed=seed)
    config = replace(size, data=str(test), output=str(output), training=training, resume=output.exists())
    tutor = load(config.tutor)
    train, held_out = split(read_data(config.data), config.held_out, seed)
    pairs, exam = lessons(train, held_out, config, tutor)
    before = examine(tutor, exam, config)
    teach(start(config, tutor.train()), tutor, pairs)
    both, encoder = (before, examine(tutor.eval(), exam, config)), TextEncoder()
    rows = [
        {
            **{f"loss, {part}": value for part, value in one.loss.items()},
            **text_figures(one.texts, exam[: config.written], encoder),
        }
        for one in both
    ]
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return {name: [row[name] for row in rows] for name in rows[0]}


def add_tutors(table: Table, arms: Listed[dict[str, list[float]]]) -> None:
    """Rows and claims of the fine-tuned tutors."""
    for name in arms[0]:
        before, after = ([arm[name][place] for arm in arms if name in arm] for place in (0, 1))
        table.rows[f"tutor: {name}"] = {"known": mean_of(before), "found": mean_of(after)}
        if name.startswith("loss"):
            text = f"A tutor fine-tuned on released turns has a lower held-out {name} problems"
            table.claims.append(compare(after, before, text).claim)
