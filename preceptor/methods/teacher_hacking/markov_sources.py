"""Exact sources of symbol sequences: each samples, and says the probability of every next symbol after any prefix.

They stand for the truth where a language model's truth cannot be known: a Markov source of order n and a hidden Markov
model (Rabiner 1989, https://doi.org/10.1109/5.18626). Both are drawn at random from a seed. All is float64.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from preceptor.errors import UserError

LARGEST_TABLE = 1 << 26  # probabilities of a Markov source: half a GiB


class Source(Protocol):
    """A distribution over sequences of the symbols 0 to ``vocabulary`` - 1, read one symbol after another."""

    vocabulary: int

    def begin(self, count: int) -> Tensor:
        """What is known of ``count`` sequences before their first symbol."""
        ...

    def predict(self, state: Tensor) -> Tensor:
        """Log-probabilities (count, vocabulary) of the next symbols, float64."""
        ...

    def follow(self, state: Tensor, symbols: Tensor) -> Tensor:
        """What is known after the symbols (count,) have been seen."""
        ...


class MarkovSource:
    """A Markov source of order n: p(y_t | y_<t) = p(y_t | y_{t-n}, ..., y_{t-1}), a row of one table.

    Every row is drawn from a Dirichlet distribution. The first n symbols are independent and uniform.

    Args:
        order: n, 0 or more.
        vocabulary: V, at least 2.
        concentration: α of the Dirichlet distribution; the smaller, the more certain the next symbol.
        seed: of the table.

    Raises:
        UserError: a size out of its interval, or a table of more than ``LARGEST_TABLE`` probabilities.
    """

    def __init__(self, *, order: int, vocabulary: int, concentration: float, seed: int) -> None:
        _check(vocabulary, concentration)
        if order < 0:
            raise UserError(f"The order of a Markov source is {order}; it must be 0 or more.")
        if vocabulary ** (order + 1) > LARGEST_TABLE:
            raise UserError(
                f"A Markov source of order {order} over {vocabulary} symbols needs {vocabulary ** (order + 1):.1e} "
                "probabilities: lower the order or the vocabulary, or take a hidden Markov model."
            )
        self.order, self.vocabulary = order, vocabulary
        generator = torch.Generator().manual_seed(seed)
        self.table = _dirichlet(vocabulary**order, vocabulary, concentration, generator).log()

    def begin(self, count: int) -> Tensor:
        """How many symbols were seen (up to n), and the last n of them as one number, base V: (count, 2) int64."""
        return torch.zeros(count, 2, dtype=torch.int64)

    def predict(self, state: Tensor) -> Tensor:
        """Log-probabilities (count, V): uniform until n symbols were seen, then the row of the last n."""
        uniform = torch.full((1, self.vocabulary), 1.0 / self.vocabulary, dtype=torch.float64).log()
        return torch.where(state[:, :1] < self.order, uniform, self.table[state[:, 1]])

    def follow(self, state: Tensor, symbols: Tensor) -> Tensor:
        """The last n symbols, the new one among them."""
        seen = (state[:, 0] + 1).clamp_max(self.order)
        last = (state[:, 1] * self.vocabulary + symbols) % self.vocabulary**self.order
        return torch.stack((seen, last), -1)


class HiddenMarkovSource:
    """A hidden Markov model: hidden states s_t walk by A, each emits a symbol by B; π is where they begin.

    The state that is carried is the belief b_t(k) = p(s_t = k | y_<t); then p(y_t | y_<t) = b_t B, and
    b_{t+1} ∝ (b_t ⊙ B[:, y_t]) A: the forward algorithm, normalised at every symbol.

    Args:
        states: K, at least 1.
        vocabulary: V, at least 2.
        concentration: α of the Dirichlet distributions from which π and the rows of A and B are drawn.
        seed: of all three.
        stickiness: κ in [0, 1), the probability that a state stays without being drawn anew: A = κ I + (1 - κ) A', of
            which the rows of A' are drawn. The larger, the longer the first symbols matter.

    Raises:
        UserError: a size out of its interval.
    """

    def __init__(
        self, *, states: int, vocabulary: int, concentration: float, seed: int, stickiness: float = 0.0
    ) -> None:
        _check(vocabulary, concentration)
        if states < 1:
            raise UserError(f"A hidden Markov model has {states} states; it must have at least 1.")
        if not 0 <= stickiness < 1:
            raise UserError(f"The stickiness of a hidden Markov model is {stickiness}; it must be in [0, 1).")
        self.states, self.vocabulary = states, vocabulary
        generator = torch.Generator().manual_seed(seed)
        self.initial = _dirichlet(1, states, concentration, generator)
        drawn = _dirichlet(states, states, concentration, generator)
        self.walk = stickiness * torch.eye(states, dtype=torch.float64) + (1 - stickiness) * drawn
        self.emit = _dirichlet(states, vocabulary, concentration, generator)

    def begin(self, count: int) -> Tensor:
        """π for each sequence: (count, K)."""
        return self.initial.expand(count, -1)

    def predict(self, state: Tensor) -> Tensor:
        """Log-probabilities (count, V) of the next symbols under the belief (count, K)."""
        return (state @ self.emit).log()

    def follow(self, state: Tensor, symbols: Tensor) -> Tensor:
        """The belief about the next hidden state."""
        joint = state * self.emit[:, symbols].T
        return (joint / joint.sum(-1, keepdim=True)) @ self.walk


def make_source(spec: str, *, seed: int) -> Source:
    """A source by its specification: ``markov:order=2,vocabulary=32`` or ``hmm:states=8,vocabulary=32``.

    ``concentration=`` is the α of both (default 0.3), ``stickiness=`` the κ of a hidden Markov model (default 0).

    Raises:
        UserError: the specification is not of these forms, or a size is out of its interval.
    """
    kind, _, rest = spec.partition(":")
    names, own = {"markov": "order", "hmm": "states"}, {"hmm": {"stickiness"}}
    given = dict(item.partition("=")[::2] for item in rest.replace(" ", "").split(",")) if rest else {}
    known = {names.get(kind, ""), "vocabulary", "concentration"} | own.get(kind, set())
    if kind not in names or not given.keys() <= known:
        raise _no_source(spec)
    try:
        size = int(given.get(names[kind], "2" if kind == "markov" else "8"))
        vocabulary, concentration = int(given.get("vocabulary", "32")), float(given.get("concentration", "0.3"))
        stickiness = float(given.get("stickiness", "0"))
    except ValueError:
        raise _no_source(spec) from None
    if kind == "markov":
        return MarkovSource(order=size, vocabulary=vocabulary, concentration=concentration, seed=seed)
    return HiddenMarkovSource(
        states=size, vocabulary=vocabulary, concentration=concentration, seed=seed, stickiness=stickiness
    )


def log_probs(source: Source, ids: Tensor) -> Tensor:
    """Log-probabilities (B, T + 1, V) along the sequences ``ids`` (B, T): at t of the symbol after the first t.

    Raises:
        UserError: an id is no symbol of the source.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < source.vocabulary:
        raise UserError(f"A source of {source.vocabulary} symbols was asked about the id {int(ids.max())}.")
    state = source.begin(len(ids))
    predicted = [source.predict(state)]
    for symbols in ids.T:
        state = source.follow(state, symbols)
        predicted.append(source.predict(state))
    return torch.stack(predicted, 1)


