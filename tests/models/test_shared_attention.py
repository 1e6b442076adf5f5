import copy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from preceptor.errors import UserError
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.shared_attention.blocks import Geometry, Shared, lead
from preceptor.models.shared_attention.config import SharedAttentionConfig, leaders_of
from preceptor.models.shared_attention.model import SharedAttentionForCausalLM, removed, share
from tests.sharing_models import FAMILIES, gemma3, llama, made, maps, qwen3, some_ids

EACH = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


# Unit test 1 of the card: nobody follows.
@EACH
def test_without_followers_it_is_the_base_model(make: object) -> None:
    model, ids = made(make), some_ids()
    shared = share(model, ())
    torch.testing.assert_close(shared(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in model.parameters())


# Unit test 2 of the card: the base model's own matrices, injected, give its own logits.
@EACH
def test_its_own_matrix_injected_gives_the_same_logits(make: object) -> None:
    model, ids = made(make), some_ids()
    shared, attentions = share(model, (2, 3)), maps(model, ids)
    spans = Geometry(ids.shape[1], 0, None, 64).spans()

    def inject(follower: nn.Module, given: tuple[object, ...], named: dict[str, object]) -> tuple[object, object]:
        found = attentions[follower.layer]  # type: ignore[index]
        blocks = found.reshape(found.shape[0] * 2, -1, found.shape[-1])
        sharing = copy.copy(named["sharing"])
        sharing.shared = Shared(spans, [blocks])  # type: ignore[attr-defined]
        return given, {**named, "sharing": sharing}

    wanted = model(input_ids=ids).logits
    assert (shared(input_ids=ids).logits - wanted).abs().max() > 1e-2
    for layer in (2, 3):
        shared.model.decoder.layers[layer].self_attn.register_forward_pre_hook(inject, with_kwargs=True)
    torch.testing.assert_close(shared(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)


# Unit test 3 of the card: parameters of SmolLM2.
def test_the_followers_of_smollm2_lose_exactly_queries_and_keys() -> None:
    model = load("smollm2").causal
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert whole == 134_515_008
    for count, fewer in ((7, 3_096_576), (12, 5_308_416), (23, 10_174_464)):
        followers = tuple(range(30 - count, 30))
        assert sum(size for _, size in removed(model, followers)) == fewer
        with torch.device("meta"):
            config = SharedAttentionConfig(text_config=model.config, followers=followers)
            small = SharedAttentionForCausalLM(config)
        small.tie_weights()
        assert whole - sum(parameter.numel() for parameter in small.parameters()) == fewer


# Unit test 4 of the card: cached decoding is the full forward, token by token and in pieces.
@EACH
def test_cached_decoding_is_the_full_forward(make: object) -> None:
    shared, ids = share(made(make), (2, 3)), some_ids(length=90)
    full = shared(input_ids=ids, use_cache=False)
    assert full.past_key_values is None
    told = shared(input_ids=ids[:, :3], use_cache=True)
    logits, cache = [told.logits], told.past_key_values
    for place in range(3, 80):
        logits.append(shared(input_ids=ids[:, place : place + 1], past_key_values=cache).logits)
    logits.append(shared(input_ids=ids[:, 80:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), full.logits, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 90
    assert all((layer.keys is None) == (index in (2, 3)) for index, layer in enumerate(cache.layers))


@EACH
def test_left_padding_changes_nothing(make: object) -> None:
    shared, ids = share(made(make), (2, 3)), some_ids(1, 20)
    alone = shared(input_ids=ids, use_cache=False).logits
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
    both = torch.cat([padded, some_ids(1, 29)])
    mask = torch.ones_like(both)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    told = shared(input_ids=both, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.isfinite(told).all()
    torch.testing.assert_close(told[:1, 9:], alone, atol=1e-4, rtol=1e-4)
    first = shared(input_ids=both[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], use_cache=True)
    steps = [first.logits]
    for place in range(20, 29):
        there = slice(place, place + 1)
        steps.append(
            shared(
                input_ids=both[:, there],
                attention_mask=mask[:, : place + 1],
                position_ids=positions[:, there],
                past_key_values=first.past_key_values,
            ).logits
        )
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], told[real], atol=1e-4, rtol=1e-4)


def test_right_padding_changes_nothing() -> None:
    shared, ids = share(made(gemma3), (2, 3)), some_ids(1, 20)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = (torch.arange(25) < 20).long()[None]
    told = shared(input_ids=padded, attention_mask=mask).logits[:, :20]
    torch.testing.assert_close(told, shared(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


# Unit test 5 of the card (its other half is in test_similarity.py): what is saved, and that it comes back.
@EACH
def test_it_is_saved_without_queries_and_keys_and_comes_back(make: object, tmp_path: Path) -> None:
    model = made(make)
    shared, ids = share(model, (2, 3, 5)), some_ids()
    assert len(removed(model, (2, 3, 5))) == 3 * (4 if make in (qwen3, gemma3) else 2)
    left = [name for name in shared.state_dict() if any(f"layers.{layer}.self_attn" in name for layer in (2, 3, 5))]
    assert left
    assert not [name for name in left if any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm"))]
    shared.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is SharedAttentionForCausalLM
    assert again.config.followers == [2, 3, 5]
    assert torch.equal(again(input_ids=ids).logits, shared(input_ids=ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.isfinite(half(input_ids=ids).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["preceptor", "transformers", "transformers.models.auto.modeling_auto"])
def test_a_fresh_process_loads_it_by_importing_preceptor(first: str, tmp_path: Path) -> None:
    shared = share(made(llama), (2, 3))
    shared.save_pretrained(tmp_path)
    script = (
        f"import {first}\nimport preceptor\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
        f"assert AutoConfig.from_pretrained({str(tmp_path)!r}).followers == [2, 3]\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert type(model).__name__ == 'SharedAttentionForCausalLM'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_to_announce_the_kind_of_model_imports_almost_nothing() -> None:
    script = (
        "import sys\nbefore = set(sys.modules)\nimport preceptor\nadded = set(sys.modules) - before\n"
        "assert not {'torch', 'transformers', 'typing', 'importlib.abc', 'inspect'} & added, sorted(added)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["preceptor.models.shared_attention.model", "preceptor.models.shared_attention.config", "preceptor.models"],
)
def test_our_own_modules_may_come_first(module: str) -> None:
    script = (
        f"import {module}\nfrom transformers import AutoModelForCausalLM\n"
        "from preceptor.models.shared_attention.model import SharedAttentionConfig\n"
        "assert SharedAttentionConfig in AutoModelForCausalLM._model_mapping"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Unit test 6 of the card.
@EACH
def test_no_token_is_seen_by_those_before_it(make: object) -> None:
    shared, ids = share(made(make), (2, 3)), some_ids(length=150)
    other = ids.clone()
    other[:, 70] = 5 + (ids[:, 70] == 5).long()
    before, after = shared(input_ids=ids).logits, shared(input_ids=other).logits
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(make: object, dtype: torch.dtype) -> None:
    shared, ids = share(made(make), (2, 3)), some_ids()
    wanted = shared(input_ids=ids).logits
    told = shared.to(dtype)(input_ids=ids).logits
    assert told.dtype == dtype
    assert (told.float() - wanted).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * wanted.norm()


@EACH
def test_it_generates(make: object) -> None:
    shared, ids = share(made(make), (2, 3)), some_ids(1, 9)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    greedy = shared.generate(ids, **settings)
    grown = ids
    for _ in range(12):
        grown = torch.cat([grown, shared(input_ids=grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, grown)
    assert torch.equal(shared.generate(ids, **settings, use_cache=False), greedy)
    assert torch.equal(
        shared.generate(ids, **settings, num_beams=3), shared.generate(ids, **settings, num_beams=3, use_cache=False)
    )


def test_a_cache_keeps_the_rows_that_are_chosen() -> None:
    shared, ids = share(made(gemma3), (2, 3)), some_ids(3, 12)
    told = shared(input_ids=ids, use_cache=True, past_key_values=DynamicCache())
    told.past_key_values.batch_select_indices(torch.tensor([2, 0]))
    told.past_key_values.crop(-2)
    wanted = shared(input_ids=ids[[2, 0]], use_cache=False).logits[:, 10:]
    step = shared(input_ids=ids[[2, 0], 10:], past_key_values=told.past_key_values)
    torch.testing.assert_close(step.logits, wanted, atol=1e-4, rtol=1e-4)
    step.past_key_values.reset()
    assert step.past_key_values.get_seq_length() == 0


def naive(query: Tensor, key: Tensor, values: list[Tensor], window: int | None, padding: Tensor | None) -> list[Tensor]:
    """The slow form: one matrix of queries x keys, masked."""
    place = torch.arange(query.shape[3])
    hidden = place[None] > place[:, None]
    if window is not None:
        hidden = hidden | (place[None] <= place[:, None] - window)
    masked = hidden.expand(query.shape[0], 1, 1, *hidden.shape)
    if padding is not None:
        masked = masked | padding[:, None, None, None]
    scores = (query @ key[:, :, None]).masked_fill(masked, torch.finfo(query.dtype).min)
    outputs = [scores.softmax(-1) @ value[:, :, None] for value in values]
    return [out.permute(0, 3, 1, 2, 4).flatten(2) for out in outputs]


@pytest.mark.parametrize("window", [None, 1, 9, 100])
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_and_their_gradient_equal_the_dense_form(window: int | None, rows: int, padded: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 2, 3, 37, 4, dtype=torch.double, requires_grad=True)
    key = torch.randn(2, 2, 4, 37, dtype=torch.double, requires_grad=True)
    values = [torch.randn(2, 2, 37, 4, dtype=torch.double, requires_grad=True) for _ in range(3)]
    padding = torch.zeros(2, 37, dtype=torch.bool) if padded else None
    weights = torch.randn(3, 2, 37, 24, dtype=torch.double)
    if padding is not None:
        padding[1, :5] = True
        weights[:, 1, :5] = 0
    first, shared = lead(query, key, values[0], Geometry(37, 0, window, rows), padding, None)
    ours = [first] + [shared.apply(value, layer) for layer, value in enumerate(values[1:])]
    theirs = naive(query, key, values, window, padding)
    inputs = [query, key, *values]
    for mine, other, weight in zip(ours, theirs, weights):
        torch.testing.assert_close(mine * weight, other * weight)
    for kept in (True, False):
        got = torch.autograd.grad(sum((a * b).sum() for a, b in zip(ours, weights)), inputs, retain_graph=kept)
        if kept:
            wanted = torch.autograd.grad(sum((a * b).sum() for a, b in zip(theirs, weights)), inputs)
        for mine, other in zip(got, wanted):
            torch.testing.assert_close(mine, other)


def test_the_leader_need_not_be_used_itself() -> None:
    query = torch.randn(1, 1, 2, 5, 4, dtype=torch.double, requires_grad=True)
    key, value = torch.randn(1, 1, 4, 5, dtype=torch.double), torch.randn(1, 1, 5, 4, dtype=torch.double)
    _, shared = lead(query, key, value, Geometry(5, 0, None, 2), None, None)
    (got,) = torch.autograd.grad(shared.apply(value, 1).square().sum(), [query])
    (wanted,) = torch.autograd.grad(naive(query, key, [value], None, None)[0].square().sum(), [query])
    torch.testing.assert_close(got, wanted)


@EACH
def test_gradients_reach_leaders_and_followers(make: object) -> None:
    shared, ids = share(made(make), (2, 3)).double(), some_ids()

    def loss() -> Tensor:
        logits = shared(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    loss().backward()
    for name, parameter in shared.named_parameters():
        assert parameter.grad is not None, name
    layers = shared.model.decoder.layers
    step = 1e-3  # the norms compute in float32
    for weight in (layers[1].self_attn.k_proj.weight, layers[3].self_attn.v_proj.weight):
        place = tuple((weight.grad.abs() == weight.grad.abs().max()).nonzero()[0])
        with torch.no_grad():
            weight[place] += step
            above = loss()
            weight[place] -= 2 * step
            below = loss()
            weight[place] += step
        assert weight.grad[place].item() == pytest.approx((above - below).item() / (2 * step), rel=5e-3)


def test_a_step_under_autocast_is_near_one_without() -> None:
    shared, ids = share(made(llama), (2, 3)), some_ids()
    shared(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted = shared.model.decoder.layers[1].self_attn.q_proj.weight.grad.clone()
    shared.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = shared(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    got = shared.model.decoder.layers[1].self_attn.q_proj.weight.grad
    assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_teacher_and_student_share_no_weight() -> None:
    model = made(llama)
    shared = share(model, (2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_works_as_a_language_model() -> None:
    teacher = load("smollm2")
    shared = LanguageModel(share(teacher.causal, (5, 6, 7)), teacher.tokenizer).eval()
    prompts = [tuple(range(20, 29)), tuple(range(30, 34))]
    together = shared.generate(prompts, max_new_tokens=6, temperature=0)
    assert together == [shared.generate([prompt], max_new_tokens=6, temperature=0)[0] for prompt in prompts]


def test_each_follower_copies_from_the_nearest_computing_layer_below() -> None:
    assert leaders_of([4, 6, 8, 10]) == {4: 3, 6: 5, 8: 7, 10: 9}
    listed = [2, 5, 4, 3, 7, 6, 18, 9, 8, 11, 12, 1, 17, 10, 14, 13, 16]
    assert set(range(22)) - leaders_of(listed).keys() == {0, 15, 19, 20, 21}
    assert {follower - leader for follower, leader in leaders_of(listed).items()} >= {1, 14}
    assert all(low <= high for low, high in pairwise(leaders_of(listed).values()))


@pytest.mark.parametrize(
    ("followers", "told"),
    [
        ((0, 1), "Layer 0 cannot follow"),
        ((6,), "out of range: the model has layers 0 to 5"),
        ((-1,), "out of range"),
        ((3, 3), "named twice"),
        ((4,), "Layer 4 sees all keys and its leader, layer 3, a window of 7"),
        ((3, 4), "Layer 4 sees all keys and its leader, layer 2, a window of 7"),
    ],
)
def test_followers_that_do_not_fit_are_refused(followers: tuple[int, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        share(made(gemma3), followers)


def test_what_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match='"gpt2" models cannot be shared: choose a model of llama'):
        share(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)), (1,))
    with pytest.raises(UserError, match="preceptor_shared_attention"):
        share(share(made(llama), (2,)), (3,))
    with pytest.raises(UserError, match="attention_dropout=0.1"):
        share(llama(attention_dropout=0.1), (2,))
    shared, ids = share(made(llama), (2,)), some_ids()
    with pytest.raises(UserError, match="another model's"):
        shared(input_ids=ids, past_key_values=made(llama)(input_ids=ids, use_cache=True).past_key_values)
    with pytest.raises(UserError, match="attention mask has shape"):
        shared(input_ids=ids, attention_mask=torch.zeros(2, 1, 23, 23))
    with pytest.raises(ValueError, match="does not support"):
        shared.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="either input_ids or inputs_embeds"):
        shared()


def test_peft_trainer_and_tuples_find_the_door_they_know() -> None:
    from peft import LoraConfig, get_peft_model

    shared, ids = share(made(llama), (2, 3)), some_ids()
    logits = shared(input_ids=ids).logits
    adapted = get_peft_model(
        share(made(llama), (2, 3)), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    told = adapted(input_ids=ids, labels=ids)
    torch.testing.assert_close(told.logits, logits)
    told.loss.backward()
    whole = shared(input_ids=ids, labels=ids).loss
    # As Trainer has it under accumulation: the sum over this many items.
    part = shared(input_ids=ids, labels=ids, num_items_in_batch=4 * ids[:, 1:].numel()).loss
    torch.testing.assert_close(4 * part, whole)
    assert torch.equal(shared(input_ids=ids, return_dict=False)[0], logits)
    with pytest.raises(UserError, match="output_attentions"):
        shared(input_ids=ids, output_attentions=True)


@torch.no_grad()
def test_a_caller_may_go_on_with_the_cache_that_it_gave() -> None:
    shared, ids, own = share(made(llama), (2, 3)).eval(), some_ids(), DynamicCache()
    wanted = shared(input_ids=ids).logits
    shared(input_ids=ids[:, :-3], past_key_values=own)
    torch.testing.assert_close(shared(input_ids=ids[:, -3:], past_key_values=own).logits, wanted[:, -3:])
    torch.testing.assert_close(shared(input_ids=ids, past_key_values=DynamicCache()).logits, wanted)


@torch.no_grad()
def test_a_cache_may_be_filled_in_one_precision_and_read_in_another() -> None:
    shared, ids = share(made(llama), (2, 3)).eval(), some_ids()
    wanted = shared(input_ids=ids).logits[:, -2:]
    for first, second in ((False, True), (True, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            kept = shared(input_ids=ids[:, :-2], use_cache=True).past_key_values
        with torch.autocast("cpu", torch.bfloat16, enabled=second):
            told = shared(input_ids=ids[:, -2:], past_key_values=kept).logits.float()
        torch.testing.assert_close(told, wanted, atol=0.1, rtol=0.1)


def test_it_may_be_asked_for_by_the_name_of_an_implementation(tmp_path: Path) -> None:
    shared, ids = share(made(llama), (2, 3)).eval(), some_ids()
    shared.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, shared(input_ids=ids).logits)
