"""What is soft bootstrapping's own: two views of a reply, the hint gap, alignment, prompts, its door."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from preceptor.cache import Cache, CapturePlan, Wanted, capture
from preceptor.data.encoding import encode_prompt
from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.distillation.objective import LABELS, Objective
from preceptor.distillation.teachers import AdapterOff, CachedTeacher, FrozenTeacher
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.language import TAUGHT, UNTAUGHT
from preceptor.knowledge import Head, HiddenTargets, LogitTargets
from preceptor.methods.soft_bootstrapping import recipe as recipe
from preceptor.methods.soft_bootstrapping.examination import to_write
from preceptor.methods.soft_bootstrapping.hints import Hinted, HintedPair, Prompts, fitted
from preceptor.methods.soft_bootstrapping.questions import QuestionSource
from preceptor.methods.soft_bootstrapping.recipe import Config, bootstrap, main, paper
from preceptor.methods.soft_bootstrapping.selection import Rolling
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.memory import memory_needed
from preceptor.models.student import make_student
from preceptor.tasks.boxed import Judgement
from preceptor.tasks.records import Item
from tests.drawings import look

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
PROMPTS = Prompts(system="Add.", hint="{question}\nWrong: {wrong}\nRight: {right}")
OBJECTIVE = Objective(temperature=2.0)


@pytest.fixture(scope="module")
def base(tokenizer):
    torch.manual_seed(2)
    return scaled(LanguageModel(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer)).eval()


def scaled(model):
    """Weights of 0.02 would leave every distribution flat, and every test easy."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture
def student(base):
    return make_student("lora:rank=2,alpha=4", base, seed=0)


def view(name, hinted, bare, reply):
    return HintedPair(
        name, *(Sequence(p + reply, (False,) * len(p) + (True,) * len(reply)) for p in (tuple(hinted), tuple(bare)))
    )


SHOWN = [
    view("a", range(30, 50), range(60, 66), (7, 8, 9, 2)),
    view("b", range(40, 52), range(70, 78), (5, 6, 2)),
    view("c", range(35, 66), range(80, 84), (11, 12, 13, 14, 15, 2)),
]
SAME = [HintedPair(one.name, one.student, one.student) for one in SHOWN]


def loss(student, shown, batch=None, said=None, objective=OBJECTIVE):
    batch = batch or collate([one.student for one in shown], pad_id=2)
    said = Hinted(said or AdapterOff(student), shown, 2)(batch)
    return student(batch, objective.against(said, batch))


def slow(model, other, shown, tau):
    """The equation, reply token by reply token, in float64; rows P-1 .. P+R-2 of each prompt's own length."""
    total = count = 0.0
    with torch.no_grad():
        for one in shown:
            told = one.teacher.response.count(True)
            p, q = (
                network.causal(torch.tensor([sequence.ids])).logits[0].double()
                for network, sequence in ((model, one.teacher), (other, one.student))
            )
            for step in range(told):
                row_p = p[len(one.teacher.ids) - told - 1 + step] / tau
                row_q = q[len(one.student.ids) - told - 1 + step] / tau
                total += float((row_p.softmax(-1) * (row_p.log_softmax(-1) - row_q.log_softmax(-1))).sum())
                count += 1
    return tau**2 * total / count


def test_an_untouched_adapter_and_the_same_prompt_give_zero(student):
    found = loss(student, SAME)
    assert abs(float(found.sum / found.count)) <= 1e-6
    assert int(found.count) == 4 + 3 + 6
    found.sum.backward()
    moved = [p.grad.abs().max() for p in student.parameters() if p.requires_grad and p.grad is not None]
    assert float(max(moved)) <= 1e-6


def test_a_teacher_that_is_one_row_off_does_not(student):
    batch = collate([one.student for one in SAME], pad_id=2)
    said = Hinted(AdapterOff(student), SAME, 2)(batch)
    off = replace(said, hidden=said.hidden.roll(1, 0))
    found = student(batch, OBJECTIVE.against(off, batch))
    assert float(found.sum / found.count) > 1e-2


