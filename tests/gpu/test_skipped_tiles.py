"""Tiles proved zero before the product in heads with ALiBi slopes: the same bits as without."""

import math

import pytest

torch = pytest.importorskip("torch")

from cases import compare, generator, make, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def nape(heads):
    """Slopes 1, 1/2, ... on the first half of the heads, none on the second."""
    return torch.tensor([1 / (i + 1) if i < (heads + 1) // 2 else 0.0 for i in range(heads)],
                        device="cuda")


def slopes(*values):
    return torch.tensor(values, dtype=torch.float32, device="cuda")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def results(attention):
    return dict(output=attention.output, threshold=attention.threshold,
                **dict(zip(("dq", "dk", "dv"), attention.gradients)),
                slopes=attention.slope_gradient, query_scale=attention.scale_gradient,
                alpha=attention.alpha_gradient)


def far_tolerance(dtype):
    """Biases of several hundred: float32 keeps such scores to 3e-5 only."""
    return 5.0 if dtype == FP32 else 1.0


def both_ways(library, call, **options):
    """Runs with and without skipping, compares bit for bit; returns the run that skipped."""
    skipping = run(library, call, engine="general", **options)
    want = results(run(library, call, engine="general", visit_all=True, **options))
    for name, got in results(skipping).items():
        if got is None:
            continue
        nan = torch.isnan(got)
        assert torch.equal(nan, torch.isnan(want[name])), name
        assert torch.equal(got[~nan], want[name][~nan]), name
    return skipping


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("n", [700, 3000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("slope_gradient", [True, False])
def test_nape(library, n, dtype, causal, slope_gradient):
    call = make(heads=4, queries=n, dtype=dtype, causal=causal, slopes=nape(4))
    compare(both_ways(library, call, slope_gradient=slope_gradient), call)


def test_nape_long(library):
    for causal in (True, False):
        call = make(heads=2, queries=9000, causal=causal, slopes=nape(2))
        compare(both_ways(library, call), call)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [32, 96, 128, 256])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
def test_sizes(library, size, dtype, alpha):
    call = make(queries=1100, size=size, dtype=dtype, causal=True, alpha=alpha,
                slopes=slopes(0.7, 0.05))
    compare(both_ways(library, call), call, tolerance=far_tolerance(dtype))


@pytest.mark.parametrize("dtype", [BF16, FP32])
class TestWithOtherFeatures:
    def test_window(self, library, dtype):
        for window in ((300, -1), (70, 1000), (-1, 20), (0, 0)):
            for causal in (False, True):
                call = make(queries=1500, keys=1613, dtype=dtype, window=window, causal=causal,
                            slopes=slopes(0.8, 0.02))
                compare(both_ways(library, call), call)

    def test_key_lengths(self, library, dtype):
        for causal in (False, True):
            call = make(batch=4, queries=1500, dtype=dtype, causal=causal, slopes=slopes(0.5, 0.1),
                        key_lengths=ints(0, 1, 1500, 901))
            compare(both_ways(library, call), call)

    def test_packed(self, library, dtype):
        for causal in (False, True):
            call = make(heads=4, kv_heads=2, queries=2000, keys=2300, dtype=dtype, causal=causal,
                        cu_query=ints(0, 3, 3, 800, 1999, 2000), slopes=slopes(1, 0.5, 0.1, 0),
                        cu_key=ints(0, 40, 41, 900, 2299, 2300))
            compare(both_ways(library, call), call)

    def test_lengths(self, library, dtype):
        for queries, keys in ((1, 3000), (3000, 600), (65, 1301), (1301, 700), (600, 6000)):
            for causal in (False, True):
                call = make(queries=queries, keys=keys, dtype=dtype, causal=causal,
                            slopes=slopes(0.3, 0.01))
                compare(both_ways(library, call), call, tolerance=far_tolerance(dtype))

    def test_grouped_heads(self, library, dtype):
        call = make(batch=2, heads=6, kv_heads=2, queries=1300, dtype=dtype, causal=True,
                    layout="gaps", slopes=slopes(1, 0, 0.25, 0.01, -0.01, 0.5))
        compare(both_ways(library, call), call)

    def test_scores(self, library, dtype):
        """Everything else that a score passes through, negative factors too."""
        factor = torch.randn(1, 2, 1300, generator=generator(3), device="cuda")
        for settings in (dict(softcap=3.0), dict(query_scale=factor), dict(scale=-0.2),
                         dict(softcap=0.5, query_scale=factor, scale=-0.3),
                         dict(alpha_per_head=slopes(1.2, 1.9))):
            call = make(queries=1300, dtype=dtype, causal=True, slopes=slopes(0.6, 0.05),
                        **settings)
            compare(both_ways(library, call, alpha_gradient="alpha_per_head" in settings), call)

    def test_negative_slopes(self, library, dtype):
        """The farthest keys are the largest: nothing may be skipped."""
        for causal in (False, True):
            call = make(heads=3, queries=1100, dtype=dtype, causal=causal,
                        slopes=slopes(-0.5, -0.01, 0.5))
            compare(both_ways(library, call), call, tolerance=far_tolerance(dtype))

    def test_one_far_key_wins(self, library, dtype):
        """A key beyond what norms usually allow, far from nearly all queries."""
        call = make(queries=3000, dtype=dtype, causal=True, slopes=slopes(0.02, 0.3))
        call["query"][..., 0] = 8.0
        call["key"][..., 0] = 0.0
        call["key"][:, :, 5, 0] = 50.0
        compare(both_ways(library, call), call, tolerance=far_tolerance(dtype))

    def test_equal_scores(self, library, dtype):
        """Bounds meet thresholds exactly, or by a rounding."""
        call = make(queries=2000, dtype=dtype, causal=True, slopes=slopes(1 / 64, 1 / 1024))
        call["query"].fill_(1.0)
        call["key"].fill_(1.0)
        compare(both_ways(library, call), call)
        call["key"].zero_()
        compare(both_ways(library, call), call)
        call["query"].zero_()
        compare(both_ways(library, call), call)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_bad_key_far_away(self, library, dtype, bad):
        call = make(queries=3000, dtype=dtype, causal=True, slopes=slopes(1.0, 0.5))
        call["key"][0, 0, 40] = bad
        got = both_ways(library, call)
        wrong = torch.isnan(got.output).any(-1)
        assert not wrong[0, 0, :40].any() and not wrong[0, 1].any()
        if math.isnan(bad):
            assert bool(wrong[0, 0, 40:].all())
        if dtype == FP32:  # The parts of an infinite number are infinite and NaN.
            return
        # One element: rows whose score is -inf are as if the key were hidden.
        call = make(queries=3000, dtype=dtype, causal=True, slopes=slopes(1.0, 0.5))
        call["key"][0, 0, 40, 3] = bad
        got = both_ways(library, call)
        hit = call["query"][0, 0, 40:, 3] > 0 if math.isinf(bad) else torch.ones(
            2960, dtype=torch.bool, device="cuda")
        assert torch.equal(torch.isnan(got.output[0, 0, 40:]).any(-1), hit)

    def test_bad_query_and_gradient(self, library, dtype):
        call = make(queries=3000, dtype=dtype, causal=True, slopes=slopes(1.0, 0.5))
        call["query"][0, 0, 1700, 9] = math.nan
        call["output_gradient"][0, 1, 900, 5] = math.inf
        call["value"][0, 1, 10, 2] = math.nan
        got = both_ways(library, call)
        wrong = torch.isnan(got.output).any(-1)
        assert wrong[0, 0].nonzero().flatten().tolist() == [1700]

    def test_softcap_does_not_hide_a_bad_key(self, library, dtype):
        call = make(queries=2000, dtype=dtype, causal=True, slopes=slopes(1.0, 0.5), softcap=2.0)
        call["key"][0, 0, 40] = math.nan
        wrong = torch.isnan(both_ways(library, call).output).any(-1)
        assert bool(wrong[0, 0, 40:].all()) and not wrong[0, 1].any()


@pytest.mark.parametrize("queries,keys,size,dtype", [
    (100, 300000, 64, BF16), (100, 70000, 256, FP32), (70, 140000, 32, BF16)])
def test_marks_that_stand_for_several_tiles(library, queries, keys, size, dtype):
    """More tiles than there are marks, for the sides that stream keys."""
    for slope in (0.5, 1e-4):
        call = make(heads=1, queries=queries, keys=keys, size=size, dtype=dtype, causal=True,
                    slopes=slopes(slope))
        compare(both_ways(library, call), call)


def test_marks_that_stand_for_several_tiles_of_queries(library):
    call = make(heads=2, kv_heads=1, queries=270000, keys=600, slopes=slopes(1e-4, 1e-3))
    both_ways(library, call)
    call = make(heads=1, queries=150000, causal=True, slopes=slopes(0.5))
    both_ways(library, call)


def test_repeats_bit_for_bit(library):
    call = make(heads=4, kv_heads=2, queries=2500, causal=True, slopes=slopes(1, 0.25, 0.01, 0))
    first = run(library, call)
    for _ in range(3):
        again = run(library, call)
        for (name, x), y in zip(results(first).items(), results(again).values()):
            assert x is None or torch.equal(x, y), name


def test_time_is_linear(library):
    """Forward and backward take no longer a row when the rows are eight times as long."""
    def milliseconds(n, **options):
        call = make(heads=4, queries=n, causal=True, slopes=slopes(1, 1 / 2, 1 / 3, 1 / 4))
        attention = run(library, call, engine="general", **options)
        times = []
        for _ in range(5):
            start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            start.record()
            attention.forward()
            attention.backward()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return min(times)

    short, long = milliseconds(8192), milliseconds(65536)
    # Quadratic growth would be 64-fold.
    assert long <= 16 * short
    assert milliseconds(32768, visit_all=True) >= 2 * milliseconds(32768)
