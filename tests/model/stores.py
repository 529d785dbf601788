"""Made-up places where models are kept: a Hugging Face cache, Ollama's store, LM Studio's folders."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.gguf_bytes import Tensor, gguf_bytes, write_shards

F32 = 0


def tiny_model(name: str = "Tiny", seed: int = 0, file_type: int = 15) -> bytes:
    """A small MoE file that passes for one; `seed` makes its bytes its own."""
    metadata: dict[str, object] = {
        "general.architecture": "qwen3moe",
        "general.name": name,
        "general.file_type": file_type,
        "general.license": "apache-2.0",
        "test.seed": seed,
        "qwen3moe.block_count": 1,
        "qwen3moe.context_length": 4096,
        "qwen3moe.embedding_length": 32,
        "qwen3moe.attention.head_count": 1,
        "qwen3moe.attention.key_length": 32,
        "qwen3moe.attention.value_length": 32,
        "qwen3moe.expert_count": 4,
        "qwen3moe.expert_used_count": 2,
        "tokenizer.chat_template": "{% if tools %}{{ tools }}{% endif %}<think>{{ messages }}</think>",
    }
    return gguf_bytes(metadata, _TENSORS)


_TENSORS: list[Tensor] = [
    ("token_embd.weight", (32, 64), F32),
    ("output.weight", (32, 64), F32),
    ("blk.0.attn_q.weight", (32, 32), F32),
    ("blk.0.attn_k.weight", (32, 32), F32),
    ("blk.0.attn_v.weight", (32, 32), F32),
    ("blk.0.attn_output.weight", (32, 32), F32),
    ("blk.0.ffn_gate_inp.weight", (32, 4), F32),
    ("blk.0.ffn_gate_exps.weight", (32, 64, 4), F32),
    ("blk.0.ffn_up_exps.weight", (32, 64, 4), F32),
    ("blk.0.ffn_down_exps.weight", (64, 32, 4), F32),
]


def shards(folder: Path, name: str) -> dict[str, bytes]:
    """A split model of three files."""
    parts = write_shards(
        folder, name, {"general.architecture": "qwen3moe"}, [_TENSORS[:2], _TENSORS[2:7], _TENSORS[7:]]
    )
    return {path.name: path.read_bytes() for path in parts}


class Places:
    """All of them, in one folder; the environment points there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub = folder / "hf" / "hub"
        self.ollama = folder / "ollama"
        self.lmstudio = folder / "home" / ".lmstudio" / "models"
        self.environment = {
            "HOME": str(folder / "home"),
            "HF_HOME": str(folder / "hf"),
            "OLLAMA_MODELS": str(self.ollama),
            "MOELOCAL_HOME": str(folder / "moelocal"),
        }
        (folder / "home").mkdir()

    def cached(self, repo: str, file: str, data: bytes, commit: str = "c0ffee", main: bool = True) -> Path:
        """A file of a repository in the Hugging Face cache: blob, link, and ref."""
        root = self.hub / ("models--" + repo.replace("/", "--"))
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(data)
        link = root / "snapshots" / commit / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if main:
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / "main").write_text(commit)
        return link

    def in_ollama(self, name: str, data: bytes, media: str = "application/vnd.ollama.image.model") -> Path:
        """A model of Ollama's: `host/owner/model/tag`."""
        digest = hashlib.sha256(data).hexdigest()
        blob = self.ollama / "blobs" / f"sha256-{digest}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        manifest = self.ollama / "manifests" / name
        manifest.parent.mkdir(parents=True, exist_ok=True)
        layers = [{"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}]
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
        return blob

    def in_lmstudio(self, repo: str, file: str, data: bytes) -> Path:
        """A model of LM Studio's."""
        path = self.lmstudio / repo / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def made(self, file: str, data: bytes) -> Path:
        """A model made here."""
        path = self.folder / "moelocal" / "models" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    found = Places(tmp_path)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return found
