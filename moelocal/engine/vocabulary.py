"""The tokens of an open model: text to tokens and back, and what some of them mean."""

from __future__ import annotations

import ctypes
from functools import cached_property

from moelocal.engine import llama


class Vocabulary:
    """Of a `llama_model *`."""

    def __init__(self, model: int) -> None:
        self._low = llama.api()
        self._vocab = self._low.llama_model_get_vocab(model)
        self.n_vocab = int(self._low.llama_vocab_n_tokens(self._vocab))
        self._piece = ctypes.create_string_buffer(1024)
        self._pieces: dict[int, tuple[bytes, bool]] = {}  # of tokens that were generated

    def tokenize(self, text: str, special: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids of a text. `special`: control-token texts such as <|im_end|> become that token.

        `add_bos` puts the model's begin token in front, if the model wants one.
        """
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        while True:
            out = (ctypes.c_int32 * room)()
            n = self._low.llama_tokenize(self._vocab, data, len(data), out, room, add_bos, special)
            if n >= 0:
                return out[:n]
            room = -n

    def token_bytes(self, token: int, special: bool = True) -> bytes:
        """A token's text as bytes; control tokens are empty unless `special`. Empty for an id that there is not: files
        with such begin or padding tokens exist, and llama.cpp would abort."""
        if not 0 <= token < self.n_vocab:
            return b""
        n = self._low.llama_token_to_piece(self._vocab, token, self._piece, len(self._piece), 0, special)
        if n < 0:
            self._piece = ctypes.create_string_buffer(-n)
            return self.token_bytes(token, special)
        return self._piece.raw[:n]

    def _learn(self, token: int) -> tuple[bytes, bool]:
        """A token's text, empty for control tokens, and whether it ends an answer; not asked for twice."""
        piece = self.token_bytes(token, special=False), bool(self._low.llama_vocab_is_eog(self._vocab, token))
        self._pieces[token] = piece
        return piece

    def token_text(self, token: int) -> str:
        """A token's text, control tokens included."""
        return self.token_bytes(token).decode(errors="replace")

    def control_token(self, text: str) -> int | None:
        """The one token that this text is, if it is a single one."""
        tokens = self.tokenize(text)
        return tokens[0] if len(tokens) == 1 and self.token_text(tokens[0]) == text else None

    @cached_property
    def _end_tokens(self) -> list[int]:
        return [token for token in range(self.n_vocab) if self._low.llama_vocab_is_eog(self._vocab, token)]

    @property
    def begin(self) -> int | None:
        """The token that this model wants at the beginning of every text."""
        token = self._low.llama_vocab_bos(self._vocab)
        return int(token) if self._low.llama_vocab_get_add_bos(self._vocab) and token >= 0 else None

    def leading_control(self, text: str) -> list[int]:
        """The control token that a text begins with, if it does."""
        tokens = self.tokenize(text)[:1]
        return [token for token in tokens if self._low.llama_vocab_is_control(self._vocab, token)]
