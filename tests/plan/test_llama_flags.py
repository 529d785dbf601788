"""A placement in llama.cpp's terms: split, overrides, flags."""

from __future__ import annotations

import re

import pytest

from moelocal.errors import BadRequest
from moelocal.plan.cost import Placement, Setting
from moelocal.plan.llama_flags import LlamaFlags, flags_of, llama_args

NAMES = {
    "experts": [
        "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight", "ffn_gate_up_exps.weight",
        "ffn_gate_exps.bias", "ffn_down_exps.scale", "ffn_up_exps.input_scale", "ffn_gate_chexps.weight",
    ],
    "others": [
        "ffn_gate_inp.weight", "ffn_gate_inp.bias", "ffn_gate_inp_shexp.weight", "ffn_gate_shexp.weight",
        "ffn_up_shexp.weight", "exp_probs_b.bias", "ffn_norm_exps.weight", "ffn_gate.weight", "ffn_down.weight",
        "ffn_latent_down.weight", "attn_q.weight", "ffn_norm.weight", "ffn_gate_tid2eid.weight",
    ],
}  # fmt: skip


def moved(flags: LlamaFlags, name: str) -> str | None:
    """The device that the overrides give a tensor: the first pattern found in its name."""
    return next((device for pattern, device in flags.overrides if re.search(pattern, name)), None)


def given(flags: LlamaFlags, n_layers: int) -> list[str]:
    """The device of each layer and of the output, by llama.cpp's rule (load_tensors), for `n_layers` in the file."""
    n_gpu = flags.n_gpu_layers
    start = max(n_layers + 1 - n_gpu, 0)
    total = sum(flags.tensor_split)
    sums: list[float] = []
    for share in flags.tensor_split:
        sums.append((sums[-1] if sums else 0.0) + share)
    held = []
    for layer in range(n_layers + 1):
        if layer < start or not flags.devices:
            held.append("CPU")
        else:
            at = (layer - start) / min(n_gpu, n_layers + 1)
            held.append(next(d for d, s in zip(flags.devices, sums, strict=True) if s / total > at))
    return held


@pytest.mark.parametrize(
    ("layers", "output", "n_ahead"),
    [
        (["CPU"] * 5, "CPU", 0),
        (["A"] * 5, "A", 0),
        (["CPU", "CPU", "A", "A", "A"], "A", 2),
        (["CPU", "A", "B", "B", "C"], "C", 0),
        (["A", "A", "A", "B"], "C", 1),
        (["CPU"] * 3, "A", 0),
        (["A"] * 47 + ["B"], "B", 1),
    ],
)
def test_layers_go_where_they_should(layers: list[str], output: str, n_ahead: int) -> None:
    flags = flags_of(Placement(tuple(layers), tuple(layers), output), n_ahead)
    held = given(flags, len(layers) + n_ahead)
    assert held[: len(layers)] == layers and held[-1] == output
    assert flags.overrides == () and moved(flags, "output.weight") is None


def test_every_split_of_three_devices() -> None:
    """The proportions are exact for any number of layers, however llama.cpp's division rounds."""
    for a in range(0, 60, 7):
        for b in range(0, 60, 5):
            for c in range(1, 60, 9):
                layers = ["A"] * a + ["B"] * b + ["C"] * c
                flags = flags_of(Placement(tuple(layers), tuple(layers), "C"))
                assert given(flags, len(layers)) == [*layers, "C"]


def test_experts_move_and_nothing_else() -> None:
    n = 14
    experts = ["A"] * n
    experts[1], experts[11], experts[4] = "CPU", "CPU", "B"
    flags = flags_of(Placement(("A",) * n, tuple(experts), "A"))
    assert flags.devices == ("A", "B") and flags.tensor_split == (15.0, 0.0)
    for layer in range(n):
        home = None if experts[layer] == "A" else experts[layer]
        for name in NAMES["experts"]:
            assert moved(flags, f"blk.{layer}.{name}") == home, (layer, name)
        for name in NAMES["others"]:
            assert moved(flags, f"blk.{layer}.{name}") is None, (layer, name)


def test_single_tensors_move_alone() -> None:
    parts = (("blk.1.ffn_down_exps.weight", "CPU"),)
    flags = flags_of(Placement(("A", "A"), ("A", "A"), "A", parts))
    assert moved(flags, "blk.1.ffn_down_exps.weight") == "CPU"
    assert not any(moved(flags, name) for name in ("blk.1.ffn_up_exps.weight", "blk.11.ffn_down_exps.weight"))


@pytest.mark.parametrize("output", ["CPU", "A"])
def test_an_output_away_from_the_last_layer(output: str) -> None:
    flags = flags_of(Placement(("A", "B"), ("A", "B"), output))
    for name in ("output.weight", "token_embd.weight"):
        assert moved(flags, name) == output
    assert moved(flags, "blk.0.attn_output.weight") is None and given(flags, 2)[:2] == ["A", "B"]


@pytest.mark.parametrize("layers", [("A", "CPU"), ("A", "B", "A"), ("CPU", "A", "CPU", "A")])
def test_an_order_that_llama_cpp_cannot_express(layers: tuple[str, ...]) -> None:
    with pytest.raises(BadRequest, match="neighbours"):
        flags_of(Placement(layers, layers, layers[-1]))


def test_flags_for_llama_server() -> None:
    placement = Placement(("CPU", "CUDA0", "RPC0"), ("CPU", "CPU", "RPC0"), "RPC0")
    setting = Setting(placement, 4096, "q8_0", 1024, 6, False, "mmap")
    args = llama_args(setting, {"RPC0": "RPC0[192.168.1.5:50052]"})
    assert " ".join(args) == (
        "--rpc 192.168.1.5:50052 -dev CUDA0,RPC0 -ngl 3 -ts 1,2 "
        r"-ot ^blk\.(1)\.ffn_(gate|up|down|gate_up)_(ch)?exps\.=CPU "
        "-c 4096 -ctk q8_0 -ctv q8_0 -b 1024 -ub 1024 -t 6 -lm mmap -np 1 -fit off --no-repack"
    )
    assert "--rpc" not in llama_args(setting)
    cpu = Setting(Placement(("CPU",), ("CPU",), "CPU"), 512, "f16", 64, 1, True, "none")
    assert llama_args(cpu, {"RPC0": "RPC0[192.168.1.5:50052]"})[:4] == ["-dev", "none", "-ngl", "0"]


def test_every_worker_is_named_once_and_overrides_use_its_buffers() -> None:
    """llama.cpp counts devices over all workers, but buffers anew for each."""
    workers = {"RPC0": "RPC0[10.0.0.2:50052]", "RPC1": "RPC1[10.0.0.2:50052]", "RPC2": "RPC0[10.0.0.3:50052]"}
    setting = Setting(Placement(("RPC1",) * 2, ("RPC1", "RPC2"), "RPC1"), 512, "f16", 64, 1, True, "mmap")
    args = llama_args(setting, workers)
    assert args[:4] == ["--rpc", "10.0.0.2:50052,10.0.0.3:50052", "-dev", "RPC1,RPC2"]
    assert args[args.index("-ot") + 1].endswith("=RPC0[10.0.0.3:50052]")
