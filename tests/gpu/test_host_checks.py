"""What the host can check without a device: every argument, before a device is looked for."""

import ctypes as C
import math
import os

import pytest

from c_structs import STATUS, OptionsArg, PlanArg, ProblemArg, TensorArg

pytestmark = pytest.mark.host_only
FLOAT64, FLOAT32, BFLOAT16, INT32, INT64 = 0, 1, 2, 5, 6


@pytest.fixture(scope="module")
def c(request):
    path = request.config.getoption("--library")
    if not os.path.exists(path):
        pytest.skip(f"{path} is not built")
    library = C.CDLL(path)
    library.flash_entmax_last_error.restype = C.c_char_p
    return library


def tensor(*shape, dtype=BFLOAT16, data=1 << 20):
    """An address that is never read."""
    strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
    return TensorArg(data, dtype, len(shape), (C.c_int64 * 4)(*shape), (C.c_int64 * 4)(*strides))


def plan(c, dtype=BFLOAT16, size=64, alpha=1.5, length=100, **settings):
    """(kind of the error or None, its text)."""
    problem = ProblemArg()
    problem.query = tensor(2, 4, length, size, dtype=dtype)
    problem.key = tensor(2, 2, 120, size, dtype=dtype)
    problem.value = tensor(2, 2, 120, size, dtype=dtype)
    problem.alpha, problem.scale = alpha, math.nan
    problem.window_left = problem.window_right = -1
    options = OptionsArg(None, 0, 0, 0, 0, -1, 0)
    for name, value in settings.items():
        setattr(options if hasattr(options, name) else problem, name, value)
    code = c.flash_entmax_gpu_plan(C.byref(problem), C.byref(options), C.byref(PlanArg()))
    return STATUS.get(code), c.flash_entmax_last_error().decode() if code else ""


def test_good_problem(c):
    kind, text = plan(c)
    assert kind in (None, "Device"), text  # Device: there is none here
    if kind:
        assert text


@pytest.mark.parametrize("settings,kind,word", [
    (dict(dtype=FLOAT64), "Unimplemented", "float64"),
    (dict(size=260), "Unimplemented", "head_size"),
    (dict(alpha=1.0), "Unimplemented", "alpha"),
    (dict(alpha=2.01), "Unimplemented", "alpha"),
    (dict(alpha=0.9), "Unimplemented", "alpha"),
    (dict(alpha=0.0), "InvalidArgument", "alpha"),
    (dict(alpha=1 + 1e-12), "Unimplemented", "alpha"),
    (dict(alpha=math.nan), "InvalidArgument", "alpha"),
    (dict(scale=math.inf), "InvalidArgument", "scale"),
    (dict(softcap=-1.0), "InvalidArgument", "softcap"),
    (dict(support_capacity=-2), "InvalidArgument", "support_capacity"),
    (dict(length=1 << 30), "Unimplemented", "length"),
    (dict(value=tensor(2, 2, 119, 64)), "InvalidArgument", "value"),
    (dict(key=tensor(2, 3, 120, 64)), "InvalidArgument", "heads"),
    (dict(key=tensor(2, 2, 120, 64, dtype=FLOAT32)), "InvalidArgument", "key"),
    (dict(alpha_per_head=tensor(4, dtype=FLOAT64)), "Unimplemented", "alpha_per_head"),
    (dict(alpha_per_head=tensor(3, dtype=FLOAT32)), "InvalidArgument", "alpha_per_head"),
    (dict(alibi_slopes=tensor(4, dtype=BFLOAT16)), "Unimplemented", "alibi_slopes"),
    (dict(query_scale=tensor(100, dtype=BFLOAT16)), "Unimplemented", "query_scale"),
    (dict(query_scale=tensor(99, dtype=FLOAT32)), "InvalidArgument", "query_scale"),
    (dict(key_lengths=tensor(2, dtype=INT64)), "Unimplemented", "key_lengths"),
    (dict(key_lengths=tensor(3, dtype=INT32)), "InvalidArgument", "key_lengths"),
    (dict(key_mask=tensor(2, 120)), "Unimplemented", "key_mask"),
    (dict(bias=tensor(100, 120)), "Unimplemented", "bias"),
    (dict(cu_query=tensor(3, dtype=INT32)), "InvalidArgument", "cu_key"),
    (dict(cu_query=tensor(3, dtype=INT32), cu_key=tensor(3, dtype=INT32)), "InvalidArgument",
     "batch"),
])
def test_refused(c, settings, kind, word):
    got, text = plan(c, **settings)
    assert got == kind and word in text, text
