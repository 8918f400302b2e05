"""Hostile inputs, exactness under them, determinism, streams, graph capture."""

import math

import pytest

torch = pytest.importorskip("torch")

import reference
from cases import GRADIENT_TOLERANCE, TOLERANCE, compare, make, relative_error, run
from engine import Attention

ENGINES = ["general", "screening", "tiles"]
NAN = math.nan


def results(attention):
    return [attention.output, attention.threshold, *attention.gradients]


@pytest.mark.parametrize("engine", ENGINES)
class TestHostile:
    def test_all_scores_equal(self, library, engine):
        for length in (300, 700):
            call = make(queries=length, causal=True)
            call["query"].fill_(1.0)
            call["key"].fill_(1.0)
            compare(run(library, call, engine=engine), call)

    def test_zero_queries_and_keys(self, library, engine):
        call = make(queries=600, causal=True)
        call["query"].zero_()
        compare(run(library, call, engine=engine), call)
        call["key"].zero_()
        compare(run(library, call, engine=engine), call)

    @pytest.mark.parametrize("order", ["up", "down", "last", "first"])
    def test_orders(self, library, engine, order):
        """Scores sorted, or one giant at an end."""
        call = make(queries=1500, std=0.0)
        n = 1500
        ramp = torch.linspace(-3, 3, n, device="cuda")
        value = {"up": ramp, "down": -ramp}.get(order, torch.zeros(n, device="cuda"))
        if order in ("last", "first"):
            value[-1 if order == "last" else 0] = 20.0
        call["query"].zero_()
        call["query"][..., 0] = 8.0  # the score is the key's first column
        call["key"].zero_()
        call["key"][..., 0] = value.to(call["key"].dtype)
        compare(run(library, call, engine=engine), call)

    @pytest.mark.parametrize("support", [30, 70, 100, 130, 200, 260, 600, 1400])
    def test_supports_past_every_limit(self, library, engine, support):
        """`support` keys tie for the maximum in every row, scattered; others are far below."""
        call = make(queries=64, keys=1500)
        chosen = torch.randperm(1500, generator=torch.Generator().manual_seed(support))[:support]
        call["query"].zero_()
        call["query"][..., 0] = 8.0
        call["key"].mul_(0.5)
        call["key"][..., 0] = -9.0
        call["key"][:, :, chosen.cuda(), 0] = 9.0
        compare(run(library, call, engine=engine), call)

    def test_one_key_that_all_keep(self, library, engine):
        call = make(queries=3000, causal=True)
        call["query"][..., 0] = 6.0
        call["key"][:, :, 0] = 0
        call["key"][:, :, 0, 0] = 6.0
        compare(run(library, call, engine=engine), call)

    def test_large_and_tiny_scores(self, library, engine):
        for std in (1e-4, 300.0):
            call = make(queries=900, std=std, causal=True)
            compare(run(library, call, engine=engine), call, backward=False)

    def test_nan_in_a_query(self, library, engine):
        call = make(queries=700, causal=True)
        clean = run(library, call, engine=engine)
        call["query"][0, 1, 333, 5] = NAN
        dirty = run(library, call, engine=engine)
        rows = torch.isnan(dirty.output).all(-1)
        assert int(torch.isnan(dirty.output).any(-1).sum()) == 1 and bool(rows[0, 1, 333])
        keep = ~rows
        assert relative_error(dirty.output[keep], clean.output[keep]) <= 5e-3
        # Keys after the row do not see it; the other head does not either.
        for got, want in zip(dirty.gradients[1:], clean.gradients[1:]):
            assert not torch.isnan(got[0, 0]).any() and not torch.isnan(got[0, 1, 334:]).any()
            assert relative_error(got[0, 1, 334:], want[0, 1, 334:]) <= 2e-2
        assert torch.isnan(dirty.gradients[0]).any(-1).nonzero().tolist() == [[0, 1, 333]]

    @pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
    def test_bad_factor(self, library, engine, bad):
        call = make(queries=700, causal=True)
        call["query_scale"] = torch.full((1, 2, 700), 1.25, device="cuda")
        clean = run(library, call, engine=engine)
        call["query_scale"] = call["query_scale"].clone()
        call["query_scale"][0, 1, 333] = bad
        dirty = run(library, call, engine=engine)
        wrong = torch.isnan(dirty.output).any(-1)
        assert wrong.nonzero().tolist() == [[0, 1, 333]]
        assert relative_error(dirty.output[~wrong], clean.output[~wrong]) <= 5e-3
        # Keys after the row do not see it, and no other row's gradient notices. The Hopper kernels
        # leave such a row out of the sums over its keys too.
        for got in dirty.gradients[1:]:
            assert torch.isfinite(got[0, 0]).all() and torch.isfinite(got[0, 1, 334:]).all()
            assert engine == "general" or torch.isfinite(got).all()
        for got in (dirty.gradients[0].sum(-1), dirty.scale_gradient):
            assert torch.isfinite(got[~wrong]).all()

    @pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
    def test_extreme_factors(self, library, engine, size):
        call = make(queries=700, causal=True)
        call["query_scale"] = torch.full((1, 2, 700), size, device="cuda")
        compare(run(library, call, engine=engine), call, backward=False)

    @pytest.mark.parametrize("size", [1e-6, 1e-2, 1e4])
    def test_gradients_at_extreme_factors(self, library, engine, size):
        """Gradients of queries and keys are proportional to the factor: compared divided by it."""
        call = make(queries=700, causal=True)
        call["query_scale"] = torch.full((1, 2, 700), size, device="cuda")
        got = run(library, call, engine=engine)
        want = reference.attention(call, call["output_gradient"])["gradients"]
        for name, gradient in zip(("query", "key", "value"), got.gradients):
            unit = 1.0 if name == "value" else size
            error = relative_error(gradient.double() / unit, want[name] / unit)
            assert error <= GRADIENT_TOLERANCE[torch.bfloat16], name
        error = relative_error(got.scale_gradient, want["query_scale"])
        assert error <= GRADIENT_TOLERANCE[torch.bfloat16]

    @pytest.mark.parametrize("bad", [NAN, math.inf])
    def test_bad_key(self, library, engine, bad):
        call = make(queries=700, causal=True)
        clean = run(library, call, engine=engine, backward=False)
        call["key"][0, 0, 400] = bad
        dirty = run(library, call, engine=engine, backward=False)
        wrong = torch.isnan(dirty.output).any(-1)
        if math.isnan(bad):
            assert bool(wrong[0, 0, 400:].all())
        assert not wrong[0, 0, :400].any() and not wrong[0, 1].any()
        assert relative_error(dirty.output[0, 0, :400], clean.output[0, 0, :400]) <= 5e-3

    @pytest.mark.parametrize("bad", [NAN, math.inf])
    def test_bad_value(self, library, engine, bad):
        call = make(queries=700, causal=True)
        want = reference.attention(call)
        call["value"][0, 0, 123, 7] = bad
        got = run(library, call, engine=engine, backward=False)
        touched = want["parts"][0]["p"][0, :, 123] > 0
        # Rows whose probability is a rounding away from zero may go either way.
        margin = (want["parts"][0]["s"] * 0.5 - want["parts"][0]["tau"][..., None])[0, :, 123].abs()
        sure = margin > 1e-4
        wrong = ~torch.isfinite(got.output[0, 0])
        assert torch.equal(wrong[sure, 7], touched[sure])
        assert not wrong[:, :7].any() and not wrong[:, 8:].any()
        assert not (~torch.isfinite(got.output[0, 1])).any()

    def test_repeats_bit_for_bit(self, library, engine):
        for std in (1.0, 0.3, 0.05):
            call = make(heads=4, kv_heads=2, queries=1800, std=std, causal=True)
            first = [t.clone() for t in results(run(library, call, engine=engine))]
            again = run(library, call, engine=engine)
            for _ in range(3):
                for x, y in zip(first, results(again)):
                    assert torch.equal(x, y)
                again.forward()
                again.backward()
                torch.cuda.synchronize()


