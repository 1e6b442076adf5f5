"""The page of a run: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import builtins
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from preceptor.catalogue import find_methods
from preceptor.cli import main as command
from preceptor.errors import UserError
from preceptor.report import write_report
from preceptor.report.curves import Curve, Series, collect, draw
from preceptor.report.table import Table
from preceptor.statistics import Claim, Value

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;'

OLD = find_methods()[0].name  # the method of a run that wrote none down: its folder's name


def table(*, claims: bool = False) -> Table:
    rows: dict[str, dict[str, Value | float | int | str | None]] = {
        "KL": {"teacher": None, "taught student": Value(0.5, 0.02, 8)},
        ATTACK: {"teacher": 12, "taught student": Value(-3.0, None, 1)},
    }
    made = [Claim("It is closer.", "difference -0.4 ± 0.1", True), Claim(ATTACK, "0.1", False)]
    return Table(
        "A table", ["teacher", "taught student"], rows, {"KL": "nat"}, {"KL": "lower"}, [ATTACK], made if claims else []
    )


def line(step: int) -> dict[str, float]:
    return {
        "step": step, "loss": 5.0 / step, "divergence": 4.0 / step, "count": 100.0, "gradient_norm": 1.0 + step,
        "learning_rate": 1e-3 * step, "items_per_second": 8.0, "count_per_second": 50.0, "memory_mib": 700.0 + step,
        **({"held_out_loss": 6.0 / step, "held_out_agreement": step / 40} if step % 5 == 0 else {}),
    }  # fmt: skip


def fill(folder: Path, *, finished: bool = True, claims: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "teacher": "smollm2",
        "student": ATTACK,
        "note": ATTACK,
        "training": {"steps": 30, "seed": 0, "clip": None},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "threads": 2, "packages": {"torch": ATTACK}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, 31)))
    if finished:
        result = {"table": table(claims=claims).json(), "headline": "" if claims else f"Better. {ATTACK}"}
        (folder / "result.json").write_text(json.dumps(result))
        samples = [{"prompt": ATTACK, "answers": {"teacher": ATTACK, "taught student": ""}}]
        (folder / "samples.json").write_text(json.dumps(samples))
    return folder


class Reader(HTMLParser):
    """Collects tags and text, and checks that what opens closes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "use", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("use", "path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_the_page_shows_what_the_folder_holds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = read(write_report(fill(tmp_path / "gkd" / "first")))
    for expected in ("gkd · first", "Better.", "smollm2", "0.50 ± 0.02", "↓ lower is better", "Samples", "no answer",
                 "training.steps", "2 threads", "60 s", "preceptor run gkd --config", "−3"):  # fmt: skip
        assert expected in page.text, expected
    assert "clip" not in page.text
    assert "not finished" not in page.text
    figures = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert figures == [
        "Loss", "Divergence from the teacher", "Held out agreement with the teacher", "Gradient norm", "Learning rate",
        "Memory, MiB",
    ]  # fmt: skip


def test_nothing_is_asked_of_another_place(tmp_path: Path) -> None:
    path = write_report(fill(tmp_path / "gkd" / "first"))
    page, text = read(path), path.read_text(encoding="utf-8")
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
        assert not any(name.startswith("on") or name in {"src", "srcset", "data", "action"} for name in attributes)
        target = attributes.get("xlink:href") or (attributes.get("href") if tag != "a" else None)
        assert target is None or target.startswith("#")
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")


def test_what_models_say_stays_text(tmp_path: Path) -> None:
    path = write_report(fill(tmp_path / "first", claims=True))
    assert read(path).text.count(ATTACK) >= 8
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "<img" not in path.read_text(encoding="utf-8")


def test_pictures_are_in_the_page_itself_with_their_captions(tmp_path: Path) -> None:
    folder = fill(tmp_path / OLD / "first")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "visual_words.png").write_bytes(b"\x89PNG one")
    (folder / "pictures" / "tree.png").write_bytes(b"\x89PNG two")
    (folder / "pictures" / "tree.txt").write_text(ATTACK)
    path = write_report(folder)
    page = read(path)
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in shown] == [ATTACK, "visual words"]
    assert shown[0]["src"] == "data:image/png;base64," + base64.b64encode(b"\x89PNG two").decode()
    assert "visual words" in page.text
    assert "img-src data:;" in path.read_text(encoding="utf-8")


