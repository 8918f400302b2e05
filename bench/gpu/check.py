"""Checks the engine against the fp64 reference. Usage: check.py LIB [quick|full] [forward|all]"""

import sys

import torch

from engine import Engine, reference_rows, workload

failures = 0


def rel(a, b):
    # A reference of zeros (ties, one key) is compared in absolute terms.
    return float((a.double() - b).norm() / b.norm().clamp(min=0.5 * b.numel() ** 0.5))


def check(engine, name, b, h, nq, nk, d, alpha=1.5, causal=True, dtype=torch.bfloat16, kv=None,
          path=0, sample=0, backward=True, strided=False, capacity=None, rows_checked=96, seed=1,
          repeat=False):
    global failures
    q, k, v = workload(name, b, h, nq, nk, d, dtype, seed=seed, kv_heads=kv)
    if strided:  # (batch, row, head, dim) storage
        q, k, v = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    a = engine.attention(q, k, v, alpha=alpha, causal=causal, path=path, sample=sample,
                         save=True, capacity=capacity)
    scale = a.p.scale
    o = a.forward()
    do = torch.randn(q.shape, device="cuda", generator=torch.Generator(device="cuda").manual_seed(9)).to(dtype)
    if strided:
        do = do.transpose(1, 2).contiguous().transpose(1, 2)
    if backward:
        a.prepare_backward(do)
        dq, dk, dv = a.backward()
    torch.cuda.synchronize()
    stats = a.stats()
    tau = a.rows("threshold", torch.float32)
    count = a.rows("support_count", torch.int32)
    units = a.layout.padded_queries // a.layout.unit_rows
    flags = a.field("unit_flag", torch.int32, b * h * units).view(b, h, units)
    worst = dict(o=0.0, tau=0.0, support=0, dq=0.0, dk=0.0, dv=0.0)
    group = h // k.shape[1]
    tolerance = 4.5e-3 if dtype == torch.bfloat16 else 1e-3
    g = torch.Generator().manual_seed(3)
    pairs = {(0, 0), (b - 1, h - 1), (b // 2, h // 2)}
    for bi, hi in sorted(pairs):
        rows = torch.unique(torch.cat([
            torch.tensor([0, nq - 1, nq // 2, max(0, nq - 2), min(nq - 1, 63), min(nq - 1, 64)]),
            torch.randint(nq, (rows_checked,), generator=g)])).cuda()
        ref = reference_rows(q[bi, hi], k[bi, hi // group], v[bi, hi // group], rows, alpha, causal,
                             scale, do[bi, hi])
        oo = o[bi, hi][rows]
        e = rel(oo, ref["o"])
        worst["o"] = e if not e <= worst["o"] else worst["o"]
        live = ~ref["empty"]
        if live.any():
            t = ((tau[bi, hi][rows].double() - ref["tau"]).abs()[live]
                 / (1 + ref["z"][live].max(-1).values.abs())).max().item()
            worst["tau"] = t if not t <= worst["tau"] else worst["tau"]
        if (~live).any():
            if oo[~live].abs().max().item() != 0:
                worst["o"] = float("nan")
        listed = flags[bi, hi][rows // a.layout.unit_rows] == 0
        near = ((ref["z"] - ref["tau"][:, None]).abs() < 3e-6 * (1 + ref["tau"].abs()[:, None])).sum(-1)
        size = (ref["p"] > 0).sum(-1)
        wrong = ((count[bi, hi][rows] - size).abs() > near) & listed & live
        if path != 1 and (path == 2 or nk > 512):
            worst["support"] += int(wrong.sum())
        if backward:
            e = rel(dq[bi, hi][rows], ref["dq"])
            worst["dq"] = e if not e <= worst["dq"] else worst["dq"]
    if backward and nq * nk <= 9000 * 9000:
        bi, kh = b - 1, k.shape[1] - 1
        dk_ref = torch.zeros(nk, d, device="cuda", dtype=torch.float64)
        dv_ref = torch.zeros_like(dk_ref)
        for hi in range(kh * group, (kh + 1) * group):
            for part in torch.arange(nq, device="cuda").split(2048):
                ref = reference_rows(q[bi, hi], k[bi, kh], v[bi, kh], part, alpha, causal, scale,
                                     do[bi, hi])
                dk_ref += scale * ref["ds"].T @ q[bi, hi][part].double()
                dv_ref += ref["p"].T @ do[bi, hi][part].double()
        for key, got, want in (("dk", dk[bi, kh], dk_ref), ("dv", dv[bi, kh], dv_ref)):
            worst[key] = rel(got, want) if not torch.isnan(got).any() else float("nan")
    same = True
    if repeat:
        if not backward: dq = dk = dv = o
        first = [t.clone() for t in ([o, dq, dk, dv] if backward else [o])]
        for _ in range(2):
            a.forward()
            if backward:
                a.backward()
            torch.cuda.synchronize()
            same &= all(torch.equal(x, y) for x, y in zip(first, [o, dq, dk, dv]))
    loose = 2.5 * tolerance
    nan = bool(torch.isnan(o).any())
    ok = (worst["o"] <= tolerance and worst["tau"] <= 4e-6 and worst["support"] == 0 and
          worst["dq"] <= loose and worst["dk"] <= loose and worst["dv"] <= loose and same and not nan)
    failures += not ok
    print(f"{'ok  ' if ok else 'FAIL'} {name:9s} b{b} h{h}/{k.shape[1]} nq{nq} nk{nk} d{d} a{alpha:.2f} "
          f"{'causal' if causal else 'full  '} {'bf16' if dtype == torch.bfloat16 else 'fp16'} "
          f"path{path} s{sample} | o {worst['o']:.1e} tau {worst['tau']:.1e} sup {worst['support']} "
          f"dq {worst['dq']:.1e} dk {worst['dk']:.1e} dv {worst['dv']:.1e} same {same} nan {nan} | "
          f"support {stats['support']:.1f} max {stats['longest']} flagged {stats['flagged']:.2f}",
          flush=True)


def main():
    engine = Engine(sys.argv[1])
    level = sys.argv[2] if len(sys.argv) > 2 else "quick"
    bw = len(sys.argv) > 3 and sys.argv[3] == "all"
    dims = [int(x) for x in (sys.argv[4] if len(sys.argv) > 4 else "64").split(",")]
    dtypes = [torch.bfloat16] + ([torch.float16] if len(sys.argv) > 5 else [])
    run = lambda *a, **o: check(engine, *a, **{"backward": bw, **o})
    for d in dims:
        for name in ("gauss1", "gauss4", "topic16", "local", "gauss0.5", "gauss0.05"):
            run(name, 1, 2, 4096, 4096, d, repeat=name in ("gauss1", "gauss0.5"))
        run("gauss1", 1, 2, 4096, 4096, d, sample=8)
        run("gauss1", 1, 2, 1000, 1000, d)
        run("gauss1", 2, 4, 777, 1301, d, kv=2, strided=True)
        run("gauss1", 1, 2, 1301, 777, d)
        run("gauss1", 1, 2, 500, 2003, d, causal=False)
        run("gauss0.05", 1, 2, 500, 2003, d, causal=False)
        run("gauss1", 1, 1, 1, 1, d)
        run("gauss1", 1, 1, 1, 1, d, path=2)
        run("gauss1", 3, 2, 90, 90, d)
        run("gauss1", 3, 2, 90, 90, d, path=2)
        run("gauss1", 1, 1, 1, 5000, d, causal=False)
        run("ties", 1, 2, 700, 700, d)
        run("sink", 1, 2, 4096, 4096, d)
        run("gauss1", 1, 2, 2048, 2048, d, path=1)
        run("gauss0.05", 1, 2, 8192, 8192, d, path=1)
        run("gauss1", 1, 2, 2048, 2048, d, capacity=2048 * 10)
        if level == "full":
            for alpha in (2.0, 1.25, 1.75, 1.05):
                for name in ("gauss1", "gauss4", "gauss0.05", "local"):
                    run(name, 1, 2, 2100, 2100, d, alpha=alpha)
                run("gauss1", 1, 2, 1111, 1111, d, alpha=alpha, path=1)
    if len(dtypes) > 1:
        for name in ("gauss1", "gauss0.05", "local"):
            run(name, 1, 2, 2100, 2100, dims[0], dtype=torch.float16)
    print("FAILURES", failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
