from __future__ import annotations

import pytest

from moelocal.errors import BadRequest
from moelocal.model.quants import quant_in_name
from moelocal.model.reference import is_repo, is_safe, parse_reference
from moelocal.model.stored import is_model, models_among


@pytest.mark.parametrize(
    ("text", "repo", "quant", "file"),
    [
        ("qwen3-30b-a3b", "unsloth/Qwen3-30B-A3B-GGUF", "", ""),
        ("Qwen3-30B-A3B:q4_k_m", "unsloth/Qwen3-30B-A3B-GGUF", "q4_k_m", ""),
        ("owner/repo", "owner/repo", "", ""),
        ("owner/repo:UD-Q4_K_XL", "owner/repo", "UD-Q4_K_XL", ""),
        ("owner/repo/a.gguf", "owner/repo", "", "a.gguf"),
        ("owner/repo/Q4_K_M/a-00001-of-00002.gguf", "owner/repo", "", "Q4_K_M/a-00001-of-00002.gguf"),
        ("hf.co/owner/repo:Q8_0", "owner/repo", "Q8_0", ""),
        ("https://huggingface.co/owner/repo", "owner/repo", "", ""),
        ("https://huggingface.co/owner/repo/tree/main", "owner/repo", "", ""),
        ("https://huggingface.co/owner/repo/blob/main/a.gguf?download=true", "owner/repo", "", "a.gguf"),
        ("https://huggingface.co/owner/repo/blob/main/a%20b/c%2Bd.gguf", "owner/repo", "", "a b/c+d.gguf"),
        ("https://mirror.example/hf/owner/repo/blob/main/a.gguf", "owner/repo", "", "a.gguf"),
        ("mirror.example/hf/owner/repo", "owner/repo", "", ""),
        ("gpt-oss:20b", "", "20b", ""),
    ],
)
def test_references(text: str, repo: str, quant: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf/")
    found = parse_reference(text)
    assert found is not None
    assert (found.repo, found.quant, found.file) == (repo, quant, file)


@pytest.mark.parametrize("part", ["tree/other", "blob/other/a.gguf", "resolve/refs%2Fpr%2F1/a.gguf"])
def test_only_main_is_taken(part: str) -> None:
    with pytest.raises(BadRequest, match="only main") as caught:
        parse_reference(f"https://huggingface.co/owner/repo/{part}")
    assert caught.value.hint.endswith("moelocal pull owner/repo")


def test_a_repository_of_the_catalog_is_known() -> None:
    found = parse_reference("unsloth/qwen3-30b-a3b-gguf")
    assert found is not None and found.entry is not None and found.entry.name == "qwen3-30b-a3b"


@pytest.mark.parametrize(
    "text", ["", "/a/b.gguf", "../a/b.gguf", "a b", "a//b", "owner/repo/folder", "o/r:a b", "o/r:"]
)
def test_what_can_only_be_a_path(text: str) -> None:
    found = parse_reference(text)
    assert found is None or (text == "o/r:" and not found.quant)


@pytest.mark.parametrize(
    "text",
    [
        "https://hf.co/o/r/blob/main/%2e%2e/a.gguf",
        "o/r/../a.gguf",
        "o/r/a/../../../b.gguf",
        "o/r/..\\a.gguf",
        "o/r/a:b.gguf",
        "o/r/./a.gguf",
    ],
)
def test_no_file_outside_of_its_repository(text: str) -> None:
    with pytest.raises(BadRequest, match="leads out"):
        parse_reference(text)


def test_names_that_the_hub_would_refuse() -> None:
    assert is_repo("Qwen/Qwen3-30B-A3B-GGUF") and is_repo("01-ai/Yi_1.5")
    for name in ("a", "a/b/c", "a/../b", "a--b/c", "-a/b", "a/.b", "a/b.", "a/" + "b" * 100, "a/b.git", "ä/b"):
        assert not is_repo(name), name


def test_files_that_are_no_safe_names() -> None:
    assert is_safe("Q4_K_M/a b.gguf") and is_safe("x" * 255 + "/ü" * 300)
    long = ("x" * 300, "ü" * 128 + "/m", "x/" * 500)
    for name in ("", "/a", "a//b", "../a", "a/..", "a\0b", "a\nb", "C:a", "a\\b", "a/. ./b", "\ud800m", *long):
        assert not is_safe(name), name


@pytest.mark.parametrize(
    ("file", "quant"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("model.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("olmoe-fp16.gguf", "F16"),
        ("model-q8_0_imat.gguf", "Q8_0"),
        ("Foo-F16-Q4_0.gguf", "Q4_0"),
        ("Qwen3-30B-A3B.gguf", ""),
        ("granite-h-1b.gguf", ""),
    ],
)
def test_quantizations_in_names(file: str, quant: str) -> None:
    assert quant_in_name(file) == quant


def test_what_is_no_model() -> None:
    for name in (
        "mmproj-F16.gguf",
        "sub/model-mmproj-f16.gguf",
        "imatrix.gguf",
        "X-imatrix.gguf",
        "README.md",
        "a.gguf.part",
    ):
        assert not is_model(name), name
    for name in ("a.gguf", "A.GGUF", "x-imatrix-Q4_K_M.gguf", "emmprojector.gguf"):
        assert is_model(name), name


def test_shards_are_one_model_if_all_are_there() -> None:
    whole, halves = models_among(
        ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "a.gguf", "c-00002-of-00003.gguf", "d-00001-of-00001.gguf"]
    )
    assert whole == [
        ("a.gguf",), ("b-00001-of-00002.gguf", "b-00002-of-00002.gguf"), ("d-00001-of-00001.gguf",)
    ]  # fmt: skip
    assert [half.missing for half in halves] == [("c-00001-of-00003.gguf", "c-00003-of-00003.gguf")]
    assert models_among(["e-00001-of-99999.gguf"]) == ([], [])
