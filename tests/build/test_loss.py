"""Losses measured on real tensors: against a sum worked out by hand, and in the order that bits give."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from moelocal.build import loss
from moelocal.build.imatrix_file import Imatrix, Importance
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import GGUFHeader, read_header

IDS = {kind.name: number for number, kind in GGML_TYPES.items()}


def _model(path: Path, dtype: GGMLQuantizationType, **tensors: np.ndarray) -> GGUFHeader:
    writer = GGUFWriter(path, "llama")
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0"])
def test_an_error_is_the_sum_in_the_docstring(tmp_path: Path, dtype: str) -> None:
    kind = GGMLQuantizationType[dtype]
    weights = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    header = _model(tmp_path / "m.gguf", kind, t=weights)
    held = dequantize(quantize(weights, kind), kind)
    made = dequantize(quantize(held, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    found = loss.measure(header, header.tensors, None, 2)["t.weight"]
    expected = ((made - held) ** 2).sum() / (held**2).sum()
    assert found[IDS["Q8_0"]] == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert IDS["Q4_K"] not in found  # 64 columns are no block of 256


def test_more_bits_lose_less_and_importances_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((3, 8, 256)).astype(np.float32)
    header = _model(tmp_path / "m.gguf", GGMLQuantizationType.F16, t=weights)
    sums = np.ones((3, 256), np.float32)
    sums[:, :16] = 1000  # inputs that matter
    matrix = Imatrix({"t.weight": Importance(sums, np.ones(3, np.float32))}, (), 1, 512)
    found = loss.measure(header, header.tensors, matrix, 1)["t.weight"]
    order = [found[IDS[name]] for name in ("IQ2_XXS", "IQ3_XXS", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0")]
    assert order == sorted(order, reverse=True)
    assert order[0] < 0.5
    blind = loss.measure(header, header.tensors, None, 1)["t.weight"]
    assert IDS["IQ2_XXS"] not in blind
    assert found[IDS["Q2_K"]] < blind[IDS["Q2_K"]]  # precision goes where it matters


def test_ctrl_c_does_not_wait_for_what_ggml_computes(tmp_path: Path) -> None:
    """ggml fills tables of IQ types in one call that takes seconds: here it sleeps for a minute."""
    _model(tmp_path / "m.gguf", GGMLQuantizationType.F16, t=np.ones((8, 256), np.float32))
    program = (
        "import sys, time; from pathlib import Path; from moelocal.build import loss\n"
        "from moelocal.model.header import read_header\n"
        "loss._errors = lambda *_: (print('begun', flush=True), time.sleep(60))\n"
        "header = read_header(Path(sys.argv[1]))\n"
        "loss.measure(header, header.tensors, None, 1)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "m.gguf")]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=70)
    assert time.monotonic() - start < 20 and "KeyboardInterrupt" in err


def test_experts_are_drawn_by_use() -> None:
    counts = np.array([0, 8, 0, 0, 1, 1, 0, 6], np.float32)
    tensor = next(iter([_tensor((32, 4, 8))]))
    drawn = loss._drawn(tensor, Importance(np.ones((8, 32), np.float32), counts))
    assert drawn.count(1) == 4
    assert not {0, 2, 3, 6} & set(drawn)
    assert loss._drawn(tensor, None) == list(range(8))


def _tensor(shape: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from moelocal.model.header import TensorInfo

    return TensorInfo("t.weight", shape, IDS["F16"], 0, 0)