def draw(source: Source, ids: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Continuations (B, length) of the prefixes ``ids`` (B, T), drawn from the source; T may be 0."""
    state = source.begin(len(ids))
    for symbols in ids.T:
        state = source.follow(state, symbols)
    drawn = []
    for _ in range(length):
        symbols = torch.multinomial(source.predict(state).exp(), 1, generator=generator).squeeze(-1)
        drawn.append(symbols)
        state = source.follow(state, symbols)
    return torch.stack(drawn, 1)


def _dirichlet(rows: int, size: int, concentration: float, generator: torch.Generator) -> Tensor:
    """Probabilities (rows, size). Of a small α float64 loses a share below 1e-308 to 0; it is raised to that."""
    alpha = torch.full((rows, size), concentration, dtype=torch.float64)
    drawn: Any = torch._standard_gamma(alpha, generator).clamp_min_(torch.finfo(torch.float64).tiny)
    shares: Tensor = drawn / drawn.sum(-1, keepdim=True)
    return shares


def _check(vocabulary: int, concentration: float) -> None:
    if vocabulary < 2:
        raise UserError(f"A source has {vocabulary} symbols; it must have at least 2.")
    if not concentration > 0:
        raise UserError(f"The concentration of a source is {concentration}; it must be above 0.")


def _no_source(spec: str) -> UserError:
    return UserError(
        f'"{spec}" is not a source: give markov:order=2,vocabulary=32[,concentration=0.3] or '
        "hmm:states=8,vocabulary=32[,concentration=0.3][,stickiness=0]."
    )
