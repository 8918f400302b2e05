"""ctypes wrapper of the C interface, workloads, and the fp64 reference."""

import ctypes as C
import math

import torch


class TensorArg(C.Structure):
    _fields_ = [("data", C.c_void_p), ("stride", C.c_int64 * 3)]


class Problem(C.Structure):
    _fields_ = (
        [(x, C.c_int32) for x in
         ("element", "batch", "heads", "kv_heads", "queries", "keys", "head_dim", "causal")]
        + [("alpha", C.c_float), ("scale", C.c_float)]
        + [(x, C.c_int32) for x in ("path", "sample_stride", "save_for_backward", "reserved")]
        + [("support_capacity", C.c_int64)])


class Plan(C.Structure):
    _fields_ = [(x, C.c_int64) for x in ("saved_bytes", "forward_bytes", "backward_bytes")]


class Layout(C.Structure):
    _fields_ = [(x, C.c_int64) for x in
                ("threshold", "support_offset", "support_count", "support_key", "support_excess",
                 "unit_flag", "support_used")] + [("padded_queries", C.c_int32), ("unit_rows", C.c_int32)]


class ForwardTensors(C.Structure):
    _fields_ = [(x, TensorArg) for x in ("query", "key", "value", "output")]


class BackwardTensors(C.Structure):
    _fields_ = [(x, TensorArg) for x in
                ("query", "key", "value", "output_gradient", "query_gradient", "key_gradient",
                 "value_gradient")]


def arg(t):
    """(batch, head, row, dim) tensor with a contiguous last dimension."""
    return TensorArg(t.data_ptr(), (C.c_int64 * 3)(*t.stride()[:3]))


class Engine:
    def __init__(self, path):
        self.lib = C.CDLL(path)
        self.lib.flash_entmax_cuda_error_text.restype = C.c_char_p

    def check(self, code):
        if code:
            raise RuntimeError(self.lib.flash_entmax_cuda_error_text(code).decode())

    def attention(self, q, k, v, **options):
        return Attention(self, q, k, v, **options)


class Attention:
    """Buffers of one problem; forward() and backward() only launch."""

    def __init__(self, engine, q, k, v, alpha=1.5, causal=True, scale=None, path=0, sample=0,
                 save=True, capacity=None):
        self.engine = engine
        b, h, nq, d = q.shape
        self.p = Problem(0 if q.dtype == torch.bfloat16 else 1, b, h, k.shape[1], nq, k.shape[2], d,
                         int(causal), alpha, scale or d ** -0.5, path, sample, int(save), 0,
                         capacity if capacity is not None else b * h * nq * 96)
        plan = Plan()
        engine.check(engine.lib.flash_entmax_cuda_plan(C.byref(self.p), C.byref(plan)))
        self.plan = plan
        u8 = dict(dtype=torch.uint8, device="cuda")
        # Poisoned: whatever is read before it is written shows.
        self.saved = torch.full((max(1, plan.saved_bytes),), 0xA5, **u8)
        self.work = torch.full((max(1, plan.forward_bytes),), 0xA5, **u8)
        self.bwork = torch.full((max(1, plan.backward_bytes),), 0xA5, **u8) if save else None
        self.layout = Layout()
        engine.check(engine.lib.flash_entmax_cuda_saved_layout(C.byref(self.p), C.byref(self.layout)))
        self.set(q, k, v)

    def set(self, q, k, v, o=None):
        self.q, self.k, self.v = q, k, v
        self.o = o if o is not None else torch.full_like(q, float("nan"))
        self.f = ForwardTensors(arg(q), arg(k), arg(v), arg(self.o))

    def forward(self):
        self.engine.check(self.engine.lib.flash_entmax_cuda_forward(
            C.byref(self.p), C.byref(self.f), C.c_void_p(self.saved.data_ptr()),
            C.c_int64(self.saved.numel()), C.c_void_p(self.work.data_ptr()),
            C.c_int64(self.work.numel()), C.c_void_p(torch.cuda.current_stream().cuda_stream)))
        return self.o

    def prepare_backward(self, do, grads=None):
        self.do = do
        self.grads = grads or [torch.full_like(t, float("nan")) for t in (self.q, self.k, self.v)]
        self.b = BackwardTensors(*[arg(t) for t in (self.q, self.k, self.v, do, *self.grads)])

    def backward(self):
        self.engine.check(self.engine.lib.flash_entmax_cuda_backward(
            C.byref(self.p), C.byref(self.b), C.c_void_p(self.saved.data_ptr()),
            C.c_int64(self.saved.numel()), C.c_void_p(self.bwork.data_ptr()),
            C.c_int64(self.bwork.numel()), C.c_void_p(torch.cuda.current_stream().cuda_stream)))
        return self.grads

    def field(self, name, dtype, count):
        offset = getattr(self.layout, name)
        size = torch.empty(0, dtype=dtype).element_size()
        return self.saved[offset:offset + count * size].view(dtype)

    def rows(self, name, dtype):
        b, h, nq, _ = self.q.shape
        n = self.layout.padded_queries
        return self.field(name, dtype, b * h * n).view(b, h, n)[:, :, :nq]

    def stats(self):
        b, h, nq, _ = self.q.shape
        units = self.layout.padded_queries // self.layout.unit_rows
        flags = self.field("unit_flag", torch.int32, b * h * units).view(b * h, units)
        used = (nq + self.layout.unit_rows - 1) // self.layout.unit_rows
        counts = self.rows("support_count", torch.int32).double()
        return dict(flagged=float((flags[:, :used] != 0).double().mean()),
                    support=float(counts.mean()), longest=int(counts.max()))


