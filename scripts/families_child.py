"""The half of families.py that needs torch and transformers: a tiny random checkpoint of a family, made by
transformers' own class (or by families_by_hand.py), converted by llama.cpp's own converter, and its logits.

usage: python scripts/families_child.py FAMILY WORK LLAMA_CPP TOKENIZER

TOKENIZER is a folder with the tokenizer's files. Writes WORK/hf, WORK/model.gguf (float32), WORK/tokens.json (ids) and
WORK/logits.npy, float32[n_tokens, n_vocab].
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import families_by_hand
from scripts.families_by_hand import BY_HAND, Reference
from scripts.families_list import FAMILIES, N_TOKENS, SHAPE, Family


def padded(n_tokens: int) -> int:
    """The next multiple of 64."""
    return -(-n_tokens // 64) * 64


def vocabulary(folder: Path) -> dict[str, int]:
    """Its size, padded to a multiple of 64 as published models with Mamba layers are (the converter relies on it), and
    the ids of the tokens that begin and end a text.
    """
    if not (folder / "tokenizer.json").exists():
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return {
            "vocab_size": padded(model.vocab_size()),
            "bos_token_id": model.bos_id(),
            "eos_token_id": model.eos_id(),
        }
    found = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(found["model"]["vocab"]) | {token["content"]: token["id"] for token in found["added_tokens"]}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {key: settings.get(key) for key in ("bos_token", "eos_token")}
    texts = {key: name["content"] if isinstance(name, dict) else name for key, name in names.items()}
    last = max(ids.values())
    return {"vocab_size": padded(last + 1)} | {f"{key}_id": ids.get(text, last) for key, text in texts.items()}


def _add_tokens(path: Path, texts: Sequence[str]) -> None:
    """Adds control tokens to a tokenizer."""
    found = json.loads(path.read_text())
    at = max([*found["model"]["vocab"].values(), *(token["id"] for token in found["added_tokens"])]) + 1
    for number, text in enumerate(texts, at):
        shape = found["added_tokens"][-1] | {"id": number, "content": text, "special": True}
        found["added_tokens"].append(shape)
    path.write_text(json.dumps(found))


def _show_ranks(folder: Path, vocab_size: int) -> None:
    """Makes the tokenizer a program of the checkpoint's own that shows the ranks of its tokens, as Hunyuan's is.
    Only of the first ones: the converter takes a minute for all."""
    (folder / "tokenization_ranked.py").write_text(
        f"""from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


class RankedTokenizer(PreTrainedTokenizerFast):
    vocab_size = {vocab_size}

    @property
    def special_tokens(self):
        return self.get_added_vocab()

    @property
    def mergeable_ranks(self):
        bytes_of = {{text: byte for byte, text in bytes_to_unicode().items()}}
        plain = {{text: rank for text, rank in self.get_vocab().items() if rank < 8000}}
        return {{bytes(bytes_of[text] for text in token): rank for token, rank in plain.items()}}
"""
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_ranked.RankedTokenizer"]}
    settings["tokenizer_class"] = "RankedTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges", "special", "added")):
            shutil.copy(file, folder / file.name)


def make(family: Family, folder: Path) -> None:
    """Writes a random checkpoint; the same one every time. Embeddings are wide, as in trained models: what a layer adds
    must not drown what it was given, or every token is a tie."""
    import torch
    import transformers

    torch.manual_seed(1)
    if family.tokens:
        _add_tokens(folder / "tokenizer.json", family.tokens)
    config = transformers.AutoConfig.for_model(family.kind, **{**SHAPE, **vocabulary(folder), **family.config})
    if family.shows_ranks:
        _show_ranks(folder, config.vocab_size)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point():
                continue
            if "e_score_correction_bias" in name or "expert_bias" in name:
                value.normal_(0, 0.1)
            elif "norm" in name and value.ndim == 1:
                value.normal_(1, 0.1)
            elif "embed" in name or "wte" in name:
                value.normal_(0, family.embedding_std)
            elif value.ndim >= 2 and not any(part in name for part in ("conv", "rotary", "slope", "decay")):
                value.normal_(0, 0.06)
    for (
        module
    ) in model.modules():  # MiniMax-Text-01's are not in published checkpoints: made anew from the configuration
        module._non_persistent_buffers_set |= {
            name for name in module._buffers if name.endswith(("_decay", "slope_rate"))
        }
    model.save_pretrained(folder, max_shard_size="100MB")
    if family.published:
        saved = folder / "config.json"
        saved.write_text(json.dumps(json.loads(saved.read_text()) | dict(family.published)))


def convert(folder: Path, out: Path, llama_cpp: Path, *, is_without_mtp: bool) -> None:
    """Converts with llama.cpp's own converter.

    Raises:
        SystemExit: it cannot, with its last line.
    """
    command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", out]
    if is_without_mtp:
        command.append("--no-nextn")  # as `moelocal convert` does: transformers makes no layers for a second token
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"converter: {done.stderr.strip().splitlines()[-1]}")


def alter_phi() -> None:
    """Makes transformers' Phi-3.5-MoE compute as llama.cpp does: the best experts of one softmax in place of
    SparseMixer, their weights made to add up to one; and norms that leave the mean in (RMS) in place of LayerNorm."""
    import torch
    from transformers.models.phimoe import modeling_phimoe

    def best(scores: Any, jitter_eps: float, training: bool, top_k: int = 2) -> tuple[Any, Any]:
        weights, experts = torch.softmax(scores.float(), dim=-1).topk(top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), experts

    def rms(self: Any, x: Any) -> Any:
        scale = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return x * scale * self.weight + self.bias

    modeling_phimoe.sparsemixer = best
    torch.nn.LayerNorm.forward = rms


def logits(family: Family, folder: Path) -> tuple[list[int], Any]:
    """Random tokens, and what transformers makes of them in float32: float32[n_tokens, n_vocab]."""
    import torch
    import transformers

    if family.is_altered:
        alter_phi()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    noise = torch.Generator().manual_seed(2)
    tokens = torch.randint(300, 1900, (1, N_TOKENS), generator=noise)
    with torch.no_grad():
        return tokens[0].tolist(), model(tokens, use_cache=False).logits[0].float().numpy()


def main() -> int:
    import numpy as np

    kind, work, llama_cpp, tokenizer = sys.argv[1], *map(Path, sys.argv[2:5])
    folder = work / "hf"
    _copy_tokenizer(tokenizer, folder)
    by_hand = BY_HAND.get(kind)
    if by_hand:
        families_by_hand.make(by_hand, folder, vocabulary(folder))
    else:
        make(FAMILIES[kind], folder)
    convert(folder, work / "model.gguf", llama_cpp, is_without_mtp=not by_hand and FAMILIES[kind].is_without_mtp)
    tokens, found = Reference(by_hand, folder).logits() if by_hand else logits(FAMILIES[kind], folder)
    (work / "tokens.json").write_text(json.dumps(tokens))
    np.save(work / "logits.npy", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
