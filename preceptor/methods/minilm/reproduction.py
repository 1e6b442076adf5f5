"""MiniLM's claim: a student's attention and value relations approach its teacher's, and what that is good for.

It runs the method as it ships.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.methods.minilm.attention_reader import SelfAttention
from preceptor.methods.minilm.encoders import make_body
from preceptor.methods.minilm.masked_language import MaskedLanguage, learn_words
from preceptor.methods.minilm.recipe import Config, RelationTeacher, check_fit, measure, start, teach
from preceptor.methods.minilm.sentence_study import Study, make_study
from preceptor.report.table import Table
from preceptor.statistics import Claim, compare, mean_of

ARMS = {
    "untaught": "the student before its first step",
    "full": "attention and value relations",
    "attention only": "weights 1, 0",
    "value only": "weights 0, 1",
    "another sentence": "a control: the teacher reads another sentence of the same length",
    "masked LM": "no teacher: BERT's masked language modelling (its training loss is that of words), as many steps",
    **{f"A_r = {heads}": "MiniLMv2, a student of 6 heads, a quarter of the steps" for heads in (12, 24, 48)},
}


COLUMNS: dict[str, Literal["lower", "higher"]] = {
    **dict.fromkeys(("L_AT", "L_VR", "last training loss", "loss left"), "lower"),
    **dict.fromkeys(("rank agreement", "probe"), "higher"),
}


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """A BERT of 3 layers of 192 learns the relations of all-MiniLM-L6-v2's last layer on 5,000 sentences in 400 steps.

    Arms learn one relation, both, those of another sentence, or masked language modelling; MiniLMv2 teaches a student
    of 6 heads. Each is measured by the relations of 1,000 held-out sentences, by how it ranks 1,000 pairs of them
    against the teacher's own sentence vectors, and by a linear probe that tells which of five parts of the Python
    documentation a sentence is from. ``full``: twice the sentences and their length, 2,000 steps.
    """
    study = make_study("minilm-l6", lessons=10_000 if full else 5000, max_length=64 if full else 32)
    path, steps = folder / ("full" if full else "arms"), 2000 if full else 400
    done = [one_seed(study, seed, path, steps=steps) for seed in range(seeds)]
    table = Table("MiniLM: 3 layers of 192 taught by all-MiniLM-L6-v2 (6 of 384)", list(COLUMNS), better=dict(COLUMNS))
    table.units = {"L_AT": "nat", "L_VR": "nat", "last training loss": "nat", "loss left": "%", "probe": "%"}
    table.rows["uniform"] = {name: done[0]["untaught"][f"{name} uniform"] for name in ("L_AT", "L_VR")}
    for arm in ARMS:
        cells = {column: [seed[arm][column] for seed in done if column in seed[arm]] for column in COLUMNS}
        table.rows[arm] = {column: mean_of(values) for column, values in cells.items() if values}
    table.notes = [f"{arm}: {what}." for arm, what in ARMS.items()]
    table.notes += [
        "Loss left: the arm's own held-out relation loss, as a share of that at step 0.",
        f"Student vectors are the mean of the states below its last layer. {seeds} seeds, ± standard error.",
    ]
    for column in ("rank agreement", "probe"):
        both, alone = ([seed[arm][column] for seed in done] for arm in ("full", "attention only"))
        order = compare(both, alone, f"Not claimed: full beats attention only in {column}", better="higher").claim
        table.notes.append(f"{order.text} ({order.figure}).")
    table.claims = [*claims(done), refusal(study)]
    return table


def one_seed(study: Study, seed: int, folder: Path, *, steps: int) -> dict[str, dict[str, float]]:
    """The figures of all arms for one seed; each arm's are kept in the folder once it is done."""
    training = Training(steps=steps, learning_rate=1e-3, schedule="linear", warmup=0.1, weight_decay=0.01, seed=seed)
    plain = Config(training=training)
    narrow = replace(plain, student="fresh:layers=3,hidden=192,heads=6", training=replace(training, steps=steps // 4))
    configs = {
        "attention only": replace(plain, weights=(1.0, 0.0)),
        "value only": replace(plain, weights=(0.0, 1.0)),
        **{arm: replace(narrow, relation_heads=int(arm[6:])) for arm in ARMS if arm.startswith("A_r")},
    }
    figures = {}
    for arm in ARMS:
        path = folder / f"{arm.replace(' ', '_')}_{seed}"
        done = path / "figures.json"
        path.mkdir(parents=True, exist_ok=True)
        if not done.exists():
            write_whole(
                done, json.dumps(one_arm(study, arm, replace(configs.get(arm, plain), output=str(path)))) + "\n"
            )
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
        figures[arm] = json.loads(done.read_text(encoding="utf-8"))
    return figures


def one_arm(study: Study, arm: str, config: Config) -> dict[str, float]:
    """Teach one student and measure it. A folder of an arm that was stopped is resumed where it can be."""
    scored, seed = not config.relation_heads, config.training.seed
    truth = partial(study.teacher, scored=scored)
    body = make_body(config.student, study.body, study.tokenizer, dropout=0.0, seed=seed)
    learner = MaskedLanguage(body, study.tokenizer) if arm == "masked LM" else SelfAttention(body)
    before = figures_of(config, truth, body, study, vectors=arm == "untaught")
    if arm == "untaught":
        return before
    run = Run(config.training, student=learner, folder=config.output, config=config, resume=True)
    if isinstance(learner, SelfAttention):
        source = study.control if arm == "another sentence" else study.teacher
        teach(run, config, partial(source, scored=scored), learner, study.texts)
    else:
        learn_words(run, study.texts.lessons, pad_id=study.texts.pad)
    after = figures_of(config, truth, body, study)
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line)["loss"] for line in lines[-max(1, len(lines) // 10) :]]
    return {**after, "last training loss": mean_of(last).mean, "loss left": 100 * after["loss"] / before["loss"]}


def figures_of(
    config: Config, teacher: RelationTeacher, body: Any, study: Study, *, vectors: bool = True
) -> dict[str, float]:
    """Held-out relations of one student, and what its vectors are good for. The student is left as it is."""
    student = SelfAttention(copy.deepcopy(body).eval())
    measured = measure(config, teacher, student, study.texts)
    terms = [value for name, value in measured.items() if not name.endswith(" uniform")]
    weights = config.weights or (1.0,) * len(terms)
    found = {"loss": sum(weight * term for weight, term in zip(weights, terms, strict=True))}
    if not config.relation_heads:
        for name, label in (("attention", "L_AT"), ("value", "L_VR")):
            found |= {label: measured[name], f"{label} uniform": measured[f"{name} uniform"]}
    return {**found, **study.exam.figures(student.below)} if vectors else found


def claims(done: list[dict[str, dict[str, float]]]) -> list[Claim]:
    """What must be observed, each with the figure that decides it."""

    def of(arm: str, column: str) -> list[float]:
        return [seed[arm][column] for seed in done]

    def beats(arm: str, other: str, column: str, text: str) -> Claim:
        return compare(of(arm, column), of(other, column), text, better=COLUMNS.get(column, "lower")).claim

    found = []
    for column, alone, other in (("L_AT", "attention only", "value only"), ("L_VR", "value only", "attention only")):
        start, end, own, without = (mean_of(of(arm, column)).mean for arm in ("untaught", "full", alone, other))
        uniform = of("full", f"{column} uniform")
        stays = f"{column} stays within a quarter of its start where it is not taught ({other})"
        suffices = f"{column} falls as far alone as with the other term, within a quarter ({alone})"
        found += [
            beats("full", "untaught", column, f"{column} falls by {1 - end / start:.0%} on held-out text"),
            compare(of("full", column), uniform, f"{column} falls below that of a uniform relation").claim,
            beats("full", other, column, f"{column} falls further than where it is not taught ({other})"),
            Claim(stays, f"{without / start:.0%} of the start", abs(without / start - 1) < 0.25),
            Claim(suffices, f"{own:.3f} nat against {end:.3f}", abs(own / end - 1) < 0.25),
        ]
    for column, what in (("last training loss", "training loss"), ("loss", "held-out distance from the teacher")):
        found.append(beats("full", "another sentence", column, f"The control's {what} stays higher"))
    for column in ("rank agreement", "probe"):
        found.append(beats("full", "untaught", column, f"Both relations beat no lesson: {column}"))
        found.append(beats("attention only", "untaught", column, f"Attention alone beats no lesson: {column}"))
    for arm in ("A_r = 12", "A_r = 24", "A_r = 48"):
        text = f"MiniLMv2 teaches a student of 6 heads, {arm}"
        found.append(compare(of(arm, "loss left"), [100.0] * len(done), text).claim)
    return found


def refusal(study: Study) -> Claim:
    """Whether MiniLM refuses a student of 6 heads of a teacher of 12, and names the way out."""
    config = Config(student="fresh:layers=3,hidden=192,heads=6")
    text, outcome = "MiniLM refuses a student with another number of heads", "it was accepted"
    try:
        check_fit(config, study.teacher, start(config, study.body, study.tokenizer), study.texts)
    except UserError as error:
        outcome = str(error)
    return Claim(text, outcome.partition(":")[0], "relation_heads" in outcome)