@pytest.mark.parametrize("capacity", [0, 1, 5000, 40000])
def test_full_pool(library, capacity):
    """Rows that find no room in the pool are computed another way."""
    call = make(queries=2000, causal=True)
    compare(run(library, call, engine="screening", capacity=capacity), call)


def test_full_pool_repeats(library):
    """Which rows find no room depends on the order of blocks; the result does not."""
    for capacity in (5000, 60000, 150000):
        call = make(heads=4, kv_heads=2, queries=2000, std=0.7, causal=True)
        first = [t.clone() for t in results(run(library, call, engine="screening",
                                                capacity=capacity))]
        for _ in range(3):
            again = results(run(library, call, engine="screening", capacity=capacity))
            for x, y in zip(first, again):
                assert torch.equal(x, y)


def test_streams(library):
    """Calls on several streams at once, with the allocator's memory reused between them."""
    calls = [make(queries=1200, heads=4, causal=True, seed=s) for s in range(4)]
    streams = [torch.cuda.Stream() for _ in calls]
    kept = []
    torch.cuda.synchronize()
    for _ in range(3):
        for call, stream in zip(calls, streams):
            with torch.cuda.stream(stream):
                settings = {k: v for k, v in call.items() if k != "output_gradient"}
                a = Attention(library, **settings)
                a.forward()
                a.prepare_backward(call["output_gradient"])
                a.backward()
                kept.append((call, a))
    torch.cuda.synchronize()
    for call, a in kept[-4:]:
        compare(a, call)


