"""The three environments: Gymnasium's contract, what an episode counts, and the defects that must not come back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.utils.env_checker import check_env  # noqa: E402

from preceptor.errors import UserError  # noqa: E402
from preceptor.methods.data_env.agents import OpenEndedAgent, SkillForestAgent, SkillListAgent, shares  # noqa: E402
from preceptor.methods.data_env.environment import UNKNOWN, DataEnvironment, Episode, OpenEnded, as_action  # noqa: E402
from preceptor.methods.data_env.policies import Alternating, Proportional  # noqa: E402
from preceptor.methods.data_env.rounds import drop_later, read_iterations, read_lines, write_iteration  # noqa: E402
from preceptor.methods.data_env.skill_environments import SkillForest, SkillList  # noqa: E402
from preceptor.methods.data_env.skill_tree import Exploit, Explore  # noqa: E402
from preceptor.methods.data_env.writers import Order, Symbolic, Written  # noqa: E402
from preceptor.tasks.arithmetic import Arithmetic  # noqa: E402
from preceptor.tasks.records import Datum, Item  # noqa: E402
from tests.scripted_student import ScriptedStudent  # noqa: E402

TASK = Arithmetic(only=("addition/two_digit", "addition/three_digit", "subtraction/two_digit", "reversal/five_digits"))
START = {"two_digit": 0.9, "three_digit": 0.9, "five_digits": 0.1}
VALIDATION = tuple(
    item
    for skill, names in TASK.skills.items()
    for name in names
    for item in TASK.items(25, seed=1, skill=skill, subskill=name)
)
FREE = Episode(budget=10_000, reject_known=False)

pytestmark = [
    pytest.mark.filterwarnings("ignore:No item was accepted"),
    pytest.mark.filterwarnings("ignore:.*fewer than 0 items"),
]


def student(start: dict[str, float] | None = None, gain: float = 0.01) -> ScriptedStudent:
    return ScriptedStudent(START if start is None else start, gain)


def open_ended(episode: Episode = FREE, pupil: Any = None) -> OpenEnded:
    return OpenEnded(TASK, pupil or student(), VALIDATION, folder=Path("rounds"), episode=episode)


def skill_list(episode: Episode = FREE, pupil: Any = None) -> SkillList:
    return SkillList(
        TASK, pupil or student(), VALIDATION, writer=Symbolic(TASK), folder=Path("rounds"), episode=episode
    )


def forest(episode: Episode = FREE, pupil: Any = None, writer: Any = None) -> SkillForest:
    writer = writer or Symbolic(TASK)
    return SkillForest(TASK, pupil or student(), VALIDATION, writer=writer, folder=Path("rounds"), episode=episode)


def written(count: int, seed: int = 5, **where: str) -> list[Datum]:
    return [TASK.datum(item) for item in TASK.items(count, seed=seed, **where)]


def play(kind: str, name: str, *, budget: int = 120, items: int = 30, seed: int = 0, **start: float) -> DataEnvironment:
    """One episode of an agent in an environment, with the scripted student."""
    blind = kind != "with_state"
    episode = Episode(budget=budget, rounds=50, reject_known=False, blind=blind)
    pupil = student(dict(START) | start, 0.008)
    if name == "open_ended":
        opened = open_ended(episode, pupil)
        agent: Any = OpenEndedAgent(Symbolic(TASK), kind, VALIDATION[:9], TASK.skills, items=items, seed=seed)  # type: ignore[arg-type]
        world: DataEnvironment = opened

        def act(info: dict[str, Any]) -> Any:
            return as_action(agent(info)[0])
    elif name == "skill_list":
        world = skill_list(episode, pupil)
        agent = SkillListAgent(kind, world.skills, items=items, seed=seed)  # type: ignore[arg-type]
        act = agent
    else:
        trees = forest(episode, pupil)
        world, agent = trees, SkillForestAgent(lambda skill: Proportional(start=3, items=24))

        def act(info: dict[str, Any]) -> Any:
            return trees.action(agent(info))

    _, info = world.reset(seed=seed)
    while not world.over:
        _, _, _, _, info = world.step(act(info))
    return world


@pytest.mark.parametrize("make", [open_ended, skill_list, forest])
def test_gymnasium_accepts_the_environment(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No item was accepted")
        warnings.filterwarnings("error", message=".*WARN.*")
        check_env(make(), skip_render_check=True)


@pytest.mark.parametrize("make", [open_ended, skill_list, forest])
def test_observations_lie_in_their_space_also_after_lessons(make: Any) -> None:
    world = make()
    seen, _ = world.reset(seed=3)
    assert seen in world.observation_space
    world.action_space.seed(4)
    for _ in range(3):
        seen, reward, terminated, truncated, _ = world.step(world.action_space.sample())
        assert seen in world.observation_space
        assert isinstance(reward, float)
        assert (type(terminated), type(truncated)) == (bool, bool)


def test_the_budget_counts_all_accepted_items_and_cuts_the_last_batch() -> None:
    world = open_ended(Episode(budget=50, rounds=99, reject_known=False))
    world.reset(seed=0)
    for number, (accepted, ends) in enumerate(((20, False), (20, False), (10, True)), 5):
        _, _, terminated, truncated, info = world.step(as_action(written(20, seed=number)))
        assert (len(info["accepted"]), terminated, truncated) == (accepted, ends, False)
    assert info["data"] == 50
    assert {check.reason for _, check in info["rejected"]} == {"the data budget is used up"}
    assert world.student.lessons == [20, 40, 50]


def test_the_limit_of_rounds_truncates_and_does_not_terminate() -> None:
    world = open_ended(Episode(budget=1000, rounds=2, reject_known=False))
    world.reset(seed=0)
    assert world.step(as_action(written(5)))[2:4] == (False, False)
    assert world.step(as_action(written(5, seed=6)))[2:4] == (False, True)


def test_reset_gives_the_student_its_first_weights_back_and_forgets_the_data() -> None:
    world = open_ended(pupil=student(gain=0.05))
    _, first = world.reset(seed=0)
    _, reward, _, _, info = world.step(as_action(written(40, skill="reversal")))
    assert reward > 0
    _, again = world.reset(seed=0)
    assert again["report"] == first["report"] != info["report"]
    assert again["data"] == 0
    assert world.data == []


@pytest.mark.parametrize("make", [skill_list, forest])
def test_the_reward_is_the_gain_in_validation_accuracy(make: Any) -> None:
    world = make(pupil=student(gain=0.02))
    _, info = world.reset(seed=0)
    world.action_space.seed(1)
    for _ in range(2):
        before = info["report"].accuracy
        skills = dict(info["accuracy"])
        _, reward, _, _, info = world.step(world.action_space.sample())
        assert reward == info["report"].accuracy - before
        for skill, past in info.get("history", {}).items():
            assert past[-1].reward == info["accuracy"][skill] - skills[skill]


def test_what_fails_a_check_is_left_out_and_its_reason_kept() -> None:
    world = open_ended(Episode(budget=100, reject_known=True), student({"two_digit": 1.0}))
    world.reset(seed=0)
    known = written(3, skill="subtraction")
    new = written(4, skill="reversal")
    unread = replace(new[0], response="no idea", id="unread")
    leaked = TASK.datum(next(item for item in VALIDATION if item.skill == "reversal"))
    _, _, _, _, info = world.step(as_action([*known, *new, unread, leaked, new[1]]))
    assert [datum.instruction for datum in info["accepted"]] == [datum.instruction for datum in new]
    reasons = [check.reason for _, check in info["rejected"]]
    assert reasons == [
        *["the student knows it"] * 3,
        "its answer does not pass the scorer",
        "it is a held-out item",
        "it was written before",
    ]
    assert world.student.lessons == [4]


def test_an_answer_that_cannot_be_read_does_not_pass_because_it_equals_itself() -> None:
    world = open_ended()
    world.reset(seed=0)
    strange = replace(written(1)[0], response="the answer is unclear", truth="the answer is unclear")
    _, _, _, _, info = world.step(as_action([strange]))
    assert [check.parses for check in info["checks"]] == [False]
    assert info["accepted"] == ()


def test_test_items_leak_too() -> None:
    test = TASK.items(5, seed=40, skill="reversal")
    world = OpenEnded(TASK, student(), VALIDATION, test=test, folder=Path("rounds"), episode=FREE)
    world.reset(seed=0)
    _, _, _, _, info = world.step(as_action([TASK.datum(item) for item in test]))
    assert [check.leaked for check in info["checks"]] == [True] * 5


def test_no_validation_items_is_an_error_that_names_the_task() -> None:
    with pytest.raises(UserError, match="math has no validation item"):
        OpenEnded(TASK, student(), [], folder=Path("rounds"))


def test_a_student_that_answers_too_little_is_an_error_with_both_counts() -> None:
    class Silent(ScriptedStudent):
        def answer(self, items: Sequence[Item]) -> list[str]:
            return ["1"]

    world = open_ended(pupil=Silent({}))
    with pytest.raises(UserError, match=f"{len(VALIDATION)} questions and gave 1 answers"):
        world.reset(seed=0)


def test_an_empty_round_trains_nothing_does_not_count_and_ends_the_episode_when_repeated() -> None:
    world = open_ended()
    _, first = world.reset(seed=0)
    with pytest.warns(UserWarning, match="not taught again"):
        _, reward, terminated, truncated, info = world.step(())
    assert (reward, terminated, truncated, info["round"]) == (0.0, False, False, 0)
    assert info["completed"] == first["completed"]
    assert world.student.lessons == []
    assert world.step(())[2:4] == (False, True)


def test_a_student_without_errors_ends_the_episode_quietly() -> None:
    world = play("with_state", "open_ended", two_digit=1.0, three_digit=1.0, five_digits=1.0)
    assert world.data == []
    assert world.over


def test_rounds_that_write_nothing_are_not_counted() -> None:
    world = forest(Episode(budget=10_000, rounds=3, reject_known=False))
    agent = SkillForestAgent(lambda skill: Alternating(new=1, items=2))
    _, info = world.reset(seed=0)
    accepted = []
    while not world.over:
        _, _, _, _, info = world.step(world.action(agent(info)))
        accepted.append(len(info["accepted"]) > 0)
    assert accepted[:4] == [True, False, True, False]
    assert world.round == 3 if sum(accepted) == 3 else world.idle > 1


def test_a_blind_episode_may_not_reject_what_the_student_knows() -> None:
    with pytest.raises(UserError, match="to see its state"):
        Episode(blind=True, reject_known=True)


class Watched(Symbolic):
    """A writer that keeps its orders."""

    def write(self, orders: Sequence[Order]) -> list[Written]:
        self.__dict__.setdefault("shown", []).extend(orders)
        return super().write(orders)


def test_a_blind_writer_is_shown_no_error_and_a_blind_tree_no_accuracy() -> None:
    writer = Watched(TASK)
    episode = Episode(reject_known=False, blind=True)
    listed = SkillList(TASK, student(), VALIDATION, writer=writer, folder=Path("a"), episode=episode)
    listed.reset(seed=0)
    listed.step(np.array([4, 4, 4]))
    shown = vars(writer)["shown"]
    assert shown
    assert not any(order.errors for order in shown)
    trees = forest(episode)
    trees.reset(seed=0)
    _, _, _, _, info = trees.step(trees.action(dict.fromkeys(trees.skills, Explore(2, 3))))
    for past in info["history"].values():
        assert set(past[-1].tree.training_accuracy.values()) == {None}
        assert (past[-1].performance, past[-1].reward) == (None, None)


def test_with_state_the_writer_is_shown_the_errors_of_the_skill_alone() -> None:
    writer = Watched(TASK)
    world = SkillList(TASK, student(), VALIDATION, writer=writer, folder=Path("a"), episode=FREE)
    _, info = world.reset(seed=0)
    world.step(np.array([4, 4, 4]))
    wrong = [one for one in info["completed"] if not one.correct]
    assert [order.errors for order in vars(writer)["shown"]] == [
        tuple(one for one in wrong if one.item.skill == skill) for skill in world.skills
    ]


def test_a_skill_that_is_not_examined_has_an_unknown_accuracy_and_no_reward() -> None:
    world = forest()
    world.reset(seed=0)
    world.completed = [one for one in world.completed if one.item.skill != "reversal"]
    assert world.accuracy["reversal"] is None
    assert world._observation()["accuracy"][world.skills.index("reversal")] == UNKNOWN
    before = world.report
    world._acted = {skill: (world.tree(skill), Explore(1, 1)) for skill in world.skills}
    world._close_round([], [], before)
    assert world.history["reversal"][-1].reward is None
    assert world.history["addition"][-1].reward == 0.0


def test_a_subskill_that_got_no_item_has_no_training_accuracy() -> None:
    class Lazy(Symbolic):
        def write(self, orders: Sequence[Order]) -> list[Written]:
            fails = [order.subskill == "five_digits" for order in orders]
            done = super().write(orders)
            return [Written((), ("no answer",)) if failed else one for failed, one in zip(fails, done)]

    world = forest(writer=Lazy(TASK))
    world.reset(seed=0)
    _, _, _, _, info = world.step(world.action(dict.fromkeys(world.skills, Explore(2, 3))))
    tree = info["history"]["reversal"][-1].tree
    assert tree.training_accuracy == {"five_digits": None}
    assert tree.accuracy == 0.0
    assert info["failures"] == ("no answer",)


def test_between_trainings_nothing_is_learned_and_the_reward_is_zero() -> None:
    world = forest(Episode(budget=1000, rounds=9, train_every=2, reject_known=False), student(gain=0.05))
    _, first = world.reset(seed=0)
    chosen = world.action(dict.fromkeys(world.skills, Explore(2, 4)))
    _, reward, _, _, info = world.step(chosen)
    assert reward == 0.0
    assert info["completed"] == first["completed"]
    assert info["history"]["reversal"][-1].tree.training_accuracy["five_digits"] is not None
    assert world.student.lessons == []
    again = world.action({skill: Exploit({}) for skill in world.skills})
    _, reward, _, _, info = world.step(again)
    assert reward > 0
    assert world.student.lessons == [info["data"]]


def test_the_data_are_those_that_the_allocations_asked_for() -> None:
    world = forest(Episode(budget=1000, rounds=9, reject_known=False))
    world.reset(seed=0)
    total = 0
    for _ in range(3):
        _, _, _, _, info = world.step(world.action(dict.fromkeys(world.skills, Explore(1, 3))))
        total += sum(past[-1].tree.total for past in info["history"].values())
        assert len(info["accepted"]) + len(info["rejected"]) == sum(p[-1].tree.total for p in info["history"].values())
    assert info["data"] <= total


def test_an_action_on_an_unknown_subskill_is_refused_by_name() -> None:
    world = forest()
    world.reset(seed=0)
    with pytest.raises(UserError, match="'singing'"):
        world.action(dict.fromkeys(world.skills, Exploit({"singing": 3})))
    with pytest.raises(UserError, match="no action"):
        world.action({})


@pytest.mark.parametrize("name", ["open_ended", "skill_list", "skill_tree"])
def test_seeing_the_student_helps_where_one_skill_is_weak(name: str) -> None:
    """An agent with state against the same one without, at equally many items, over three seeds."""
    gains = []
    for seed in range(3):
        seen, blind = (play(kind, name, seed=seed) for kind in ("with_state", "no_state"))
        assert len(seen.data) == len(blind.data) == 120
        gains.append(seen.report.accuracy - blind.report.accuracy)
    assert min(gains) > 0.05


@pytest.mark.parametrize("name", ["open_ended", "skill_list"])
def test_seeing_the_student_helps_little_where_all_skills_are_alike(name: str) -> None:
    alike = dict.fromkeys(START, 0.3)
    gaps = []
    for seed in range(4):
        seen, blind = (play(kind, name, seed=seed, **alike) for kind in ("with_state", "no_state"))
        gaps.append(seen.report.accuracy - blind.report.accuracy)
    assert abs(float(np.mean(gaps))) < 0.08


@pytest.mark.parametrize("name", ["open_ended", "skill_list", "skill_tree"])
@pytest.mark.parametrize("kind", ["with_state", "no_state", "random"])
def test_the_same_seed_gives_the_same_episode(name: str, kind: str) -> None:
    first, second, other = (play(kind, name, budget=60, seed=seed) for seed in (1, 1, 2))
    assert first.data == second.data
    assert first.report == second.report
    assert first.data != other.data


@pytest.mark.parametrize("make", [open_ended, skill_list, forest])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_episode_goes_on_from_its_last_whole_round(make: Any, stop: int) -> None:
    def act(world: Any, number: int) -> Any:
        if isinstance(world, OpenEnded):
            return as_action(written(10, seed=number, skill="reversal"))
        if isinstance(world, SkillList):
            return np.array([1, 5, 2])
        return world.action(dict.fromkeys(world.skills, Explore(1, 4)))

    whole = make()
    _, info = whole.reset(seed=7)
    write_iteration(whole, info, 0.0, [])
    for number in range(3):
        _, reward, _, _, info = whole.step(act(whole, number))
        write_iteration(whole, info, reward, ["a call failed"])
    drop_later(whole.folder, stop + 1)
    rounds = read_iterations(whole.folder)
    assert len(rounds) == stop + 1
    resumed = make()
    seen = resumed.restore(rounds[-1].report["state"], [datum for one in rounds for datum in one.data])
    assert seen["data"] == sum(len(one.data) for one in rounds)
    for number in range(stop, 3):
        _, _, _, _, seen = resumed.step(act(resumed, number))
    assert resumed.data == whole.data
    assert seen["report"] == info["report"]
    assert seen.get("history") == info.get("history")


def test_a_half_written_round_is_not_whole() -> None:
    world = open_ended()
    _, info = world.reset(seed=0)
    write_iteration(world, info, 0.0, [])
    _, reward, _, _, info = world.step(as_action(written(6)))
    write_iteration(world, info, reward, [])
    path = world.folder / "001" / "data.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.warns(UserWarning, match="was cut off"):
        assert len(read_iterations(world.folder)) == 1
    (world.folder / "000" / "report.json").unlink()
    assert read_iterations(world.folder) == []


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_separators_of_lines_in_a_text_do_not_cut_it(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"instruction": "a{separator}b"}}\n\n{{"instruction": "c"}}\n', encoding="utf-8")
    assert [row["instruction"] for row in read_lines(path)] == [f"a{separator}b", "c"]


def test_shares_are_whole_and_add_up() -> None:
    assert shares(np.array([1.0, 1.0, 1.0]), 10).tolist() == [4, 3, 3]
    assert shares(np.array([0.0, 2.0, 1.0]), 7).tolist() == [0, 5, 2]
    assert shares(np.zeros(2), 7).tolist() == [0, 0]
    with pytest.raises(UserError, match="negative"):
        shares(np.array([-1.0, 2.0]), 7)
