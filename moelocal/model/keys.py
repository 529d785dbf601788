"""Typed, bounded reads of a GGUF header's `<arch>.*` metadata: what is missing or absurd is refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelocal.errors import BadGGUF, BadRequest
from moelocal.model.header import ArrayRef, GGUFHeader

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS, llama.cpp 0c1e57098 src/llama-hparams.h
_MAX_VALUE = 1 << 31
_HINT = "The file is damaged or was converted badly: download it again, or another conversion of the model."


@dataclass(frozen=True, slots=True)
class Keys:
    """The metadata of one architecture. `offset` is where the header ends, for error messages."""

    metadata: Mapping[str, Any]
    arch: str
    offset: int

    def bad(self, message: str, hint: str = _HINT) -> BadGGUF:
        """The error to raise for a header that contradicts itself."""
        return BadGGUF(message, self.offset, hint)

    def integer(self, key: str, default: int | None = None) -> int:
        """`<arch>.<key>`; no default means that the key is required.

        Raises:
            BadGGUF: missing, not a whole number, negative or absurdly large.
        """
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise self.bad(f"The header has no {self.arch}.{key}")
        return self._checked(key, value)

    def per_layer(self, key: str, n_layers: int, default: int | None = None) -> tuple[int, ...]:
        """`<arch>.<key>` as int[n_layers], from one number for all layers or an array of one per layer.

        Raises:
            BadGGUF: as `integer`, or an array of another length.
        """
        values = self.array(key)
        if values is None:
            return (self.integer(key, default),) * n_layers
        if len(values) != n_layers:
            raise self.bad(f"{self.arch}.{key} has {len(values)} entries for {n_layers} layers")
        return values

    def per_layer_at(self, key: str, layer: int) -> int:
        """Entry `layer` of an array that may hold more or fewer entries than there are layers; 0 beyond its end."""
        values = self.array(key)
        if values is None:
            return self.integer(key)
        return values[layer] if layer < len(values) else 0

    def has(self, key: str) -> bool:
        """Whether the header has `<arch>.<key>`."""
        return f"{self.arch}.{key}" in self.metadata

    def array(self, key: str) -> tuple[int, ...] | None:
        """`<arch>.<key>` if it is an array of numbers or flags, else None."""
        value = self.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, ArrayRef):  # a vocabulary's worth: never read it into memory
            raise self.bad(f"{self.arch}.{key} has {len(value):,} entries, more than any model has layers")
        if not isinstance(value, list):
            return None
        return tuple(self._checked(key, entry) for entry in value)

    def _checked(self, key: str, value: object) -> int:
        if not isinstance(value, int) or not 0 <= value <= _MAX_VALUE:
            raise self.bad(f"{self.arch}.{key} is {value!r}, not a number that a model can have")
        return int(value)


def read_keys(header: GGUFHeader) -> Keys:
    """The keys of the header's architecture.

    Raises:
        BadRequest: it is no model's.
        BadGGUF: no `general.architecture`.
    """
    if header.metadata.get("general.type") == "imatrix":
        raise BadRequest(
            "This file is an importance matrix, not a model.", "Name the model: moelocal quantize MODEL --imatrix FILE"
        )
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise BadGGUF("The header does not name an architecture (general.architecture)", header.data_offset, _HINT)
    return Keys(header.metadata, arch, header.data_offset)
