"""Every recipe, found as the command line finds it: its smallest settings run end to end, and twice alike."""

import hashlib
import importlib
import json
import os
from contextlib import suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from preceptor.catalogue import Method, find_methods, read_settings
from preceptor.cli import main
from preceptor.engine.config_file import read_config
from preceptor.extras import missing_packages
from preceptor.models.language_model import LanguageModel
from preceptor.vision.backbones import make_backbone
from tests.drawings import look

METHODS = [pytest.param(method, id=method.name) for method in find_methods()]


def recipe(method: Method) -> ModuleType:
    missing = missing_packages(method.requires)
    if missing:
        pytest.skip(f"{method.name} needs {', '.join(missing)}")
    return importlib.import_module(f"preceptor.methods.{method.name}.recipe")


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run of each recipe stays for the tests that follow it, in whichever process they run."""
    folder = tmp_path_factory.getbasetemp()
    runs = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny-runs"
    runs.mkdir(exist_ok=True)
    return runs


def run_tiny(method: Method, folder: Path) -> Path:
    module = recipe(method)
    with FileLock(f"{folder.absolute()}.lock"):
        if not (folder / "report.html").exists():
            module.main(replace(module.tiny, output=str(folder)))
    return folder


class Saved(Exception):
    """The student is on the disk: what a run does after that is left out."""


def run_until_saved(method: Method, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The smallest run up to its student, without the evaluation where the student is a language model."""
    save = LanguageModel.save

    def stopping(model: LanguageModel, place: Path, **named: Any) -> None:
        save(model, place, **named)
        if Path(place) == folder / "student":
            raise Saved

    monkeypatch.setattr(LanguageModel, "save", stopping)
    with suppress(Saved):
        module = recipe(method)
        module.main(replace(module.tiny, output=str(folder)))
    return folder


def load_student(method: Method, folder: Path) -> nn.Module:
    if method.requires == "vision":
        return make_backbone(str(folder), 1, seed=0)
    kind = AutoConfig.from_pretrained(folder)
    causal = any("CausalLM" in name for name in kind.architectures or [])
    return (AutoModelForCausalLM if causal else AutoModel).from_pretrained(folder)


def weights(folder: Path) -> str:
    state = load_file(folder / "student" / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_run_leaves_a_student_and_a_page(method: Method, kept: Path) -> None:
    folder = run_tiny(method, kept / method.name)
    student = load_student(method, folder / "student")
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert (folder / "student" / "README.md").stat().st_size > 0
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")[:500]
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert not [path for path in folder.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".pkl"}]
    for picture in folder.rglob("*.png"):
        look(picture, colours=0)


@pytest.mark.parametrize("method", METHODS)
def test_its_steps_are_written_down(method: Method, kept: Path) -> None:
    folder = run_tiny(method, kept / method.name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == recipe(method).tiny.training.steps


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_same_settings_give_the_same_student(method: Method, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_tiny(method, kept / method.name), run_until_saved(method, Path("again"), monkeypatch)
    assert weights(first) == weights(second)


@pytest.mark.parametrize("method", METHODS)
def test_its_settings_come_back_from_the_folder(method: Method, kept: Path) -> None:
    folder = run_tiny(method, kept / method.name)
    module = recipe(method)
    assert is_dataclass(module.Config)
    assert read_config(module.Config, folder / "config.json") == replace(module.tiny, output=str(folder))


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_that_holds_a_run_is_not_touched(
    method: Method, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_tiny(method, kept / method.name)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["run", method.name, "--tiny", "--output", str(folder), "--training.seed", "5"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "Traceback" not in told
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("method", METHODS)
def test_help_lists_every_setting(method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(method)
    with pytest.raises(SystemExit) as stop:
        main(["run", method.name, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "--training.learning-rate" in told
    assert "--output" in told


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_that_are_shown_are_the_codes_own(method: Method) -> None:
    config = recipe(method).Config()
    for setting in read_settings(method.path):
        value: object = config
        for name in setting.name.split("."):
            value = vars(value)[name]
        if not is_dataclass(value):
            assert eval(setting.default, {}) == value, setting.name  # noqa: S307
