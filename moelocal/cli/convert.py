"""`moelocal convert`: a Hugging Face checkpoint to GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moelocal.cli import options as opt

if TYPE_CHECKING:
    from moelocal.cli.converting import Made

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A folder with config.json and safetensors files, or owner/repo on the hub."),
]
Out = Annotated[
    str | None,
    typer.Argument(metavar="[OUT]", help="A path, or a name among the models made here. [the source's, with the type]"),
]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is made, and with what."""

    type: Annotated[
        Literal["auto", "f16", "bf16", "f32", "q8_0"],
        opt.option("--type", "Type of the weights. [auto: the checkpoint's own of 16 bits]"),
    ] = "auto"
    quantize: Annotated[
        str | None, opt.option("--quantize", "Quantize the result at once, and keep only that.", "TYPE")
    ] = None
    split: Annotated[str | None, opt.option("--split", "Files of at most this size, e.g. 4GB.", "SIZE")] = None
    name: Annotated[
        str | None, opt.option("--name", "What the model is called. [as the folder or repository]", "NAME")
    ] = None
    force: Annotated[bool, opt.option("--force", "Replace OUT if it exists.")] = False
    converter: Annotated[
        str | None,
        opt.option("--converter", "llama.cpp's folder, or the source of llama-cpp-python. [fetched once]", "PATH"),
    ] = None
    python: Annotated[
        str | None, opt.option("--python", "The Python that has torch and transformers. [this one]", "PATH")
    ] = None
    trust_code: Annotated[
        bool, opt.option("--trust-code", "Let Python files of the checkpoint run, if its tokenizer is one.")
    ] = False


def convert(
    source: Source,
    out: Out = None,
    conversion: Conversion = Conversion(),
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make a GGUF file of a Hugging Face checkpoint, by llama.cpp's own converter.

    Without OUT the result goes to the models made here, and can be used by its name at once. torch and transformers are
    needed: pip install 'moelocal[convert]'
    """
    from moelocal.cli.converting import carry_out

    made = carry_out(source, out, conversion, verbose)
    if as_json:
        print(json.dumps(_document(made), ensure_ascii=False))
    else:
        _tell(made)


def _document(made: Made) -> dict[str, Any]:
    return {
        "output": str(made.outputs[0]),
        "bytes_in": made.bytes_in,
        "bytes_out": made.bytes_out,
        "bits_per_weight": round(made.bits_per_weight, 4),
        "types": made.types,
        "seconds": round(made.seconds, 3),
        "source": made.source,
        "architecture": made.architecture,
        "type": made.type_name,
        "files": [str(path) for path in made.outputs],
        "converter": {"version": made.converter.version, "checked": made.converter.is_checked},
    }


def _tell(made: Made) -> None:
    """The end: where the model is, and how to run it."""
    from moelocal.cli.making import usable_as
    from moelocal.cli.messages import note
    from moelocal.units import format_bytes, format_seconds

    print(made.outputs[0])
    sys.stdout.flush()
    n = len(made.outputs)
    size = f"{format_bytes(made.bytes_out)}{f' in {n} files' if n > 1 else ''}"
    note(f"{size}, {made.bits_per_weight:.2f} bits per weight, in {format_seconds(made.seconds)}.")
    usable = usable_as(made.outputs[0])
    note(f'Run it: moelocal run {usable} "Who are you?"')
    if made.type_name in ("F32", "F16", "BF16"):
        note(f"Make it smaller: moelocal quantize {usable} --type Q4_K_M")
