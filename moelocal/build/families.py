"""MoE families that llama.cpp does not support, each with the reason."""

from __future__ import annotations

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


def unsupported_reason(architecture: str) -> str | None:
    """Why llama.cpp cannot run an architecture (a name as in `config.json`); None: nothing is known against it."""
    return _REASONS.get(architecture)
