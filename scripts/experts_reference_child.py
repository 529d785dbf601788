"""The half of experts_reference.py that needs torch and transformers: random checkpoints made, converted, and run.

usage: python scripts/experts_reference_child.py ARCH|FOLDER WORK LLAMA_CPP

Reads WORK/tokens.json (token ids) and writes WORK/choices.json: {"layers": {"0": [[ids of a token], ...]}, "scores":
{"0": [[score of every expert by which the router chooses], ...]}}. For an ARCH also WORK/hf and WORK/model.gguf; its
tokenizer is taken from WORK/tokenizer.
"""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

_SHAPE = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "initializer_range": 0.06,
    "bos_token_id": 1, "eos_token_id": 5, "pad_token_id": 3,
}  # fmt: skip
_MLA = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("softmax, weights normalised", {
        "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "norm_topk_prob": True, "head_dim": 32, "decoder_sparse_step": 1,
    }),
    "qwen2_moe": ("softmax, a shared expert", {
        "intermediate_size": 256, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128,
        "num_experts": 12, "num_experts_per_tok": 4, "norm_topk_prob": False,
    }),
    "olmoe": ("softmax, weights as they are", {
        "intermediate_size": 64, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "num_key_value_heads": 4,
    }),
    "granitemoe": ("softmax over the chosen, fused gate and up", {
        "intermediate_size": 64, "num_local_experts": 10, "num_experts_per_tok": 2, "attention_multiplier": 0.177,
    }),
    "deepseek_v2": ("softmax, a dense first layer, shared experts", {
        **_MLA, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
        "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "head_dim": 16,
    }),
    "deepseek_v3": ("sigmoid with a bias, 4 groups of which 2 are open", {
        **_MLA, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 32, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 4, "topk_group": 2,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "head_dim": 16,
        # as in the published checkpoint: transformers leaves it out, and the converter then writes no sigmoid
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    }),
    "glm4_moe": ("sigmoid with a bias, a dense first layer", {
        "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    }),
    "llama4": ("one expert per token", {
        "intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 16, "num_experts_per_tok": 1,
        "head_dim": 32, "interleave_moe_layer_step": 1, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 2048,
    }),
}  # fmt: skip


def make(arch: str, folder: Path, tokenizer: Path) -> None:
    """Writes a random checkpoint of an architecture; the same one every time."""
    import torch
    import transformers

    torch.manual_seed(1)
    values = {**_SHAPE, **ARCHITECTURES[arch][1]}
    kind = "llama4_text" if arch == "llama4" else arch
    config = transformers.AutoConfig.for_model(kind, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                value.normal_(0, 0.1)
            elif "norm" in name and value.ndim == 1:
                value.normal_(1, 0.1)
            elif "embed" in name:  # what a layer adds must not drown what it was given, as in trained models
                value.normal_(0, 1)
            elif value.ndim >= 2:
                value.normal_(0, 0.06)
    model.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)


def convert(folder: Path, out: Path, llama_cpp: Path) -> None:
    """Converts with llama.cpp's own converter; the vocabulary is the sentencepiece file, whatever the architecture."""
    sys.path.insert(0, str(llama_cpp))
    sys.path.insert(1, str(llama_cpp / "gguf-py"))
    conversion = importlib.import_module("conversion")
    original = conversion.get_model_class

    def with_tokenizer(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.set_vocab = found._set_vocab_sentencepiece
        return found

    vars(conversion)["get_model_class"] = with_tokenizer
    before = sys.argv
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(out)]
    try:
        runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")
    finally:
        sys.argv = before


def choices(folder: Path, tokens: list[int]) -> dict[str, Any]:
    """What transformers' routers choose, by layer: ids and scores of every token, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    ids: dict[str, Any] = {}
    scores: dict[str, Any] = {}

    def on_experts(layer: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            if len(args) > 1 and not args[1].is_floating_point():
                ids[layer] = args[1].reshape(len(tokens), -1).tolist()

        return hook

    def on_router(layer: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], out: Any) -> None:
            hidden = args[0].reshape(len(tokens), -1).float()
            weight = next(one for name, one in module.named_parameters() if name.endswith("weight"))
            logits = hidden @ weight.float().T
            bias = getattr(module, "e_score_correction_bias", None)
            scores[layer] = (logits if bias is None else logits.sigmoid() + bias).tolist()
            if type(module).__name__ == "Llama4Router":
                ids[layer] = logits.topk(module.top_k, dim=-1).indices.tolist()

        return hook

    for name, module in model.named_modules():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        if name.endswith(".experts"):
            module.register_forward_pre_hook(on_experts(layer))
        elif name.rsplit(".", 1)[-1] in ("gate", "router") and hasattr(module, "parameters"):
            module.register_forward_hook(on_router(layer))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return {"layers": ids, "scores": {layer: scores[layer] for layer in ids if layer in scores}}


def main() -> int:
    what, work, llama_cpp = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder = Path(what)
    if what in ARCHITECTURES:
        folder = work / "hf"
        make(what, folder, work / "tokenizer")
        convert(folder, work / "model.gguf", llama_cpp)
    found = choices(folder, json.loads((work / "tokens.json").read_text()))
    (work / "choices.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
