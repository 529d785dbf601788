"""MoE families, each as a configuration of transformers' own class: what scripts/families.py tries."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

N_TOKENS = 48
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
_MLA = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
_DEEPSEEK = {
    **_MLA, "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
_QWEN_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_QWEN_MOE = {
    "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "head_dim": 64, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 256,
}  # fmt: skip
_GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>")
_THREE_SLIDING = [*["sliding_attention"] * 3, "full_attention"]


class Family(NamedTuple):
    """`kind` is transformers' model type, `tokenizer` which one the checkpoint gets. `published` is what
    config.json says in published checkpoints, where transformers saves it otherwise, in a way unknown to the converter.
    `embedding_std`: smaller where the embedding is the output too, else every token predicts itself alone.
    `shows_ranks`: the tokenizer is a program of the checkpoint's own, as the converter expects.
    `is_altered`: transformers' model is changed to what llama.cpp computes, see `alter_phi`.
    """

    name: str
    kind: str
    tokenizer: str
    config: dict[str, Any]
    is_without_mtp: bool = False
    published: Mapping[str, Any] = MappingProxyType({})
    tokens: tuple[str, ...] = ()  # added to the tokenizer: the converter asks for them
    is_altered: bool = False
    embedding_std: float = 1.0
    shows_ranks: bool = False

    @property
    def key(self) -> str:
        """What it is called on the command line."""
        return f"{self.kind}-altered" if self.is_altered else self.kind


PHI = Family("Phi-3.5-MoE", "phimoe", "sentencepiece", {
    "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 2047,
    "attention_bias": True, "lm_head_bias": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": 2048,
    },
}, published={"architectures": ["PhiMoEForCausalLM"]})  # fmt: skip
FAMILIES = {
    family.key: family
    for family in (
        Family("Mixtral", "mixtral", "sentencepiece", {
            "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
        }),
        Family("Qwen2-MoE", "qwen2_moe", "qwen3", {**_QWEN_MOE, "norm_topk_prob": False}),
        Family("Qwen3-MoE", "qwen3_moe", "qwen3", _QWEN_MOE),
        Family("Qwen3-Next", "qwen3_next", "qwen3", {**_QWEN_MOE, **_QWEN_LINEAR}, True),
        Family("Qwen3.5-MoE", "qwen3_5_moe_text", "qwen3", {**_QWEN_MOE, **_QWEN_LINEAR}, True),
        Family("DeepSeek-V2", "deepseek_v2", "deepseek_v3", {
            **_DEEPSEEK, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        }),
        Family("DeepSeek-V3, Kimi-K2", "deepseek_v3", "deepseek_v3", {
            **_DEEPSEEK, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        }),
        Family("OLMoE", "olmoe", "qwen3", {
            "intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False,
            "num_key_value_heads": 4,
        }),
        Family("FlexOlmo", "flex_olmo", "qwen3", {
            "intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False,
            "num_key_value_heads": 4,
        }),
        Family("Granite MoE", "granitemoe", "qwen3", {
            "intermediate_size": 256, "num_local_experts": 10, "num_experts_per_tok": 2, "attention_multiplier": 0.125,
        }),
        Family("Granite MoE shared", "granitemoeshared", "qwen3", {
            "intermediate_size": 256, "shared_intermediate_size": 256, "num_local_experts": 10,
            "num_experts_per_tok": 2, "attention_multiplier": 0.125,
        }),
        Family("Granite hybrid MoE", "granitemoehybrid", "qwen3", {
            "intermediate_size": 256, "shared_intermediate_size": 256, "num_local_experts": 10,
            "num_experts_per_tok": 2, "attention_multiplier": 0.125, "position_embedding_type": "nope",
            "layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 64,
            "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_conv": 4,
        }, published={"layer_types": ["mamba", "mamba", "attention", "mamba"]}),
        PHI,
        PHI._replace(name="Phi-3.5-MoE, altered", is_altered=True),
        Family("gpt-oss", "gpt_oss", "gptoss", {
            "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64,
            "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2,
        }),
        Family("GLM-4-MoE", "glm4_moe", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 16, "num_experts_per_tok": 4,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 64, "n_group": 1, "topk_group": 1,
            "norm_topk_prob": True, "num_nextn_predict_layers": 0,
        }, tokens=_GLM),
        Family("GLM-4.7-Flash", "glm4_moe_lite", "qwen3", {
            **_DEEPSEEK, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "n_group": 1, "topk_group": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 1.8, "num_nextn_predict_layers": 0,
        }, tokens=_GLM, published={"scoring_func": "sigmoid"}),
        Family("DBRX", "dbrx", "gptoss", {
            "d_model": 256, "n_heads": 4, "n_layers": 4, "max_seq_len": 2048,
            "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 8, "moe_top_k": 2, "moe_loss_weight": 0.0},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        }),
        Family("Llama 4", "llama4_text", "llama3_1", {
            "intermediate_size": 256, "intermediate_size_mlp": 512, "num_local_experts": 8, "num_experts_per_tok": 1,
            "head_dim": 64, "interleave_moe_layer_step": 1, "no_rope_layers": [1, 1, 1, 0],
            "attention_chunk_size": 2048,
        }),
        Family("ERNIE 4.5 MoE", "ernie4_5_moe", "sentencepiece", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "moe_num_experts": 8, "moe_k": 2,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 3,
            "moe_layer_interval": 1, "head_dim": 64,
        }),
        Family("LFM2-MoE", "lfm2_moe", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
            "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention", "conv"], "norm_topk_prob": True,
            "use_expert_bias": True, "tie_word_embeddings": True,
        }, embedding_std=0.03),
        Family("MiniMax-M2", "minimax_m2", "qwen3", {
            "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64,
            "rotary_dim": 32,
        }, published={"scoring_func": "sigmoid"}),
        Family("MiniMax-Text-01", "minimax", "qwen3", {
            "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64,
            "layer_types": [*["linear_attention"] * 7, "full_attention"], "num_hidden_layers": 8, "block_size": 32,
            **{f"{part}_alpha_factor": 3.5 for part in ("full_attn", "linear_attn", "mlp")},
        }, published={
            "architectures": ["MiniMaxText01ForCausalLM"], "rotary_dim": 64,
            **{f"layernorm_{part}_alpha": 3.5 for part in ("full_attention", "linear_attention", "mlp")},
            **{f"layernorm_{part}_beta": 1.0 for part in ("full_attention", "linear_attention", "mlp")},
        }),
        Family("Hunyuan-A13B", "hunyuan_v1_moe", "qwen3", {
            "intermediate_size": 256, "moe_intermediate_size": [256] * 4, "num_experts": 8, "moe_topk": [2] * 4,
            "num_shared_expert": [1] * 4, "head_dim": 64, "use_mixed_mlp_moe": True,
        }, shows_ranks=True),
        Family("Hy3", "hy_v3", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
            "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "head_dim": 64,
            "router_scaling_factor": 2.5,
        }, published={"first_k_dense_replace": 1}),
        Family("dots1", "dots1", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 64, "n_group": 1, "topk_group": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": None, "num_key_value_heads": 4,
        }, published={"scoring_func": "sigmoid"}),
        Family("JetMoE", "jetmoe", "sentencepiece", {
            "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 64,
        }),
        Family("Jamba", "jamba", "sentencepiece", {
            "intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "attn_layer_period": 2,
            "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 16, "use_mamba_kernels": False,
        }),
        Family("AFMoE", "afmoe", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
            "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 64, "sliding_window": 32,
            "layer_types": _THREE_SLIDING, "route_scale": 2.5, "mup_enabled": True,
        }, published={"route_norm": True}),
        Family("EXAONE MoE", "exaone_moe", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
            "num_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 64, "n_group": 1, "topk_group": 1,
            "sliding_window": 32, "layer_types": _THREE_SLIDING,
        }, published={"scoring_func": "sigmoid"}),
        Family("Gemma 4 MoE", "gemma4_text", "gemma3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 8, "top_k_experts": 2,
            "enable_moe_block": True, "head_dim": 64, "global_head_dim": 128, "num_global_key_value_heads": 1,
            "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 32,
            "layer_types": _THREE_SLIDING, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
            "vocab_size": 262145,
        }, embedding_std=0.06),
        Family("Mellum 2", "mellum", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
            "head_dim": 64, "sliding_window": 32, "layer_types": _THREE_SLIDING, "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in sorted(set(_THREE_SLIDING))
            },
        }),
        Family("Nemotron-H MoE", "nemotron_h", "qwen3", {
            "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_shared_expert_intermediate_size": 256, "n_shared_experts": 1, "head_dim": 64,
            "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 64,
            "ssm_state_size": 32, "n_groups": 1, "conv_kernel": 4, "expand": 2, "n_group": 1, "topk_group": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        }),
    )
}  # fmt: skip
