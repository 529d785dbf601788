"""What needs torch and transformers in tests/build/test_convert_torch.py, in a process of its own.

A tiny random Qwen3-MoE checkpoint in bfloat16, made by transformers' own class, with a byte-level BPE tokenizer that is
trained here, and its logits in float32.

usage: python torch_child.py FOLDER OUT.npz N_LAYERS N_SHARDS

Writes the checkpoint to FOLDER, and to OUT what transformers makes of `PROBE`: `tokens` int64[n], `logits`
float32[n, n_vocab].
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parents[2] / "moelocal/model/demo/demo.txt"
PROBE = (
    "Once upon a time there was a shy owl named Mia, who'd counted 1234 stars; \n\n  then "
    "<|im_start|>user\nWie heißt die Straße?  Größe: 3.14 — naïve café 東京 🦉<|im_end|>\n"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Source: https://huggingface.co/Qwen/Qwen2-7B, tokenizer.json (pre_tokenizer); llama.cpp calls it qwen2.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer() -> Any:
    """A tokenizer like Qwen's, with 1,024 tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    bpe.train([str(TEXT)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=TEMPLATE
    )


def make_model(n_layers: int, n_vocab: int) -> Any:
    """Random weights, the same ones every time. Embeddings are wide, as in trained models: what a layer adds must not
    drown what it was given, or every token is a tie."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=n_vocab, hidden_size=256, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=512, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"), pad_token_id=SPECIAL.index("<|endoftext|>"),
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.normal_(1, 0.1)
            else:
                value.normal_(0, 1.0 if "embed" in name else 0.06)
    return model.to(torch.bfloat16)


def main() -> int:
    import numpy as np
    import torch
    import transformers

    folder, out, n_layers, n_shards = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    model = make_model(n_layers, len(tokenizer))
    n_bytes = sum(2 * value.numel() for value in model.parameters())
    model.save_pretrained(folder, max_shard_size=n_bytes * 11 // 10 // n_shards)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits[0]
    np.savez(out, tokens=tokens[0].numpy(), logits=logits.numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main())