def test_different_prompts_give_the_hint_gap(student, base):
    found = loss(student, SHOWN)
    gap = slow(base, base, SHOWN, tau=2.0)
    assert gap > 1e-3
    assert float(found.sum / found.count) == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
def test_the_loss_is_the_equation_for_a_taught_student(student, base, tau):
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    found = loss(student, SHOWN, objective=Objective(temperature=tau))
    assert float(found.sum / found.count) == pytest.approx(slow(base, student, SHOWN, tau), rel=1e-4)


@pytest.mark.parametrize(("tau", "kl", "scaled"), [(1.0, 1.1504208, 1.1504208), (2.0, 0.3201567, 1.2806267)])
def test_temperature_by_hand(tau, kl, scaled):
    head = Head(weight=torch.eye(3))
    batch = Batch(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.long), torch.tensor([[False, True]]))
    hidden = torch.tensor([[[0.0, 1.0, 2.0], [9.0, 9.0, 9.0]]])
    said = LogitTargets(torch.tensor([[2.0, 1.0, 0.0]]))
    found = Objective(temperature=tau).against(said, batch)(hidden, head)
    assert float(found.parts["divergence"]) == pytest.approx(kl, abs=2e-7)
    assert float(found.sum) == pytest.approx(scaled, abs=5e-7)


def test_rows_that_are_masked_change_nothing(student):
    batch = collate([one.student for one in SHOWN], pad_id=2)
    said = Hinted(AdapterOff(student), SHOWN, 2)(batch)
    hidden = student(batch)
    disturbed = torch.where(batch.predicts.unsqueeze(-1), hidden, hidden + 7.0)
    first, second = (OBJECTIVE.against(said, batch)(states, student.head) for states in (hidden, disturbed))
    assert torch.equal(first.sum, second.sum)
    heard = AdapterOff(student)

    def noisy(asked):
        targets = heard(asked)
        return HiddenTargets(
            torch.where(asked.predicts.unsqueeze(-1), targets.hidden, targets.hidden - 3.0), targets.head
        )

    again = Hinted(noisy, SHOWN, 2)(batch)
    assert torch.equal(again.hidden, said.hidden)


@pytest.mark.parametrize("pad_id", [0, 2, 77])
def test_padding_changes_nothing(student, pad_id):
    """Also where the pad token is the end of the turn: masks are told by lengths."""
    apart = [loss(student, SHOWN, collate([one.student], pad_id)) for one in SHOWN]
    batch = collate([one.student for one in SHOWN], pad_id)
    wide = Batch(
        torch.cat([batch.input_ids, torch.full((3, 5), pad_id)], 1),
        torch.cat([batch.attention_mask, torch.zeros(3, 5, dtype=torch.long)], 1),
        torch.cat([batch.response, torch.zeros(3, 5, dtype=torch.bool)], 1),
    )
    together, padded = loss(student, SHOWN, batch), loss(student, SHOWN, wide)
    total = sum(float(one.sum) for one in apart)
    assert int(together.count) == int(padded.count) == sum(int(one.count) for one in apart)
    assert float(together.sum) == pytest.approx(total, abs=1e-5)
    assert float(padded.sum) == pytest.approx(total, abs=1e-5)
    backwards = loss(student, SHOWN, collate([one.student for one in reversed(SHOWN)], pad_id))
    assert float(backwards.sum) == pytest.approx(total, abs=1e-5)


