"""Errors made to be shown to a person: what failed, the numbers, and the next command to type."""


class MoelocalError(Exception):
    """An expected failure. `message` is one sentence, `hint` says what to do next, `details` are llama.cpp's last log
    lines; `exit_status` is what the command then ends with."""

    exit_status = 1

    def __init__(self, message: str, hint: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class BadGGUF(MoelocalError):
    """A file that is not a usable GGUF checkpoint. `offset` is the byte at which reading gave up."""

    def __init__(self, message: str, offset: int, hint: str = "") -> None:
        super().__init__(f"{message} (at byte {offset:,})", hint)
        self.offset = offset


class ModelNotFound(MoelocalError):
    """A MODEL reference that leads to no file."""


class LoadFailed(MoelocalError):
    """llama.cpp refused or failed to load a model that looked fine."""


class OutOfMemory(MoelocalError):
    """The model, its context or its work buffers do not fit where they were to go."""


class ContextFull(MoelocalError):
    """More tokens than the context holds. `n_tokens` were asked for, `n_ctx` is the limit."""

    def __init__(self, message: str, n_tokens: int, n_ctx: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx


class BadTemplate(MoelocalError):
    """A chat template that cannot be rendered."""


class BadRequest(MoelocalError):
    """Wrong usage: an empty prompt, a bad grammar, contradictory or impossible settings."""

    exit_status = 2