# ---- workloads (one definition for checks and timings)

def workload(name, b, h, nq, nk, d, dtype, seed=0, kv_heads=None):
    g = torch.Generator(device="cuda").manual_seed(seed)
    kv = kv_heads or h
    r = lambda *s: torch.randn(*s, generator=g, device="cuda")
    if name.startswith("gauss"):
        q, k = r(b, h, nq, d) * float(name[5:]), r(b, kv, nk, d)
    elif name.startswith("topic"):
        topics = int(name[5:] or 16)
        n = max(nq, nk)
        centre = torch.nn.functional.normalize(r(b, h, topics, d), dim=-1) * math.sqrt(6 * math.sqrt(d))
        ids = torch.randint(topics, (b, h, (n + 255) // 256), generator=g, device="cuda")
        base = torch.gather(centre, 2, ids.repeat_interleave(256, 2)[:, :, :n, None].expand(-1, -1, -1, d))
        q = base[:, :, n - nq:] + 0.7 * r(b, h, nq, d)
        k = (base[:, :, n - nk:] + 0.7 * r(b, h, nk, d))[:, :kv]
    elif name == "local":
        n, rho = max(nq, nk), 0.98
        x = r(b, h, n, d) * math.sqrt(1 - rho * rho)
        x[:, :, 0] /= math.sqrt(1 - rho * rho)
        step, f = 1, rho  # parallel scan of b_t = rho b_(t-1) + x_t
        while step < n:
            x[:, :, step:] = x[:, :, step:] + f * x[:, :, :-step]
            step, f = 2 * step, f * f
        q = x[:, :, n - nq:] + 0.3 * r(b, h, nq, d)
        k = (x[:, :, n - nk:] + 0.3 * r(b, h, nk, d))[:, :kv]
    elif name == "ties":
        q, k = torch.ones(b, h, nq, d, device="cuda"), torch.ones(b, kv, nk, d, device="cuda")
    elif name == "sink":  # every query keeps key 0
        q, k = r(b, h, nq, d), r(b, kv, nk, d)
        q[..., 0] += 4.0
        k[:, :, 0] = 0
        k[:, :, 0, 0] = 4.0 * math.sqrt(d) / 4
    else:
        raise ValueError(name)
    v = r(b, kv, nk, d)
    return [t.to(dtype) for t in (q, k, v)]


# ---- fp64 reference

def solve_threshold(z, alpha, steps=60):
    """z: (rows, keys) fp64, -inf = masked. Bracketed bisection on tau."""
    m = alpha - 1
    top = z.max(-1, keepdim=True).values
    lo, hi = top - 1, top.clone()
    for _ in range(steps):
        mid = (lo + hi) / 2
        f = (z - mid).clamp(min=0).pow(1 / m).sum(-1, keepdim=True)
        right = f < 1
        hi = torch.where(right, mid, hi)
        lo = torch.where(right, lo, mid)
    return (lo + hi) / 2


def reference_rows(q, k, v, rows, alpha, causal, scale, do=None):
    """One head: q (nq, d), k, v (nk, d); `rows` query indices. Returns z, tau, p, o (and dq)."""
    nq, nk = q.shape[0], k.shape[0]
    qd, kd, vd = q[rows].double(), k.double(), v.double()
    z = (alpha - 1) * scale * qd @ kd.T
    if causal:
        limit = rows + nk - nq
        z = z.masked_fill(torch.arange(nk, device=z.device)[None] > limit[:, None], -math.inf)
    empty = torch.isinf(z).all(-1)
    safe = torch.where(empty[:, None], torch.zeros_like(z), z)
    tau = solve_threshold(safe, alpha)
    w = (safe - tau).clamp(min=0)
    p = w.pow(1 / (alpha - 1))
    p = torch.where(empty[:, None], torch.zeros_like(p), p)
    out = dict(z=z, tau=tau[:, 0], p=p, o=p @ vd, empty=empty)
    if do is not None:
        u = torch.where(p > 0, p.pow(2 - alpha), torch.zeros_like(p))
        dp = do[rows].double() @ vd.T
        delta = (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True).clamp(min=1e-300)
        ds = u * (dp - delta)
        out.update(ds=ds, dq=scale * ds @ kd)
    return out
