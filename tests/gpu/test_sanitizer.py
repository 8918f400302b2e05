"""No kernel reads or writes where it should not, or what another thread is still writing.

compute-sanitizer comes with the CUDA toolkit; without it these tests are skipped.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer")
ERROR = 9  # what the tool is told to end with
SECONDS = 500

# racecheck does not follow the barriers that bulk copies complete (mbarrier), and reports what the
# kernels for 9.0 read behind them: docs/performance-log-gpu.md.
RUNS = [("memcheck", "short"), ("memcheck", "general"), ("memcheck", "screening"),
        ("racecheck", "short"), ("racecheck", "general")]


needs_tool = pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")


def sanitized(request, tool, group):
    # PyTorch's allocator would hand out parts of one block, beyond whose ends nothing is noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [TOOL, "--tool", tool, "--error-exitcode", str(ERROR), "--print-limit", "5", sys.executable,
         str(pathlib.Path(__file__).with_name("sanitized.py")),
         request.config.getoption("--library"), group],
        capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)


@needs_tool
@pytest.mark.parametrize("tool,group", RUNS)
def test_finds_nothing(request, tool, group):
    result = sanitized(request, tool, group)
    if result.returncode == 3 and group == "screening":
        pytest.skip("no kernels for compute capability 9.0 in this build or for this device")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"problems of {group}" in result.stdout


@needs_tool
def test_would_notice(request):
    assert sanitized(request, "memcheck", "faulty").returncode == ERROR
