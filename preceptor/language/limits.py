"""How much may be spent on calls, and how fast they may be made."""

from __future__ import annotations

from dataclasses import dataclass

from preceptor.errors import UserError


@dataclass(frozen=True)
class Budget:
    """What one chat may spend in its life. None sets no limit; what the cache answers costs nothing."""

    calls: int | None = None
    """Requests sent to the backend, every repetition after a failure counted."""
    tokens: int | None = None
    """Tokens read and written together."""
    cost: float | None = None
    """Money, in the currency of the prices."""
    prompt_price: float = 0.0
    """Money for a million tokens read."""
    completion_price: float = 0.0
    """Money for a million tokens written."""

    def __post_init__(self) -> None:
        """Refuses limits and prices that cannot be meant."""
        for name in ("calls", "tokens", "cost", "prompt_price", "completion_price"):
            value = {**self.__dict__}[name]
            if value is not None and not value >= 0:
                raise UserError(f"The budget's {name} is {value}: it must be 0 or more.")
        if self.cost is not None and not self.prompt_price + self.completion_price:
            raise UserError("The budget limits the cost but no price is set: give prompt_price and completion_price.")


@dataclass(frozen=True)
class Limits:
    """How fast, how often and how long a backend is asked. None sets no limit."""

    concurrency: int = 16
    """Calls under way at once."""
    requests_per_minute: int | None = None
    """Calls begun within any 60 seconds."""
    tokens_per_minute: int | None = None
    """Tokens of the calls begun within any 60 seconds, read and written."""
    attempts: int = 6
    """How often a call is made at most when the endpoint is busy, fails or does not answer."""
    call_seconds: float = 120.0
    """How long a call may take."""
    total_seconds: float | None = None
    """How long one ``ask`` may take; what is not answered by then carries an error."""
    schema_attempts: int = 3
    """How often a structured answer is asked for at most, each time with what was wrong."""

    def __post_init__(self) -> None:
        """Refuses limits that let nothing through."""
        for name, value in self.__dict__.items():
            if value is not None and not value > 0:
                raise UserError(f"The limit {name} is {value}: it must be more than 0.")
