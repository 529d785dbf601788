"""A loaded model that answers: load(path, header, plan) -> Session, Session.stream(tokens, sampling) -> Chunks.

The KV cache holds `Session.cached`; a new prompt that begins with the same tokens never computes them again.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelocal.engine import llama, mapped
from moelocal.engine.allocation import allocated, logged_buffers, report_differences
from moelocal.engine.interrupt import Interrupt
from moelocal.engine.prefault import prefaulting
from moelocal.engine.sampling import Sampler, Sampling
from moelocal.engine.state import StateFile
from moelocal.engine.text import TextDecoder
from moelocal.engine.timings import Chunk, FinishReason, Timings, timings_of
from moelocal.engine.vocabulary import Vocabulary
from moelocal.engine.warm import warm
from moelocal.errors import BadRequest, ContextFull, LoadFailed, MoelocalError
from moelocal.model.header import GGUFHeader
from moelocal.plan.llama_flags import flags_of_plan
from moelocal.plan.planner import MemoryUse, Plan

if TYPE_CHECKING:
    from moelocal.engine.nodes import NodeReader
    from moelocal.engine.residency import Residency

_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
_CHECKPOINT_BACK = 16  # tokens before the prompt's end: before the template's own opening of the answer


def load(
    paths: Sequence[Path],
    header: GGUFHeader,
    plan: Plan,
    progress: Callable[[float], None] | None = None,
    one_shot: bool = False,
    watch: NodeReader | None = None,
) -> Session:
    """Loads the weights as the plan says. The context is made when first needed: `reserve` can still set its size.

    Args:
        paths: the checkpoint's files, in the order of its shards.
        progress: called with 0.0 to 1.0.
        one_shot: one answer only: no rewind point where memory cannot be cut back (recurrent, window), no huge pages.
        watch: sees which experts are chosen, which makes everything slower.

    Raises:
        KeyboardInterrupt: Ctrl-C during the load.
        LoadFailed, OutOfMemory: see `llama.open_model`.
    """
    interrupt = Interrupt()

    def on_progress(fraction: float, offset: float = 0.0) -> bool:
        if progress is not None:
            progress((fraction + offset) / 2)
        return not interrupt.is_set()

    start = time.perf_counter()
    try:
        with interrupt:
            if plan.disk_bytes == 0 and plan.load_mode == "mmap":
                warm(paths, on_progress)
            is_copied = plan.repack or plan.load_mode == "none"
            is_lazy = plan.disk_bytes > 0 and plan.load_mode == "mmap"
            with (
                mapped.lazily(llama.api()._lib._name, is_lazy),
                prefaulting(lambda fraction: on_progress(fraction, 1.0), is_copied, not one_shot) as on_tensor,
            ):
                model = llama.open_model(paths, plan, flags_of_plan(plan, header), on_tensor)
        session = Session(model, header, plan, interrupt, time.perf_counter() - start, not one_shot)
        session.watch = watch
        if is_lazy and watch is None:
            from moelocal.engine.residency import streaming

            session.watch = session.residency = streaming(paths, header, plan)
    except BaseException:
        interrupt.close()
        raise
    if interrupt.is_set() or not session.generates:
        session.close()
        if interrupt.is_set():
            raise KeyboardInterrupt
        raise LoadFailed(
            f"{paths[0].name} is not a model that writes text one token after another.",
            "Embedding, encoder and diffusion models cannot answer; choose a chat or base model.",
        )
    return session


class Session(Vocabulary):
    """An open model and its context. A context manager; not for use by two threads at once."""

    def __init__(
        self, model: int, header: GGUFHeader, plan: Plan, interrupt: Interrupt, load_s: float, checkpoints: bool
    ) -> None:
        super().__init__(model)
        self.plan, self.header, self.load_s = plan, header, load_s
        self.cached: list[int] = []
        self.allocated: tuple[MemoryUse, ...] = ()  # per device, once the context is made
        self.timings: Timings | None = None  # of the last answer, an interrupted one too
        self.watch: NodeReader | None = None  # takes effect when the context is made
        self.residency: Residency | None = None  # of a model larger than RAM
        self._buffers = logged_buffers()
        low = self._low
        self._interrupt = interrupt
        self._model, self._context = model, 0
        self._n_ctx = plan.n_ctx
        self._n_swa = int(low.llama_model_n_swa(model))
        self._recurrent = bool(low.llama_model_is_recurrent(model) or low.llama_model_is_hybrid(model))
        self._checkpoints = checkpoints and (self._recurrent or self._n_swa > 0)
        self._checkpoint: tuple[list[int], Any] | None = None
        self._token = (ctypes.c_int32 * 1)()

    @property
    def generates(self) -> bool:
        """Whether this is a model that continues a text."""
        low, model = self._low, self._model
        return bool(low.llama_model_has_decoder(model)) and not (
            low.llama_model_has_encoder(model) or low.llama_model_is_diffusion(model)
        )

    def check(self, sampling: Sampling) -> None:
        """Raises BadRequest for a grammar that cannot be parsed."""
        Sampler(sampling, self._model).close()

    # -- context ----------------------------------------------------------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds, prompt and answer together."""
        return self._n_ctx

    def reserve(self, n_ctx: int) -> None:
        """Makes the context hold `n_ctx` tokens: exactly so many before it is made, at least so many after. One that
        is too small is made anew, its cache lost."""
        if n_ctx > self._n_ctx or not self._context:
            self._close_context()
            self._n_ctx = n_ctx

    def run_as(self, plan: Plan) -> None:
        """Goes on with another plan for the same weights in the same places; the cache stays if only threads differ."""
        if self._context and plan.context == self.plan.context:
            self._low.llama_set_n_threads(self._context, plan.threads, plan.threads_batch or plan.threads)
        else:
            self._close_context()
        self.plan, self._n_ctx = plan, plan.n_ctx

    def open(self) -> None:
        """Makes the context now instead of at the first answer.

        Raises:
            OutOfMemory, LoadFailed: see `llama.open_context`.
        """
        if not self._context:
            # a recurrent state half updated cannot be cut back, so there Ctrl-C waits for the batch
            abort = None if self._recurrent else self._interrupt.abort
            on_node = None if self.watch is None else self.watch.callback
            self._context = llama.open_context(self._model, self.plan, self._n_ctx, abort, on_node)
            if not self._low.llama_get_memory(self._context):
                self._close_context()
                raise LoadFailed(
                    "This model keeps no memory of a text, so it cannot continue one.", "Choose a chat or base model."
                )
            self._memory = self._low.llama_get_memory(self._context)
            self.allocated = allocated(self._buffers + logged_buffers(), self.plan, self.header)
            if self._n_ctx == self.plan.n_ctx:
                report_differences(self.plan, self.allocated)

    def _longer(self, n_tokens: int) -> str:
        """What to do about a prompt that is too long."""
        trained = int(self._low.llama_model_n_ctx_train(self._model))
        if 0 < trained < n_tokens:
            return f"The model was trained for at most {trained:,} tokens: give it less text."
        return f"Give it a longer context: --ctx {_round_up(n_tokens)}"

    def _rewind(self, tokens: Sequence[int]) -> int:
        """Keeps what the cache and `tokens` have in common, at most all but the last token. Returns how many."""
        low, memory = self._low, self._memory
        held = min(len(self.cached), low.llama_memory_seq_pos_max(memory, 0) + 1)
        keep = _common(self.cached[:held], tokens[:-1])
        lost = self._n_swa and low.llama_memory_seq_pos_min(memory, 0) > max(0, keep - self._n_swa)
        if (keep < held and lost) or not low.llama_memory_seq_rm(memory, 0, keep, -1):
            keep = self._restore_checkpoint(tokens)
        del self.cached[keep:]
        return keep

    def _restore_checkpoint(self, tokens: Sequence[int]) -> int:
        """Goes back to the rewind point if `tokens` begin with it, else empties the memory. Returns the tokens kept."""
        low, memory = self._low, self._memory
        if self._checkpoint is not None:
            held, data = self._checkpoint
            n = len(held)
            if n < len(tokens) and list(tokens[:n]) == held and self.cached[:n] == held:
                size = low.llama_state_seq_set_data_ext(self._context, data, len(data), 0, _PARTIAL_ONLY)
                if size and low.llama_memory_seq_rm(memory, 0, n, -1):
                    return n
        low.llama_memory_clear(memory, True)
        return 0

    def _take_checkpoint(self) -> None:
        low = self._low
        size = low.llama_state_seq_get_size_ext(self._context, 0, _PARTIAL_ONLY)
        data = (ctypes.c_uint8 * size)()
        if low.llama_state_seq_get_data_ext(self._context, data, size, 0, _PARTIAL_ONLY) == size:
            self._checkpoint = (self.cached[:], data)

    def _prefill(self, tokens: Sequence[int], on_prefill: Callable[[int, int], None] | None) -> None:
        """Computes the tokens that the cache lacks, one physical batch a call."""
        start, end = len(self.cached), len(tokens)
        mark = end - _CHECKPOINT_BACK if self._checkpoints and end - start > 2 * _CHECKPOINT_BACK else end
        at = start
        while at < end:
            n = min(self.plan.n_ubatch, self._n_ctx, (mark if at < mark else end) - at)
            ids = tokens[at : at + n]
            array = (ctypes.c_int32 * n)(*ids)  # the batch only points to it
            self._decode(self._low.llama_batch_get_one(array, n), ids)
            at += n
            if at == mark < end:
                self._take_checkpoint()
            if on_prefill is not None:
                on_prefill(at - start, end - start)
        self._low.llama_synchronize(self._context)  # a GPU or a worker may still be computing

    def _decode(self, batch: Any, ids: Sequence[int]) -> None:
        """Runs one batch of these tokens.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was not finished is not in `cached`.
            MoelocalError: llama.cpp failed, with its last words.
        """
        code = self._low.llama_decode(self._context, batch)
        if code == 0:
            self.cached += ids
        if self._interrupt.is_set():
            raise KeyboardInterrupt
        if code != 0:
            raise MoelocalError(
                f"llama.cpp failed to compute (code {code}).",
                "Run again with -v for its log; a smaller context (--ctx) needs less memory.",
                llama.LOG.tail(),
            )

    def stream(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        visible: frozenset[int] = frozenset(),
        on_prefill: Callable[[int, int], None] | None = None,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> Iterator[Chunk]:
        """Streams the answer to a prompt of token ids, one chunk a token; `timings` are there however it ends.

        Args:
            visible: control tokens whose text belongs into the stream (others are silent).
            on_prefill: called after each batch of the prompt with (tokens done, tokens to do).
            stop_tokens: end tokens beyond those that the vocabulary names.

        Raises:
            ContextFull: the prompt leaves no room for an answer.
            KeyboardInterrupt: Ctrl-C, within one batch; the session stays usable.
            BadRequest: an empty prompt, or a grammar that cannot be parsed.
        """
        self._check_room(tokens)
        ends = self._end_tokens if sampling.ignore_eos else ()
        with Sampler(sampling, self._model, ends) as sampler, self._interrupt:
            self.open()
            start, prompt_at, first_at = time.perf_counter(), 0.0, 0.0
            n_cached = self._rewind(tokens)
            generated, token = 0, None
            finish: FinishReason | None = None
            try:
                self._prefill(tokens, on_prefill)
                prompt_at = time.perf_counter()
                sampler.accept(tokens[-sampling.penalty_last_n :] if sampling.penalty_last_n else ())
                out = TextDecoder(sampling.stop)
                limit = min(sampling.max_tokens or self._n_ctx, self._n_ctx)
                decode, cached, pieces = self._decode, self.cached, self._pieces
                pick = sampler.picker(self._context)
                batch = self._low.llama_batch_get_one(self._token, 1)
                while finish is None:
                    token = pick()
                    generated += 1
                    first_at = first_at or time.perf_counter()
                    data, is_end = pieces.get(token) or self._learn(token)
                    if is_end or token in stop_tokens:
                        token, finish = None, "stop"
                        break
                    text = out.feed(self.token_bytes(token) if token in visible else data)
                    if out.stopped:
                        finish = "stop"
                    elif generated >= limit or len(cached) >= self._n_ctx:
                        finish = "length"
                    else:
                        yield Chunk(text, token)
                        self._token[0] = token
                        decode(batch, (token,))
            finally:
                marks = (start, prompt_at, first_at, time.perf_counter())
                n_prompt = min(len(tokens), len(self.cached))
                self.timings = timings_of(self.load_s, (n_prompt, n_cached, generated), marks)
            rest = out.flush() if token is None else text + out.flush()
            yield Chunk(rest, token, self.timings, finish)

    def evaluate(self, tokens: Sequence[int], one_by_one: bool = False) -> None:
        """Computes tokens after those in the cache, in batches or one at a time as in decode; nothing is sampled.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            MoelocalError: see `open`; llama.cpp failed.
        """
        with self._interrupt:
            self.open()
            step = 1 if one_by_one else min(self.plan.n_ubatch, self._n_ctx)
            for at in range(0, len(tokens), step):
                ids = tokens[at : at + step]
                array = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to it
                self._decode(self._low.llama_batch_get_one(array, len(ids)), ids)
                if one_by_one:
                    self._low.llama_synchronize(self._context)
            self._low.llama_synchronize(self._context)

    def rewind(self, n_tokens: int) -> int:
        """Keeps the first tokens of the cache. Returns how many: 0 where the memory cannot be cut there."""
        return self._rewind([*self.cached[:n_tokens], -1]) if self._context else 0

    def _check_room(self, tokens: Sequence[int]) -> None:
        """Raises BadRequest for an empty prompt, ContextFull for one that leaves no room for an answer."""
        if not tokens:
            raise BadRequest("The prompt is empty.", 'Give one: moelocal run demo "What is a mixture of experts?"')
        if len(tokens) >= self._n_ctx:
            raise ContextFull(
                f"The prompt has {len(tokens):,} tokens, but the context holds {self._n_ctx:,}.",
                len(tokens),
                self._n_ctx,
                self._longer(len(tokens) + 512),
            )

    # -- state ------------------------------------------------------------------------------------------------------

    def save_state(self, path: Path) -> int:
        """Writes the KV cache and its tokens. Returns the bytes written; 0 when there is nothing to save."""
        return StateFile(path, self.header).save(self._context, self.cached) if self._context and self.cached else 0

    def load_state(self, path: Path) -> int:
        """Restores what `save_state` wrote. Returns the tokens restored: 0 for a missing, damaged or foreign file."""
        with self._interrupt:
            self.open()
            self._low.llama_memory_clear(self._memory, True)
            self.cached, self._checkpoint = [], None
            self.cached = StateFile(path, self.header).load(self._context, self._n_ctx)
        if self._interrupt.is_set():
            raise KeyboardInterrupt
        return len(self.cached)

    # -- closing ----------------------------------------------------------------------------------------------------

    def _close_context(self) -> None:
        if self._context:
            self._low.llama_free(self._context)
        self._context, self.cached, self._checkpoint = 0, [], None

    def close(self) -> None:
        """Frees the context, then the weights."""
        self._close_context()
        if self.residency is not None:  # before the mapping goes that it works on
            self.residency.close()
        if self._model:
            self._low.llama_model_free(self._model)
        self._model = 0
        self._interrupt.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _round_up(n: int, step: int = 1024) -> int:
    return -(-n // step) * step
