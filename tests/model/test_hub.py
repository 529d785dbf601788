"""What a repository holds, and how the hub's refusals read."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from moelocal.errors import ModelNotFound
from moelocal.model.client import HubError, pause_s, unreachable
from moelocal.model.hub import HubFile, group, list_models, pick
from tests.hub_server import COMMIT, HubServer

REPO = "owner/Model-GGUF"


def files(*names: str) -> list[HubFile]:
    return [HubFile(name, 1000 + len(name), f"{i:064x}") for i, name in enumerate(names)]


def labels(*names: str) -> list[str]:
    return sorted(model.label for model in group(files(*names))[0])


def test_files_become_models_by_quantization() -> None:
    found, incomplete = group(
        files(
            "README.md",
            "Model-Q8_0.gguf",
            "Model-UD-Q4_K_XL.gguf",
            "Model.i1-IQ3_XS.gguf",
            "BF16/Model-BF16-00002-of-00002.gguf",
            "BF16/Model-BF16-00001-of-00002.gguf",
            "UD-Q2_K_XL/Model-00001-of-00002.gguf",
            "UD-Q2_K_XL/Model-00002-of-00002.gguf",
            "mmproj-F16.gguf",
            "Model.mmproj-Q8_0.gguf",
            "imatrix_unsloth.gguf_file",
            "Model-imatrix.gguf",
        )
    )
    assert sorted(model.label for model in found) == ["BF16", "IQ3_XS", "Q8_0", "UD-Q2_K_XL", "UD-Q4_K_XL"]
    split = next(model for model in found if model.label == "BF16")
    assert [file.path[-19:] for file in split.files] == ["-00001-of-00002.gguf"[1:], "-00002-of-00002.gguf"[1:]]
    assert incomplete == () and not split.is_cut


@pytest.mark.parametrize(
    "names",
    [
        ("m.Q6_K.gguf.part1of3", "m.Q6_K.gguf.part2of3", "m.Q6_K.gguf.part3of3"),
        ("m.Q6_K.gguf-split-a", "m.Q6_K.gguf-split-b", "m.Q6_K.gguf-split-c"),
        ("m.Q6_K.gguf-part-a", "m.Q6_K.gguf-part-b", "m.Q6_K.gguf-part-c"),
        ("m.Q6_K.gguf.part-00", "m.Q6_K.gguf.part-01", "m.Q6_K.gguf.part-02"),
    ],
)
def test_files_cut_into_pieces(names: tuple[str, ...]) -> None:
    (model,), incomplete = group(files(*reversed(names)))
    assert model.is_cut and model.label == "Q6_K" and tuple(file.path for file in model.files) == names
    assert not incomplete
    found, incomplete = group(files(*(names[:1] if names[0].endswith("00") else names[1:])))
    assert not found and incomplete == ("m.Q6_K",)


def test_split_models_that_lack_a_file() -> None:
    found, incomplete = group(files("m-Q4_0-00001-of-00003.gguf", "m-Q4_0-00003-of-00003.gguf"))
    assert not found and incomplete == ("m-Q4_0",)


@pytest.mark.parametrize(
    "name",
    [
        "../m-Q4_0.gguf",
        "/etc/m-Q4_0.gguf",
        "a/../../m-Q4_0.gguf",
        "a\\..\\m-Q4_0.gguf",
        "C:m-Q4_0.gguf",
        "a\nb.gguf",
        "x" * 300 + "-Q4_0.gguf",
        "\ud800-Q4_0.gguf",
    ],
)
def test_hostile_names_are_not_taken(name: str) -> None:
    assert labels(name, "good-Q4_0.gguf") == ["Q4_0"]


def test_two_models_of_one_quantization_go_by_their_files(hub: HubServer) -> None:
    hub.add(REPO, "a-Q4_0.gguf", b"1" * 10)
    hub.add(REPO, "b-Q4_0.gguf", b"2" * 20)
    listing = list_models(REPO)
    assert [model.label for model in listing.models] == ["a-Q4_0.gguf", "b-Q4_0.gguf"]
    with pytest.raises(ModelNotFound, match="2 models") as caught:
        pick(listing, "Q4_0")
    assert f"{REPO}/b-Q4_0.gguf" in caught.value.hint
    assert pick(listing, file="b-Q4_0.gguf").n_bytes == 20


def test_a_quantization_is_found_with_and_without_its_prefix(hub: HubServer) -> None:
    hub.add(REPO, "m-UD-Q4_K_M.gguf", b"1")
    hub.add(REPO, "m-UD-Q8_0.gguf", b"2")
    hub.add(REPO, "m-Q8_0.gguf", b"3")
    listing = list_models(REPO)
    assert pick(listing, "q4_k_m").label == "UD-Q4_K_M"
    assert pick(listing, "Q8_0").label == "Q8_0"
    with pytest.raises(ModelNotFound, match="Q5_K_M") as caught:
        pick(listing, "Q5_K_M")
    assert "UD-Q4_K_M" in caught.value.hint and "Q8_0" in caught.value.hint


def test_repositories_without_gguf(hub: HubServer) -> None:
    hub.add("owner/Model", "model.safetensors", b"1")
    hub.add("owner/notes", "README.md", b"1")
    hub.add("owner/half", "m-Q4_0-00001-of-00002.gguf", b"1")
    with pytest.raises(ModelNotFound) as caught:
        list_models("owner/Model")
    assert "moelocal convert owner/Model" in caught.value.hint
    with pytest.raises(ModelNotFound, match="no GGUF"):
        list_models("owner/notes")
    with pytest.raises(ModelNotFound, match="only a part"):
        list_models("owner/half")
    hub.add("owner/vision", "mmproj-F16.gguf", b"1")
    with pytest.raises(ModelNotFound, match=r"mmproj-F16.gguf' is left out, since .* projector"):
        list_models("owner/vision")
    hub.add("owner/odd", "../m-Q4_0.gguf", b"1")
    with pytest.raises(ModelNotFound, match="no file on a disk can be called so"):
        list_models("owner/odd")


def test_what_is_incomplete_there_is_called_so(hub: HubServer) -> None:
    hub.add(REPO, "m-Q8_0.gguf", b"1")
    hub.add(REPO, "m-Q4_0-00001-of-00002.gguf", b"2")
    listing = list_models(REPO)
    for quant, file in (("Q4_0", ""), ("", "m-Q4_0-00001-of-00002.gguf")):
        with pytest.raises(ModelNotFound, match="holds only a part of m-Q4_0"):
            pick(listing, quant, file)


def test_a_repository_of_the_catalog_that_is_not_there(hub: HubServer) -> None:
    with pytest.raises(ModelNotFound, match="no repository") as caught:
        list_models("unsloth/Qwen3-30B-A3B-GGUF")
    assert "Did you mean" not in caught.value.hint and "HF_ENDPOINT" in caught.value.hint


def test_refusals_in_plain_words(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, "m-Q4_0.gguf", b"1")
    with pytest.raises(ModelNotFound, match="no repository owner/other"):
        list_models("owner/other")
    expired = {"X-Error-Message": "Invalid credentials in Authorization header"}
    for token, status, headers, text in (
        ("", 403, {"X-Error-Code": "GatedRepo"}, "gated"),
        ("", 403, {}, "not let everybody"),
        ("", 401, expired, "not let everybody"),
        ("hf_some", 403, {}, "no right"),
        ("hf_some", 401, expired, "expired"),
        ("hf_some", 418, {}, "418"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        hub.faults.api_status = [(status, headers)]
        with pytest.raises(HubError, match=text) as caught:
            list_models(REPO)
        assert hub.endpoint in caught.value.hint and caught.value.status == status
    monkeypatch.delenv("HF_TOKEN")
    hub.token = "hf_right"
    with pytest.raises(ModelNotFound, match="or it is private"):
        list_models(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(HubError, match="expired"):
        list_models(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert len(list_models(REPO).models) == 1


def test_a_busy_hub_is_asked_again(hub: HubServer) -> None:
    hub.add(REPO, "m-Q4_0.gguf", b"1")
    hub.faults.api_status = [(429, {"Retry-After": "0"}), (503, {}), (500, {})]
    assert list_models(REPO).models and len(hub.requests) == 4
    hub.faults.api_status = [(429, {"Retry-After": "0"})] * 9
    with pytest.raises(HubError, match="too many requests"):
        list_models(REPO)
    hub.faults.api_status = [(502, {})] * 9
    with pytest.raises(HubError, match="502"):
        list_models(REPO)


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(HubError, match="cannot be reached"):
        list_models(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        list_models(REPO)


def test_listings_that_cannot_be(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, "m-Q4_0.gguf", b"1")
    with monkeypatch.context() as patched:
        patched.setattr("tests.hub_server.COMMIT", "../../elsewhere")
        with pytest.raises(HubError, match="does not answer like"):
            list_models(REPO)
    monkeypatch.setattr("tests.hub_server.Stored.size", 1 << 62)
    with pytest.raises(ModelNotFound, match="no model"):
        list_models(REPO)


@pytest.mark.parametrize(("told", "seconds", "is_said"), [("1", 1, False), ("5", 5, True), ("9000", 60, True)])
def test_a_long_wait_is_told(told: str, seconds: int, is_said: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert pause_s(0, {"Retry-After": told}) == seconds
    assert (f"asked again in {seconds} s" in caplog.text) is is_said


def test_pauses_grow_and_are_kept(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = [pause_s(attempt, {}) for attempt in range(8)]
    assert pauses == sorted(pauses) and pauses[3] == 8 * pauses[0] > 0 and pauses[-1] <= 60
    assert pause_s(0, {"RateLimit": '"api";r=0;t=2'}) == 2 and pause_s(0, {"RateLimit": "odd"}) == pauses[0]
    slept: list[float] = []
    monkeypatch.setattr("moelocal.model.client.time.sleep", slept.append)
    hub.add(REPO, "m-Q4_0.gguf", b"1")
    hub.faults.api_status = [(500, {}), (503, {}), (429, {"Retry-After": "7"})]
    assert list_models(REPO).models
    assert slept == [pauses[0], pauses[1], 7.0]


def answer(**more: object) -> bytes:
    """An answer of the hub with one file, of which something is otherwise."""
    lfs = {"sha256": "0" * 64, "size": 7, "pointerSize": 130}
    sibling = {"rfilename": "m-Q4_0.gguf", "size": 7, "blobId": "0" * 40, "lfs": lfs} | more
    siblings = [{key: value for key, value in sibling.items() if value is not ...}]
    return json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"<!doctype html><title>Welcome to our hotel</title>",
        b"",
        b"[]",
        b"null",
        b"{}",
        b"7",
        b'{"id": "\xff\xfe"}',
        b'{"id": ' + b"[" * 100_000,
        answer()[:40],
        answer(lfs=None, size="1000"),
        answer(lfs=None, size=10.5),
        answer(lfs=None, blobId=5),
        answer(rfilename=...),
        answer(rfilename=5),
        answer(lfs={"sha256": 5, "size": 7, "pointerSize": 1}),
        answer(lfs={"size": 7, "pointerSize": 1}),
        json.dumps({"id": REPO, "sha": COMMIT, "siblings": [5]}).encode(),
    ],
)
def test_an_answer_that_is_not_the_hubs(hub: HubServer, data: bytes) -> None:
    hub.faults.api_answer = data
    with pytest.raises(HubError, match="does not answer like the Hugging Face hub") as caught:
        list_models(REPO)
    assert caught.value.status == 0 and "login" in caught.value.hint and "HF_ENDPOINT" in caught.value.hint
    hub.faults.api_answer = answer()
    assert len(list_models(REPO).models) == 1


@pytest.mark.parametrize("status", [204, 302, 511])
def test_a_status_that_is_not_the_hubs(hub: HubServer, status: int) -> None:
    hub.faults.api_status = [(status, {})]
    with pytest.raises(HubError, match="does not answer like") as caught:
        list_models(REPO)
    assert caught.value.status == 0


def test_one_full_stop(hub: HubServer) -> None:
    error = unreachable(RuntimeError("Server disconnected without sending a response."))
    assert "response." in error.message and ".." not in error.message


def test_upper_and_lower_case_are_one_repository(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, "m-Q4_0.gguf", b"1")
    assert list_models(REPO.upper()).repo == REPO
    hub.faults.api_answer = answer().replace(f'"id": "{REPO}"'.encode(), b'"id": "x/renamed"')
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert list_models(REPO.upper()).repo == REPO.upper()
    (tmp_path / f"models--{REPO.replace('/', '--')}").mkdir()
    assert list_models(REPO.upper()).repo == REPO
