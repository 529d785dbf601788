"""Sampling: how the next token is chosen. Values in, a llama.cpp sampler chain out; all of it runs in C."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from moelocal.engine.abi import captured_stderr
from moelocal.engine.llama import api
from moelocal.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings, named and defaulted as in llama.cpp. `seed` None draws one; `max_tokens` None runs to the end
    token; `ignore_eos` never ends by itself, for measuring.

    Raises:
        BadRequest: a value outside its range.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str = ""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = name.replace("_", "-")
                limit = f"between {_number(low)} and {_number(high)}"
                raise BadRequest(
                    f"--{option} must be {limit}, not {_number(value)}.", f"For instance: --{option} {_EXAMPLE[name]}"
                )
        if self.grammar and self.ignore_eos:
            raise BadRequest(
                "A grammar ends the answer itself, so ignore_eos cannot go with it.", "Leave one of them out."
            )
        if "" in self.stop:
            raise BadRequest("--stop needs a text: an empty one would stop at once.", 'For instance: --stop "###"')


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 2**31 - 1),
    ("temperature", 0.0, 100.0),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repeat_penalty", 0.01, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("penalty_last_n", 0, 2**31 - 1),
    ("seed", 0, 2**32 - 2),
)
_EXAMPLE = {
    "max_tokens": "256",
    "temperature": "0.7",
    "top_k": "40",
    "top_p": "0.95",
    "min_p": "0.05",
    "repeat_penalty": "1.1",
    "frequency_penalty": "0.2",
    "presence_penalty": "0.2",
    "penalty_last_n": "64",
    "seed": "42",
}
# Keys of a GGUF that carry its maker's advice. Source: llama.cpp src/llama-arch.cpp, LLM_KV_GENERAL_SAMPLING_*.
_ADVICE = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "penalty_last_n": "general.sampling.penalty_last_n",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


def with_advice(given: Mapping[str, Any], metadata: Mapping[str, Any]) -> Sampling:
    """The user's settings (None: not given), then the model's own advice, then llama.cpp's defaults."""
    values = {name: value for name, value in given.items() if value is not None}
    kinds: dict[str, type] = {field.name: type(field.default) for field in fields(Sampling)}
    for name, key in _ADVICE.items():
        advice = metadata.get(key)
        if name not in values and isinstance(advice, (int, float)) and not isinstance(advice, bool):
            try:
                candidate = kinds[name](advice)
                replace(Sampling(), **{name: candidate})
            except (BadRequest, ValueError, OverflowError):
                continue  # nonsense in the file is not the user's mistake
            values[name] = candidate
    return Sampling(**values)


class Sampler:
    """A sampler chain held open for one answer. A context manager; `picker()` gives what picks the next token."""

    def __init__(self, sampling: Sampling, model: int, ends: Sequence[int] = ()) -> None:
        """`ends`: the tokens that `ignore_eos` rules out."""
        self._low = low = api()
        self._vocab = vocab = low.llama_model_get_vocab(model)
        self.seed = int.from_bytes(os.urandom(3), "little") if sampling.seed is None else sampling.seed
        self._grammar = self._open_grammar(sampling.grammar) if sampling.grammar else None
        self._chain = low.llama_sampler_chain_init(low.llama_sampler_chain_default_params())
        n_vocab = low.llama_vocab_n_tokens(vocab)
        for part in _parts(low, n_vocab, sampling, self.seed, ends):
            low.llama_sampler_chain_add(self._chain, part)

    def _open_grammar(self, grammar: str) -> Any:
        with captured_stderr() as said:  # its parser prints, the grammar included
            sampler = self._low.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
        if not sampler:
            reason = next((line for line in said() if "error" in line), "")
            raise BadRequest(
                f"The grammar cannot be parsed{reason.partition('grammar')[2].rstrip('.')}.",
                'It must be GBNF with a rule called root, for instance: root ::= "yes" | "no"',
            )
        return sampler

    def accept(self, tokens: Sequence[int]) -> None:
        """Shows the chain the end of the prompt, which penalties count too; the grammar is about the answer only."""
        for token in tokens:
            self._low.llama_sampler_accept(self._chain, token)

    def picker(self, context: int) -> Callable[[], int]:
        """Picks and accepts the next token after the last decoded one; without a grammar it is a call into C."""
        if self._grammar is None:
            return partial(self._low.llama_sampler_sample, self._chain, context, -1)
        return partial(self._sample_with_grammar, context)

    def _sample_with_grammar(self, context: int) -> int:
        """Samples freely and asks the grammar about that one token; only a rejected one makes the grammar look at the
        whole vocabulary, which is slow. Source: llama.cpp common/sampling.cpp, common_sampler_sample."""
        low = self._low
        before = low.llama_sampler_clone(self._chain)
        token = int(low.llama_sampler_sample(self._chain, context, -1))
        if self._allowed(token):
            low.llama_sampler_free(before)
            low.llama_sampler_accept(self._grammar, token)
            return token
        low.llama_sampler_free(self._chain)
        self._chain = before
        both = low.llama_sampler_chain_init(low.llama_sampler_chain_default_params())
        low.llama_sampler_chain_add(both, self._grammar)
        low.llama_sampler_chain_add(both, self._chain)
        token = int(low.llama_sampler_sample(both, context, -1))
        low.llama_sampler_chain_remove(both, 1)
        low.llama_sampler_chain_remove(both, 0)
        low.llama_sampler_free(both)
        return token

    def _allowed(self, token: int) -> bool:
        one = self._low.llama_token_data(token, 1.0, 0.0)
        data = self._low.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        self._low.llama_sampler_apply(self._grammar, ctypes.byref(data))
        return bool(one.logit > float("-inf"))

    def close(self) -> None:
        """Frees the chain."""
        for part in (self._chain, self._grammar):
            if part:
                self._low.llama_sampler_free(part)
        self._chain = self._grammar = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parts(low: Any, n_vocab: int, sampling: Sampling, seed: int, ends: Sequence[int]) -> list[Any]:
    """The chain in llama.cpp's default order: bias, penalties, top-k, top-p, min-p, temperature, then the choice."""
    parts = []
    if sampling.ignore_eos:
        bias = (low.llama_logit_bias * len(ends))(*((token, float("-inf")) for token in ends))
        parts.append(low.llama_sampler_init_logit_bias(n_vocab, len(ends), bias))
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1.0, 0.0, 0.0) and sampling.penalty_last_n:
        parts.append(low.llama_sampler_init_penalties(n_vocab, sampling.penalty_last_n, *penalties))
    if sampling.temperature == 0.0:
        return [*parts, low.llama_sampler_init_top_k(1), low.llama_sampler_init_greedy()]  # a quarter quicker so
    if sampling.top_k:
        parts.append(low.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1.0:
        parts.append(low.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0.0:
        parts.append(low.llama_sampler_init_min_p(sampling.min_p, 1))
    parts.append(low.llama_sampler_init_temp(sampling.temperature))
    return [*parts, low.llama_sampler_init_dist(seed)]
