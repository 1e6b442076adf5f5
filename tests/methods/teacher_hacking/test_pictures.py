"""The pictures are drawn, with their captions, and say where the law is left."""

import pytest

from preceptor.evaluation.power_law import PowerLawVerdict, find_departure
from preceptor.evaluation.power_law_picture import draw_law
from preceptor.methods.teacher_hacking.pictures import draw_plane
from tests.drawings import look

matplotlib = pytest.importorskip("matplotlib")


def test_the_plane_has_a_line_a_course(tmp_path):
    path = tmp_path / "pictures" / "1_plane.png"
    draw_plane(path, {f"arm {k}": [(2.0, 3.0), (1.0, 2.0 + k), (0.5, 2.5)] for k in range(11)}, "Eleven arms.")
    look(path)
    assert path.with_suffix(".txt").read_text() == "Eleven arms.\n"


@pytest.mark.parametrize("departs", [True, False])
def test_the_law_and_what_leaves_it(tmp_path, departs):
    points = [(step, step**-0.5 * (3 if departs and step > 100 else 1)) for step in range(10, 210, 10)]
    verdict = find_departure(points)
    assert (verdict.flagged is not None) == departs
    draw_law(tmp_path / "law.png", [(0, 5.0), *points], verdict, str(verdict))
    look(tmp_path / "law.png")


def test_no_verdict_is_drawn_without_a_law_and_nothing_without_points(tmp_path):
    verdict = PowerLawVerdict(reason="insufficient data: 2 checkpoints")
    draw_law(tmp_path / "two.png", [(10, 1.0), (20, 0.9)], verdict, str(verdict))
    look(tmp_path / "two.png", colours=1)
    draw_law(tmp_path / "none.png", [], verdict, str(verdict))
    assert not (tmp_path / "none.png").exists()