@pytest.mark.parametrize("engine", ENGINES)
def test_graph_capture(library, engine):
    call = make(queries=900, causal=True)
    a = run(library, call, engine=engine)
    want = [t.clone() for t in results(a)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.forward()
        a.backward()
    for t in results(a):
        t.fill_(NAN)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(want, results(a)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_error_is_that_of_the_type(library, dtype):
    """The field's criterion: at most twice the error of a plain implementation in the same type."""
    for std in (0.3, 1.0, 3.0):
        call = make(queries=1000, dtype=dtype, std=std, causal=True)
        exact = reference.attention(call, call["output_gradient"])
        plain = reference.attention(call, call["output_gradient"], dtype=dtype)
        got = run(library, call)
        assert (relative_error(got.output, exact["output"])
                <= 2 * relative_error(plain["output"], exact["output"]) + 3e-6)
        for name, gradient in zip(("query", "key", "value"), got.gradients):
            assert (relative_error(gradient, exact["gradients"][name])
                    <= 2 * relative_error(plain["gradients"][name], exact["gradients"][name])
                    + 1e-5), name


@pytest.mark.parametrize("settings", [{}, dict(causal=True), dict(window=(40, 3)),
                                      dict(alpha=2.0), dict(softcap=5.0)])
def test_support(library, settings):
    for dtype in (torch.bfloat16, torch.float32):
        call = make(batch=2, queries=333, keys=450, dtype=dtype, **settings)
        a = run(library, call, backward=False)
        offsets, index, probability = a.support()
        want = reference.attention(call)
        order = float(want["alpha"][0]) - 1
        counts = (offsets[1:] - offsets[:-1]).view(2, 2, 333)
        got = torch.zeros(2 * 2 * 333, 450, device="cuda", dtype=torch.float64)
        rows = torch.repeat_interleave(torch.arange(2 * 2 * 333, device="cuda"), counts.flatten())
        got[rows, index.long()] = probability.double()
        got = got.view(2, 2, 333, 450)
        for part in want["parts"]:
            p, entry = part["p"], part["entry"]
            assert float((got[entry] - p).abs().max()) <= 2e-3
            margin = (order * part["s"] - part["tau"][..., None]).abs()
            sure = margin > 1e-5 * (1 + part["tau"].abs()[..., None])
            assert torch.equal((got[entry] > 0) & sure, (p > 0) & sure)
        # Ascending keys: where the row stays the same, the key rises.
        same = rows[1:] == rows[:-1]
        assert bool((index[1:] > index[:-1])[same].all())
