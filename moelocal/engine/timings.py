"""What an answer is made of as it streams: chunks, and the seconds that it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on a monotonic clock, each phase apart. `cached_tokens` of the prompt were in the KV cache already.

    `first_token_s` runs from the call to the first token; `generate_s` from the first token to the last, so it covers
    `generated_tokens - 1` decodes.
    """

    load_s: float
    prompt_tokens: int
    cached_tokens: int
    prompt_s: float
    first_token_s: float
    generated_tokens: int
    generate_s: float

    @property
    def prompt_per_s(self) -> float | None:
        """Prompt tokens computed per second; cached ones do not count."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_s if computed and self.prompt_s > 0 else None

    @property
    def generate_per_s(self) -> float | None:
        """Decode steps per second; None for an answer of one token."""
        return (
            (self.generated_tokens - 1) / self.generate_s if self.generated_tokens > 1 and self.generate_s > 0 else None
        )

    def as_json(self) -> dict[str, Any]:
        """Under the names that `run --json` prints."""
        return {**asdict(self), "prompt_per_s": self.prompt_per_s, "generate_per_s": self.generate_per_s}


class Chunk(NamedTuple):
    """One step of an answer. `text` may be empty (half a character, or a possible stop string held back).

    The last chunk has `timings` and `finish_reason`; its `token` is None when an end token ended the answer.
    """

    text: str
    token: int | None
    timings: Timings | None = None
    finish_reason: FinishReason | None = None


def timings_of(load_s: float, tokens: tuple[int, int, int], marks: tuple[float, float, float, float]) -> Timings:
    """Timings of an answer that ended at any moment.

    Args:
        tokens: of the prompt, as far as computed; of it cached; generated.
        marks: when it began, had read the prompt, had the first token (0.0: it never did), ended.
    """
    n_prompt, n_cached, n_generated = tokens
    start, prompt_at, first_at, end = marks
    return Timings(
        load_s=load_s,
        prompt_tokens=n_prompt,
        cached_tokens=n_cached,
        prompt_s=(prompt_at or end) - start,
        first_token_s=(first_at or end) - start,
        generated_tokens=n_generated,
        generate_s=end - (first_at or end),
    )
