"""A local transformers model as a backend: batches, token counts, and exact log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from preceptor.data.encoding import encode_prompt
from preceptor.data.readers import Message
from preceptor.data.sequences import Sequence as Tokens, collate
from preceptor.errors import UserError
from preceptor.language.gate import Gate, Size
from preceptor.language.messages import Answer, CallFailed, Request
from preceptor.models.identity import fingerprint, template_hash
from preceptor.models.language_model import LanguageModel, in_evaluation, project
from preceptor.models.loading import load


class LocalModel:
    """A causal model on this machine, asked in batches; on a GPU where there is one and the model is given by name.

    Greedy answers (temperature 0) do not depend on the batch, but for rounding; sampled ones do, and repeat where the
    same requests are asked in the same order. What the cache knows an answer by is the weights and the chat template,
    not the name.

    Args:
        model: ``smollm2``, a folder, a ``.gguf`` file or a name on the hub; or a loaded model.
        batch_size: requests answered at once.
        dtype: of the parameters, when it is loaded here.

    Raises:
        UserError: the model cannot be loaded, or the batch size is less than 1.
    """

    def __init__(self, model: str | LanguageModel, *, batch_size: int = 16, dtype: str = "float32") -> None:
        if batch_size < 1:
            raise UserError(f"The batch size is {batch_size}: it must be at least 1.")
        self.group = batch_size
        if isinstance(model, str):
            model = load(model, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model
        self._longest = model.causal.config.get_text_config().to_dict().get("max_position_embeddings")
        self.identity = f"local {fingerprint(model)} {template_hash(model.tokenizer)[:32]}"

    def prompt_bound(self, request: Request) -> int:
        """The tokens of the prompt, exactly; 0 for one that the chat template refuses, which is never read."""
        try:
            return len(encode_prompt(request.messages, self._model.tokenizer))
        except UserError:
            return 0

    async def answer(self, requests: Sequence[Request]) -> list[Answer | CallFailed]:
        """The model's answers. Requests that differ in length or temperature are sampled apart."""
        answers: list[Answer | CallFailed] = []
        prompts: dict[int, tuple[int, ...]] = {}
        for index, request in enumerate(requests):
            try:
                prompts[index] = self._encode(request)
                answers.append(Answer("", 0, 0))
            except CallFailed as failed:
                answers.append(failed)
        for kind in sorted({(requests[index].temperature, requests[index].max_tokens) for index in prompts}):
            alike = [index for index in prompts if (requests[index].temperature, requests[index].max_tokens) == kind]
            with _seeded([requests[index] for index in alike], self._model.device):
                written = self._model.generate(
                    [prompts[index] for index in alike],
                    temperature=kind[0],
                    max_new_tokens=kind[1],
                    batch_size=self.group,
                )
            for index, ids in zip(alike, written):
                answers[index] = self._read(requests[index], len(prompts[index]), ids)
        return answers

    async def log_probabilities(
        self, messages: Sequence[Message], continuations: Sequence[str], gate: Gate
    ) -> list[tuple[float, ...]]:
        """Of each token of each continuation as the assistant's answer, in nats; without the end of the turn.

        Raises:
            UserError: the chat template refuses the messages, or a continuation is empty.
        """
        prompt = encode_prompt(messages, self._model.tokenizer)
        endings = [tuple(self._model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in continuations]
        if not all(endings):
            raise UserError("A continuation is empty: give at least one token, whose log-probability is asked.")
        rows = [Tokens(prompt + end, (False,) * len(prompt) + (True,) * len(end)) for end in endings]

        async def score() -> list[tuple[float, ...]]:
            starts = range(0, len(rows), self.group)
            return [row for start in starts for row in self._score(rows[start : start + self.group])]

        size = Size(len(rows), sum(len(row.ids) for row in rows), 0)
        return await gate.call(size, score, lambda _: (size.prompt, 0))

    async def close(self) -> None:
        """Nothing is open."""

    def _encode(self, request: Request) -> tuple[int, ...]:
        try:
            ids = encode_prompt(request.messages, self._model.tokenizer)
        except UserError as error:
            raise CallFailed(str(error)) from error
        if self._longest is not None and len(ids) + request.max_tokens > self._longest:
            raise CallFailed(
                f"the prompt has {len(ids)} tokens and the answer may have {request.max_tokens}, but the model reads "
                f"only {self._longest}"
            )
        return ids

    def _read(self, request: Request, prompt_tokens: int, ids: tuple[int, ...]) -> Answer:
        text = str(self._model.tokenizer.decode(ids, skip_special_tokens=True))
        ends = [place for stop in request.stop if stop and (place := text.find(stop)) >= 0]
        cut = not ends and len(ids) == request.max_tokens and ids[-1] not in self._model.stop_ids
        return Answer(text[: min(ends)] if ends else text, prompt_tokens, len(ids), cut)

    @torch.no_grad()
    def _score(self, rows: Sequence[Tokens]) -> list[tuple[float, ...]]:
        batch = collate(rows, self._model.pad_id).to(self._model.device)
        with in_evaluation(self._model):
            hidden = self._model(batch)
        places = batch.predicts
        logits = project(hidden[places], self._model.head).float()
        labels = batch.labels[places].unsqueeze(-1)
        likely = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
        return [tuple(part.tolist()) for part in torch.split(likely, places.sum(-1).tolist())]


@contextmanager
def _seeded(requests: Sequence[Request], device: torch.device) -> Iterator[None]:
    """Sampling inside follows from the seeds of the requests; the generators outside go on as if it had not been."""
    digest = hashlib.sha256(",".join(str(request.seed) for request in requests).encode()).digest()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        yield
