from itertools import combinations
from pathlib import Path

import pytest
import torch

from preceptor.errors import UserError
from preceptor.methods.echoatt.followers import (
    block_ends,
    check_spec,
    choose_followers,
    in_blocks,
    most_similar,
    shared_region,
)
from preceptor.methods.echoatt.pictures import draw_similarity
from preceptor.methods.echoatt.similarity import Similarity, measure_similarity
from preceptor.models.shared_attention.config import leaders_of
from tests.drawings import look
from tests.sharing_models import FAMILIES, gemma3, llama, made, maps, some_ids


def similarity_of(cosines: list[list[float]]) -> Similarity:
    return Similarity(tuple(map(tuple, cosines)), (0.1,) * len(cosines), 1, 0)


def drawn(layers: int, seed: int) -> Similarity:
    values = torch.rand(layers, layers, generator=torch.Generator().manual_seed(seed))
    both = (values + values.T) / 2
    return similarity_of(both.fill_diagonal_(1).tolist())


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_similarity_is_the_mean_cosine_of_whole_maps(make: object) -> None:
    model, ids = made(make), some_ids(3, 70)
    found = measure_similarity(model, ids.tolist(), length=70)
    attention = [one.flatten(1) for one in maps(model, ids)]
    even = torch.ones(70, 70).tril() / torch.arange(1, 71)[:, None]
    attention.append(even.expand(3, 4, 70, 70).flatten(1))
    wanted = [
        [torch.cosine_similarity(a.double(), b.double(), dim=1).mean().item() for b in attention] for a in attention
    ]
    torch.testing.assert_close(torch.tensor(found.cosines), torch.tensor(wanted)[:-1, :-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(found.floor), torch.tensor(wanted)[-1, :-1], atol=1e-5, rtol=1e-5)
    mean = (sum(wanted[2][:-1]) - wanted[2][2]) / 5
    assert found.means[2] == pytest.approx(mean, abs=1e-5)


# Unit test 5 of the card, its first half.
def test_similarity_is_symmetric_with_ones_and_knows_no_order() -> None:
    model, texts = made(llama), some_ids(4, 40).tolist()
    found = torch.tensor(measure_similarity(model, texts, length=40).cosines)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(6))
    other = measure_similarity(model, texts[::-1], length=40)
    torch.testing.assert_close(torch.tensor(other.cosines), found, atol=1e-6, rtol=1e-6)


def test_texts_of_another_length_are_cut_or_dropped(tmp_path: Path) -> None:
    model, text = made(gemma3), some_ids(1, 40)[0].tolist()
    found = measure_similarity(model, [text, text[:29], text[:30]], length=30)
    assert (found.texts, found.dropped) == (2, 1)
    alone = measure_similarity(model, [text[:30]], length=30)
    torch.testing.assert_close(torch.tensor(found.cosines), torch.tensor(alone.cosines))
    with pytest.raises(UserError, match="None of the 1 calibration texts has 41 tokens"):
        measure_similarity(model, [text], length=41)
    found.write(tmp_path / "similarity.json")
    assert Similarity.read(tmp_path / "similarity.json") == found


def test_the_sum_of_similarities_to_the_leaders_is_the_largest() -> None:
    for seed in range(5):
        similarity = drawn(9, seed)

        def kept(followers: tuple[int, ...], similarity: Similarity = similarity) -> float:
            return sum(similarity.cosines[layer][leader] for layer, leader in leaders_of(followers).items())

        for count in (0, 1, 4, 8):
            best = max(combinations(range(1, 9), count), key=kept)
            assert kept(tuple(most_similar(similarity, count, [None] * 9))) == pytest.approx(kept(best))
    with pytest.raises(UserError, match="9 followers do not fit a model of 9 layers"):
        most_similar(similarity, 9, [None] * 9)


def test_whoever_is_chosen_sees_what_its_leader_sees() -> None:
    windows: list[int | None] = [7, 7, 7, None, 7, 7, 7, None, 7]
    similarity = drawn(9, 3)
    assert in_blocks(0, 8, 3, windows) == [1, 2, 5, 6]

    def fits(followers: tuple[int, ...]) -> bool:
        return all(windows[layer] == windows[leader] for layer, leader in leaders_of(followers).items())

    def kept(followers: tuple[int, ...]) -> float:
        return sum(similarity.cosines[layer][leader] for layer, leader in leaders_of(followers).items())

    for count in (1, 2, 3, 4):
        best = max(filter(fits, combinations(range(1, 9), count)), key=kept)
        found = choose_followers(f"similar={count}", windows, lambda: similarity)
        assert fits(tuple(found))
        assert kept(tuple(found)) == pytest.approx(kept(best))
    with pytest.raises(UserError, match="at most 4 of its 9 layers can follow"):
        most_similar(similarity, 5, windows)


def test_the_largest_gap_leaves_the_ends_alone() -> None:
    low, high = 0.2, 0.9
    apart = (0, 1, 4, 7)  # 4 stands alone in the middle and is shared all the same
    cosines = [[1.0 if i == j else low if i in apart or j in apart else high for j in range(8)] for i in range(8)]
    assert shared_region(similarity_of(cosines)) == (2, 6)
    assert choose_followers("gap=2", [None] * 8, lambda: similarity_of(cosines)) == [3, 5]


def test_the_forms_of_the_setting() -> None:
    def never() -> Similarity:
        raise AssertionError("not needed")

    ten: list[int | None] = [None] * 10
    assert in_blocks(2, 9, 4, ten) == [3, 4, 5, 7, 8, 9]
    assert choose_followers("blocks=4,skip=2", ten, never) == [3, 4, 5, 7, 8, 9]
    assert choose_followers("2, 5,4,3,7", [None] * 22, never) == [2, 5, 4, 3, 7]
    for nobody in ("blocks=1", "blocks=2,skip=9"):
        with pytest.warns(UserWarning, match="no layer shares"):
            assert choose_followers(nobody, ten, never) == []
    with pytest.warns(UserWarning, match="no layer shares"):
        assert choose_followers("similar=0", ten, lambda: drawn(10, 0)) == []
    for wrong in ("similar", "similar=a", "gap=3,skip=1", "12,", "some=3"):
        with pytest.raises(UserError, match="does not say which layers share"):
            choose_followers(wrong, ten, never)
        with pytest.raises(UserError, match="does not say which layers share"):
            check_spec(wrong)
    with pytest.raises(UserError, match="skip is 10"):
        choose_followers("blocks=2,skip=10", ten, never)


def test_a_group_ends_with_its_last_follower() -> None:
    assert block_ends([3, 4, 5, 7, 8, 9]) == (5, 9)
    assert block_ends([7, 2, 4]) == (2, 4, 7)
    assert block_ends([]) == ()


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_similarity(tmp_path / "pictures", drawn(9, 0), [2, 3])
    look(tmp_path / "pictures" / "similarity.png")
    assert "Mean over 1 texts" in (tmp_path / "pictures" / "similarity.txt").read_text()
