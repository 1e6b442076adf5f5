import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from preceptor.data.encoding import encode_prompt
from preceptor.errors import UserError
from preceptor.language import Budget, Chat, ChatSettings, Echo, Endpoint, Limits, Request, open_chat
from preceptor.language.local import LocalModel
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load

QUESTIONS = ["What is the capital of France?", "Say hello.", "Name a colour and an animal, please.", "2 + 2 ="]


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    return load("smollm2")


@pytest.fixture(scope="module")
def local(smollm2: LanguageModel) -> LocalModel:
    return LocalModel(smollm2, batch_size=4)


def ask(
    text: str, max_tokens: int = 12, temperature: float = 0.0, seed: int = 0, stop: tuple[str, ...] = ()
) -> Request:
    return Request(({"role": "user", "content": text},), max_tokens, temperature, seed, stop)


def test_answers_and_token_counts_are_the_models_own(smollm2: LanguageModel, local: LocalModel) -> None:
    replies = Chat(local).ask([ask(question) for question in QUESTIONS])
    assert "Paris" in replies[0].text
    for question, reply in zip(QUESTIONS, replies):
        prompt = encode_prompt([{"role": "user", "content": question}], smollm2.tokenizer)
        whole = smollm2.causal.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=smollm2.pad_id
        )[0, len(prompt) :]
        assert reply.text == smollm2.tokenizer.decode(whole, skip_special_tokens=True)
        assert (reply.prompt_tokens, reply.completion_tokens) == (len(prompt), len(whole))
        assert reply.cut == (len(whole) == 12 and int(whole[-1]) not in smollm2.stop_ids)


def test_log_probabilities_are_exact(smollm2: LanguageModel, local: LocalModel) -> None:
    messages = ({"role": "user", "content": QUESTIONS[0]},)
    continuations = ["Paris", "The capital of France is Paris.", "London", "Berlin is.", "Rome"]
    asking = Chat(local)
    found = asking.log_probabilities(messages, continuations)
    prompt = encode_prompt(messages, smollm2.tokenizer)
    for text, row in zip(continuations, found):
        ids = smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = smollm2.causal(torch.tensor([[*prompt, *ids]])).logits[0].double()
        expected = [float(logits[len(prompt) + place - 1].log_softmax(-1)[token]) for place, token in enumerate(ids)]
        assert row == pytest.approx(expected, abs=1e-3)
    assert sum(found[0]) > sum(found[2])
    total = math.fsum(math.exp(sum(row)) for row in (found[0], found[2], found[4]))
    assert 0 < total < 1
    assert asking.spent.prompt_tokens > 0
    assert asking.log_probabilities(messages, []) == []
    with pytest.raises(UserError, match="continuation is empty"):
        asking.log_probabilities(messages, [""])
    with pytest.raises(UserError, match='"echo" gives no log-probabilities'):
        Chat(Echo()).log_probabilities(messages, ["x"])


def test_kinds_of_request_are_answered_apart_and_in_order(local: LocalModel) -> None:
    mixed = [ask("Count to ten.", max_tokens=length) for length in (3, 9, 3)] + [ask("Say hello.", stop=("ello",))]
    replies = Chat(local).ask(mixed)
    assert [reply.completion_tokens for reply in replies[:3]] == [3, 9, 3]
    assert [reply.cut for reply in replies] == [True, True, True, False]
    assert replies[0].text == replies[2].text
    assert replies[1].text.startswith(replies[0].text)
    assert "ello" not in replies[3].text


def test_sampling_follows_the_seeds_and_disturbs_no_other(local: LocalModel) -> None:
    def sampled(seed: int) -> list[str]:
        return [reply.text for reply in Chat(local).ask([ask("Tell a story.", 6, temperature=1.0, seed=seed)] * 2)]

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = sampled(0)
    assert torch.equal(torch.rand(3), expected)
    assert sampled(0) == first
    assert sampled(1) != first


def test_one_request_that_cannot_be_read_fails_alone(local: LocalModel) -> None:
    long = ask("word " * 9000)
    replies = Chat(local).ask([ask("Say hello."), long, ask("Say hello.")])
    assert [bool(reply.error) for reply in replies] == [False, True, False]
    assert "the model reads only 8192" in replies[1].error


def test_a_batch_shrinks_to_the_budget(local: LocalModel) -> None:
    asking = Chat(local, budget=Budget(calls=6))
    replies = asking.ask([ask(f"Say {index}.", max_tokens=2) for index in range(9)])
    assert [bool(reply.error) for reply in replies] == [False] * 6 + [True] * 3
    bound = sum(local.prompt_bound(ask(f"Say {index}.")) + 2 for index in range(5))
    tokens = Chat(local, budget=Budget(tokens=bound))
    assert sum(not reply.error for reply in tokens.ask([ask(f"Say {index}.", max_tokens=2) for index in range(9)])) == 5
    assert tokens.spent.tokens <= bound


def test_the_cache_knows_a_model_by_its_weights(smollm2: LanguageModel, local: LocalModel) -> None:
    [first] = Chat(local, cache="cache.sqlite").ask([ask("Say hello.")])
    assert Chat(LocalModel(smollm2, batch_size=1), cache="cache.sqlite").ask([ask("Say hello.")])[0].cached
    weight = next(smollm2.causal.parameters()).data
    kept = weight[0, 0].clone()
    weight[0, 0] += 1
    try:
        assert LocalModel(smollm2).identity != local.identity
    finally:
        weight[0, 0] = kept
    assert not first.cached


def test_settings_load_a_local_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_chat(ChatSettings(model=str(tmp_path / "nowhere.gguf")))
    with pytest.raises(UserError, match="batch size is 0"):
        open_chat(ChatSettings(batch_size=0))


def test_the_example_of_the_package_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import preceptor.language

    lines = [line[4:] for line in (preceptor.language.__doc__ or "").splitlines() if line.startswith("    ")]
    for calls in (2, 0):
        exec("\n".join(lines), {})
        said = capsys.readouterr().out
        assert "What is a prime number?" in said
        assert f"Spent(calls={calls}" in said


# A real server


@pytest.fixture
def served(smollm2: LanguageModel, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and model name of ``transformers serve`` on loopback."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]'")
    folder = tmp_path / "model"
    smollm2.save(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(480):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait(30)


@pytest.mark.slow
def test_a_real_server_answers_as_the_local_model_does(
    served: tuple[str, str], local: LocalModel, tmp_path: Path
) -> None:
    url, model = served
    limits = Limits(concurrency=2, call_seconds=60)
    requests = [ask(question, max_tokens=8) for question in QUESTIONS[:2]]
    with Chat(Endpoint(url, model), cache=tmp_path / "cache.sqlite", limits=limits) as asking:
        replies = asking.ask(requests)
        assert [reply.error for reply in replies] == ["", ""]
        assert [reply.cached for reply in asking.ask(requests)] == [True, True]
        assert asking.spent.calls == 2
        with pytest.raises(UserError, match="gives no log-probabilities"):
            asking.log_probabilities(requests[0].messages, ["Paris"])
    at_home = Chat(local).ask(requests)
    assert [reply.text for reply in replies] == [reply.text for reply in at_home]
    assert [reply.prompt_tokens for reply in replies] == [reply.prompt_tokens for reply in at_home]
