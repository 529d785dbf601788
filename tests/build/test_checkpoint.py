"""What is told of a checkpoint before anything long begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moelocal.build.checkpoint import (
    Checkpoint,
    Weights,
    architecture_of,
    check_architecture,
    open_checkpoint,
    read_config,
    remark_on,
)
from moelocal.build.families import check_router
from moelocal.errors import BadRequest
from tests.build.checkpoints import ARCHITECTURE, Shapes, safetensors, write_checkpoint

SECOND = "model-00002-of-00002.safetensors"


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


def without(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def only(folder: Path, name: str) -> None:
    without(folder, "*")
    (folder / name).write_text("{}")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut off": (lambda f: cut(f / "config.json", 20), "is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "not a model's configuration"),
    "no architecture": (lambda f: (f / "config.json").write_text("{}"), "does not name the model's architecture"),
    "odd architecture": (lambda f: (f / "config.json").write_text('{"architectures": [3]}'), "does not name"),
    "adapter": (lambda f: only(f, "adapter_config.json"), "LoRA"),
    "publisher's format": (lambda f: only(f, "params.json"), "publisher's own format"),
    "gguf": (lambda f: only(f, "model.gguf"), "nothing to convert"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "lacks its tokenizer"),
    "missing shard": (lambda f: (f / SECOND).unlink(), f"lacks 1 of 2 files with weights: {SECOND}"),
    "cut shard": (lambda f: cut(f / SECOND, 300), "is cut off: 300 of"),
    "cut head": (lambda f: cut(f / SECOND, 40), "is cut off"),
    "empty shard": (lambda f: cut(f / SECOND, 0), "is cut off"),
    "no safetensors": (lambda f: (f / SECOND).write_bytes(b"PK\x03\x04" + bytes(5000)), "no safetensors file"),
    "pointer": (
        lambda f: (f / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "only a Git LFS pointer",
    ),
    "bad head": (
        lambda f: (f / SECOND).write_bytes((9).to_bytes(8, "little") + b'{"a": []}' + bytes(50)),
        "its head is damaged",
    ),
    "no weights": (lambda f: without(f, "model*"), "holds no weights"),
    "odd index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "does not tell which file"),
    "tensor missing": (
        lambda f: (f / SECOND).write_bytes(safetensors({"c.weight": ("BF16", [2, 2])})),
        "lacks 1 tensors that its index names, such as b.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_missing_or_damaged_is_said(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(BadRequest, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.hint


def test_a_whole_one(tmp_path: Path) -> None:
    found = open_checkpoint(write_checkpoint(tmp_path))
    assert found.architecture == ARCHITECTURE and found.best_type == "bf16"
    assert [tensor.name for tensor in found.tensors] == ["a.norm.weight", "a.weight", "b.weight"]
    assert found.n_bytes == 64 * 4 + 2 * 64 * 32 * 2
    slack = 8 << 20
    assert found.output_bytes("f32") - slack == 64 * 4 + 2 * 64 * 32 * 4
    assert found.output_bytes("q8_0") - slack == 64 * 4 + 2 * 64 * 34


@pytest.mark.parametrize(
    "tensors,best,quantization,weights",
    [
        ({"a": ("F32", [64, 64])}, "f16", None, 4096),
        ({"a": ("F8_E4M3", [64, 64]), "b": ("BF16", [2, 2])}, "bf16", {"quant_method": "fp8"}, 4100),
        ({"a": ("F16", [64, 64])}, "f16", None, 4096),
        ({"a": ("I32", [64, 8])}, "f16", {"quant_method": "gptq"}, 4096),
    ],
)
def test_type_and_size_of_what_will_be_written(
    tmp_path: Path, tensors: Shapes, best: str, quantization: object, weights: int
) -> None:
    config = {"architectures": [ARCHITECTURE], "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "model.safetensors").write_bytes(safetensors(tensors))
    found = open_checkpoint(tmp_path)
    assert found.best_type == best
    assert found.output_bytes("bf16") - (8 << 20) == weights * 2


def test_architectures_are_told_apart_as_the_converter_does() -> None:
    assert architecture_of({"architectures": ["A", "B"]}) == "A"
    assert architecture_of({"architectures": ["V"], "text_config": {"architectures": ["T"]}}) == "T"
    assert architecture_of({"architectures": ["V"], "llm_config": {"architectures": ["T"]}}) == "T"
    kept, inner = "KimiK3ForConditionalGeneration", "KimiLinearForCausalLM"
    assert architecture_of({"architectures": [kept], "text_config": {"architectures": [inner]}}) == kept
    assert architecture_of({"ssm_cfg": {"layer": "Mamba2"}}) == "Mamba2ForCausalLM"


def test_unknown_architectures_get_names_like_theirs() -> None:
    known = ["Qwen3MoeForCausalLM", "MixtralForCausalLM"]
    check_architecture("MixtralForCausalLM", known)
    with pytest.raises(BadRequest, match="does not know the architecture 'Qwen3MoEForCausalLM'") as caught:
        check_architecture("Qwen3MoEForCausalLM", known)
    assert "Names like it: Qwen3MoeForCausalLM" in caught.value.hint
    with pytest.raises(BadRequest, match=r"llama\.cpp does not support JetMoeForCausalLM: "):
        check_architecture("JetMoeForCausalLM", [*known, "JetMoeForCausalLM"])


@pytest.mark.parametrize("said", [None, "noaux_tc"])
def test_families_that_do_not_run_without_a_scoring_function(said: str | None) -> None:
    config = {"scoring_func": said, "n_group": 1}
    check_router("Dots1ForCausalLM", config | {"scoring_func": "sigmoid"}, "x")
    check_router("Qwen3MoeForCausalLM", config, "x")
    with pytest.raises(BadRequest, match="noaux_tc" if said else "does not say how the router") as caught:
        check_router("Dots1ForCausalLM", config, "x")
    assert '"scoring_func": "sigmoid"' in caught.value.hint


def test_afmoe_without_its_norm_is_remarked() -> None:
    config = {"architectures": ["AfmoeForCausalLM"]}
    assert '"route_norm": true' in remark_on(config)
    assert remark_on(config | {"route_norm": True}) == ""


def test_deepseek_without_a_scoring_function_is_remarked(tmp_path: Path) -> None:
    config = {"architectures": ["DeepseekV3ForCausalLM"]}
    assert "sigmoid" in remark_on(config)
    assert remark_on({**config, "scoring_func": "sigmoid"}) == ""
    assert remark_on({"architectures": ["X"], "text_config": config}) != ""
    assert remark_on({"architectures": [ARCHITECTURE]}) == ""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(BadRequest) as caught:
        read_config(tmp_path / "config.json")
    assert str(tmp_path / "a") in caught.value.hint


@pytest.mark.parametrize(
    ("architecture", "tensor", "lacks"),
    [
        ("Qwen3NextForCausalLM", "model.layers.0.mlp.gate.weight", True),
        ("Qwen3NextForCausalLM", "mtp.layers.0.mlp.gate.weight", False),
        ("Qwen3_5MoeForConditionalGeneration", "model.language_model.layers.0.mlp.gate.weight", True),
        ("Qwen3MoeForCausalLM", "model.layers.0.mlp.gate.weight", False),
    ],
)
def test_layers_for_a_second_token_may_be_missing(architecture: str, tensor: str, lacks: bool, tmp_path: Path) -> None:
    assert Checkpoint(tmp_path, {}, architecture, (Weights(tensor, "BF16", (2, 2), 8),), 8).lacks_prediction == lacks
    assert not Checkpoint(tmp_path, {}, architecture, (), 8).lacks_prediction  # not known


def test_layers_named_as_transformers_5_does_are_refused_where_the_converter_would_miss_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for layers, is_refused in ((["mamba", "attention"], False), (["linear_attention", "full_attention"], True)):
        changed = {**config, "architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": layers}
        (folder / "config.json").write_text(json.dumps(changed))
        if is_refused:
            with pytest.raises(BadRequest, match="names its layers as transformers 5 does") as caught:
                open_checkpoint(folder)
            assert '"attention" for "full_attention"' in caught.value.hint
        else:
            assert open_checkpoint(folder).architecture == "GraniteMoeHybridForCausalLM"
