"""Rows of up to 512 keys: every kernel form at the ends of its range."""

import math

import pytest

torch = pytest.importorskip("torch")

import reference
from cases import GRADIENT_TOLERANCE, compare, generator, make, relative_error, run

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 90, 95, 96, 97, 112, 128, 129, 160, 300, 511, 512])
def test_lengths(library, n, size, dtype):
    for settings in (dict(causal=True), {}, dict(causal=True, alpha=2.0)):
        call = make(batch=2, heads=3, queries=n, size=size, dtype=dtype, **settings)
        compare(run(library, call), call)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
@pytest.mark.parametrize("n", [5, 90, 96, 97, 128, 130, 512, 700])
def test_slopes_and_factors(library, n, alpha, dtype):
    """Heads as the lab trains them: a slope, or a factor a row; without the slopes' gradient too."""
    slopes = torch.tensor([1.0, 0.5, 0.0, 0.0], device="cuda")
    factors = torch.ones(2, 4, n, device="cuda")
    factors[:, 2:] = 1.0 + torch.rand(2, 2, n, generator=generator(n), device="cuda")
    for causal in (True, False):
        call = make(batch=2, heads=4, queries=n, size=32, dtype=dtype, alpha=alpha, causal=causal,
                    slopes=slopes, query_scale=factors)
        for slope_gradient in (False, True):
            compare(run(library, call, engine="general", slope_gradient=slope_gradient), call)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("queries,keys", [(1, 1), (1, 144), (144, 1), (33, 90), (90, 33), (16, 96),
                                          (112, 112), (113, 128), (130, 130), (144, 144),
                                          (145, 144)])
def test_one_block_backward(library, queries, keys, dtype):
    """Up to 112 rows (144 under a causal mask) of up to 32 columns have a backward of their own."""
    lengths = torch.tensor([0, 1, keys // 2 + 1, keys], dtype=torch.int32, device="cuda")
    alpha = torch.tensor([1.5, 1.25, 2.0], device="cuda")
    for settings in (dict(causal=True), {}, dict(window=(20, 7)), dict(window=(0, 0)),
                     dict(key_lengths=lengths), dict(key_lengths=lengths, causal=True),
                     dict(alpha_per_head=alpha), dict(scale=0.0),
                     # Of one key the gradient of the slopes is 0: rounding, times distances.
                     dict(slopes=-0.1 * alpha) if keys > 1 else {},
                     dict(std=6.0, causal=True), dict(layout="gaps", causal=True),
                     dict(layout="bnhd", size=24, value_size=16), dict(size=7, value_size=29)):
        call = make(**{**dict(batch=4, heads=3, queries=queries, keys=keys, size=32, dtype=dtype),
                       **settings})
        compare(run(library, call), call)


def test_shared_keys_and_alpha_gradient_of_short_rows(library):
    """What that kernel does not do."""
    for settings in (dict(heads=4, kv_heads=2), dict(softcap=3.0), dict(alpha=1.3)):
        call = make(batch=2, queries=90, size=32, causal=True, **settings)
        compare(run(library, call, alpha_gradient="alpha" in settings), call)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("where", ["query", "key", "value", "output_gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_beside_bad_numbers(library, where, bad, dtype):
    """A bad number at row 40 of one head reaches what depends on it, and nothing else."""
    call = make(batch=2, heads=3, queries=90, size=32, dtype=dtype, causal=True)
    want = reference.attention(call)
    clean = run(library, call)
    call[where][1, 2, 40, 3] = bad
    dirty = run(library, call)
    beside = torch.ones(2, 3, dtype=torch.bool, device="cuda")
    beside[1, 2] = False
    for got, same in zip(dirty.gradients, clean.gradients):
        assert torch.equal(got[beside], same[beside])
    of_query, of_key, of_value = (torch.isfinite(g[1, 2]).all(-1) for g in dirty.gradients)
    if where in ("query", "output_gradient"):
        assert of_query.nonzero()[:, 0].tolist() == [i for i in range(90) if i != 40]
        assert of_key[41:].all() and of_value[41:].all()
        kept = want["parts"][1]["p"][2, 40] > 1e-3
        assert not (of_value if where == "output_gradient" else of_key)[kept].any()
        close = of_query
    else:
        # A key's bad number is in the score of every row that sees it, unless that becomes -inf; a
        # value's only in the sums of rows that keep it.
        p = want["parts"][1]["p"][2, :, 40]
        assert of_query[:40].all()
        if where == "value" or math.isnan(bad):
            assert not of_query[p > 1e-3].any()
        assert where == "key" or of_query[p == 0].all()
        close = of_query & (p == 0)
    error = relative_error(dirty.gradients[0][1, 2, close], clean.gradients[0][1, 2, close])
    assert error <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("factor", [1e-6, 1e-2, 1e4])
def test_extreme_factors(library, size, factor):
    """Gradients of queries and keys are proportional to the factor: compared divided by it."""
    call = make(heads=3, queries=90, size=size, causal=True)
    call["query_scale"] = torch.full((1, 3, 90), factor, device="cuda")
    got = run(library, call)
    want = reference.attention(call, call["output_gradient"])["gradients"]
    for name, gradient in zip(("query", "key", "value"), got.gradients):
        unit = 1.0 if name == "value" else factor
        error = relative_error(gradient.double() / unit, want[name] / unit)
        assert error <= GRADIENT_TOLERANCE[BF16], name


@pytest.mark.parametrize("size", [32, 64])
def test_small_output_gradients(library, size):
    """fp16 keeps numbers below 6e-5 with fewer digits: score gradients must not be made smaller."""
    call = make(heads=3, queries=90, size=size, dtype=FP16, causal=True)
    call["output_gradient"].mul_(1e-4)
    got = run(library, call)
    want = reference.attention(call, call["output_gradient"])["gradients"]
    for name, gradient in zip(("query", "key", "value"), got.gradients):
        error = relative_error(gradient.double() / 1e-4, want[name] / 1e-4)
        assert error <= GRADIENT_TOLERANCE[FP16], name


@pytest.mark.parametrize("size", [32, 64])
def test_a_score_that_is_minus_infinity(library, size):
    """It has the weight zero, and the gradient of the factor does not notice."""
    call = make(heads=2, queries=90, size=size, causal=True)
    call["query_scale"] = torch.ones(1, 2, 90, device="cuda")
    call["key"][..., 0] = 0.0
    call["key"][:, :, 10, 0] = -1e20
    call["query"][:, :, 50] = 0.0
    call["query"][:, :, 50, 0] = 1e20
    got = run(library, call)
    assert torch.isfinite(got.output).all() and torch.isfinite(got.scale_gradient).all()
    for gradient in got.gradients:
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("size", [32, 64])
def test_infinite_factor_of_a_row_without_keys(library, size):
    call = make(heads=2, queries=64, keys=32, size=size, causal=True)
    call["query_scale"] = torch.ones(1, 2, 64, device="cuda")
    call["query_scale"][..., 0] = -math.inf
    got = run(library, call)
    assert (got.output[:, :, 0] == 0).all() and (got.gradients[0][:, :, 0] == 0).all()
    for gradient in got.gradients:
        assert torch.isfinite(gradient).all()


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
