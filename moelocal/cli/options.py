"""Options that commands share, in groups: a command takes a group as one parameter, `expand` makes options of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from moelocal.engine.address import parse_endpoint
from moelocal.errors import BadRequest
from moelocal.units import parse_bytes

if TYPE_CHECKING:
    from moelocal.plan.request import PlanRequest


def option(name: str, text: str, metavar: str | None = None, min: int | None = None, max: int | None = None) -> Any:
    """An option of a command; its default is told in the text, in brackets."""
    return typer.Option(*name.split(), help=text, metavar=metavar, min=min, max=max, show_default=False)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="demo, a name from moelocal list, owner/repo[:QUANT], or the path of a .gguf file."
    ),
]
Text = Annotated[
    str | None, option("--text", "The text, UTF-8; - or a pipe: standard input. [built-in passages]", "FILE")
]
Described = Annotated[
    str | None,
    option(
        "--machine",
        'Plan for a machine that is not here: "gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s;disk=3GB/s;cores=8".',
        "TEXT",
    ),
]
Json = Annotated[bool, option("--json", "One JSON document on stdout, nothing else.")]
Verbose = Annotated[bool, option("--verbose -v", "Show llama.cpp's own log.")]
HideReasoning = Annotated[bool, option("--hide-reasoning", "Do not show what the model thinks before it answers.")]


@dataclass(frozen=True, slots=True)
class Generation:
    """How an answer is generated. None: the model's own advice, then llama.cpp's default."""

    max_tokens: Annotated[int | None, option("--max-tokens", "End the answer after N tokens.", "N")] = None
    temperature: Annotated[
        float | None,
        option("--temperature", "0: always the likeliest token. [the model's advice, else 0.8]", "X"),
    ] = None
    top_k: Annotated[int | None, option("--top-k", "Choose among the N likeliest tokens; 0: all. [40]", "N")] = None
    top_p: Annotated[
        float | None, option("--top-p", "Choose among the likeliest that together have this share. [0.95]", "X")
    ] = None
    min_p: Annotated[
        float | None, option("--min-p", "Drop tokens less likely than X times the likeliest. [0.05]", "X")
    ] = None
    repeat_penalty: Annotated[float | None, option("--repeat-penalty", "Above 1 discourages repetition. [1]", "X")] = (
        None
    )
    frequency_penalty: Annotated[
        float | None, option("--frequency-penalty", "Discourage tokens by how often they came. [0]", "X")
    ] = None
    presence_penalty: Annotated[
        float | None, option("--presence-penalty", "Discourage tokens that came at all. [0]", "X")
    ] = None
    seed: Annotated[int | None, option("--seed", "Make sampling repeatable.", "N")] = None
    stop: Annotated[list[str] | None, option("--stop", "End the answer before this text; may be repeated.", "TEXT")] = (
        None
    )
    json_schema: Annotated[Path | None, option("--json-schema", "Answer with JSON of this schema.", "FILE")] = None
    grammar: Annotated[Path | None, option("--grammar", "Answer in this GBNF grammar.", "FILE")] = None
    system: Annotated[str | None, option("--system", "System message.", "TEXT")] = None
    raw: Annotated[bool, option("--raw", "No chat template: the model continues the prompt.")] = False

    def __post_init__(self) -> None:
        if self.raw and self.system is not None:
            raise BadRequest("--raw uses no chat template, so --system has no place.", "Put the text into the prompt.")
        if self.grammar is not None and self.json_schema is not None:
            raise BadRequest("--grammar and --json-schema exclude each other.", "Give one of them.")


@dataclass(frozen=True, slots=True)
class Placement:
    """How a model is loaded and run. None: the planner chooses."""

    ctx: Annotated[int | None, option("--ctx", "Context length in tokens. [chosen]", "N", min=16)] = None
    kv_type: Annotated[Literal["f16", "q8_0", "q4_0"] | None, option("--kv-type", "Type of the KV cache. [f16]")] = None
    threads: Annotated[int | None, option("--threads", "CPU threads. [physical cores]", "N", min=1, max=512)] = None
    ubatch: Annotated[
        int | None, option("--ubatch", "Prompt tokens computed at once. [512]", "N", min=1, max=16384)
    ] = None
    ram: Annotated[str | None, option("--ram", "Use at most this much RAM, e.g. 12GiB.", "SIZE")] = None
    gpu_memory: Annotated[
        list[str] | None,
        option("--gpu-memory", "Use at most this much of a GPU's memory; may be repeated.", "[DEVICE=]SIZE"),
    ] = None
    experts_on_cpu: Annotated[
        int | None, option("--experts-on-cpu", "Keep the experts of N layers in RAM. [chosen]", "N", min=0)
    ] = None
    objective: Annotated[
        Literal["chat", "long-prompt", "throughput"], option("--objective", "What to be fast at. [chat]")
    ] = "chat"
    cpu_only: Annotated[bool, option("--cpu-only", "Do not use a GPU.")] = False
    rpc: Annotated[
        list[str] | None,
        option("--rpc", "Use another machine too, where moelocal worker runs; may be repeated.", "HOST:PORT"),
    ] = None

    def __post_init__(self) -> None:
        if self.cpu_only and self.rpc:
            raise BadRequest("--cpu-only and --rpc exclude each other.", "Give one of them.")
        for address in self.rpc or ():
            parse_endpoint(address)

    def request(self, one_shot: bool = False) -> PlanRequest:
        """What the planner is asked. `one_shot`: one answer only, so the time to load counts in full.

        Raises:
            BadRequest: a size that is none.
        """
        from moelocal.plan.request import PlanRequest, parse_gpu_memory

        return PlanRequest(
            n_ctx=self.ctx,
            kv_type=self.kv_type,
            threads=self.threads,
            n_ubatch=self.ubatch,
            cpu_only=self.cpu_only,
            ram_bytes=None if self.ram is None else parse_bytes(self.ram),
            gpu_bytes=parse_gpu_memory(self.gpu_memory or ()),
            experts_on_cpu=self.experts_on_cpu,
            objective=self.objective,
            one_shot=one_shot,
        )


@dataclass(frozen=True, slots=True)
class Running(Placement):
    """The same for answers."""

    lossy_misses: Annotated[
        int,
        option(
            "--lossy-misses",
            "LOSSY, for models larger than RAM: of the experts chosen for a token in a layer, let up to N that are not "
            "in RAM be replaced by the next best that are. Fewer reads, other answers. [0]",
            "N",
            min=0,
        ),
    ] = 0

    def request(self, one_shot: bool = False) -> PlanRequest:
        """See `Placement`."""
        return replace(Placement.request(self, one_shot), lossy_misses=self.lossy_misses)


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are groups became their fields, as Typer wants them."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation  # as written: typing.get_type_hints on Python 3.10 wraps what has None as default
        if not is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        inner = get_type_hints(kind, include_extras=True)
        groups[parameter.name] = (kind, [field.name for field in fields(kind)])
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=inner[field.name]
                )
            )

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        grouped = {name: kind(**{part: values.pop(part) for part in parts}) for name, (kind, parts) in groups.items()}
        command(**values, **grouped)

    vars(flat)["__signature__"] = inspect.Signature(parameters)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del flat.__wrapped__
    return flat
