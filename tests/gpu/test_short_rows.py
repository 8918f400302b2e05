"""Rows of up to 512 keys: every kernel form at the ends of its range."""

import math

import pytest

torch = pytest.importorskip("torch")

from cases import compare, make, run

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 90, 95, 96, 97, 112, 128, 129, 160, 300, 511, 512])
def test_lengths(library, n, size, dtype):
    for settings in (dict(causal=True), {}, dict(causal=True, alpha=2.0)):
        call = make(batch=2, heads=3, queries=n, size=size, dtype=dtype, **settings)
        compare(run(library, call), call)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("window", [(40, -1), (64, -1), (65, -1), (66, -1), (30, 35), (97, -1),
                                    (200, 10), (481, -1)])
def test_windows(library, size, window):
    """A strip of 16 rows sees at most so many keys, wherever it starts."""
    call = make(queries=700, size=size, window=window, causal=window[1] < 0)
    compare(run(library, call), call)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("n", [90, 200, 512])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_output_is_that_of_inference(library, n, size, dtype, bad):
    """With a backward pass to come two results are made together; the first has the same bits."""
    for std in (1.0, 0.05):
        call = make(batch=2, heads=3, queries=n, size=size, dtype=dtype, std=std, causal=True)
        if bad is not None:
            call["value"][0, 1, n // 3, 5] = bad
        training = run(library, call)
        inference = run(library, call, backward=False)
        for name in ("output", "threshold"):
            got, want = getattr(training, name), getattr(inference, name)
            nan = torch.isnan(want)
            assert torch.equal(torch.isnan(got), nan), name
            assert torch.equal(got[~nan], want[~nan]), name
        if bad is not None:
            wrong = ~torch.isfinite(training.output)
            assert wrong[0, 1, n // 3:, 5].any()
            wrong[0, 1, n // 3:, 5] = False
            assert not wrong.any()
