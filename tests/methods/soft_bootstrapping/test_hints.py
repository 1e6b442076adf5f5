"""Hints: what teacher and student are told, the two views of a reply, and what gives away that attempts were shown."""

import copy
from dataclasses import replace

import pytest

from preceptor.data.encoding import PLAIN_TEMPLATE
from preceptor.errors import UserError
from preceptor.methods.soft_bootstrapping.hints import Prompts, views
from preceptor.methods.soft_bootstrapping.recipe import SHORT
from preceptor.methods.soft_bootstrapping.rollouts import Rollout, Tried
from preceptor.tasks.records import Item

PROMPTS = Prompts(system="Add.", hint="{question}\nWrong: {wrong}\nRight: {right}")


def attempt(text, tokenizer, correct):
    return Rollout((*tokenizer(text)["input_ids"], 2), text, "5" if correct else "6", correct)


def kept(tokenizer, reply="2 + 3 = 5. \\boxed{5}"):
    item = Item("q0", "math", "", "", "What is 2 + 3?", "5")
    rollouts = (attempt("2 + 3 = 6. \\boxed{6}", tokenizer, False), attempt("2 + 3 = 5. \\boxed{5}", tokenizer, True))
    return Tried(item, rollouts, "kept", right=1, wrong=0, reply=attempt(reply, tokenizer, True))


def test_both_views_hold_the_generated_ids_under_the_template(tokenizer):
    odd = replace(kept(tokenizer).reply, ids=(32, 32, 2))  # no tokenizer would write these ids for a text
    one = replace(kept(tokenizer), reply=odd)
    (made,) = views([one], PROMPTS, tokenizer, max_length=512, stop=frozenset({2}))
    assert made.student.ids[-3:] == made.teacher.ids[-3:] == (32, 32, 2)
    assert made.student.response == (False,) * (len(made.student.ids) - 3) + (True,) * 3
    asked, shown = (tokenizer.decode(part.prompt) for part in (made.student, made.teacher))
    assert asked == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Wrong: 2 + 3 = 6. \\boxed{6}\nRight: 2 + 3 = 5. \\boxed{5}<|im_end|>" in shown
    assert made.student.prompt == PROMPTS.ask(one.item, tokenizer)  # learned as it is asked


def test_the_authors_plain_prompt_and_open_end_are_options(tokenizer):
    plain = replace(PROMPTS, template=False, end_of_turn=False)
    (made,) = views([kept(tokenizer)], plain, tokenizer, max_length=512, stop=frozenset({2}))
    assert tokenizer.decode(made.student.ids) == "Add.\n\nWhat is 2 + 3?\n\n2 + 3 = 5. \\boxed{5}"
    assert "<|im_start|>" in tokenizer.decode(made.teacher.ids)
    assert made.teacher.response.count(True) == made.student.response.count(True)


def test_shots_stand_before_the_question_and_the_hints_own_before_the_hint(tokenizer):
    asked = tokenizer.decode(SHORT.ask(kept(tokenizer).item, tokenizer))
    shown = tokenizer.decode(SHORT.show(kept(tokenizer), tokenizer))
    assert asked.count("<|im_start|>assistant\n") == shown.count("<|im_start|>assistant\n") == 2
    assert asked.index("= 65. \\boxed{65}<|im_end|>") < asked.index("What is 2 + 3?")
    assert "Wrong" not in asked
    assert shown.count("Wrong: ") == 2


def test_a_tokenizer_without_a_template_gets_the_plain_one(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    text = bare.decode(PROMPTS.ask(kept(tokenizer).item, bare))
    assert PLAIN_TEMPLATE.startswith("{{ bos_token")
    assert "### System:\nAdd." in text
    assert text.endswith("### User:\nWhat is 2 + 3?\n\n### Assistant:\n")


@pytest.mark.parametrize(
    ("reply", "leaks"),
    [
        ("2 + 3 = 5. \\boxed{5}", False),
        ("The attempt above is right. \\boxed{5}", True),
        ("As I was shown, it is \\boxed{5}", True),
        ("Here is one whose result is wrong, so \\boxed{5}", True),
        ("Many people are tempted to forget the carry. \\boxed{5}", False),
        ("She attempted 10 free throws and missed 5. \\boxed{5}", False),
        ("Both attempts differ in the carry. \\boxed{5}", True),
    ],
)
def test_replies_that_speak_of_the_hint_are_found(reply, leaks):
    assert (Prompts().leak(reply) is not None) is leaks


@pytest.mark.parametrize(
    ("prompts", "reply", "found"),
    [
        (Prompts(forbidden=("попытка",)), "Это верно: 5.", None),
        (Prompts(forbidden=("попытка",)), "Первая Попытка верна: 5.", "попытка"),
        (Prompts(forbidden=("", "...")), "2 + 3 = 5.", None),
        (Prompts(forbidden=("尝试",)), "我的尝试是对的", "尝试"),
        (Prompts(forbidden=("the hint",)), "They hinted at it. Mathe hints.", None),
        (Prompts(hint="{question} Вот один верный и один неверный ответ: {right} {wrong}"), "Вот один верный и один...",
         "вот один верный и один"),
    ],
)  # fmt: skip
def test_phrases_are_whole_words_in_any_script(prompts, reply, found):
    assert prompts.leak(reply) == found


def test_what_the_question_says_too_gives_nothing_away():
    reply = "In 3 attempts she scores 5. \\boxed{5}"
    assert Prompts().leak(reply) == "attempts"
    assert Prompts().leak(reply, "How often does she score in 3 attempts?") is None


def test_what_the_prompts_lack_is_said():
    with pytest.raises(UserError, match=r"has no \{right\}"):
        Prompts(hint="{question} {wrong}")
    with pytest.raises(UserError, match="cannot be filled in"):
        Prompts(hint="{question} {right} \\boxed{}")
    with pytest.raises(UserError, match=r"prompts\.hint_shots has 1 texts"):
        Prompts(hint_shots=("a",))


def test_ids_outside_the_vocabulary_are_refused_by_name(tokenizer):
    strange = replace(kept(tokenizer), reply=replace(kept(tokenizer).reply, ids=(49152, 2)))
    with pytest.raises(UserError, match="reply to q0 holds the id 49152"):
        views([strange], PROMPTS, tokenizer, max_length=512, stop=frozenset({2}))


def test_an_empty_reply_is_left_out_and_a_long_one_warned_of(tokenizer):
    empty = replace(kept(tokenizer), reply=Rollout((2,), "", None, False))
    open_ended = replace(PROMPTS, end_of_turn=False)
    assert views([empty], open_ended, tokenizer, max_length=512, stop=frozenset({2})) == []
    with pytest.warns(UserWarning, match="1 of 1 replies and prompts are cut to 12 tokens"):
        views([kept(tokenizer)], PROMPTS, tokenizer, max_length=12, stop=frozenset({2}))