def test_a_reproduction_shows_its_claims(tmp_path: Path) -> None:
    folder = tmp_path / "gkd" / "reproduction"
    folder.mkdir(parents=True)
    (folder / "table.json").write_text(json.dumps(table(claims=True).json()))
    page = read(write_report(folder))
    assert "Reproduction of gkd" in page.text
    assert "1 of 2 claims hold." in page.text
    assert "Does not hold" in page.text
    assert "difference −0.4 ± 0.1" in page.text
    assert "preceptor reproduce gkd" in page.text


def test_the_headline_counts_the_claims_that_hold(tmp_path: Path) -> None:
    for count, sentence in ((1, "The claim holds."), (2, "Both claims hold."), (3, "All 3 claims hold.")):
        made = table(claims=True)
        made.claims = [made.claims[0]] * count
        (tmp_path / "table.json").write_text(json.dumps(made.json()))
        assert sentence in read(write_report(tmp_path)).text


def test_the_method_is_the_one_that_the_run_wrote_down(tmp_path: Path) -> None:
    folder = fill(tmp_path / "anywhere" / "first")
    assert "Method" not in read(write_report(folder)).text
    (folder / "environment.json").write_text(json.dumps({"method": "gkd"}))
    page = read(write_report(folder))
    assert "MethodGKD: " in page.text
    assert "gkd · first" in page.text
    older = fill(tmp_path / OLD / "first")
    assert f"{OLD} · first" in read(write_report(older)).text
    (older / "environment.json").write_text(json.dumps({"method": "/elsewhere/mine"}))
    page = read(write_report(older))
    assert "Methodmine" in page.text
    assert "mine · first" in page.text


def test_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    folder = fill(tmp_path / "gkd" / "first", finished=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:12]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "lo')
    page = read(write_report(folder))
    assert "This run is not finished: 12 of 30 steps are done. The loss went from 5 to 0.417." in page.text
    assert "--resume" in page.text
    (folder / "metrics.jsonl").unlink()
    assert "has not taken a step yet" in read(write_report(folder)).text


def test_without_matplotlib_the_page_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    page = read(write_report(fill(tmp_path / "first")))
    assert 'pip install "preceptor[report]"' in page.text
    assert "0.50 ± 0.02" in page.text


def test_the_page_is_replaced_whole(tmp_path: Path) -> None:
    folder = fill(tmp_path / "first")
    assert write_report(folder).read_text() == write_report(folder).read_text()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "environment.json", "metrics.jsonl", "report.html", "result.json", "samples.json",
    ]  # fmt: skip


def test_folders_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    assert command(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


BROKEN = {
    "not JSON": ("result.json", "{"), "holds a list": ("config.json", "[1]"),
    "line 2": ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n'),
    "table": ("result.json", '{"table": {"title": "x"}}'), "no samples": ("samples.json", '[{"prompt": "x"}]'),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BROKEN)
def test_files_that_no_run_wrote_are_named(tmp_path: Path, sentence: str) -> None:
    name, text = BROKEN[sentence]
    folder = fill(tmp_path / "first")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_long_run_stays_a_small_page() -> None:
    pytest.importorskip("matplotlib")
    steps = [float(step) for step in range(1, 20001)]
    drawn = draw(Curve("Loss", Series(steps, [1 / step for step in steps]), Series([], [])))
    assert len(drawn) < 40_000


def test_curves_leave_out_what_is_constant_or_not_finite() -> None:
    metrics = [{"step": float(step), "loss": 1.0 / step, "flat": 2.0} for step in range(1, 4)]
    metrics.append({"step": 4.0, "loss": float("nan"), "flat": 2.0})
    curves = collect(metrics)
    assert [curve.title for curve in curves] == ["Loss"]
    twice = [{**line, "divergence": line["loss"] * 1.00001, "agreement": 1 / line["step"] + 1} for line in metrics[:3]]
    assert [curve.title for curve in collect(twice)] == ["Loss", "Agreement with the teacher"]
    assert curves[0].training.steps == [1, 2, 3]
