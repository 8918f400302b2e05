"""The examples run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    # One thread, so that other programs on the machine do not slow it down more than their share.
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_classification() -> None:
    lines = run("classification.py", "--steps", "150").splitlines()
    assert len(lines) == 3
    for line, classes in zip(lines, (10.0, 5.0, 5.0), strict=True):
        assert float(line.split("accuracy ")[1].split(",")[0]) >= 0.9
        assert float(line.split(", ")[1].split()[0]) <= classes


@pytest.mark.parametrize("attention", ["entmax", "softmax"])
def test_gpt(attention: str) -> None:
    output = run("gpt.py", "--attention", attention, "--steps", "60", "--length", "64")
    assert float(output.split("bits a byte after")[0].split()[-1]) <= 6.0


def test_attention_maps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "maps.png"
    assert "alpha 2" in run("attention_maps.py", str(picture))
    assert picture.stat().st_size > 10_000
