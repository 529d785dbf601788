"""Checkpoints, and a converter that stands in for llama.cpp's: it needs no torch, and fails when told to.

What it does is told by the environment: FAKE_CONVERTER = how it fails, or `slow`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.gguf_bytes import gguf_bytes, write_shards

ARCHITECTURE = "MixtralForCausalLM"
GGUF = gguf_bytes({"general.architecture": "llama", "general.name": "fake"}, [("output.weight", (256, 4096), 1)])
"""What the stand-in writes: 2 MB."""

_REGISTRY = f'''
from __future__ import annotations
TEXT_MODEL_MAP: dict[str, str] = {{"{ARCHITECTURE}": "llama", "Qwen3MoeForCausalLM": "qwen"}}
import torch_is_never_imported_for_the_registry
'''
_SCRIPT = """
import argparse, json, logging, os, sys, time
import gguf
from tqdm import tqdm
import transformers

def set_vocab(folder):
    if os.environ.get("FAKE_CONVERTER") == "tokenizer":
        raise RuntimeError("could not parse ModelProto")
    transformers.AutoTokenizer.from_pretrained(folder)
    assert not sys.stdin.read()

def main():
    parser = argparse.ArgumentParser()
    for name in ("--outfile", "--outtype", "--model-name", "--split-max-size"):
        parser.add_argument(name)
    parser.add_argument("--vocab-only", action="store_true")
    parser.add_argument("model")
    args = parser.parse_args()
    how = os.environ.get("FAKE_CONVERTER", "")
    logging.getLogger("hf-to-gguf").warning("said once")
    logging.getLogger("hf-to-gguf").warning("said once")
    print("this must not reach the parent's protocol")
    set_vocab(args.model)
    if how.startswith("raise "):
        raise eval(how.removeprefix("raise "))
    if how == "exit":
        logging.getLogger("hf-to-gguf").error("Model Abc is not supported")
        sys.exit(1)
    if how == "kill":
        os.kill(os.getpid(), 9)
    if args.vocab_only:
        assert not [name for name in os.listdir(args.model) if name.endswith((".safetensors", ".index.json"))]
    if how == "nothing" or args.vocab_only:
        return
    ends = ["-00001-of-00002.gguf", "-00002-of-00002.gguf"] if args.split_max_size else [".gguf"]
    stem = os.path.join(os.path.dirname(__file__), "gguf-py", "written")
    datas = [open(stem + end, "rb").read() for end in ends]
    from tqdm import tqdm as bar_of
    bar = bar_of(desc="Writing", total=sum(map(len, datas)), unit="byte", unit_scale=True)
    for end, data in zip(ends, datas):
        if how == "half":
            data = data[: len(data) // 2]
        with open(args.outfile[: -len(".gguf")] + end, "wb") as out:
            for start in range(0, len(data), 1 << 18):
                out.write(data[start : start + (1 << 18)])
                out.flush()
                bar.update(1 << 18)
                if how == "slow":
                    time.sleep(0.25)
    if "FAKE_TOLD" in os.environ:
        told = {"args": vars(args), "gguf": gguf.__file__, "offline": os.environ["HF_HUB_OFFLINE"]}
        open(os.environ["FAKE_TOLD"], "w").write(json.dumps(told))
"""
_TRANSFORMERS = """
class AutoTokenizer:
    @classmethod
    def from_pretrained(cls, folder, trust_remote_code=False):
        import os
        if os.path.exists(os.path.join(folder, "tokenization_own.py")) and not trust_remote_code:
            raise ValueError("contains custom code ... Please pass the argument `trust_remote_code=True`")
"""


def converter_files() -> dict[str, str]:
    """The stand-in, by names below its folder."""
    return {
        "convert_hf_to_gguf.py": _SCRIPT,
        "conversion/__init__.py": _REGISTRY,
        "conversion/base.py": "raise ImportError",
        "gguf-py/gguf/__init__.py": "",
    }


def write_converter(folder: Path, gguf: bytes = GGUF) -> Path:
    for name, text in converter_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "gguf-py" / "written.gguf").write_bytes(gguf)
    tensors = [[(name, (256, 2048), 1)] for name in ("token_embd.weight", "output.weight")]
    write_shards(folder / "gguf-py", "written", {"general.architecture": "llama"}, tensors)
    return folder


_IMPORTED = ("torch", "transformers", "safetensors", "yaml")


def write_python(folder: Path, modules: Sequence[str] = _IMPORTED) -> Path:
    """A Python that has the like of some modules that the converter imports, and none of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lib").mkdir(exist_ok=True)
    for name in modules:
        (folder / "lib" / f"{name}.py").write_text(_TRANSFORMERS if name == "transformers" else "")
    absent = dict.fromkeys(set(_IMPORTED) - set(modules))
    (folder / "lib" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({absent})\n")
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{folder / "lib"}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    os.chmod(path, 0o755)
    return path


Shapes = Mapping[str, tuple[str, Sequence[int]]]


def safetensors(tensors: Shapes) -> bytes:
    """A safetensors file of zeros."""
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4}[dtype]
        for extent in shape:
            n_bytes *= extent
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


PARTS: dict[str, Shapes] = {
    "model-00001-of-00002.safetensors": {"a.norm.weight": ("F32", [64]), "a.weight": ("BF16", [64, 32])},
    "model-00002-of-00002.safetensors": {"b.weight": ("BF16", [64, 32])},
}


def checkpoint_files(architecture: str = ARCHITECTURE) -> dict[str, bytes]:
    """A whole checkpoint of two shards."""
    config = {"architectures": [architecture], "model_type": "x", "hidden_size": 64}
    index = {"weight_map": {tensor: part for part, tensors in PARTS.items() for tensor in tensors}}
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": b"{}",
        "README.md": b"# a model",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{part: safetensors(tensors) for part, tensors in PARTS.items()},
    }


def write_checkpoint(folder: Path, architecture: str = ARCHITECTURE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in checkpoint_files(architecture).items():
        (folder / name).write_bytes(data)
    return folder