def test_what_is_too_long_stays_aligned(student, base):
    reply = tuple(range(100, 112))
    prompts = tuple(range(300, 330)), tuple(range(200, 206))
    for longest in (20, 13, 12, 8, 2):
        cut = HintedPair("a", *(fitted(prompt, reply, longest) for prompt in prompts))
        kept = reply[: longest - 1]
        for sequence, prompt in zip((cut.teacher, cut.student), prompts, strict=True):
            assert len(sequence.ids) == min(longest, len(prompt) + len(kept))
            assert sequence.ids[-len(kept) :] == kept
            assert sequence.response.count(True) == len(kept)
            assert sequence.ids[: -len(kept)] == prompt[-(longest - len(kept)) :]
        found = loss(student, [cut])
        assert float(found.sum / found.count) == pytest.approx(slow(base, base, [cut], 2.0), rel=1e-4)


def test_views_of_other_replies_are_refused_by_name(student):
    wrong = HintedPair("q7", SHOWN[0].teacher, SHOWN[1].student)
    with pytest.raises(UserError, match="reply to q7 has 4 tokens and the student's 3"):
        Hinted(AdapterOff(student), [wrong], 2)


def test_a_cache_says_what_the_teacher_says(student, base, tmp_path):
    plan = CapturePlan(Wanted(budget=200.0, k=64, tolerance=1e-8), kind="hidden", sample=64)
    kept_there = capture(base, [one.teacher for one in SHOWN], tmp_path / "c", name="b", max_length=64, plan=plan)
    cached, live = loss(student, SHOWN, said=CachedTeacher(kept_there)), loss(student, SHOWN)
    assert float(cached.sum) == pytest.approx(float(live.sum), rel=1e-3)
    with pytest.raises(UserError, match="1 of 1 sequences are not in the cache"):
        loss(student, SAME[:1], said=CachedTeacher(Cache.open(tmp_path / "c")))


def test_a_teacher_that_writes_in_half_precision_is_cached_too(student, base, tmp_path):
    half = copy.deepcopy(base).to(torch.bfloat16)
    plan = CapturePlan(Wanted(budget=200.0, k=64), kind="hidden", sample=64)
    there = capture(half, [one.teacher for one in SHOWN], tmp_path / "c", name="b", max_length=64, plan=plan)
    cached, live = loss(student, SHOWN, said=CachedTeacher(there)), loss(student, SHOWN)
    assert float(cached.sum) == pytest.approx(float(live.sum), rel=0.05)


def test_a_frozen_teacher_of_another_size_teaches_too(base, tokenizer):
    torch.manual_seed(5)
    other = LanguageModel(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer)
    found = loss(other, SHOWN, said=FrozenTeacher(base))
    assert float(found.sum / found.count) == pytest.approx(slow(base, other, SHOWN, 2.0), rel=1e-4)


def test_the_copy_that_writes_keeps_what_the_adapter_learned(student):
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-3)
    batch = collate([one.student for one in SHOWN], pad_id=2)
    with torch.no_grad():
        copied = to_write(student, "bfloat16")
        assert next(student.parameters()).dtype == torch.float32
        assert next(copied.parameters()).dtype == torch.bfloat16
        for mine, theirs in zip(copied.buffers(), student.buffers(), strict=True):
            assert torch.equal(mine, theirs)  # rotary frequencies above all
        with student.model.disable_adapter():
            plain = student(batch)
        off = (copied(batch).float() - student(batch)).abs().mean()
        assert float(off) < 0.05 * float(plain.abs().mean())


def toss(item, response):
    """A verifier of one's own: the letters decide, so that a random model has right and wrong answers."""
    return Judgement(str(len(response) % 3) if response else None, len(response) % 3 != 1)


def write_model(folder, tokenizer, kind=LlamaForCausalLM, config=LlamaConfig):
    torch.manual_seed(2)
    scaled(LanguageModel(kind(config(**SIZES)), tokenizer)).save(folder)
    return str(folder)


def asked(count=44):
    return [Item(f"q{n}", "math", "", "", f"What is {n} + 1?", f"{n + 1}") for n in range(count)]


