import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig

from preceptor.errors import UserError
from preceptor.models.identity import same_tokenizer
from preceptor.models.loading import load
from preceptor.models.student import make_student
from tests.byte_models import WIDTHS, batch_of, byte_tokenizer, tiny

GEMMA3 = {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 3}


def deep(layers=7):
    return tiny(LlamaConfig(**WIDTHS, num_hidden_layers=layers))


def storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def kept(student, teacher):
    """Which of the teacher's layers each layer of the student is, told by its weights."""
    own = [layer.self_attn.q_proj.weight for layer in student.causal.base_model.layers]
    theirs = [layer.self_attn.q_proj.weight for layer in teacher.causal.base_model.layers]
    return [next(index for index, weight in enumerate(theirs) if torch.equal(mine, weight)) for mine in own]


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("teacher:layers=7", [0, 1, 2, 3, 4, 5, 6]),
        ("teacher:layers=4", [0, 2, 4, 6]),
        ("teacher:layers=3", [0, 3, 6]),
        ("teacher:layers=2", [0, 6]),
        ("teacher:layers=1", [0]),
        ("teacher:layers=1,2,5", [1, 2, 5]),
    ],
)
def test_a_pruned_copy_has_the_teachers_layers_and_shares_none(spec, layers):
    teacher = deep()
    student = make_student(spec, teacher, seed=0)
    assert kept(student, teacher) == layers
    assert student.causal.config.num_hidden_layers == len(layers)
    assert [layer.self_attn.layer_idx for layer in student.causal.base_model.layers] == list(range(len(layers)))
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert not storages(student) & storages(teacher)
    assert student.training
    assert not teacher.training
    assert student.tokenizer is not teacher.tokenizer
    assert same_tokenizer(teacher, student) == "identical"


def test_a_copy_with_all_layers_is_the_teacher():
    for config in (LlamaConfig(**WIDTHS, num_hidden_layers=3, tie_word_embeddings=True),
                   Gemma3TextConfig(**WIDTHS, **GEMMA3, num_hidden_layers=3)):  # fmt: skip
        teacher = tiny(config)
        student = make_student("teacher:layers=3", teacher, seed=0).eval()
        with torch.no_grad():
            assert torch.equal(student(batch_of(9, 4)), teacher(batch_of(9, 4)))


def test_lists_with_an_entry_a_layer_follow_the_layers():
    teacher = tiny(Gemma3TextConfig(**WIDTHS, **GEMMA3, num_hidden_layers=6))
    kinds = teacher.causal.config.layer_types
    assert len(set(kinds)) == 2
    student = make_student("teacher:layers=0,2,5", teacher, seed=0)
    assert student.causal.config.layer_types == [kinds[0], kinds[2], kinds[5]]
    assert kept(student, teacher) == [0, 2, 5]
    longer = make_student("fresh:layers=8,hidden=16", teacher, seed=0)
    assert longer.causal.config.layer_types == [*kinds, *kinds[:2]]
    assert longer(batch_of(6)).shape == (1, 6, 16)


