"""DistillKit's Parquet captures come in as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from preceptor.cache import Cache
from preceptor.commands.cache import Config, main
from preceptor.data.encoding import encode
from preceptor.data.readers import read
from preceptor.data.sequences import Sequence, collate
from preceptor.errors import UserError
from preceptor.models.language_model import LanguageModel
from tests.cache_models import VOCABULARY, make_sequences


def distillkit_bytes(log_p: np.ndarray, form: dict[str, object]) -> bytes:
    """One row of DistillKit's compressed log-probabilities, written from the format's description."""
    values = log_p.astype(np.float32)
    if form["delta_encoding"]:
        values = np.concatenate([values[:1], np.diff(values)])
    out = b""
    exact = int(form["exact_k"])
    out += values[:exact].astype("<f2" if form["exact_dtype"] == "float16" else "<f4").tobytes()
    rest, fitted = values[exact:], np.zeros(len(values) - exact, np.float32)
    if form["polynomial_terms"]:
        t = np.arange(len(rest), dtype=np.float32)
        shapes = np.stack([np.sqrt(t) if term == "sqrt" else t ** int(term) for term in form["polynomial_terms"]], 1)
        weights = np.linalg.lstsq(shapes.astype(np.float64), rest.astype(np.float64), rcond=None)[0].astype("<f4")
        out += weights.tobytes()
        fitted = (shapes * weights).sum(1)
    start, left = 0, rest - fitted
    for one in form["residual_bins"]:
        count, bits = one["num_elements"], one["element_bits"]
        part = left[start : start + count]
        scale = np.float32(np.abs(part).max() / 2 ** (bits - 1))
        whole = np.clip(np.round(part / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(int) + 2 ** (bits - 1)
        text = "".join(format(value, f"0{bits}b") for value in whole)
        text += "0" * (-len(text) % 8)
        out += scale.tobytes() + int(text, 2).to_bytes(len(text) // 8, "big")
        start += count
    return out


FORMS = (
    {"k": 10, "exact_k": 10, "exact_dtype": "float32", "polynomial_terms": None, "residual_bins": [],
     "delta_encoding": False},
    {"k": 24, "exact_k": 4, "exact_dtype": "float16", "polynomial_terms": [0, 1, 2, "sqrt"], "residual_bins": [],
     "delta_encoding": False},
    {
        "k": 24, "exact_k": 2, "exact_dtype": "float32", "polynomial_terms": [0, 1], "delta_encoding": True,
        "residual_bins": [
            {"scale_dtype": "float32", "element_bits": 6, "num_elements": 10},
            {"scale_dtype": "float32", "element_bits": 3, "num_elements": 7},
        ],
    },
)  # fmt: skip


Rows = dict[str, list[list[list[int]]]]


def write_capture(
    form: dict[str, object], teacher: LanguageModel, sequences: list[Sequence], folder: Path
) -> tuple[Rows, dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]]:
    """A capture as DistillKit writes it; returns its rows, and the log-probabilities and ids that went into them."""
    import pyarrow as pa
    import yaml
    from pyarrow import parquet

    full = {"d": VOCABULARY, "term_dtype": "float32", "error_diffusion": False, "normalize_t": False, **form}
    rows: Rows = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    truth = {}
    for one in sequences:
        with torch.no_grad():
            hidden = teacher(collate([Sequence((*one.ids, 1), (*one.response, False))], 1))[0]
        values, ids = (hidden @ teacher.head.weight.detach().T).log_softmax(-1).topk(int(form["k"]))
        truth[one.ids] = (values, ids)
        rows["input_ids"].append([*one.ids, 1])
        rows["compressed_logprobs"].append([list(distillkit_bytes(row.numpy(), full)) for row in values[:-1]])
        bits = ["".join(format(index, "08b") for index in row) for row in ids[:-1].tolist()]
        rows["bytepacked_indices"].append([list(int(row, 2).to_bytes(len(row) // 8, "big")) for row in bits])
    kind = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema(
        [("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", kind), ("bytepacked_indices", kind)]
    )
    folder.mkdir()
    parquet.write_table(pa.table(rows, schema=schema), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(full), encoding="utf-8")
    return rows, truth


@pytest.mark.parametrize("form", FORMS)
def test_distillkit_captures_are_imported(
    form: dict[str, object], teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path
) -> None:
    from preceptor.cache.distillkit import CompressionFormat, import_distillkit

    source = tmp_path / "captured"
    rows, truth = write_capture(form, teacher, sequences[:20], source)
    cache = import_distillkit(
        source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="tiny", max_length=64, sequences=sequences
    )
    assert len(cache) == 20
    assert cache.header.kind == "top_k"
    assert cache.summary()["kl"] < 0.02
    exactly = form["exact_k"] == form["k"]
    for one in sequences[:20:3]:
        targets = cache.targets([one])
        start = len(one.ids) - int(sum(one.response)) - 1
        values, ids = (part[start : len(one.ids) - 1] for part in truth[one.ids])
        assert torch.equal(targets.ids.sort(-1).values, ids.sort(-1).values)
        found = torch.zeros(len(ids), VOCABULARY).scatter(1, targets.ids, targets.log_probs.exp())
        wanted = torch.zeros(len(ids), VOCABULARY).scatter(1, ids, values.exp())
        assert (found - wanted).abs().max() < (0.03 if exactly else 0.2)
    form_read = CompressionFormat.read(source / "compression_config.yaml")
    decoded = form_read.targets(
        torch.tensor(rows["compressed_logprobs"][0], dtype=torch.uint8),
        torch.tensor(rows["bytepacked_indices"][0], dtype=torch.uint8),
    )
    values, ids = (part[:-1] for part in truth[sequences[0].ids])
    assert torch.equal(decoded.ids, ids)
    assert (decoded.log_probs - values).abs().max() < (1e-5 if exactly else 1.0)
    with pytest.raises(UserError, match="holds a cache already"):
        import_distillkit(source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="tiny", max_length=64)
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(UserError, match="None of the sequences"):
        import_distillkit(
            source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="t", max_length=64, sequences=sequences[30:]
        )
    (source / "compression_config.yaml").unlink()
    with pytest.raises(UserError, match="compression_config.yaml"):
        import_distillkit(source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="tiny", max_length=64)


def test_the_command_converts_a_capture_without_the_teachers_weights(
    teacher: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = tmp_path / "teacher", tmp_path / "text.jsonl"
    teacher.tokenizer.save_pretrained(folder)
    lines = [{"text": " ".join(f"w{word}" for word in one.ids)} for one in make_sequences(12)]
    text.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    sequences = encode(read(str(text)), teacher.tokenizer, max_length=48)
    _, truth = write_capture(FORMS[0], teacher, sequences, tmp_path / "captured")
    whole = {"distillkit": str(tmp_path / "captured"), "teacher": str(folder), "max_length": 48}
    assert main(Config(output=str(tmp_path / "c"), data=str(text), **whole)) == 0
    assert "top_k, 12 sequences" in capsys.readouterr().out
    cache = Cache.open(tmp_path / "c")
    cache.header.check_tokenizer(teacher.tokenizer)
    targets = cache.targets(sequences[:1])
    assert torch.equal(targets.ids.sort(-1).values, truth[sequences[0].ids][1][: len(targets.ids)].sort(-1).values)
    assert main(Config(output=str(tmp_path / "every"), **whole)) == 0
    assert "12 sequences" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a cache already"):
        main(Config(output=str(tmp_path / "c"), **whole))
    with pytest.raises(UserError, match="give --kind top_k, not hidden"):
        main(Config(output=str(tmp_path / "d"), kind="hidden", **whole))
    with pytest.raises(UserError, match="nothing to capture"):
        main(Config(output=str(tmp_path / "d")))
    with pytest.raises(UserError, match='tokenizer of "absent" cannot be loaded'):
        main(Config(output=str(tmp_path / "d"), **{**whole, "teacher": "absent"}))
