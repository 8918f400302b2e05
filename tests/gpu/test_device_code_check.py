"""The compiler launcher that fails on spills; needs no GPU."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.host_only
SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "cmake/check_device_code.py"
ENTRY = "ptxas info    : Compiling entry function '{}' for 'sm_90'"
SPILL = "    8 bytes stack frame, {} bytes spill stores, {} bytes spill loads"


def check(tmp_path, *lines, code=0):
    """Runs the launcher over a command that says `lines`."""
    program = f"import sys; sys.stderr.write({chr(10).join(lines)!r}); sys.exit({code})"
    return subprocess.run([sys.executable, SCRIPT, sys.executable, "-c", program, "-o",
                           tmp_path / "object.o"], capture_output=True, text=True)


def test_clean(tmp_path):
    result = check(tmp_path, ENTRY.format("kernel"), SPILL.format(0, 0))
    assert result.returncode == 0 and result.stderr == ""
    assert "spill" in (tmp_path / "object.o.resources").read_text()


def test_spill(tmp_path):
    result = check(tmp_path, ENTRY.format("kernel"), SPILL.format(4, 8))
    assert result.returncode == 1 and "kernel spills registers" in result.stderr


def test_allowed_spill(tmp_path):
    result = check(tmp_path, ENTRY.format("_Z8RunAgainv"), SPILL.format(400, 800))
    assert result.returncode == 0


def test_serialised_products(tmp_path):
    result = check(tmp_path, "ptxas info    : (C7514) Potential Performance Loss: wgmma")
    assert result.returncode == 1 and "C7514" in result.stderr


def test_failing_compiler(tmp_path):
    result = check(tmp_path, "error: no such file", code=3)
    assert result.returncode == 3 and "no such file" in result.stderr
