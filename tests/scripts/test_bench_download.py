"""The comparison with `hf download`, once, on a small file: both end with the whole file, and a ratio comes out."""

import shutil
import sys
from pathlib import Path

import pytest

from scripts import bench_download as bench


@pytest.mark.skipif(not shutil.which("hf", path=str(Path(sys.executable).parent)), reason="hf is not installed")
def test_both_download_the_file(tmp_path: Path) -> None:
    ((ours, theirs),) = bench.measure(tmp_path, 8 << 20, 1, 0.0)
    assert ours > 0 and theirs > 0