def test_a_pruned_copy_trains_generates_and_is_saved(tmp_path):
    student = make_student("teacher:layers=2", deep(), seed=0)
    student(batch_of(6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.causal.base_model.parameters())
    student.save(tmp_path / "student")
    again = load(str(tmp_path / "student"))
    assert again.causal.config.num_hidden_layers == 2
    prompts = [(1, 8, 9), (1, 5)]
    assert again.generate(prompts, max_new_tokens=5, temperature=0) == student.generate(
        prompts, max_new_tokens=5, temperature=0
    )


def test_another_architectures_layers_are_found():
    teacher = tiny(GPT2Config(n_embd=32, n_layer=4, n_head=4))
    student = make_student("teacher:layers=2", teacher, seed=0)
    assert len(student.causal.transformer.h) == 2
    assert torch.equal(
        student.causal.transformer.h[1].attn.c_attn.weight, teacher.causal.transformer.h[3].attn.c_attn.weight
    )


def test_a_low_precision_teacher_gives_a_float32_student_by_every_road():
    teacher = deep().bfloat16()
    for spec in ("teacher:layers=2", "fresh:layers=1,hidden=16", "lora:rank=2"):
        student = make_student(spec, teacher, seed=0)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert teacher.head.weight.dtype == torch.bfloat16


def test_a_fresh_student_keeps_proportions_and_depends_on_the_seed_alone():
    teacher = deep()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, other = (make_student("fresh:layers=2,hidden=16", teacher, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    config = one.causal.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 16, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert one.generate([(1, 5)], max_new_tokens=3)
    given = make_student("fresh:layers=1,hidden=24,heads=6,kv_heads=3,intermediate=40", teacher, seed=0).causal.config
    assert (given.num_attention_heads, given.num_key_value_heads, given.head_dim, given.intermediate_size) == (
        6,
        3,
        4,
        40,
    )


def test_an_adapter_begins_as_its_base_and_only_it_learns():
    teacher = deep(3)
    student = make_student("lora:rank=2,alpha=4,dropout=0.1", teacher, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(batch_of(6)), teacher(batch_of(6)))
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 3 * 7 * 2
    assert not storages(student) & storages(teacher)
    assert not any("lora_" in name for name, _ in teacher.named_parameters())
    same = make_student("lora:rank=2,alpha=4,dropout=0.1", teacher, seed=0)
    pairs = zip(student.state_dict().values(), same.state_dict().values())
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_an_adapter_or_a_student_comes_from_a_folder(tmp_path):
    other = tiny(LlamaConfig(**WIDTHS, num_hidden_layers=1), seed=5)
    other.save(tmp_path / "base")
    adapted = make_student(f"lora:rank=2,base={tmp_path / 'base'}", deep(), seed=0)
    assert adapted.causal.config.num_hidden_layers == 1
    named = make_student(str(tmp_path / "base"), deep(), seed=0)
    assert torch.equal(named.head.weight, other.head.weight)
    assert named.training


def test_an_adapted_teacher_gives_pruned_and_adapted_students_of_what_it_says():
    teacher = make_student("lora:rank=2", deep(3), seed=0).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        said = teacher(batch_of(6))
        for spec in ("teacher:layers=3", "lora:rank=2"):
            student = make_student(spec, teacher, seed=0).eval()
            torch.testing.assert_close(student(batch_of(6)), said, rtol=1e-4, atol=1e-5)
    assert teacher.adapted


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("teacher:layers=9", "have 9 layers, but the teacher has 7: choose 1 to 7"),
        ("teacher:layers=0", "have 0 layers"),
        ("teacher:layers=0,7", "layer 7 is out of range: the teacher has layers 0 to 6"),
        ("teacher:layers=2,2", "distinct and ascending"),
        ("teacher:layers=3,1", "distinct and ascending"),
        ("teacher:layers=two", "is not a student: give teacher:layers=10"),
        ("teacher", "is not a student"),
        ("teacher:depth=3", "is not a student"),
        ("fresh:layers=2,width=16", "its settings are layers, hidden, heads"),
        ("fresh:layers=2,layers=3", "its settings are"),
        ("fresh:layers=x", "layers is x; it must be a whole number"),
        ("fresh:hidden=20,heads=3", "does not fit: hidden must be an even multiple of heads"),
        ("fresh:hidden=32,heads=4,kv_heads=3", "heads a multiple of kv_heads"),
        ("lora:rank=0", "rank is 0; it must be a whole number of at least 1"),
        ("lora:rank=2,dropout=1.5", "it must lie in"),
        ("lora", "its settings are rank, alpha"),
        ("techer:layers=3", "is not a student: give teacher:layers=10"),
        ("./absent", "does not exist"),
    ],
)
def test_specifications_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        make_student(spec, deep(), seed=0)


def test_the_tokenizer_of_a_fresh_student_is_the_teachers():
    teacher = tiny(tokenizer=byte_tokenizer(extra=["one", "two"]))
    student = make_student("fresh:layers=1,hidden=16", teacher, seed=0)
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert student.vocabulary == 262
