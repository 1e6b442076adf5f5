"""Rollouts: shared reading, pairing, statistics, and a selection that goes on after a kill."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from random import Random

import pytest
import torch

from preceptor.errors import UserError
from preceptor.methods.soft_bootstrapping import sampling as module
from preceptor.methods.soft_bootstrapping.hints import Prompts
from preceptor.methods.soft_bootstrapping.pictures import draw_selection
from preceptor.methods.soft_bootstrapping.rollouts import Rollout, Tried, pair, roll_out, statistics
from preceptor.methods.soft_bootstrapping.sampling import grouped, quick_decoding, write
from preceptor.methods.soft_bootstrapping.selection import Rolling, collect, enough, statistics_table, write_statistics
from preceptor.models.language_model import LanguageModel
from preceptor.models.sampling import Sampling, left_pad
from preceptor.statistics import interval
from preceptor.tasks.boxed import Judgement, by_value
from preceptor.tasks.records import Item
from tests.small_llama import small_llama

PLAIN = Prompts(system="Add.", hint="{question} {right} {wrong}", forbidden=("told",))


@pytest.fixture(scope="module")
def small(tokenizer):
    model = small_llama(3, num_attention_heads=4, num_key_value_heads=2)
    return LanguageModel(model, tokenizer).eval()


def rollout(answer, correct=False):
    return Rollout((5, 2), f"it is {answer}", answer, correct)


def items(count):
    return [Item(f"q{place}", "math", "", "", f"What is {place} + 1?", f"{place + 1}") for place in range(count)]


def toss(item, response):
    """A verifier that a random model cannot fail: the number of letters decides."""
    return Judgement(None if not response else str(len(response) % 3), len(response) % 3 == 0)


def test_what_prompts_share_is_read_once_and_changes_nothing(small):
    start = tuple(range(10, 30))
    prompts = [(*start, 40 + n, 50 + n) for n in range(3) for _ in range(4)]
    prompts += [(9, 8, 7), (9, 8, 7), (*range(60, 75),)]
    seen = []

    class Counting(LanguageModel):
        def forward(self, batch, objective=None):
            seen.append(tuple(batch.ids.shape))
            return super().forward(batch, objective)

    counted = Counting(small.model, small.tokenizer)
    greedy = Sampling(6, 0.0)
    assert write(counted, prompts, greedy, batch_size=12) == small.generate(
        prompts, max_new_tokens=6, temperature=0.0, batch_size=12
    )
    assert seen[:2] == [(1, 20), (3, 2)]  # the beginning once, each of three different ends once
    assert (2, 15) in seen  # padded on the left: read as a whole, each prompt once


def test_padding_is_not_taken_for_the_token_that_it_looks_like(small):
    prompts = [(0, 9, 8, 7), (9, 8, 7), (0, 0, 9, 8, 7)]
    assert write(small, prompts, Sampling(6, 0.0), batch_size=3) == small.generate(
        prompts, max_new_tokens=6, temperature=0.0
    )


def test_a_shared_beginning_has_the_same_logits(small):
    prompts = [(*range(10, 30), 40 + n) for n in range(4)]
    prefix = module.Prefix(
        torch.tensor(prompts), torch.ones(4, 21, dtype=torch.long), torch.arange(21).expand(4, 21), None
    )
    with torch.no_grad():
        apart, cache = module.read_once(small)(prefix)
        whole, _ = small(prefix)
    assert torch.allclose(apart, whole, atol=1e-5)
    assert cache.get_seq_length() == 21


def test_rollouts_come_in_groups_as_they_were_generated(small):
    torch.manual_seed(0)
    sampling = Sampling(5, 1.0, 20)
    asked = items(3)
    prompts = [PLAIN.ask(item, small.tokenizer) for item in asked]
    found = roll_out(small, asked, lambda item: prompts[asked.index(item)], sampling, toss, copies=4, batch_size=7)
    assert [len(group) for group in found] == [4, 4, 4]
    for one in (one for group in found for one in group):
        assert 1 <= len(one.ids) <= 5
        assert one.text == small.tokenizer.decode(one.ids, skip_special_tokens=True).strip()
    assert len({one.ids for group in found for one in group}) > 3


def test_pairs_take_the_first_right_and_the_most_frequent_wrong():
    told = [rollout("7"), rollout("9"), rollout("5", True), rollout("9"), rollout("5", True), rollout(None)]
    assert pair(told, Random(0)) == (2, 1)
    lone = [rollout("7"), rollout("5", True), rollout("8"), rollout("9")]
    drawn = {pair(lone, Random(seed)) for seed in range(40)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}


def test_a_missing_answer_is_no_wrong_exemplar():
    right, nothing, wrong = rollout("5", True), rollout(None), rollout("6")
    stream = Random(0)
    assert pair([right, right], stream) == "all right"
    assert pair([right, nothing], stream) == "none wrong"
    assert pair([nothing, nothing], stream) == "no answer"
    assert pair([wrong, nothing], stream) == "none right"


def test_wilsons_interval():
    assert interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert interval(500, 500) == pytest.approx((0.992376, 1.0), abs=1e-6)
    with pytest.raises(UserError, match="at least one question"):
        interval(0, 0)


def tried(outcome, marks, reply=None):
    answers = tuple(rollout("5" if mark else "6", mark) for mark in marks)
    return Tried(items(1)[0], answers, outcome, reply=reply)


def test_statistics_count_every_question():
    told = statistics(
        [
            tried("kept", (True, False), rollout("5", True)),
            tried("hint failed", (True, False), rollout("6")),
            tried("none right", (False, False)),
            tried("all right", (True, True)),
        ]
    )
    assert told.questions == 4
    assert told.outcomes["kept"] == told.outcomes["none right"] == 1
    assert told.pass_rate.mean == 0.5
    assert told.hinted == 0.5
    assert told.spread == {0: 1, 1: 2, 2: 1}
    assert "1 kept" in str(told)
    with pytest.raises(UserError, match="No question was tried"):
        statistics([])


@pytest.mark.parametrize(
    ("outcome", "marks", "advice"),
    [
        ("all right", (True, True), r"too easy: .*raise rolling\.temperature"),
        ("none right", (False, False), r"too hard: .*rolling\.copies"),
    ],
)
def test_where_nothing_is_kept_the_counts_and_an_advice_are_given(outcome, marks, advice):
    with pytest.raises(UserError, match=rf"0 questions were kept, and 2 .*4 {outcome}.*{advice}"):
        enough([tried(outcome, marks)] * 4, 2)
    nothing = Tried(items(1)[0], (rollout(None), rollout(None)), "no answer")
    with pytest.raises(UserError, match="allow longer ones"):
        enough([nothing], 1)
    failed = tried("hint failed", (True, False), rollout("6"))
    with pytest.raises(UserError, match=r"not verified: change prompts\.hint"):
        enough([failed], 1)
    leaked = tried("hint leaked", (True, False), rollout("5", True))
    with pytest.raises(UserError, match="speak of the hint"):
        enough([leaked], 1)
    cut = tried("hint unfinished", (True, False), rollout("5", True))
    with pytest.raises(UserError, match=r"cut off: allow longer ones \(rolling\.length\)"):
        enough([cut, cut, failed], 1)
    enough([tried("kept", (True, False), rollout("5", True))], 1)


def test_advice_names_what_is_wrong():
    kept, failed = tried("kept", (True, False), rollout("5", True)), tried("hint failed", (True, False), rollout("6"))
    for found in ([kept] * 3, [kept] * 3 + [failed] * 2):
        assert statistics(found).advice() == "the questions are too few: raise questions.count, or give more"
    assert "not verified" in statistics([kept] + [failed] * 2).advice()
    silent = Tried(items(1)[0], (rollout("5", True), rollout(None)), "none wrong")
    assert "has no answer, and cannot be a wrong attempt" in statistics([silent] * 20 + [kept]).advice()


def rolling(**changed):
    return Rolling(**{"copies": 3, "length": 6, "round": 2, "batch_size": 8, **changed})


def test_a_selection_that_was_killed_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    def select(path, count=8):
        return collect(small, items(count), rolling(), PLAIN, toss, wanted=100, seed=5, path=tmp_path / path)

    whole = select("whole.jsonl")
    assert len(whole) == 8
    assert len({one.outcome for one in whole}) > 1
    text = (tmp_path / "whole.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:5]) + lines[5][:40])  # in the middle of the third round
    before = torch.random.get_rng_state()
    assert select("cut.jsonl") == whole
    assert (tmp_path / "cut.jsonl").read_text() == text
    assert torch.equal(before, torch.random.get_rng_state())

    def never(*_, **__):
        raise AssertionError("a finished selection draws nothing")

    monkeypatch.setattr(module, "sample", never)
    assert select("whole.jsonl") == whole


def test_every_round_is_on_the_disk_before_the_next(small, tmp_path, monkeypatch):
    path, real, calls = tmp_path / "questions.jsonl", module.sample, []

    def stopped(*arguments, **named):
        calls.append(1)
        lines = path.read_text().count("\n") if path.exists() else 0
        if lines >= 4:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(module, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        collect(small, items(8), rolling(), PLAIN, toss, wanted=100, seed=5, path=path)
    assert path.read_text().count("\n") == 4


def test_questions_of_one_name_stay_apart(small, tmp_path):
    asked = {
        "apart": items(8),
        "same": [replace(item, id="same") for item in items(8)],
        "none": [replace(item, id="") for item in items(8)],
    }
    told = [
        collect(small, some, rolling(round=8), PLAIN, toss, wanted=9, seed=5, path=tmp_path / f"{name}.jsonl")
        for name, some in asked.items()
    ]
    assert sum(one.reply is not None for one in told[0]) > 1
    for found in told[1:]:
        assert [one.item.instruction for one in found] == [one.item.instruction for one in told[0]]
        assert [one.rollouts for one in found] == [one.rollouts for one in told[0]]
        assert [one.reply is None for one in found] == [one.reply is None for one in told[0]]


def test_it_stops_when_enough_are_kept(small, tmp_path):
    few = collect(
        small, items(8), rolling(), PLAIN, lambda *_: Judgement("5", True), wanted=1, seed=5, path=tmp_path / "a"
    )
    assert len(few) == 8  # all right: nothing can be kept, so all are tried
    assert {one.outcome for one in few} == {"all right"}


def test_other_questions_in_the_file_and_missing_truths_are_refused(small, tmp_path):
    path = tmp_path / "questions.jsonl"
    collect(small, items(2), rolling(), PLAIN, toss, wanted=9, seed=5, path=path)
    with pytest.raises(UserError, match="these are other questions"):
        collect(small, items(4)[2:], rolling(), PLAIN, toss, wanted=9, seed=5, path=path)
    with pytest.raises(UserError, match="q0 has no true answer"):
        collect(small, [Item("q0", "math", "", "", "?", " ")], rolling(), PLAIN, toss, wanted=9, seed=5, path=path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"copies": 1}, "at least 2"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"round": 0}, r"rolling\.round is 0"),
        ({"hint_temperature": -1.0}, "temperature is -1"),
    ],
)
def test_rollouts_that_cannot_be_meant_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        rolling(**wrong)


def test_the_statistics_are_written_and_drawn(tmp_path):
    told = [tried("kept", (True, False), rollout("5", True)), tried("none right", (False, False))]
    write_statistics(tmp_path, told)
    kept = json.loads((tmp_path / "selection.json").read_text())
    assert kept["outcomes"]["kept"] == 1
    assert kept["table"]["rows"]["none right"] == {"questions": 1, "share": 50.0}
    assert statistics_table(told).rows["kept"] == {"questions": 1, "share": 50.0}
    draw_selection(tmp_path / "pictures", told)
    assert {path.suffix for path in (tmp_path / "pictures").iterdir()} == {".png", ".txt"}


def test_top_k_draws_among_the_k_likeliest_only():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(4000, 4)
    torch.manual_seed(0)
    drawn = Sampling(1, 1.0, 2).choose(logits)
    assert set(drawn.tolist()) == {1, 3}
    assert float((drawn == 1).float().mean()) == pytest.approx(0.731, abs=0.03)


def test_a_numbers_verifier_marks_what_a_model_writes():
    assert by_value(items(1)[0], r"0 + 1 = \boxed{1.0}") == Judgement("1", True)


def test_decoding_in_half_precision_gives_what_pytorchs_kernel_gives(small):
    """Also under padding, and the model is left as it was."""
    half = copy.deepcopy(small).to(torch.bfloat16)
    torch.manual_seed(0)
    prompts = [tuple(torch.randint(3, 400, (length,)).tolist()) for length in (12, 9, 12, 5)]
    ids, mask = left_pad(prompts, torch.device("cpu"))
    following = module.Prefix(
        torch.full((4, 1), 7), torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1), None, None
    )
    following = replace(following, positions=following.mask.sum(-1, keepdim=True) - 1)
    told = []
    for quick in (False, True):
        with torch.no_grad(), quick_decoding(half.causal) if quick else nullcontext():
            _, cache = half(module.Prefix(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None))
            told.append(half(replace(following, cache=cache))[0])
    assert half.causal.config._attn_implementation == "sdpa"
    assert not torch.equal(told[0], told[0].roll(1, 0))
    assert torch.allclose(told[0], told[1], atol=2e-2 * float(told[0].abs().max()))


def test_grouped_attention_by_hand():
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 6, 1, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])[:, None, None]
    found, _ = grouped(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    for row in range(2):
        for head in range(6):
            scores = (query[row, head, 0] * key[row, head // 2]).sum(-1) * 0.3
            weights = scores.masked_fill(~mask[row, 0, 0], -torch.inf).softmax(-1)
            assert torch.allclose(found[row, 0, head], weights @ value[row, head // 2], atol=1e-6)
