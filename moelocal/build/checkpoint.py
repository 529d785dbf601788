"""A Hugging Face checkpoint in a folder, looked at before anything long begins: what it is, whether all of it is there.

    config = read_config(folder / "config.json")
    check_architecture(architecture_of(config), converter.architectures())
    checkpoint = open_checkpoint(folder)            # heads of all safetensors files

Source: llama.cpp 0c1e57098, conversion/base.py (load_hparams, get_model_architecture, index_tensors, the choice of a
type in ModelBase.__init__).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from moelocal.build import families
from moelocal.errors import BadRequest

TYPES = {"f16": 2.0, "bf16": 2.0, "f32": 4.0, "q8_0": 34 / 32}
"""What the converter writes, and bytes per weight."""
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TOKENIZERS = {
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tiktoken.model"),
    *("tokenizer.tok.json", "tekken.json", "spiece.model", "tokenizer.jsonl"),
}
"""Files that hold a vocabulary, one kind or another."""
_PARENTS_KEPT = {
    "StepVLForConditionalGeneration",
    "Sarashina2VisionForCausalLM",
    "Exaone4_5_ForConditionalGeneration",
    "Step3p7ForConditionalGeneration",
    "KimiK3ForConditionalGeneration",
}
_PREDICTS = ("Qwen3NextFor", "Qwen3_5For", "Qwen3_5MoeFor")
_TEXT_CONFIGS = ("llm_config", "lm_config", "language_config", "lfm")
_MOST_HEAD_BYTES = 100 << 20  # as the safetensors library
_POINTER = b"version https://git-lfs"


class Weights(NamedTuple):
    """One tensor of a safetensors file: `dtype` as there (`BF16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is converted. `tensors` is empty where heads were not read: PyTorch's own files, the hub's. `n_bytes`: of
    all weights."""

    folder: Path
    config: Mapping[str, Any]
    architecture: str
    tensors: tuple[Weights, ...]
    n_bytes: int

    @property
    def best_type(self) -> str:
        """The 16-bit type that loses nothing: that of the first matrix that has one; without heads what is told."""
        if not self.tensors:
            told = self.config.get("dtype", self.config.get("torch_dtype"))
            return "bf16" if told == "bfloat16" else "f16"
        kinds = (tensor.dtype for tensor in self.tensors if len(tensor.shape) >= 2 and tensor.dtype in ("BF16", "F16"))
        return next(kinds, "f16").lower()

    @property
    def lacks_prediction(self) -> bool:
        """Whether the layers that predict a second token are missing where the converter expects them: transformers
        leaves them out when it saves such a model."""
        is_expected = self.architecture.startswith(_PREDICTS) and bool(self.tensors)
        return is_expected and not any("mtp." in tensor.name for tensor in self.tensors)

    def output_bytes(self, type_name: str) -> int:
        """About what the output takes in one of `TYPES`."""
        per_weight = TYPES[type_name]
        if not self.tensors:
            return int(self.n_bytes * per_weight / 2)
        packing = _packing(self.config)
        return int(sum(_values(tensor, packing) * _stored(tensor, per_weight) for tensor in self.tensors)) + (8 << 20)


def _packing(config: Mapping[str, Any]) -> int:
    """Weights in one number of packed integer types; 0: they are copied as they are (MXFP4)."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return {"gptq": 8, "compressed-tensors": 8, "bitnet": 4}.get(str(method), 0)


def _values(tensor: Weights, packing: int) -> float:
    n = 1.0
    for extent in tensor.shape:
        n *= extent
    return n * packing if packing and tensor.dtype in ("I32", "U8") else n


def _stored(tensor: Weights, per_weight: float) -> float:
    if len(tensor.shape) < 2:
        return 4.0
    return 1.0 if tensor.dtype in ("U8", "I8") else per_weight


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration.

    Raises:
        BadRequest: there is none, or it is none.
    """
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _no_checkpoint(path.parent) from error
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.", "Check who may read it.") from error
    except (ValueError, RecursionError) as error:
        if path.read_bytes().startswith(_POINTER):
            raise _pointer(path) from error
        raise BadRequest(f"{path} is not JSON: {error}.", "Download it again.") from error
    if not isinstance(config, dict):
        raise BadRequest(f"{path} is not a model's configuration.", "Download it again.")
    return config


def _no_checkpoint(folder: Path) -> BadRequest:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "adapter_config.json" in names:
        return BadRequest(f"{folder} holds an adapter (LoRA), not a whole model.", "Merge it into its model first.")
    if "params.json" in names:
        return BadRequest(
            f"{folder} is a checkpoint in the publisher's own format (params.json).",
            "Take the one with config.json: most are published in both forms.",
        )
    if made := sorted(name for name in names if name.endswith(".gguf")):
        run = f"Run it: moelocal run {shlex.quote(str(folder / made[0]))}"
        return BadRequest(f"{folder} holds a GGUF file: there is nothing to convert.", run)
    below = next((path.parent for path in sorted(folder.glob("*/config.json"))), None) if folder.is_dir() else None
    hint = f"Is it {below}?" if below else "Name the folder that has config.json, the weights and the tokenizer in it."
    return BadRequest(f"{folder} holds no checkpoint: there is no config.json in it.", hint)


def _pointer(path: Path) -> BadRequest:
    return BadRequest(
        f"{path} is only a Git LFS pointer to a file.", f"Fetch the content: git -C {path.parent} lfs pull"
    )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture by which the converter chooses how to read a checkpoint.

    Raises:
        BadRequest: none is told.
    """
    outer = _first(config.get("architectures"))
    if not outer and isinstance(config.get("ssm_cfg"), dict):
        outer = f"{config['ssm_cfg'].get('layer', 'Mamba')}ForCausalLM"
    text = config.get("text_config")
    for name in _TEXT_CONFIGS:
        text = config.get(name, text)
    if isinstance(thinker := config.get("thinker_config"), dict):
        text = thinker.get("text_config", text)
    inner = _first(text.get("architectures")) if isinstance(text, dict) else ""
    if found := outer if outer in _PARENTS_KEPT else inner or outer:
        return found
    raise BadRequest(
        "config.json does not name the model's architecture.", "Download it again: it needs architectures."
    )


def _first(names: object) -> str:
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def check_architecture(architecture: str, known: Iterable[str]) -> None:
    """Looks whether the converter, and llama.cpp, know an architecture.

    Raises:
        BadRequest: with the reason, or with names that are like it.
    """
    if reason := families.unsupported_reason(architecture):
        raise BadRequest(
            f"llama.cpp does not support {architecture}: {reason}.", "Models that it runs: moelocal list --all"
        )
    names = sorted(known)
    if architecture in names:
        return
    close = get_close_matches(architecture, names, n=3, cutoff=0.75)
    like = f" Names like it: {', '.join(close)}." if close else ""
    raise BadRequest(
        f"llama.cpp's converter does not know the architecture {architecture!r:.80}.",
        f"A newer one may: pip install --upgrade llama-cpp-python.{like}",
    )


def remark_on(config: Mapping[str, Any]) -> str:
    """What is wrong with a configuration, though the converter would take it; '' for nothing."""
    text = config.get("text_config")
    return families.remark_on(architecture_of(config), text if isinstance(text, dict) else config)


def check_tokenizer(names: Iterable[str], where: str) -> None:
    """Looks whether one of the files is a vocabulary.

    Raises:
        BadRequest: none is.
    """
    if TOKENIZERS.isdisjoint(names) and not any(name.endswith(".tiktoken") for name in names):
        raise BadRequest(
            f"{where} lacks its tokenizer: there is neither tokenizer.json nor tokenizer.model.",
            "Copy the tokenizer's files there from the model that it was made from.",
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint of which all files are there and whole.

    Raises:
        BadRequest: something is missing, cut off, or no checkpoint.
    """
    config = read_config(folder / CONFIG)
    architecture = architecture_of(config)
    _check_layer_names(folder, config, architecture)
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise BadRequest(f"{folder} cannot be read: {error.strerror}.", "Check who may read it.") from error
    check_tokenizer(names, str(folder))
    parts = _parts(folder, names)
    if parts[0].suffix != ".safetensors":
        return Checkpoint(folder, config, architecture, (), sum(part.stat().st_size for part in parts))
    tensors = [tensor for part in parts for tensor in read_head(part)]
    _check_index(folder, names, {tensor.name for tensor in tensors})
    return Checkpoint(folder, config, architecture, tuple(tensors), sum(tensor.n_bytes for tensor in tensors))


def _check_layer_names(folder: Path, config: Mapping[str, Any], architecture: str) -> None:
    """Raises BadRequest for layers named as transformers 5 saves them, which the converter would take for others: the
    file would be written, and not load."""
    if architecture == "GraniteMoeHybridForCausalLM" and "full_attention" in (config.get("layer_types") or ()):
        raise BadRequest(
            f"{folder / CONFIG} names its layers as transformers 5 does, and llama.cpp's converter would find no "
            "attention in them.",
            'In layer_types write "attention" for "full_attention" and "mamba" for "linear_attention", and try again.',
        )


def _parts(folder: Path, names: set[str]) -> list[Path]:
    """The files with the weights, in the converter's order."""
    for index in (INDEX, "pytorch_model.bin.index.json"):
        if index in names:
            wanted = sorted(set(weight_map(folder / index).values()))
            check_whole(wanted, names, str(folder))
            return [folder / name for name in wanted]
    for start, end in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if found := sorted(name for name in names if name.startswith(start) and name.endswith(end)):
            return [folder / name for name in found]
    other = next((name for name in sorted(names) if name.endswith((".safetensors", ".bin", ".pt", ".pth"))), "")
    more = f"; {other} is not named as a checkpoint's is" if other else ""
    raise BadRequest(
        f"{folder} holds no weights: there is no model.safetensors in it{more}.", "Download the rest of the checkpoint."
    )


def weight_map(path: Path) -> dict[str, str]:
    """Which file holds each tensor, as an index tells.

    Raises:
        BadRequest: it is no index.
    """
    found = read_config(path).get("weight_map")
    if not (isinstance(found, dict) and found and all(isinstance(name, str) for name in found.values())):
        raise BadRequest(f"{path} does not tell which file holds which tensor.", "Download it again.")
    return found


def check_whole(wanted: Sequence[str], names: Iterable[str], where: str) -> None:
    """Looks whether all files with weights are there.

    Raises:
        BadRequest: with those that are not.
    """
    missing = sorted(set(wanted) - set(names))
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BadRequest(
            f"{where} lacks {len(missing)} of {len(set(wanted))} files with weights: {shown}.",
            "Download the rest of the checkpoint.",
        )


def _check_index(folder: Path, names: set[str], there: set[str]) -> None:
    if INDEX in names and (missing := sorted(set(weight_map(folder / INDEX)) - there)):
        raise BadRequest(
            f"{folder} lacks {len(missing):,} tensors that its index names, such as {missing[0]}.",
            "Download the checkpoint again.",
        )


def read_head(path: Path) -> list[Weights]:
    """The tensors of a safetensors file, by their names.

    Raises:
        BadRequest: it is cut off, or no such file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(24)
            n_head = int.from_bytes(start[:8], "little")
            if start.startswith(_POINTER):
                raise _pointer(path)
            if len(start) > 8 and (start[8:9] != b"{" or n_head > _MOST_HEAD_BYTES):
                raise ValueError("it does not begin like one")
            if n_head + 8 > size or len(start) <= 8:
                raise _cut_off(path, size)
            stream.seek(8)
            head = json.loads(stream.read(n_head))
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.", "Check who may read it.") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path} is no safetensors file: {error}.", "Download it again.") from error
    try:
        tensors = [
            Weights(
                name,
                str(told["dtype"]),
                tuple(map(int, told["shape"])),
                told["data_offsets"][1] - told["data_offsets"][0],
            )
            for name, told in head.items()
            if name != "__metadata__"
        ]
        end = max((told["data_offsets"][1] for name, told in head.items() if name != "__metadata__"), default=0)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"{path} is no safetensors file: its head is damaged.", "Download it again.") from error
    if 8 + n_head + end > size:
        raise _cut_off(path, size, 8 + n_head + end)
    return sorted(tensors)


def _cut_off(path: Path, size: int, wanted: int = 0) -> BadRequest:
    of = f" of {wanted:,}" if wanted else ""
    return BadRequest(f"{path} is cut off: {size:,}{of} bytes are there.", "Download it again.")
