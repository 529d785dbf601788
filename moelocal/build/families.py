"""MoE families that llama.cpp does not support, each with the reason; and those whose configuration must say what
transformers 5 leaves out, or publishers say otherwise.

Source: llama.cpp 0c1e57098, conversion/base.py (TextModel.set_gguf_parameters), src/models/*.cpp (load_arch_hparams).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelocal.errors import BadRequest

_REASONS = {
    "JetMoeForCausalLM": "its attention heads are experts too, and llama.cpp has no graph for that",
    "FlexOlmoForCausalLM": "its norms come after the blocks, and llama.cpp has OLMoE with norms before them alone",
    "LongcatFlashForCausalLM": "its layers have two attentions each, and llama.cpp has no graph for that",
    "MiniMaxForCausalLM": "its converter knows these weights only under the names of MiniMaxAI/MiniMax-Text-01, not of "
    "MiniMax-Text-01-hf",
    "DogeForCausalLM": "its attention chooses its own mask, and llama.cpp has no graph for that",
    "ZayaForCausalLM": "its attention is a convolution of queries and keys too, and llama.cpp has no graph for that",
    "AriaForConditionalGeneration": "it reads pictures too, and llama.cpp has no graph for any part of it",
    "NllbMoeForConditionalGeneration": "it is an encoder-decoder with experts, and llama.cpp has T5 without",
    "SwitchTransformersForConditionalGeneration": "it is an encoder-decoder with experts, and llama.cpp has T5 without",
}
_SCORE_KEYS = (
    *("score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func"),
    "expert_selection_fn",
)
_SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
_MUST_SAY_SCORE = ("MiniMaxM2ForCausalLM", "Dots1ForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM")
_LEFT_OUT = {
    "DeepseekV3ForCausalLM": ("scoring_func", '"sigmoid"', "would take softmax for its router, not sigmoid"),
    "AfmoeForCausalLM": ("route_norm", "true", "would not make the weights of a token's experts add up to one"),
}


def unsupported_reason(architecture: str) -> str | None:
    """Why llama.cpp cannot run an architecture (a name as in `config.json`); None: nothing is known against it."""
    return _REASONS.get(architecture)


def check_router(architecture: str, config: Mapping[str, Any], called: str) -> None:
    """Looks whether config.json says how the router scores experts, where llama.cpp ends the process without.

    Args:
        called: the checkpoint, for messages.

    Raises:
        BadRequest: it does not, or in a word that the converter does not know.
    """
    said = next((config[key] for key in _SCORE_KEYS if config.get(key) is not None), None)
    if architecture not in _MUST_SAY_SCORE or said in _SCORES:
        return
    how = (
        "does not say how the router scores experts, and llama.cpp does not run this family without"
        if said is None
        else f"calls its router's scores {said!r:.40}, which llama.cpp's converter does not know"
    )
    raise BadRequest(
        f"config.json of {called} {how}.",
        'This family takes sigmoid: write "scoring_func": "sigmoid" in config.json of a copy on disk and convert it.',
    )


def remark_on(architecture: str, config: Mapping[str, Any]) -> str:
    """What config.json lacks though the converter takes it; '' for nothing."""
    key, value, then = _LEFT_OUT.get(architecture, ("", "", ""))
    if not key or key in config:
        return ""
    return (
        f"config.json does not have {key} (transformers 5 leaves it out), so llama.cpp {then}. If this model is like "
        f'the published ones of its family, add "{key}": {value} to config.json and convert again.'
    )
