"""Finds PyTorch without importing it: its folder is printed, or nothing if there is none.

The build needs its headers and libraries only. pip builds in an environment of its own, in which
the PyTorch that is installed beside it cannot be imported; but it can be found, and then need not
be downloaded (gigabytes, where it comes with CUDA) to be thrown away after the build.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sys
import sysconfig
from pathlib import Path

OLDEST = (2, 10)


def version(folder: Path) -> tuple[int, ...]:
    """As (2, 13), or () if this is not a PyTorch that can be built against."""
    file = folder / "version.py"
    if not file.is_file() or not (folder / "include/torch/csrc/stable/library.h").is_file():
        return ()
    found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", file.read_text(encoding="utf-8"))
    return (int(found[1]), int(found[2])) if found else ()


def find_torch() -> Path | None:
    folders = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(place) for place in spec.submodule_search_locations]
    places = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    places += site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # Not in a virtual environment.
        places.append(site.getusersitepackages())
    folders += [Path(place) / "torch" for place in places]
    return next((folder for folder in folders if version(folder) >= OLDEST), None)


if __name__ == "__main__":
    print(find_torch() or "")
