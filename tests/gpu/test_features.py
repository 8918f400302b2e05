"""Every feature against the float64 reference, forward and backward."""

import random

import pytest

torch = pytest.importorskip("torch")

from cases import compare, generator, make, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def per_head(heads, low, high, seed=5):
    return low + (high - low) * torch.rand(heads, generator=generator(seed), device="cuda")


def row_factors(batch, heads, queries):
    """ASEntmax: 1 + beta (log(i + 2))^gamma, a number a row."""
    g = generator(7)
    beta = 0.3 * torch.rand(batch, heads, queries, generator=g, device="cuda")
    position = torch.arange(queries, device="cuda", dtype=torch.float32)
    return 1 + beta * torch.log(position + 2) ** 0.7


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
def test_head_sizes(library, dtype, size, alpha):
    call = make(queries=301, size=size, dtype=dtype, causal=True, alpha=alpha)
    compare(run(library, call, engine="general"), call)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("queries,keys", [(1, 1), (1, 77), (77, 1), (90, 90), (129, 130),
                                          (512, 512), (513, 513), (700, 1301), (1301, 700)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(library, dtype, queries, keys, causal):
    call = make(batch=2, heads=2, queries=queries, keys=keys, size=64, dtype=dtype, causal=causal)
    compare(run(library, call, engine="general"), call)


@pytest.mark.parametrize("length", [200, 900])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
class TestFeatures:
    def test_window(self, library, length, dtype):
        for window in ((0, 0), (5, -1), (70, 33), (-1, 20)):
            call = make(queries=length, keys=length + 13, dtype=dtype, window=window)
            compare(run(library, call), call)
            call = make(queries=length, dtype=dtype, window=window, causal=True)
            compare(run(library, call), call)

    def test_key_lengths(self, library, length, dtype):
        lengths = torch.tensor([0, 1, length, length // 2 + 1], dtype=torch.int32, device="cuda")
        for causal in (False, True):
            call = make(batch=4, queries=length, dtype=dtype, key_lengths=lengths, causal=causal)
            compare(run(library, call), call)

    def test_packed(self, library, length, dtype):
        query = torch.tensor([0, 3, 3, length // 2, length], dtype=torch.int32, device="cuda")
        key = torch.tensor([0, 40, 41, 41 + length // 2, length + 50], dtype=torch.int32,
                           device="cuda")
        for causal in (False, True):
            call = make(queries=length, keys=length + 50, heads=4, kv_heads=2, dtype=dtype,
                        cu_query=query, cu_key=key, causal=causal)
            compare(run(library, call), call)

    def test_alibi(self, library, length, dtype):
        slopes = torch.tensor([1.0, 0.5, 0.25, 0.0], device="cuda")
        for causal in (False, True):
            call = make(heads=4, queries=length, dtype=dtype, slopes=slopes, causal=causal)
            compare(run(library, call), call)

    def test_query_scale(self, library, length, dtype):
        call = make(batch=2, queries=length, dtype=dtype, causal=True,
                    query_scale=row_factors(2, 2, length))
        compare(run(library, call), call)
        position = torch.arange(length, device="cuda", dtype=torch.float32)
        call["query_scale"] = (0.4 * torch.log(position + 2)).expand(2, 2, length)  # SSMax
        compare(run(library, call), call)

    def test_softcap(self, library, length, dtype):
        for cap in (0.7, 15.0):
            call = make(queries=length, dtype=dtype, softcap=cap, std=2.0, causal=True)
            compare(run(library, call), call)

    def test_alpha_per_head(self, library, length, dtype):
        alpha = per_head(4, 1.1, 2.0)
        alpha[0], alpha[1] = 1.5, 2.0
        call = make(heads=4, queries=length, dtype=dtype, alpha_per_head=alpha, causal=True)
        compare(run(library, call, alpha_gradient=True), call)

    def test_alpha_gradient(self, library, length, dtype):
        for alpha in (1.5, 1.3):
            call = make(queries=length, dtype=dtype, alpha=alpha)
            compare(run(library, call, alpha_gradient=True), call)

    def test_grouped_heads(self, library, length, dtype):
        call = make(heads=6, kv_heads=2, queries=length, dtype=dtype, causal=True)
        compare(run(library, call, engine="general"), call)
        call = make(heads=6, kv_heads=1, queries=length, dtype=dtype)
        compare(run(library, call), call)

    @pytest.mark.parametrize("layout", ["bnhd", "gaps"])
    def test_layouts(self, library, length, dtype, layout):
        call = make(batch=2, heads=4, kv_heads=2, queries=length, dtype=dtype, layout=layout,
                    causal=True)
        compare(run(library, call), call)

    def test_value_size(self, library, length, dtype):
        for size, value_size in ((64, 32), (40, 72), (1, 1), (33, 7)):
            call = make(queries=length, dtype=dtype, size=size, value_size=value_size, causal=True)
            compare(run(library, call), call)


@pytest.mark.parametrize("engine", ["screening", "tiles"])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
@pytest.mark.parametrize("scaled", [False, True])
def test_hopper(library, engine, size, dtype, alpha, scaled):
    for std in (1.0, 0.05, 4.0):
        call = make(queries=1111, size=size, dtype=dtype, alpha=alpha, std=std, causal=True)
        if scaled:
            call["query_scale"] = row_factors(1, 2, 1111)
        compare(run(library, call, engine=engine), call)
    call = make(batch=2, heads=4, kv_heads=2, queries=777, keys=1301, size=size, dtype=dtype,
                alpha=alpha, layout="bnhd")
    if scaled:
        # Factors of either sign, and rows that all keys look the same to; any strides.
        factor = torch.randn(2, 777, 4, generator=generator(3), device="cuda").transpose(1, 2)
        factor[0, 1, 100:130] = 0.0
        call["query_scale"] = factor
    compare(run(library, call, engine=engine), call)


def test_query_scale_runs_on_the_fast_kernels(library):
    call = make(queries=700, causal=True)
    plain = run(library, call, backward=False).engine
    call["query_scale"] = row_factors(1, 2, 700)
    assert run(library, call, backward=False).engine == plain


@pytest.mark.parametrize("seed", range(40))
def test_random(library, seed):
    """Random sizes and features; the seed is the test's name."""
    r = random.Random(seed)
    packed = r.random() < 0.25
    batch = 1 if packed else r.randint(1, 3)
    kv_heads = r.randint(1, 3)
    heads = kv_heads * r.randint(1, 3)
    queries, keys = [r.choice([r.randint(1, 70), r.randint(1, 600), r.randint(1, 1400)])
                     for _ in range(2)]
    dtype = r.choice([BF16, FP16, FP32])
    settings = dict(causal=r.random() < 0.6)
    if r.random() < 0.3:
        settings["window"] = (r.choice([-1, r.randint(0, 300)]), r.choice([-1, r.randint(0, 90)]))
    if r.random() < 0.3:
        settings["slopes"] = per_head(heads, 0.0, 0.6, seed)
    if r.random() < 0.3:
        settings["query_scale"] = row_factors(batch, heads, queries)
    if r.random() < 0.2:
        settings["softcap"] = r.uniform(0.5, 20)
    if r.random() < 0.3:
        settings["alpha_per_head"] = per_head(heads, 1.15, 2.0, seed)
    else:
        settings["alpha"] = r.choice([1.5, 1.5, 2.0, r.uniform(1.1, 2.0)])
    if packed:
        cuts = r.randint(1, 5)
        offsets = lambda n: torch.tensor([0, *sorted(r.randint(0, n) for _ in range(cuts - 1)), n],
                                         dtype=torch.int32, device="cuda")
        settings["cu_query"], settings["cu_key"] = offsets(queries), offsets(keys)
    elif r.random() < 0.3:
        settings["key_lengths"] = torch.tensor([r.randint(0, keys) for _ in range(batch)],
                                               dtype=torch.int32, device="cuda")
    call = make(batch=batch, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys,
                size=r.choice([32, 64, 128, r.randint(1, 256)]), dtype=dtype,
                std=r.choice([0.05, 0.5, 1.0, 3.0]), seed=seed,
                layout=r.choice(["bhnd", "bnhd", "gaps"]), **settings)
    compare(run(library, call, alpha_gradient=r.random() < 0.5), call)
