import io
import time

import pytest
from rich.console import Console

from preceptor.engine import progress_bar
from preceptor.engine.progress_bar import Bar, describe


def test_off_a_terminal_it_prints_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("step") as bar:
        bar.show(3, 10, "loss 0.5")
        bar.show(10, 10)
    printed = capsys.readouterr()
    assert printed.err == "step 3/10  loss 0.5\nstep 10/10\n"
    assert printed.out == ""


def test_it_is_due_every_fifteen_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    bar, hidden = Bar("step"), Bar("step", shown=False)
    for clock[0], due in ((114.9, False), (115.0, True)):
        assert (bar.due, hidden.due) == (due, False)
    bar.show(1, 2)
    hidden.show(1, 2)
    assert not bar.due
    assert capsys.readouterr().err == "step 1/2\n"


@pytest.mark.parametrize("timed", [True, False])
def test_on_a_terminal_it_draws_one_line(monkeypatch: pytest.MonkeyPatch, timed: bool) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(progress_bar, "Console", lambda stderr: terminal)
    with Bar("tokens", timed=timed) as bar:
        bar.show(1, 4, "first")
        bar.show(2, 4, "second")
        assert "\x1b[?25l" in screen.getvalue()
    drawn = screen.getvalue()
    assert "tokens 1/4" in drawn
    assert "tokens 2/4" in drawn
    assert drawn.index("first") < drawn.index("second")
    assert ("left" in drawn) is timed
    assert drawn.endswith("\x1b[?25h")


def test_a_line_of_metrics_in_short() -> None:
    line = {"step": 1, "loss": 0.25, "count": 4.0, "items_per_second": 12.0, "learning_rate": 0.1, "divergence": 0.5}
    assert describe(line) == "12 items/s  loss 0.25  divergence 0.5"
