"""Correction and re-generation: where, with what, what stays, and that a cut cache is as good as reading again."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.teachers import FrozenTeacher
from preceptor.errors import UserError
from preceptor.knowledge import LogitTargets
from preceptor.methods.semantic_revision.correction import Correction, can_be_cut, correct, differences
from preceptor.models.language_model import LanguageModel

V, END = 60, 2
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "eos_token_id": END}


class Words:
    """A tokenizer of V ids, of which END ends a text."""

    chat_template = None
    eos_token_id = pad_token_id = END
    all_special_ids = (END,)

    def get_vocab(self):
        return {str(index): index for index in range(V)}


def llama(seed, scale=3.0, **more):
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LanguageModel(LlamaForCausalLM(LlamaConfig(**SIZES, **heads, **more)), Words())
    with torch.no_grad():
        model.causal.get_output_embeddings().weight.mul_(scale * 20)
    return model.eval()


def gemma(seed):
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=8, sliding_window=4, pad_token_id=END
    )
    config.layer_types = ["sliding_attention", "full_attention"]
    model = LanguageModel(Gemma3ForCausalLM(config), Words())
    with torch.no_grad():
        model.causal.get_output_embeddings().weight.mul_(60)
    return model.eval()


def written(student, count=7, length=10, seed=0, temperature=1.0):
    """Sequences of several lengths that the student has written."""
    torch.manual_seed(seed)
    prompts = [tuple(torch.randint(3, V, (int(n),)).tolist()) for n in torch.randint(1, 6, (count,))]
    answers = student.generate(prompts, max_new_tokens=length, temperature=temperature)
    return [made(prompt, answer) for prompt, answer in zip(prompts, answers)]


def made(prompt, answer):
    return Sequence((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def slow(student, teacher, sequence, after=-1):
    """The place and the token of one correction, position by position, each model on the student's own prefix."""
    best = None
    start = len(sequence.prompt)
    for place in range(len(sequence.ids) - start):
        prefix = torch.tensor([sequence.ids[: start + place]])
        with torch.no_grad():
            p, q = (model.causal(prefix).logits[0, -1].double().log_softmax(-1) for model in (teacher, student))
        wanted = int(p.argmax())
        gap = float((p.exp() * (p - q)).sum())
        if place > after and wanted != sequence.ids[start + place] and (best is None or gap > best[0]):
            best = (gap, place, wanted)
    return best


class Says:
    """A teacher for which one token is the likeliest everywhere."""

    def __init__(self, token):
        self.token = token

    def __call__(self, batch):
        logits = torch.zeros(*batch.input_ids.shape, V)
        logits[..., self.token] = 5.0
        return LogitTargets(logits)


def test_the_most_divergent_token_is_replaced_and_all_before_it_stays():
    student, teacher = llama(1), llama(2)
    sequences = written(student)
    done = correct(student, FrozenTeacher(teacher), sequences, Correction(), length=10)
    assert done.without == 0
    assert done.tried == len(sequences)
    for before, after, places in zip(sequences, done.sequences, done.places):
        _, place, token = slow(student, teacher, before)
        start = len(before.prompt)
        assert places == (place,)
        assert after.ids[: start + place] == before.ids[: start + place]
        assert after.ids[start + place] == token != before.ids[start + place]
        assert after.prompt == before.prompt
        assert len(after.ids) - start <= 10
        assert END not in after.ids[start:-1]
    assert len({len(sequence.ids) for sequence in sequences}) > 1


def test_later_rounds_correct_later_places():
    student, teacher = llama(1), llama(2)
    sequences = written(student)
    torch.manual_seed(5)
    once = correct(student, FrozenTeacher(teacher), sequences, Correction(), length=10)
    torch.manual_seed(5)
    thrice = correct(student, FrozenTeacher(teacher), sequences, Correction(rounds=3), length=10)
    assert max(len(places) for places in thrice.places) > 1
    for first, places in zip(once.places, thrice.places):
        assert places[:1] == first
        assert list(places) == sorted(set(places))
    second = [
        (slow(student, teacher, sequence, places[0]), again.places[0])
        for sequence, places, again in zip(
            once.sequences,
            once.places,
            (correct_after(student, teacher, s, p) for s, p in zip(once.sequences, once.places)),
        )
        if again.places[0]
    ]
    assert second
    assert all(found[1] == places[-1] for found, places in second)