def settings(tmp_path, tokenizer, **changed):
    """A random model never ends its turn: the id that it must write is one of many, so all ids are its end."""
    values = {
        "teacher": write_model(tmp_path / "model", tokenizer),
        "student": "lora:rank=2,alpha=4",
        "questions": QuestionSource(count=24, exam=4),
        "prompts": PROMPTS,
        "rolling": Rolling(copies=4, length=4, round=4, batch_size=64),
        "pairs": 4,
        "held_out": 2,
        "dtype": "float32",
        "output": str(tmp_path / "run"),
        "training": Training(steps=20, batch_size=4, learning_rate=1e-2, schedule="linear", evaluate_every=5),
    }
    return Config(**(values | changed))


@pytest.fixture
def ends(monkeypatch):
    """Half of all ids end a turn, so that a random model's turns end."""
    monkeypatch.setattr(LanguageModel, "stop_ids", property(lambda _: frozenset(range(0, 49152, 2))))


@pytest.mark.slow
def test_a_verifier_of_ones_own_and_a_run_that_goes_on(tmp_path, tokenizer, ends):
    config = settings(tmp_path, tokenizer, dtype="bfloat16")  # of the answers; the loss before is the student's
    items = asked()
    table = bootstrap(config, items[4:], items[:4], toss)
    folder = tmp_path / "run"
    assert set(table.columns) == {UNTAUGHT, TAUGHT}
    row = table.rows["loss on held-out replies"]
    assert row[TAUGHT] < row[UNTAUGHT]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_loss"] == pytest.approx(row[TAUGHT], rel=1e-5)
    told = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for one in (one for one in told if one["outcome"] == "kept"):
        marks = [roll["correct"] for roll in one["rollouts"]]
        assert any(marks)
        assert not all(marks)
        assert one["reply"]["correct"]
    assert json.loads((folder / "selection.json").read_text())["outcomes"]["kept"] >= 6
    assert {path.name for path in (folder / "pictures").glob("*.png")} == {"1_outcomes.png", "2_right_rollouts.png"}
    for path in (folder / "pictures").glob("*.png"):
        look(path, colours=1)
    assert "What became of the questions" in (folder / "report.html").read_text()
    again = bootstrap(replace(config, resume=True), items[4:], items[:4], toss)
    assert again.rows == table.rows


