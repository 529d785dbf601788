"""`moelocal prune` as people use it: the real command in a process of its own, good input and bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelocal.model.header import read_header
from tests.cli.test_run import QUICK, refused, run

STORY = "Once upon a time there was a little wolf named Mia. The capital of France is Paris. The sum of 3 and 4 is 7.\n"


def text_file(folder: Path) -> str:
    (folder / "text.txt").write_text(STORY * 60)
    return str(folder / "text.txt")


def test_the_result_is_usable_by_its_name(tmp_path: Path, home: Path) -> None:
    done = run("prune", "demo", "--keep", "75%", "--text", text_file(tmp_path), "--eval", text_file(tmp_path), *QUICK)
    made = Path(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0 and made.parent == home / "models"
    for told in ("12 of 16 experts", "by impact", "KL"):
        assert told in done.stdout + done.stderr
    assert read_header(made).metadata["llama.expert_count"] == 12
    assert run("run", made.name.removesuffix(".gguf"), "Hello", "--max-tokens", "3", *QUICK).returncode == 0
    refused(
        run("prune", "demo", "--keep", "75%", "--text", text_file(tmp_path), *QUICK), 2, "exists already", "--force"
    )


def test_json_and_dry_run(tmp_path: Path, home: Path) -> None:
    done = run("prune", "demo", "--size", "10MiB", "--text", text_file(tmp_path), "--dry-run", "--json", *QUICK)
    document = json.loads(done.stdout)
    assert document["bytes_out"] <= 10 << 20 < document["bytes_in"]
    assert not (home / "models").exists()


def test_too_little_text_is_told(tmp_path: Path, home: Path) -> None:
    (tmp_path / "short.txt").write_text(STORY * 10)
    short = run("prune", "demo", "--keep", "75%", "--text", str(tmp_path / "short.txt"), "--dry-run", *QUICK)
    assert short.returncode == 0 and "partly chance" in short.stderr and "800 tokens or more" in short.stderr
    enough = run("prune", "demo", "--keep", "75%", "--text", text_file(tmp_path), "--dry-run", *QUICK)
    assert "partly chance" not in enough.stderr and "built-in" not in enough.stderr
    none = run("prune", "demo", "--keep", "75%", "--dry-run", *QUICK)
    assert none.returncode == 0 and "built-in passages" in none.stderr and "--text FILE" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--keep", "5%"), "needs 2"),
        (("--keep", "100%"), "drop nothing"),
        (("--keep", "0"), "--keep"),
        (("--keep", "many"), "--keep"),
        (("--size", "1MiB"), "MiB"),
        (("--keep", "75%", "--size", "10MiB"), "--size"),
        ((), "--keep"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run("prune", "demo", "--text", text_file(tmp_path), *arguments, *QUICK)
    refused(done, done.returncode, told)
    assert done.returncode in (1, 2)
