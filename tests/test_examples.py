"""Every script in examples/ runs, with a small teacher of random weights."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
STUDENTS = {"first_student": ["student"], "on_policy": ["student"], "your_own_term": ["student"]}
STUDENTS["cache_and_train_twice"] = ["1-layers/student", "2-layers/student"]
SETTINGS: dict[str, dict[str, Any]] = {"cache_and_train_twice": {"layers": (1, 2)}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of three layers whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*letters, "<end>"])}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<end>")
    config = LlamaConfig(
        vocab_size=len(letters) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        eos_token_id=len(letters),
        bos_token_id=None,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "small"
    LanguageModel(LlamaForCausalLM(config), tokenizer).save(folder)
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


@pytest.mark.slow
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