def correct_after(student, teacher, sequence, places):
    """One more round on a sequence whose prompt is taken to reach up to what was corrected."""
    start = len(sequence.prompt) + places[0] + 1
    later = Sequence(sequence.ids, (False,) * start + (True,) * (len(sequence.ids) - start))
    done = correct(student, FrozenTeacher(teacher), [later], Correction(), length=10)
    moved = tuple(place + places[0] + 1 for place in done.places[0])
    return type(done)(done.sequences, [moved], done.without, done.tried)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cut_cache_writes_what_reading_the_prefix_again_writes(temperature):
    student, teacher = llama(1), llama(2)
    sequences = written(student, count=9)
    results = []
    for keep in (True, False):
        torch.manual_seed(3)
        done = correct(
            student,
            FrozenTeacher(teacher),
            sequences,
            Correction(rounds=2),
            length=10,
            temperature=temperature,
            keep_cache=keep,
        )
        results.append((done.sequences, done.places))
    assert results[0] == results[1]


def test_after_the_correction_the_student_continues():
    student, teacher = llama(1), llama(2)
    sequences = written(student)
    done = correct(student, FrozenTeacher(teacher), sequences, Correction(), length=10, temperature=0.0)
    for sequence, places in zip(done.sequences, done.places):
        start = len(sequence.prompt) + places[0] + 1
        if len(sequence.ids) == start:
            continue
        expected = student.generate([sequence.ids[:start]], max_new_tokens=10 - places[0] - 1, temperature=0.0)[0]
        assert sequence.ids[start:] == expected


def test_a_cache_that_cannot_be_cut_is_not():
    """Sliding windows forget: the prefix is read again, and the student goes on as it would."""
    student, teacher = gemma(1), llama(2)
    sequences = written(student)
    batch = collate(sequences, END)
    with torch.no_grad():
        cache = student.causal.base_model(input_ids=batch.input_ids, use_cache=True).past_key_values
    assert not can_be_cut(cache, batch.input_ids.shape[1])
    done = correct(student, FrozenTeacher(teacher), sequences, Correction(), length=10, temperature=0.0)
    sequence, places = done.sequences[0], done.places[0]
    start = len(sequence.prompt) + places[0] + 1
    expected = student.generate([sequence.ids[:start]], max_new_tokens=9 - places[0], temperature=0.0)[0]
    assert sequence.ids[start:] == expected


def test_without_a_candidate_a_sequence_stays_and_is_counted():
    student = llama(1)
    sequences = written(student, temperature=0.0)
    done = correct(student, FrozenTeacher(llama(1)), sequences, Correction(rounds=3), length=10)
    assert done.sequences == sequences
    assert done.places == [()] * len(sequences)
    assert (done.without, done.tried) == (len(sequences), len(sequences))


def test_it_stops_where_the_teacher_would():
    student = llama(1)
    sequences = written(student)
    done = correct(student, Says(END), sequences, Correction(), length=10)
    for before, after, places in zip(sequences, done.sequences, done.places):
        assert places
        assert after.ids == before.ids[: len(before.prompt) + places[0]] + (END,)


def test_an_answer_that_ended_at_once_goes_on():
    student = llama(1)
    done = correct(student, Says(7), [made((3, 4), (END,))], Correction(), length=5, temperature=0.0)
    assert done.places == [(0,)]
    assert done.sequences[0].ids[:3] == (3, 4, 7)
    assert len(done.sequences[0].ids) > 3


def test_at_the_length_limit_the_corrected_prefix_is_kept():
    student = llama(1)
    answer = (7, 7, 7, 7, 5)
    done = correct(student, Says(7), [made((3, 4), answer)], Correction(), length=5)
    assert done.places == [(4,)]
    assert done.sequences[0].ids == (3, 4, 7, 7, 7, 7, 7)
    cut = correct(student, Says(7), [made((3, 4), (5, 6, 8))], Correction(), length=50, max_length=4)
    assert len(cut.sequences[0].ids) <= 5


