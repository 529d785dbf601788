"""What `build.quantize` makes, against llama.cpp called directly and against hashes of llama-quantize's own output."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from moelocal.build.quantize import Preview, Progress, QuantizeJob, preview, quantize
from moelocal.build.types import COPY, TYPES, file_type
from moelocal.engine import llama
from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.header import GGML_TYPES, ValueType, read_header
from tests.conftest import DEMO, ROOT
from tests.gguf_bytes import Typed, write_shards

Tiny = Callable[[str], Path]
NATIVE = json.loads((ROOT / "tests/data/quantize_native.json").read_text())
QUICK = ["Q8_0", "Q6_K", "Q4_K_M", "Q2_K", "MXFP4_MOE", "Q4_0", "BF16"]
OTHERS = [kind.name for kind in TYPES.values() if kind.imatrix != "required" and kind.name not in QUICK]


def digest(path: Path) -> str:
    """As scripts/quantize_native.py has it."""
    header = read_header(path)
    table = repr([tensor[:3] for tensor in header.tensors]).encode()
    return hashlib.sha256(table + path.read_bytes()[header.data_offset :]).hexdigest()


def made(source: Path, output: Path, type_name: str, **more: Any) -> Path:
    job = QuantizeJob(source, output, type_name, requantize=True, threads=2, **more)
    assert quantize(job).outputs == (output,)
    return output


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(DEMO, tmp_path_factory.mktemp("f16") / "demo-F16.gguf", "F16")


def check(type_name: str, folder: Path) -> None:
    ours = made(DEMO, folder / "ours.gguf", type_name)
    low = llama.api()
    params = low.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.only_copy = file_type(TYPES[type_name]), True, type_name == COPY
    theirs = folder / "theirs.gguf"
    assert low.llama_model_quantize(os.fsencode(DEMO), os.fsencode(theirs), ctypes.byref(params)) == 0
    assert ours.read_bytes() == theirs.read_bytes()
    if llama.system_info() == NATIVE["system"]:  # the last bits depend on what the compiler makes of a * b + c
        assert digest(ours) == NATIVE["sha256"][type_name]


@pytest.mark.parametrize("type_name", QUICK)
def test_every_byte_is_llama_quantizes(type_name: str, tmp_path: Path) -> None:
    check(type_name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("type_name", OTHERS)
def test_every_byte_of_the_other_types_too(type_name: str, tmp_path: Path) -> None:
    check(type_name, tmp_path)


def test_the_preview_is_what_is_made(f16: Path, tmp_path: Path) -> None:
    seen: list[Preview] = []
    progress: list[Progress] = []
    job = QuantizeJob(f16, tmp_path / "out.gguf", "Q4_K_M", threads=1)
    result = quantize(job, progress.append, seen.append)
    planned = preview(job)
    assert seen == [planned] == [result.preview]
    assert {change.name: change.after for change in planned.changes} == {
        tensor.name: tensor.ggml_type for tensor in read_header(job.output).tensors
    }
    assert planned.bytes_in == result.bytes_in == f16.stat().st_size
    assert job.output.stat().st_size == result.bytes_out <= planned.file_bytes <= result.bytes_out + 8192
    assert planned.types["Q4_K"] > 10 and sum(planned.types.values()) == len(planned.changes)
    assert [step.fraction for step in progress] == sorted(step.fraction for step in progress)
    assert progress[0].fraction == 0.0 and progress[-1].fraction == pytest.approx(1.0)
    assert progress[0].change == planned.changes[0] and len(progress) == len(planned.changes) + 1
    header = read_header(job.output)
    assert header.metadata["general.file_type"] == 15 and header.metadata["general.quantization_version"] == 2
    assert header.metadata["tokenizer.chat_template"] == read_header(f16).metadata["tokenizer.chat_template"]


def test_types_of_single_tensors(f16: Path, tmp_path: Path) -> None:
    job = QuantizeJob(
        f16,
        tmp_path / "out.gguf",
        "Q4_K_M",
        tensor_types={"blk.0.ffn_down_exps.weight": "Q8_0", "blk.1.attn_q.weight": "Q6_K"},
        patterns=((r"blk\.[01]\.attn_q", "Q5_K"), ("attn_q", "Q3_K")),
        embedding_type="Q8_0",
    )
    quantize(job)
    types = {tensor.name: GGML_TYPES[tensor.ggml_type].name for tensor in read_header(job.output).tensors}
    assert types["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert [types[f"blk.{i}.attn_q.weight"] for i in range(3)] == ["Q5_K", "Q5_K", "Q3_K"]
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.ffn_up_exps.weight"] == "Q4_K"


def test_a_shape_that_does_not_allow_a_type(tiny: Tiny, tmp_path: Path) -> None:
    planned = preview(QuantizeJob(tiny("tiny-deepseek2"), tmp_path / "out.gguf", "Q4_K_M", requantize=True))
    assert planned.fallbacks
    for change in planned.fallbacks:
        assert change.wanted is not None and change.shape[0] % GGML_TYPES[change.wanted].block_size
        assert change.shape[0] % GGML_TYPES[change.after].block_size == 0


def test_what_is_quantized_already(tiny: Tiny, tmp_path: Path) -> None:
    job = QuantizeJob(DEMO, tmp_path / "out.gguf", "Q4_K_M", called="demo")
    with pytest.raises(MoelocalError, match=r"demo is quantized already: .* are Q8_0") as refusal:
        quantize(job)
    assert "--requantize" in refusal.value.hint and not list(tmp_path.iterdir())
    assert (found := preview(job).refusal) is not None and found.message == refusal.value.message
    quantize(replace(job, type_name="Q8_0"))  # nothing is lost: llama.cpp copies what has its type
    gptoss = QuantizeJob(tiny("tiny-gptoss"), tmp_path / "out2.gguf", "Q8_0")
    with pytest.raises(MoelocalError) as refusal:
        quantize(gptoss)
    assert "--tensor-type _exps=MXFP4" in refusal.value.hint
    assert preview(replace(gptoss, patterns=(("_exps", "MXFP4"),))).types["MXFP4"] > 0


@pytest.mark.parametrize("type_name", ["IQ2_XS", "IQ1_S", "Q2_K_S", "IQ3_XXS"])
def test_types_that_need_importances(f16: Path, tmp_path: Path, type_name: str) -> None:
    job = QuantizeJob(f16, tmp_path / "out.gguf", type_name)
    with pytest.raises(MoelocalError, match=f"{type_name} needs an importance matrix") as refusal:
        quantize(job)
    assert "moelocal imatrix" in refusal.value.hint and not list(tmp_path.iterdir())
    assert preview(job).bits_per_weight < 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"patterns": (("nothing_like_it", "Q4_K"),)}, "No tensor's name contains 'nothing_like_it'"),
        ({"patterns": (("(", "Q4_K"),)}, "no regular expression"),
        ({"patterns": (("attn", "Q4_K_M"),)}, "mixture"),
        ({"output_type": "Q9"}, "no tensor type"),
        ({"type_name": "F16", "patterns": (("attn", "Q4_K"),)}, "not with F16"),
        ({"output": DEMO, "replace": True}, "the source itself"),
    ],
)
def test_jobs_that_make_no_sense(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    job = replace(QuantizeJob(DEMO, tmp_path / "out.gguf", "Q8_0", requantize=True), **more)
    with pytest.raises(BadRequest, match=words):
        quantize(job)
    assert not list(tmp_path.iterdir())


def test_a_type_of_embeddings_that_their_rows_do_not_allow(tiny: Tiny, tmp_path: Path) -> None:
    job = QuantizeJob(tiny("tiny-deepseek2"), tmp_path / "out.gguf", "Q8_0", embedding_type="Q4_K", requantize=True)
    with pytest.raises(BadRequest, match="multiple of 256 values"):
        preview(job)


@pytest.fixture
def split(tiny: Tiny, tmp_path: Path) -> Path:
    """A model in three files; its weights are zeros."""
    header = read_header(tiny("tiny-qwen3moe"))
    metadata: dict[str, object] = {}
    for key, value in header.metadata.items():
        if isinstance(value, int) and not isinstance(value, bool):
            metadata[key] = Typed(ValueType.UINT32, value)
        elif isinstance(value, str | float):
            metadata[key] = value
    tensors = [(tensor.name, tensor.shape, 0 if len(tensor.shape) == 1 else 1) for tensor in header.tensors]
    return write_shards(tmp_path, "big", metadata, [tensors[:10], tensors[10:30], tensors[30:]])[0]


def test_split_sources(split: Path, tmp_path: Path) -> None:
    one = tmp_path / "one" / "out.gguf"
    result = quantize(QuantizeJob(split, one, "Q4_K_M"))
    assert result.outputs == (one,) and "split.count" not in read_header(one).metadata
    kept = quantize(QuantizeJob(split, tmp_path / "kept" / "out.gguf", "Q4_K_M", keep_split=True))
    assert [path.name for path in kept.outputs] == [f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(kept.outputs) == sorted((tmp_path / "kept").iterdir())
    both = [{tensor.name: tensor.ggml_type for tensor in read_header(path).tensors} for path in (one, kept.outputs[0])]
    assert both[0] == both[1] and result.preview.types == kept.preview.types
    with pytest.raises(BadRequest, match="exists already"):
        quantize(QuantizeJob(split, tmp_path / "kept" / "out.gguf", "Q4_K_M", keep_split=True))
    joined = quantize(QuantizeJob(split, tmp_path / "one" / "joined.gguf", COPY))
    assert joined.preview.types == {"F16": 37, "F32": 18} or set(joined.preview.types) == {"F16", "F32"}


def crash(signum: int) -> Callable[[Progress], None]:
    def on_progress(_: Progress) -> None:
        for child in psutil.Process().children():
            child.send_signal(signum)

    return on_progress


@pytest.mark.parametrize(
    ("signum", "words"),
    [(signal.SIGABRT, r"llama.cpp crashed \(SIGABRT\)"), (signal.SIGKILL, "Memory ran out while demo.gguf")],
)
def test_a_crash_is_told(tmp_path: Path, signum: int, words: str) -> None:
    with pytest.raises(MoelocalError, match=words):
        quantize(QuantizeJob(DEMO, tmp_path / "out.gguf", "Q3_K_M", requantize=True, threads=1), crash(signum))
    assert not list(tmp_path.iterdir()) and not psutil.Process().children()


def test_interrupted_by_the_caller(tmp_path: Path) -> None:
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            quantize(QuantizeJob(DEMO, tmp_path / "out.gguf", "Q3_K_M", requantize=True, threads=1), stop)
        assert not list(tmp_path.iterdir()) and not psutil.Process().children()


def test_damaged_weights(f16: Path, tmp_path: Path) -> None:
    header = read_header(f16)
    at = next(tensor for tensor in header.tensors if tensor.name == "blk.2.attn_q.weight")
    data = bytearray(f16.read_bytes())
    data[at.offset : at.offset + 2] = b"\x00\x7e"  # a NaN
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(MoelocalError, match=r"bad.gguf is damaged: tensor blk.2.attn_q.weight"):
        quantize(QuantizeJob(bad, tmp_path / "out.gguf", "Q4_K_M"))
    assert list(tmp_path.iterdir()) == [bad]
