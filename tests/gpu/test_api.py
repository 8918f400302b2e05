"""Bad input: an error that names the argument, never a crash, never another algorithm."""

import pytest

torch = pytest.importorskip("torch")

from cases import make, run, skip_if_absent
from engine import Attention, EngineError


def refuse(library, kind, word, call, **options):
    settings = {k: v for k, v in call.items() if k != "output_gradient"}
    settings.update(options)
    with pytest.raises(EngineError) as error:
        Attention(library, **settings).forward()
    skip_if_absent(error.value)
    assert error.value.kind == kind
    assert word in str(error.value)


def test_device(library):
    assert "compute capability" in library.device()


@pytest.mark.parametrize("alpha,kind", [(1.0, "Unimplemented"), (2.5, "Unimplemented"),
                                        (0.5, "Unimplemented"),
                                        (-0.5, "InvalidArgument"), (float("nan"), "InvalidArgument")])
def test_alpha(library, alpha, kind):
    refuse(library, kind, "alpha", make(), alpha=alpha)


def test_types_and_shapes(library):
    refuse(library, "Unimplemented", "query", make(dtype=torch.float64))
    call = make()
    refuse(library, "InvalidArgument", "key", dict(call, key=call["key"].half()))
    refuse(library, "InvalidArgument", "value", dict(call, value=call["value"][:, :, :-1]))
    refuse(library, "InvalidArgument", "key", dict(call, key=call["key"][..., :-1]))
    refuse(library, "InvalidArgument", "heads",
           dict(make(heads=4), **{k: make(heads=3)[k] for k in ("key", "value")}))
    refuse(library, "Unimplemented", "head_size", make(size=257))
    refuse(library, "Unimplemented", "value_size", make(value_size=300))


def test_features(library):
    call = make(heads=2)
    ones = lambda *s, **o: torch.ones(*s, device="cuda", **o)
    refuse(library, "Unimplemented", "alpha_per_head", call,
           alpha_per_head=ones(2, dtype=torch.float64))
    refuse(library, "InvalidArgument", "alpha_per_head", call, alpha_per_head=ones(3))
    refuse(library, "InvalidArgument", "alibi_slopes", call, slopes=ones(1))
    refuse(library, "Unimplemented", "query_scale", call, query_scale=ones(128).half())
    refuse(library, "InvalidArgument", "query_scale", call, query_scale=ones(127))
    refuse(library, "Unimplemented", "key_lengths", call, key_lengths=ones(1, dtype=torch.int64))
    refuse(library, "Unimplemented", "key_mask", call, key_mask=ones(1, 128, dtype=torch.uint8))
    refuse(library, "Unimplemented", "bias", call, bias=ones(128, 128))
    refuse(library, "InvalidArgument", "cu_key", call, cu_query=ones(2, dtype=torch.int32))
    refuse(library, "InvalidArgument", "softcap", call, softcap=-1.0)
    refuse(library, "InvalidArgument", "scale", call, scale=float("inf"))


@pytest.mark.parametrize("engine", ["screening", "tiles"])
def test_engine_says_why_not(library, engine):
    refuse(library, "Unimplemented", "float32", make(queries=600, dtype=torch.float32),
           engine=engine)
    refuse(library, "Unimplemented", "head_size", make(queries=600, size=96), engine=engine)
    refuse(library, "Unimplemented", "aligned", make(queries=600, layout="gaps"), engine=engine)


def test_small_buffers(library):
    a = run(library, make(queries=700, causal=True))
    a.saved = a.saved[:-256]
    with pytest.raises(EngineError, match="saved buffer"):
        a.forward()
    a = run(library, make(queries=700, causal=True))
    if a.engine != "general":
        a.work = a.work[:-256]
        with pytest.raises(EngineError, match="workspace"):
            a.forward()


def test_results_may_not_overlap_inputs(library):
    call = make()
    a = Attention(library, **{k: v for k, v in call.items() if k != "output_gradient"},
                  output=call["query"])
    with pytest.raises(EngineError, match="output"):
        a.forward()


def test_backward_needs_a_saved_forward(library):
    call = make()
    a = run(library, call, backward=False)
    a.prepare_backward(call["output_gradient"])
    with pytest.raises(EngineError, match="save_for_backward"):
        a.backward()


@pytest.mark.parametrize("shape", [dict(batch=0), dict(queries=0, keys=5), dict(queries=5, keys=0)])
def test_nothing_to_do(library, shape):
    call = make(**shape)
    a = run(library, call)
    assert float(a.output.abs().sum()) == 0.0
    for gradient in a.gradients:
        assert float(gradient.abs().sum()) == 0.0


def test_bad_numbers_on_the_device_stay_in_bounds(library):
    """Lengths and offsets that the host cannot check: wrong rows perhaps, no stray access."""
    bad = torch.tensor([-5, 1 << 30], dtype=torch.int32, device="cuda")
    run(library, make(batch=2, queries=200, key_lengths=bad))
    offsets = torch.tensor([0, 150, 90, 1 << 29, 200], dtype=torch.int32, device="cuda")
    run(library, make(queries=200, cu_query=offsets, cu_key=offsets))
    torch.cuda.synchronize()