def test_an_empty_response_stays():
    student, teacher = llama(1), FrozenTeacher(llama(2))
    empty = Sequence((3, 4), (False, False))
    done = correct(student, teacher, [empty, *written(student, count=1)], Correction(), length=5)
    assert done.sequences[0] == empty
    assert done.without == 1
    assert done.places[0] == ()
    assert len(done.places[1]) == 1


def test_a_text_of_one_token_stays():
    alone = Sequence((5,), (True,))
    done = correct(llama(1), FrozenTeacher(llama(2)), [alone], Correction(), length=5)
    assert done.sequences == [alone]
    assert (done.without, done.tried) == (1, 1)


def hybrid(seed):
    """A model of convolutions, whose states cannot be cut, and attention."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": END}
    model = LanguageModel(
        Lfm2ForCausalLM(Lfm2Config(**SIZES, **heads, layer_types=["conv", "full_attention"])), Words()
    )
    with torch.no_grad():
        model.causal.get_output_embeddings().weight.mul_(60)
    return model.eval()


def test_recurrent_states_are_read_again():
    """Rows that have ended cannot be dropped from them, and are written on to no end."""
    student, teacher = hybrid(1), llama(2)
    sequences = written(student)
    assert len({len(sequence.ids) for sequence in sequences}) > 1
    for sequence in sequences:
        (again,) = student.generate([sequence.prompt], max_new_tokens=10, temperature=0.0)
        together = student.generate([sequence.prompt, (3, 4, 5, 6, 7)], max_new_tokens=10, temperature=0.0)
        assert together[0] == again
    done = correct(student, FrozenTeacher(teacher), sequences, Correction(), length=10, temperature=0.0)
    for sequence, places in zip(done.sequences, done.places):
        start = len(sequence.prompt) + places[0] + 1
        if len(sequence.ids) > start:
            expected = student.generate([sequence.ids[:start]], max_new_tokens=9 - places[0], temperature=0.0)[0]
            assert sequence.ids[start:] == expected


def test_no_rounds_change_nothing():
    student, teacher = llama(1), llama(2)
    sequences = written(student)
    state = torch.random.get_rng_state()
    done = correct(student, FrozenTeacher(teacher), sequences, Correction(rounds=0), length=10)
    assert done.sequences == sequences
    assert (done.without, done.tried) == (0, 0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_random_place_is_a_candidate_too():
    student, teacher = llama(1), llama(2)
    sequences = written(student) * 8
    torch.manual_seed(0)
    done = correct(student, FrozenTeacher(teacher), sequences, Correction(), length=10, place="random")
    batch = collate(sequences[:7], END)
    with torch.no_grad():
        _, choices = differences(student(batch), student, FrozenTeacher(teacher), batch)
    choices = torch.split(choices, batch.predicts.sum(-1).tolist())
    chosen = [set() for _ in range(7)]
    for index, (sequence, places) in enumerate(zip(sequences, done.places)):
        answer = sequence.ids[len(sequence.prompt) :]
        assert answer[places[0]] != int(choices[index % 7][places[0]])
        chosen[index % 7].add(places[0])
    assert max(map(len, chosen)) > 1


def test_the_teachers_token_can_be_drawn():
    student = llama(1)
    batch = collate(written(student), END)
    torch.manual_seed(0)
    with torch.no_grad():
        _, drawn = differences(student(batch), student, FrozenTeacher(llama(2, scale=0.1)), batch, "sampled")
        _, best = differences(student(batch), student, FrozenTeacher(llama(2, scale=0.1)), batch)
    assert not torch.equal(drawn, best)


def test_the_student_is_left_as_it_was():
    student, teacher = llama(1).train(), llama(2)
    sequences = written(student)
    correct(student, FrozenTeacher(teacher), sequences, Correction(), length=10)
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="0 or more"):
        Correction(rounds=-1)
    student = llama(1)

    def other(batch):
        return LogitTargets(torch.zeros(*batch.input_ids.shape, V + 1))

    with pytest.raises(UserError, match=f"has {V + 1} entries and the student's {V}"):
        correct(student, other, written(student), Correction(), length=5)
