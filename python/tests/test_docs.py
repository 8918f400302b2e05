"""The documentation: examples run, and the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/python/index.md"])
def test_the_first_example(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    # Shorter sequences: it is not the speed that is tested.
    exec(compile(found[1].replace("4096", "256"), page, "exec"), {})


def test_the_site_builds(tmp_path: Path) -> None:
    for module in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site/python/api/functions/index.html").read_text(encoding="utf-8")
    assert "attention_varlen" in page
    # A saved result outside docs/ is part of the site.
    assert list((tmp_path / "site/repository/lab/results").glob("gpu-*.html"))
