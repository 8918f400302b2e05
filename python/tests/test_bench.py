"""The GPU benchmark's parts that run anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "train_gpt_gpu.py"


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [
        sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--normalised", "on",
        "--output", str(output),
    ]  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    (row,) = found["attention"]
    assert row["correct"] and row["ratios"].keys() >= {"over flash forward"}
    assert len(found["overhead_us"]) == 6
    (training,) = found["training"]
    assert len(training["blocks"]) == 2 and len(training["keys_kept_after"]) == 2
    bits = training["blocks"][-1]["bits_per_byte"]
    # Both models start from the same weights and see the same text.
    assert abs(bits["sdpa"] - bits["alpha 1.5"]) < 0.1
