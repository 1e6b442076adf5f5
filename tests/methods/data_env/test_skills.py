"""Trees, actions, policies and the discovery of skills."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from preceptor.errors import UserError
from preceptor.language import Chat, Request, Scripted
from preceptor.methods.data_env.policies import (
    Alternating,
    Asked,
    Chance,
    FillBalanced,
    Policy,
    Proportional,
    Threshold,
    read_action,
)
from preceptor.methods.data_env.skill_discovery import Skills, discover, label, skills_of
from preceptor.methods.data_env.skill_tree import Action, Experience, Exploit, Explore, SkillTree, act
from preceptor.tasks.arithmetic import Arithmetic
from preceptor.tasks.records import Check, Datum, Item

TREE = SkillTree("fractions", {"adding": 5, "halving": 3})


def propose(skill: str, there: Sequence[str], count: int) -> list[str]:
    return [f"new {len(there) + place}" for place in range(count)]


def datum(place: int, subskill: str) -> Datum:
    return Datum(f"d{place}", f"question {place}", "1", "1", "fractions", subskill)


def check(place: int, known: bool, parses: bool = True) -> Check:
    return Check(f"d{place}", parses, known, False, parses, "" if parses else "its answer does not pass the scorer")


def went(action: Action, allocation: dict[str, int], reward: float | None = None, **accuracy: float) -> Experience:
    data = {name: tuple(f"{name}{place}" for place in range(count)) for name, count in allocation.items()}
    return Experience(SkillTree("fractions", allocation, data, {}, dict(accuracy)), action, 0.5, reward)


def test_explore_leaves_old_allocations_as_they_are() -> None:
    after = act(TREE, Explore(2, 7), propose)
    assert after.allocation == {"adding": 5, "halving": 3, "new 2": 7, "new 3": 7}


def test_exploit_adds_no_subskill_and_changes_by_its_delta() -> None:
    after = act(TREE, Exploit({"adding": 4, "halving": -3}), propose)
    assert after.allocation == {"adding": 9, "halving": 0}
    assert act(TREE, Exploit({}), propose).allocation == TREE.allocation


def test_an_allocation_below_zero_is_zero_and_warned_of() -> None:
    with pytest.warns(UserWarning, match="halving of fractions was to have fewer than 0"):
        assert act(TREE, Exploit({"halving": -10}), propose).allocation["halving"] == 0


def test_exploit_of_an_unknown_subskill_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'doubling'.*adding, halving"):
        act(TREE, Exploit({"doubling": 1}), propose)


def test_a_duplicate_in_another_case_is_dropped_and_asked_for_once_again() -> None:
    asked: list[int] = []

    def repeats(skill: str, there: Sequence[str], count: int) -> list[str]:
        asked.append(count)
        return ["Adding", "tripling"] if len(asked) == 1 else ["ADDING"]

    after = act(TREE, Explore(2, 1), repeats)
    assert after.subskills == ("adding", "halving", "tripling")
    assert asked == [2, 1]


def test_too_many_proposals_are_cut() -> None:
    after = act(TREE, Explore(1, 1), lambda skill, there, count: ["a", "b", "c"])
    assert after.subskills == ("adding", "halving", "a")


def test_actions_that_are_none_are_refused() -> None:
    for new, items in ((0, 3), (2, -1)):
        with pytest.raises(UserError, match="is no action"):
            Explore(new, items)


def test_training_accuracy_is_the_share_known_and_unknown_without_items() -> None:
    tree = TREE.filled(
        [datum(0, "adding"), datum(1, "adding"), datum(2, "adding")],
        [check(0, True), check(1, False), check(2, True, parses=False)],
    )
    assert tree.training_accuracy == {"adding": 0.5, "halving": None}
    assert tree.accuracy == 0.5  # weighted over the subskills where it is known
    assert tree.data == {"adding": ("d0", "d1", "d2"), "halving": ()}
    assert SkillTree("x", {"a": 3}).accuracy == 0.0
    assert tree.without_data() == TREE


def test_the_tree_s_accuracy_is_weighted_by_allocation() -> None:
    tree = SkillTree("x", {"a": 3, "b": 1, "c": 9}, training_accuracy={"a": 1.0, "b": 0.0, "c": None})
    assert tree.accuracy == pytest.approx(0.75)


def play(policy: Policy, rounds: int) -> list[Experience]:
    """The rounds of one skill under a policy; every item asked for is written."""
    history: list[Experience] = []
    for _ in range(rounds):
        tree = history[-1].tree.without_data() if history else SkillTree("fractions")
        action = policy(history, 0.5)
        history.append(went(action, dict(act(tree, action, propose).allocation)))
    return history


def test_alternating_explores_every_second_round_up_to_its_cap() -> None:
    history = play(Alternating(new=2, items=30, cap=200), 9)
    assert [isinstance(one.action, Explore) for one in history] == [True, False] * 4 + [False]
    assert [one.tree.total for one in history] == [60, 0, 60, 0, 60, 0, 60, 0, 0]
    assert len(history[-1].tree.subskills) == 8


def test_fill_balanced_brings_every_subskill_to_its_target() -> None:
    history = play(FillBalanced(new=2, items=10, subskills=4, target=25, cap=12), 8)
    written = {name: sum(one.tree.allocation.get(name, 0) for one in history) for name in history[-1].tree.subskills}
    assert written == dict.fromkeys(written, 25)
    assert len(written) == 4
    assert max(count for one in history for count in one.tree.allocation.values()) <= 12
    assert history[-1].tree.total == 0


def test_chance_keeps_at_most_so_many_subskills_and_follows_its_seed() -> None:
    history = play(Chance(Random(3), items=9, active=4), 30)
    assert {type(one.action) for one in history} == {Explore, Exploit}
    assert all(sum(count > 0 for count in one.tree.allocation.values()) <= 4 for one in history)
    assert history == play(Chance(Random(3), items=9, active=4), 30)


@pytest.mark.parametrize(
    ("reward", "expected"), [(0.02, Exploit({"a": 10})), (0.01, Explore(5, 10)), (None, Explore(5, 10))]
)
def test_threshold_adds_where_it_helped_and_explores_elsewhere(reward: float | None, expected: Action) -> None:
    assert Threshold()([went(Explore(1, 3), {"a": 3}, reward)], 0.5) == expected
    assert Threshold()([], 0.5) == Explore(5, 10)


def test_proportional_moves_the_allocation_to_the_errors() -> None:
    policy = Proportional(new=3, start=4, items=20, least=2)
    assert policy([], None) == Explore(3, 4)
    past = went(Explore(3, 4), {"a": 4, "b": 4, "c": 4}, a=1.0, b=0.25)
    assert policy([past], 0.5) == Exploit({"a": -2, "b": 11, "c": 6})


def chat(answers: Sequence[object]) -> tuple[Chat, list[str]]:
    """A chat that gives these answers, and what it was asked."""
    asked: list[str] = []
    left = iter(answers)

    def answer(request: Request) -> str:
        asked.append(request.messages[-1]["content"])
        return json.dumps(next(left))

    return Chat(Scripted(answer)), asked


def test_a_model_s_action_is_read_and_asked_for_again_when_it_is_none() -> None:
    talk, asked = chat([
        {"reasoning": "", "action": "explore", "new_subskills": 2},
        {"reasoning": "", "action": "exploit", "delta": {"singing": 3}},
        {"reasoning": "weak", "action": "exploit", "delta": {"adding": 4}},
    ])  # fmt: skip
    history = [went(Explore(2, 5), {"adding": 5, "halving": 5}, 0.03, adding=0.2)]
    with pytest.warns(UserWarning, match="says nothing of halving"):
        action = Asked(talk, "fractions")(history, 0.53)
    assert action == Exploit({"adding": 4, "halving": 0})
    assert "needs the two integers" in asked[1]
    assert "singing" in asked[2]


def test_a_model_that_never_gives_an_action_is_an_error() -> None:
    talk, asked = chat([{"reasoning": "", "action": "explore"}] * 8)
    with pytest.raises(UserError, match="no action for fractions in 8 tries"):
        Asked(talk, "fractions")([], None)
    assert len(asked) == 8


def test_the_two_prompts_show_rewards_or_training_accuracies() -> None:
    history = [went(Explore(2, 5), {"adding": 5}, 0.031, adding=0.217)]
    shown = {}
    for form in ("train_retrain", "accumulate"):
        talk, asked = chat([{"reasoning": "", "action": "explore", "new_subskills": 9, "items_each": 500}])
        action = Asked(talk, "fractions", form)(history, 0.5)  # type: ignore[arg-type]
        assert action == Explore(9, 500 if form == "train_retrain" else 30)
        shown[form] = asked[0]
    assert "reward 0.031" in shown["train_retrain"]
    assert "0.217" not in shown["train_retrain"]
    assert "training accuracy 0.217" in shown["accumulate"]
    assert "reward 0.031" not in shown["accumulate"]
    assert "LOWEST" in shown["accumulate"]


def test_actions_are_read_strictly() -> None:
    for data, told in (
        ({"action": "sing"}, "neither explore nor exploit"),
        (None, "neither explore nor exploit"),
        ({"action": "exploit"}, "map delta"),
        ({"action": "exploit", "delta": {"adding": 1.5}}, "map delta"),
    ):
        with pytest.raises(UserError, match=told):
            read_action(data, {"adding": 3})


ITEMS = Arithmetic().items(4, seed=0, skill="addition")


def test_skills_are_discovered_named_sorted_and_kept(tmp_path: Path) -> None:
    names = ["adding_small", "adding_large", "carrying", "unlisted"]
    sorted_names = {"categories": [{"name": "adding", "skills": names[:2]}, {"name": "carry", "skills": ["carrying"]}]}
    talk, asked = chat([*({"reason": "", "skill": name} for name in names), sorted_names, {"skill": "carry"}])
    found = discover(ITEMS, talk, least=2)
    assert found.names == ("adding", "carry")
    assert [found.labels[item.instruction] for item in ITEMS] == ["adding", "adding", "carry", "carry"]
    assert "at least 2 categories" in asked[4]
    found.save(tmp_path / "skills.json")
    assert Skills.load(tmp_path / "skills.json") == found
    with pytest.raises(UserError, match="discover them anew"):
        Skills.load(tmp_path / "absent.json")


def test_an_unknown_label_is_asked_for_again_and_then_an_error_that_lists_the_allowed() -> None:
    talk, asked = chat([{"skill": "cooking"}, {"skill": "adding"}])
    assert label(ITEMS[0], ("adding", "carry"), talk) == "adding"
    assert "'cooking'" in asked[1]
    talk, asked = chat([{"skill": "cooking"}] * 4)
    with pytest.raises(UserError, match="not one of adding, carry"):
        label(ITEMS[0], ("adding", "carry"), talk)
    assert len(asked) == 4


def test_items_that_name_their_skills_need_no_discovery() -> None:
    items: list[Item] = Arithmetic(only=("units", "reversal/four_digits")).items(8, seed=0)
    assert skills_of(items).categories.keys() == {"units", "reversal"}


def test_no_subskill_has_more_items_than_it_may() -> None:
    told = {"action": "exploit", "delta": {"adding": 30, "halving": 2}}
    assert read_action(told, {"adding": 20, "halving": 5}, most=30) == Exploit({"adding": 10, "halving": 2})
