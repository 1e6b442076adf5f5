"""Own samples: a constant share, and DistiLLM's adaptive schedule."""

import math

import pytest
import torch

from preceptor.data.sequences import Sequence
from preceptor.distillation.lessons import Text
from preceptor.distillation.on_policy import BUFFER, OnPolicyMixer, OwnSamples
from preceptor.errors import UserError

TEXT = Text(answer_length=4, max_length=16)


class Writer:
    """Answers every prompt with the same two tokens, and counts how often it is called."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate(self, prompts, *, max_new_tokens, temperature, batch_size, limits):
        self.calls.append(len(prompts))
        return [(7, 8)] * len(prompts)


def examples(count):
    return [Sequence((n, n, 1, 2, 3), (False, False, True, True, True)) for n in range(count)]


def own(sequences):
    return [sequence for sequence in sequences if sequence.ids[2:] == (7, 8)]


def test_no_share_leaves_the_text_and_draws_nothing():
    writer, state = Writer(), torch.random.get_rng_state()
    assert OnPolicyMixer(OwnSamples()).mix(writer, examples(5), TEXT) == examples(5)
    assert writer.calls == []
    assert torch.equal(state, torch.random.get_rng_state())


def test_share_one_replaces_every_answer_in_one_call():
    writer = Writer()
    mixed = OnPolicyMixer(OwnSamples(share=1.0)).mix(writer, examples(5), TEXT)
    assert writer.calls == [5]
    assert own(mixed) == mixed
    assert sorted(s.prompt for s in mixed) == sorted(s.prompt for s in examples(5))
    assert all(s.response == (False, False, True, True) for s in mixed)


def test_the_share_is_decided_per_example():
    torch.manual_seed(0)
    writer, share = Writer(), OnPolicyMixer(OwnSamples(share=0.3))
    counts = [len(own(share.mix(writer, examples(20), TEXT))) for _ in range(100)]
    assert abs(sum(counts) / 2000 - 0.3) < 3 * (0.3 * 0.7 / 2000) ** 0.5
    assert len(set(counts)) > 5  # a coin for a whole batch would give 0 or 20 only


def test_text_without_a_prompt_stays():
    plain = [Sequence((1, 2, 3), (False, True, True)), Sequence((4, 5), (True, True))]
    mixed = OnPolicyMixer(OwnSamples(share=1.0)).mix(Writer(), plain, TEXT)
    assert plain[1] in mixed


def test_the_threshold_rises_only_when_the_loss_has_risen():
    share = OnPolicyMixer(OwnSamples(adaptive=True))
    for loss, threshold in ((2.0, 0.0), (2.05, 0.0), (1.0, 0.0), (2.11, 0.1), (2.15, 0.1), (2.3, 0.2)):
        share.see(loss)
        assert share.threshold == pytest.approx(threshold)
    for rise in range(20):
        share.see(10.0 + rise)
    assert share.threshold == 1.0


def test_the_share_is_the_threshold_where_it_is_adaptive():
    assert OnPolicyMixer(OwnSamples(share=0.3)).share == 0.3
    own_share = OnPolicyMixer(OwnSamples(adaptive=True))
    assert own_share.share == 0.0
    for loss in (1.0, 2.0):
        own_share.see(loss)
    assert own_share.share == pytest.approx(0.1)


def test_what_is_revised_enters_the_buffer():
    share = OnPolicyMixer(OwnSamples(adaptive=True))
    share.threshold = 1.0
    better = [Sequence((1, 9), (False, True))]
    assert share.mix(Writer(), examples(3), TEXT, revise=lambda written: better) == better
    assert share.buffer == better


def test_a_full_buffer_is_replayed_and_its_state_survives():
    torch.manual_seed(0)
    share = OnPolicyMixer(OwnSamples(adaptive=True))
    share.threshold = 1.0
    writer = Writer()
    while len(share.buffer) < BUFFER:
        share.mix(writer, examples(100), TEXT)
    writer.calls.clear()
    mixed = share.mix(writer, examples(100), TEXT, progress=0.75)
    fresh = writer.calls[0]
    assert 10 < fresh < 40  # φ (1 - t/N) = 0.25 of them are written anew
    assert own(mixed) == mixed  # the others come from the buffer
    assert len(share.buffer) == BUFFER
    again = OnPolicyMixer(OwnSamples(adaptive=True))
    again.load_state_dict(share.state_dict())
    assert again.state_dict() == share.state_dict()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"share": 1.5}, "probability"),
        ({"share": -0.1}, "probability"),
        ({"share": math.nan}, "probability"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": math.nan}, "above 0"),
        ({"adaptive": True, "share": 0.5}, r"set own\.share to 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        OwnSamples(**wrong)