def test_the_student_starts_from_the_weights_as_they_lie(tmp_path, tokenizer, monkeypatch):
    class Started(Exception):
        """The student that a run begins with is all that is asked for."""

    def begin(_, student):
        raise Started(student)

    monkeypatch.setattr(recipe, "start", begin)
    config = settings(tmp_path, tokenizer, student="teacher:layers=0,1", dtype="bfloat16")
    with pytest.raises(Started) as begun:
        bootstrap(config, asked(), asked(), toss)
    student, lying = begun.value.args[0], load(config.teacher)
    for mine, theirs in zip(student.parameters(), lying.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(lying.head.weight, lying.head.weight.bfloat16().float())


def test_without_questions_or_an_exam_nothing_begins(tmp_path, tokenizer):
    config = settings(tmp_path, tokenizer)
    for items, exam, says in (([], asked(), "to learn from"), (asked(), [], "for the exam")):
        with pytest.raises(UserError, match=f"There is no question {says}"):
            bootstrap(config, items, exam, toss)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_same_through_a_cache_and_from_outside(tmp_path, tokenizer, ends):
    items = asked()
    live = settings(tmp_path, tokenizer)
    cached = replace(live, cache=str(tmp_path / "cache"), output=str(tmp_path / "cached"))
    outside = replace(live, student=live.teacher, output=str(tmp_path / "outside"))
    tables = [bootstrap(config, items[4:], items[:4], toss) for config in (live, cached, outside)]
    losses = [table.rows["loss on held-out replies"][TAUGHT] for table in tables]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[2] < tables[2].rows["loss on held-out replies"][UNTAUGHT]
    with pytest.raises(UserError, match="is of the teacher"):
        bootstrap(replace(cached, teacher="smollm2", output=str(tmp_path / "other")), items[4:], items[:4], toss)


def test_without_a_mix_the_run_stops_with_counts_and_advice(tmp_path, tokenizer):
    with pytest.raises(
        UserError, match=r"0 questions were kept, and 3 are needed at least \(24 questions: 24 no answer"
    ):
        main(settings(tmp_path, tokenizer))
    assert json.loads((tmp_path / "run" / "selection.json").read_text())["outcomes"]["no answer"] == 24


def test_labels_alone_ask_no_teacher(tmp_path, tokenizer, ends):
    items = asked()
    config = settings(tmp_path, tokenizer, objective=Objective(weight=0.0, label_weight=1.0))
    bootstrap(config, items[4:], items[:4], toss)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "divergence" not in lines[0]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["cross_entropy"])
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_too_few_questions_are_refused_before_a_model_is_loaded():
    with pytest.raises(UserError, match="3 questions to learn from and held_out is 3"):
        bootstrap(Config(teacher="nowhere", held_out=3), asked()[:3], asked()[3:], toss)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"pairs": 0}, "pairs is too small"),
        ({"held_out": 0}, "held_out is too small"),
        ({"max_length": 1}, "give at least 2"),
        ({"training": Training(shard=True)}, r"training\.shard"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Config(**wrong)


def write_talker(folder, tokenizer):
    """A tiny model of the paper's class that answers whatever it is asked: 4 or 5, in a box, one as often as other."""
    torch.manual_seed(2)
    model = LanguageModel(Qwen2ForCausalLM(Qwen2Config(**SIZES)), tokenizer)
    prompt = encode_prompt([{"role": "user", "content": "How many?"}], tokenizer)
    said = [tuple(tokenizer(f"\\boxed{{{number}}}")["input_ids"]) + (min(model.stop_ids),) for number in (4, 5)]
    batch = collate([Sequence(prompt + ids, (False,) * len(prompt) + (True,) * len(ids)) for ids in said], pad_id=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(60):
        loss = model(batch, LABELS.against(None, batch))
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
    model.save(folder)
    return str(folder)


def test_the_papers_setting_starts_at_tiny_width(tmp_path, tokenizer):
    """By `main`, with the tutor's prompts, the verifier, the precisions and LoRA of rank 32; and the doctor's estimate.

    Tiny are the model, the files in the form of GSM8K and MATH-500, and what counts questions, tokens and steps.
    """
    told = [{"question": f"{name} has {n} nuts and finds 2. How many?", "answer": f"#### {n + 2}"}
            for name in ("Ann", "Bob", "Cleo", "Dan", "Eve", "Fay", "Gil", "Hal") for n in (2, 3)]  # fmt: skip
    asked_later = [{"problem": f"What is {n} + 1?", "solution": "", "answer": f"{n + 1}"} for n in range(4)]
    files = {"source": tmp_path / "train.jsonl", "exam_source": tmp_path / "math500.jsonl"}
    for path, lines in zip(files.values(), (told, asked_later)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = write_talker(tmp_path / "model", tokenizer)
    config = replace(
        paper,
        teacher=model,
        questions=replace(paper.questions, **{name: str(path) for name, path in files.items()}, exam=4),
        rolling=replace(paper.rolling, length=12),
        pairs=4,
        held_out=1,
        output=str(tmp_path / "run"),
        training=replace(paper.training, epochs=None, steps=1),
    )
    table = main(config)
    assert table is not None
    assert table.rows["answers in a box"][UNTAUGHT] == 100
    assert (tmp_path / "run" / "student").is_dir()
    need = memory_needed(model, paper.student, batch=4, length=512, precision="bf16", teacher_dtype="bfloat16")
    assert need.parts["teacher"] == 0  # the adapter lies on the teacher itself
    assert 0 < need.learning < need.student
