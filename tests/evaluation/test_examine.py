"""Tables, and the measures of language models against slow formulas written from their definitions."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from preceptor.commands.evaluate import Config, main
from preceptor.data.encoding import encode_prompt
from preceptor.data.sequences import Sequence
from preceptor.distillation.lessons import Text, prepare
from preceptor.errors import UserError
from preceptor.evaluation.language import (
    LABELS_ONLY,
    TAUGHT,
    TEACHER,
    UNTAUGHT,
    ask,
    evaluate_language,
    evaluate_own_samples,
    language_headline,
    language_table,
    samples,
)
from preceptor.evaluation.result import write_result
from preceptor.models.language_model import LanguageModel
from preceptor.report.table import Table, aggregate
from preceptor.statistics import Claim, Value, compare, format_cell, mean_of, ratio_of

WORDS = 64


def tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {"<end>": 0, "user": 1, "assistant": 2, **{f"w{index}": index for index in range(3, words)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<end>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return made


def model(seed: int, *, layers: int = 2, words: int = WORDS) -> LanguageModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=words, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3,
        eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config), tokenizer(words)).eval()


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return model(0)


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return model(1, layers=1)


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for length in (5, 12, 20, 9, 30):
        ids = torch.randint(3, WORDS, (length,), generator=generator).tolist()
        made.append(Sequence(tuple(ids), tuple(place >= 3 for place in range(length))))
    return made


def slow(teacher: LanguageModel, student: LanguageModel, sequences: list[Sequence]) -> dict[str, list[list[float]]]:
    """Every token's figures, sequence by sequence, in float64 from the models' own logits."""
    found: dict[str, list[list[float]]] = {"kl": [], "reverse": [], "agree": [], "ce": [], "sure": [], "right": []}
    for sequence in sequences:
        ids = torch.tensor([sequence.ids])
        with torch.no_grad():
            p, q = (m.causal(input_ids=ids).logits[0].double().softmax(-1) for m in (teacher, student))
        rows: dict[str, list[float]] = {name: [] for name in found}
        for place in range(len(sequence.ids) - 1):
            if not sequence.response[place + 1]:
                continue
            label = sequence.ids[place + 1]
            rows["kl"].append(float((p[place] * (p[place] / q[place]).log()).sum()))
            rows["reverse"].append(float((q[place] * (q[place] / p[place]).log()).sum()))
            rows["agree"].append(float(p[place].argmax() == q[place].argmax()))
            rows["ce"].append(-math.log(q[place, label]))
            rows["sure"].append(float(q[place].max()))
            rows["right"].append(float(q[place].argmax() == label))
        for name, row in rows.items():
            found[name].append(row)
    return found


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def test_measures_equal_their_definitions(
    teacher: LanguageModel, student: LanguageModel, sequences: list[Sequence]
) -> None:
    truth = slow(teacher, student, sequences)
    tokens = len(flat(truth["kl"]))
    # A chunk of a few rows, and batches that need padding.
    got = evaluate_language(student, teacher, sequences, batch_size=2, speed=False, chunk_bytes=5 * 4 * WORDS * 3)
    assert got.kl is not None
    assert got.agreement is not None
    assert got.kl.mean == pytest.approx(sum(flat(truth["kl"])) / tokens, rel=1e-5)
    assert got.agreement.mean == pytest.approx(sum(flat(truth["agree"])) / tokens)
    assert got.perplexity.mean == pytest.approx(math.exp(sum(flat(truth["ce"])) / tokens), rel=1e-5)
    assert got.calibration.mean == pytest.approx(slow_calibration(flat(truth["sure"]), flat(truth["right"])), rel=1e-5)
    assert got.kl.count == len(sequences)
    assert got.parameters == sum(p.numel() for p in student.parameters())
    assert got.megabytes == pytest.approx(got.parameters * 4 / 1e6)


def slow_calibration(sure: list[float], right: list[float]) -> float:
    error = 0.0
    for number in range(15):
        chosen = [i for i, s in enumerate(sure) if number / 15 <= s < (number + 1) / 15]
        if chosen:
            accuracy = sum(right[i] for i in chosen) / len(chosen)
            confidence = sum(sure[i] for i in chosen) / len(chosen)
            error += len(chosen) / len(sure) * abs(accuracy - confidence)
    return error


def test_a_model_is_no_distance_from_itself(teacher: LanguageModel, sequences: list[Sequence]) -> None:
    got = evaluate_language(teacher, teacher, sequences, speed=False)
    assert got.kl is not None
    assert got.agreement is not None
    assert abs(got.kl.mean) < 1e-6
    assert got.agreement.mean == 1


def test_what_the_teacher_said_serves_several_students(
    teacher: LanguageModel, student: LanguageModel, sequences: list[Sequence]
) -> None:
    said = ask(teacher, sequences, batch_size=3)
    assert [rows.shape for rows in said.rows] == [(len(s.ids) - 3, 32) for s in sequences]
    online, reused = (evaluate_language(student, source, sequences, speed=False) for source in (teacher, said))
    assert online.kl is not None
    assert reused.kl is not None
    assert reused.kl.mean == pytest.approx(online.kl.mean, rel=1e-6)
    assert reused.kl.error == pytest.approx(online.kl.error, rel=1e-5)
    alone = evaluate_language(teacher, None, sequences, speed=False)
    assert evaluate_language(teacher, None, sequences, outputs=ask(teacher, sequences), speed=False) == alone
    with pytest.raises(UserError, match="other sequences"):
        evaluate_language(student, said, sequences[:-1], speed=False)
    with pytest.raises(UserError, match="other sequences"):
        evaluate_language(teacher, None, sequences[:-1], outputs=said, speed=False)


def test_own_samples_are_the_students_and_follow_the_seed(teacher: LanguageModel, student: LanguageModel) -> None:
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12, 13)] * 3
    state = torch.get_rng_state()
    first = evaluate_own_samples(student, teacher, prompts, max_new_tokens=12, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert first == evaluate_own_samples(student, teacher, prompts, max_new_tokens=12, seed=3)
    assert first != evaluate_own_samples(student, teacher, prompts, max_new_tokens=12, seed=4)
    torch.manual_seed(3)
    written = student.generate(prompts, max_new_tokens=12, temperature=1.0)
    made = [Sequence(p + a, (False,) * len(p) + (True,) * len(a)) for p, a in zip(prompts, written)]
    truth = slow(teacher, student, made)
    assert first.reverse_kl.mean == pytest.approx(sum(flat(truth["reverse"])) / len(flat(truth["reverse"])), rel=1e-4)
    assert first.forward_kl.mean == pytest.approx(sum(flat(truth["kl"])) / len(flat(truth["kl"])), rel=1e-4)
    assert first.length.mean == pytest.approx(sum(map(len, written)) / len(written))


def test_the_error_treats_a_sequence_as_one_observation() -> None:
    # Ten equal tokens in a sequence say no more than one: the error must not shrink with them.
    once, often = ratio_of([1.0, 2.0, 4.0], [1, 1, 1]), ratio_of([10.0, 20.0, 40.0], [10, 10, 10])
    assert once.error == pytest.approx(often.error)
    assert once.error == pytest.approx(mean_of([1.0, 2.0, 4.0]).error)
    assert ratio_of([3.0, 0.0], [2, 0]) == Value(1.5, None, 1)
    with pytest.raises(UserError, match="No sequence"):
        ratio_of([0.0], [0])


def test_the_cluster_error_covers(teacher: LanguageModel) -> None:
    # Simulated clusters of uneven size with a common effect: |estimate - truth| < 2 errors about 95 times in 100.
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(300):
        counts = torch.randint(5, 15, (40,), generator=generator)
        effects = torch.randn(40, generator=generator)
        sums = [float(n * e + torch.randn(int(n), generator=generator).sum()) for n, e in zip(counts, effects)]
        value = ratio_of(sums, [int(n) for n in counts])
        inside += abs(value.mean) < 2 * (value.error or 0)
    assert 0.90 < inside / 300 < 0.985


def test_calibration_error_has_a_spread(teacher: LanguageModel, sequences: list[Sequence]) -> None:
    got = evaluate_language(teacher, None, sequences, speed=False)
    assert got.kl is None
    assert got.calibration.error is not None
    assert 0 < got.calibration.error < 1


def test_speed_is_measured_and_its_setting_named(student: LanguageModel, sequences: list[Sequence]) -> None:
    got = evaluate_language(student, None, sequences)
    assert got.prefill is not None
    assert got.decode is not None
    assert got.prefill.mean > got.decode.mean > 0
    assert f"{torch.get_num_threads()} thread" in got.setting


def test_tokenizers_that_differ_are_refused(teacher: LanguageModel, sequences: list[Sequence]) -> None:
    with pytest.raises(UserError):
        evaluate_language(model(1, words=WORDS + 8), teacher, sequences)
    with pytest.raises(UserError, match="answers"):
        ask(teacher, [Sequence((4, 5), (True, False))])


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Value(0.39605, 0.0041), "0.396 ± 0.004"),
        (Value(0.39605, 0.0012), "0.3961 ± 0.0012"),
        (Value(1234.56, 56.0), "1,230 ± 60"),
        (Value(12.3456, 0.96), "12.3 ± 1.0"),
        (Value(2.0), "2"),
        (Value(math.inf, None), "∞"),
        (Value(3e-9, 2e-10), "3.00e-09 ± 2e-10"),
        (Value(-0.5, 0.0), "-0.5"),
        (134515008, "134,515,008"),
        (134515.008, "134,515"),
        (1.23456e19, "1.23e+19"),
        (Value(1.23456e19, 2e19), "1.23e+19 ± 2e+19"),
        (0.00012345, "0.0001234"),
        (None, "–"),
        ("plain", "plain"),
    ],
)
def test_digits_follow_the_error(cell: Value | float | str | None, text: str) -> None:
    assert format_cell(cell) == text


def table() -> Table:
    rows: dict[str, dict[str, Value | float | int | str | None]] = {
        "KL": {"a|b": Value(0.5, 0.01, 3), "c": None},
        "size": {"a|b": 12, "c": 0.25},
        "name": {"a|b": "x", "c": math.inf},
    }
    claims = [Claim("a is closer", "4 standard errors", True), Claim("b is not", "0.1", False)]
    return Table("A [title]", ["a|b", "c"], rows, {"KL": "nat"}, {"KL": "lower"}, ["a note"], claims)


def test_a_table_survives_json() -> None:
    made = table()
    text = json.dumps(made.json(), allow_nan=False)
    back = Table.from_json(json.loads(text))
    assert back.rows["name"]["c"] == Value(math.inf)
    back.rows["name"]["c"] = math.inf
    assert back == made
    assert not made.holds
    with pytest.raises(UserError, match="table"):
        Table.from_json({"title": "no rows"})


def test_a_table_prints_what_it_holds() -> None:
    markdown = table().markdown()
    assert "| KL (nat) ↓ | 0.500 ± 0.010 | – |" in markdown
    assert "a\\|b" in markdown
    assert "**does not hold**: b is not (0.1)" in markdown
    console = Console(record=True, width=100)
    table().print(console)
    printed = console.export_text()
    assert "A [title]" in printed
    assert "does not hold: b is not" in printed


def test_seeds_are_aggregated() -> None:
    def one(kl: float) -> Table:
        return Table("t", ["student"], {"KL": {"student": Value(kl, 0.5)}, "kind": {"student": "x"}})

    mean = aggregate([one(1.0), one(2.0), one(3.0)])
    assert mean.rows["KL"]["student"] == Value(2.0, pytest.approx(1 / math.sqrt(3)), 3)
    assert mean.rows["kind"]["student"] == "x"
    with pytest.raises(UserError, match="differ"):
        aggregate([one(1.0), Table("u", ["other"])])
    with pytest.raises(UserError, match="no table"):
        aggregate([])


def test_arms_are_compared_pair_by_pair() -> None:
    # A large spread over seeds that both arms share: paired it shows, unpaired it does not.
    ours, theirs = {0: 1.0, 1: 5.0, 2: 9.0}, {2: 9.52, 0: 1.5, 1: 5.48}
    paired = compare(ours, theirs, "ours is lower")
    assert paired.paired
    assert paired.claim.holds
    assert paired.difference == Value(pytest.approx(-0.5), pytest.approx(0.011547, rel=1e-3), 3)
    loose = compare(mean_of(list(ours.values())), mean_of(list(theirs.values())), "ours is lower")
    assert not loose.paired
    assert not loose.claim.holds
    assert not compare({0: 1.0, 1: 2.0}, {3: 1.0, 4: 2.0}, "other seeds").paired


def test_a_claim_needs_spread_and_direction() -> None:
    assert not compare([1.0], [2.0], "one seed").claim.holds
    assert "two seeds" in compare([1.0], [2.0], "one seed").claim.figure
    assert not compare([2.0, 2.1], [1.0, 1.1], "wrong way").claim.holds
    assert compare([2.0, 2.1], [1.0, 1.2], "right way", better="higher").claim.holds
    assert not compare([1.0, 1.0], [1.0, 1.0], "no difference").claim.holds
    assert not compare([1.0, 2.0, 3.0], [1.1, 2.3, 3.0], "within two errors").claim.holds


def test_language_table_and_headline(teacher: LanguageModel, student: LanguageModel, sequences: list[Sequence]) -> None:
    found = {
        TEACHER: evaluate_language(teacher, None, sequences),
        UNTAUGHT: evaluate_language(model(5, layers=1), teacher, sequences),
        TAUGHT: evaluate_language(student, teacher, sequences),
    }
    made = language_table("t", found, {TAUGHT: evaluate_own_samples(student, teacher, [(5, 6)], max_new_tokens=4)})
    assert made.columns == [TEACHER, UNTAUGHT, TAUGHT]
    assert made.rows["KL(teacher ‖ model)"][TEACHER] is None
    assert made.rows["perplexity"][TEACHER] is not None
    assert list(made.rows)[1] == "KL(model ‖ teacher), own samples"
    assert [name for name, cell in made.rows["KL(model ‖ teacher), own samples"].items() if cell] == [TAUGHT]
    assert any("thread" in note for note in made.notes)
    agreements = [f"{100 * found[name].agreement.mean:.0f} %" for name in (TAUGHT, UNTAUGHT)]  # type: ignore[union-attr]
    assert language_headline(found) == (
        f"The taught student and its teacher agree on {agreements[0]} of next tokens; untaught it is {agreements[1]}."
    )
    assert language_headline({TEACHER: found[TEACHER]}) == ""


def test_samples_are_greedy_and_side_by_side(teacher: LanguageModel, student: LanguageModel) -> None:
    prompts = [({"role": "user", "content": "w5 w6"},), ({"role": "user", "content": "w9"},)]
    told = samples({"teacher": teacher, "student": student}, prompts, max_new_tokens=6)
    assert [one["prompt"] for one in told] == ["w5 w6", "w9"]
    assert all(list(one["answers"]) == ["teacher", "student"] for one in told)
    ids = [encode_prompt(prompt, teacher.tokenizer) for prompt in prompts]
    for one, answer in zip(told, teacher.generate(ids, max_new_tokens=6, temperature=0.0)):
        assert one["answers"]["teacher"].endswith("…") == (answer[-1] not in teacher.stop_ids)
        words = teacher.tokenizer.decode(answer, skip_special_tokens=True)
        assert one["answers"]["teacher"].removesuffix(" …") == words.strip()
    assert told == samples({"teacher": teacher, "student": student}, prompts, max_new_tokens=6)


def test_an_earlier_result_is_kept(tmp_path: Path) -> None:
    write_result(tmp_path, table(), [{"prompt": "p", "answers": {}}], headline="first")
    write_result(tmp_path, table(), headline="second")
    assert json.loads((tmp_path / "result.json").read_text())["headline"] == "second"
    assert json.loads((tmp_path / "result.previous.json").read_text())["headline"] == "first"
    assert (tmp_path / "samples.json").exists()


def test_the_command_writes_table_samples_and_page(
    teacher: LanguageModel, student: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    teacher.save(tmp_path / "teacher")
    student.save(run / "student")
    (run / "config.json").write_text(json.dumps({"teacher": str(tmp_path / "teacher"), "student": "teacher:layers=1"}))
    lines = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": "w7 w8"}]}
        for i in (4, 5, 6)
    ]
    data = tmp_path / "held_out.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    main(Config(str(run), data=str(data), answer_length=4, shown=2))
    result = json.loads((run / "result.json").read_text())
    words = [str(run), "--data", str(data), "--answer-length", "4", "--shown", "2"]
    assert result["command"] == shlex.join(["preceptor", "evaluate", *words])
    made = Table.from_json(result["table"])
    assert made.columns == [TEACHER, UNTAUGHT, TAUGHT]
    assert len(json.loads((run / "samples.json").read_text())) == 2
    assert "taught student" in (run / "report.html").read_text()
    assert "perplexity" in capsys.readouterr().out


def test_the_command_takes_the_runs_own_exam(teacher: LanguageModel, student: LanguageModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    teacher.save(tmp_path / "teacher")
    student.save(run / "student")
    (run / "config.json").write_text(json.dumps({"teacher": str(tmp_path / "teacher")}))
    (run / "environment.json").write_text(json.dumps({"method": "gkd", "seed": 0}))
    exam = [{"prompt": f"w{i}", "completion": "w7 w8"} for i in range(4, 10)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, exam)))
    lessons = prepare(Text(str(tmp_path / "all.jsonl"), held_out=3), teacher, seed=0, path=run / "lessons.jsonl")
    main(Config(str(run / "student"), answer_length=4, output=str(tmp_path / "there")))
    made = Table.from_json(json.loads((tmp_path / "there" / "result.json").read_text())["table"])
    assert made.columns == [TEACHER, TAUGHT]
    assert f"{len(lessons.exam)} sequences" in made.notes[0]
    told = json.loads((tmp_path / "there" / "samples.json").read_text())
    assert [one["prompt"] for one in told] == [asked[-1]["content"] for asked in lessons.questions]
    assert not (run / "result.json").exists()
    assert json.loads((tmp_path / "there" / "environment.json").read_text()) == {"method": "gkd", "run": str(run)}
    assert "<dt>Method</dt><dd>GKD: " in (tmp_path / "there" / "report.html").read_text()


def test_without_data_the_teacher_answers_embedded_prompts(
    teacher: LanguageModel, student: LanguageModel, tmp_path: Path
) -> None:
    teacher.save(tmp_path / "teacher")
    student.save(tmp_path / "student")
    there = tmp_path / "there"
    main(
        Config(
            str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), labels_only=str(tmp_path / "student"),
            limit=3, answer_length=4, shown=1, output=str(there),
        )
    )  # fmt: skip
    rows = Table.from_json(json.loads((there / "result.json").read_text())["table"]).rows
    assert rows["perplexity"][LABELS_ONLY] == rows["perplexity"][TAUGHT]
    assert rows["KL(teacher ‖ model)"][TAUGHT].mean > 0  # type: ignore[union-attr]


def test_settings_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="limit"):
        Config("x", limit=0)
    with pytest.raises(UserError, match="max_length"):
        Config("x", max_length=1)


@pytest.mark.parametrize(
    ("kept", "settings", "told"),
    [
        (False, "{}", "is a run without a student"),
        (True, '{"teacher": "fresh:layers=2"}', "name another one with --teacher"),
    ],
)
def test_a_run_that_cannot_be_evaluated_says_why(tmp_path: Path, kept: bool, settings: str, told: str) -> None:
    (tmp_path / "config.json").write_text(settings)
    (tmp_path / "environment.json").write_text("{}")
    if kept:
        (tmp_path / "student").mkdir()
    with pytest.raises(UserError, match=told):
        main(Config(str(tmp_path)))


def test_an_evaluation_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--output"):
        main(Config("smollm2", output=str(tmp_path / "file" / "inner")))
    with pytest.raises(UserError):
        main(Config(str(tmp_path / "no_model"), teacher=str(tmp_path / "none"), output=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
