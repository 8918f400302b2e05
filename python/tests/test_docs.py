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


def build_site(root: Path, site: Path) -> None:
    for module in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(site)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_site_builds(tmp_path: Path) -> None:
    build_site(ROOT, tmp_path)
    page = (tmp_path / "python/api/functions/index.html").read_text(encoding="utf-8")
    assert "attention_varlen" in page
    # A saved result outside docs/ is part of the site.
    assert list((tmp_path / "repository/lab/results").glob("gpu-*.html"))


def test_the_site_has_what_pages_link_to_outside_docs(tmp_path: Path) -> None:
    files = {
        "mkdocs.yml": f"site_name: x\nnav: [index.md]\nhooks: [{ROOT / 'tools/site_links.py'}]\nplugins: []\n",
        "docs/index.md": "[report](../runs/a/report.html) [notes](../runs/a/README.md#end) [web](https://x.org/a)",
        "runs/a/README.md": "[start](../../docs/index.md) [report](report.html) [next](../b/README.md)\n\n# End",
        "runs/a/report.html": "the report",
        "runs/b/README.md": "[back](../a/README.md)",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    site = tmp_path / "site"
    build_site(tmp_path, site)

    def links(page: str) -> list[str]:
        text = (site / page / "index.html").read_text(encoding="utf-8")
        return re.findall(r'href="([^"]*)">(?:report|notes|web|start|next|back)<', text)

    assert (site / "repository/runs/a/report.html").read_text(encoding="utf-8") == "the report"
    assert links("") == ["repository/runs/a/report.html", "repository/runs/a/#end", "https://x.org/a"]
    assert links("repository/runs/a") == ["../../../", "report.html", "../b/"]
    assert links("repository/runs/b") == ["../a/"]
