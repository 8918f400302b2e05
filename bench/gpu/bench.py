"""Times the engine against PyTorch's attention backends in one process; writes JSON.

bench.py LIB OUT.json [--cases main|short|all] [--reps N] [--no-rivals] [--no-backward]
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from engine import Engine, reference_rows, workload


def timed(functions, reps, warm=2):
    """Median ms of each function; functions of one rep run one after the other (alternating)."""
    names = list(functions)
    times = {n: [] for n in names}
    for _ in range(warm):
        for n in names:
            functions[n](0)
    torch.cuda.synchronize()
    events = []
    for i in range(reps):
        for n in names:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            functions[n](i)
            end.record()
            events.append((n, start, end))
    torch.cuda.synchronize()
    for n, s, e in events:
        times[n].append(s.elapsed_time(e))
    return {n: dict(median=statistics.median(t), low=min(t), high=max(t)) for n, t in times.items()}


def verify(a, heads=2, rows=32):
    q, k, v, o = a.q, a.k, a.v, a.o
    group = q.shape[1] // k.shape[1]
    worst = 0.0
    for hi in sorted({0, q.shape[1] - 1})[:heads]:
        r = torch.unique(torch.cat([torch.tensor([0, q.shape[2] - 1]),
                                    torch.randint(q.shape[2], (rows,))])).cuda()
        ref = reference_rows(q[-1, hi], k[-1, hi // group], v[-1, hi // group], r, a.p.alpha,
                             bool(a.p.causal), a.p.scale, a.do[-1, hi])
        e = float((o[-1, hi][r].double() - ref["o"]).norm() / ref["o"].norm())
        e2 = float((a.grads[0][-1, hi][r].double() - ref["dq"]).norm() / ref["dq"].norm()) if a.has_backward else 0
        for x in (e, e2 / 2.5):
            worst = x if not x <= worst else worst
    return worst


def run_case(engine, name, b, h, n, d, args, sample, path=0, alpha=1.5):
    sets = []
    count = 3 if b * h * n * d * 6 < 4e8 else 2
    for s in range(count):
        q, k, v = workload(name, b, h, n, n, d, torch.bfloat16, seed=10 + s)
        do = torch.randn_like(q)
        sets.append((q, k, v, do))
    a = engine.attention(*sets[0][:3], alpha=alpha, sample=sample, path=path, save=True,
                         capacity=args.capacity * b * h * n)
    a.has_backward = not args.no_backward
    a.prepare_backward(sets[0][3])
    a.forward()
    if a.has_backward:
        a.backward()
    torch.cuda.synchronize()
    error = verify(a)
    result = dict(workload=name, batch=b, heads=h, n=n, d=d, sample=sample, path=path, alpha=alpha,
                  error=error, verified=bool(error <= 4.5e-3), **a.stats())
    inference = engine.attention(*sets[0][:3], alpha=alpha, sample=sample, path=path, save=False)

    def ours_forward(i):
        q, k, v, _ = sets[i % count]
        inference.set(q, k, v, inference.o)
        inference.forward()

    def ours_both(i):
        q, k, v, do = sets[i % count]
        a.set(q, k, v, a.o)
        a.forward()
        a.prepare_backward(do, a.grads)
        a.backward()

    functions = {"ours forward": ours_forward}
    if not args.no_backward:
        functions["ours both"] = ours_both
    if not args.no_rivals:
        for label, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            leaves = [[t.detach().clone().requires_grad_() for t in s[:3]] for s in sets]

            def forward(i, backend=backend):
                q, k, v, _ = sets[i % count]
                with torch.no_grad(), sdpa_kernel(backend):
                    sdpa(q, k, v, is_causal=True)

            def both(i, backend=backend, leaves=leaves):
                l = leaves[i % count]
                with sdpa_kernel(backend):
                    o = sdpa(*l, is_causal=True)
                    torch.autograd.grad(o, l, sets[i % count][3])

            functions[label + " forward"] = forward
            functions[label + " both"] = both
    for key in list(functions):
        try:
            functions[key](0)
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("   skipped", key, str(error).splitlines()[0])
            del functions[key]
    result["ms"] = timed(functions, args.reps)
    med = {k: v["median"] for k, v in result["ms"].items()}
    line = (f"{name:9s} b{b} h{h} n{n} d{d} s{sample} p{path} err {error:.1e} sup {result['support']:.1f} "
            f"fl {result['flagged']:.2f} |")
    for k, t in med.items():
        line += f" {k.replace('forward', 'f').replace('both', 'f+b')} {t:.3f}"
    for rival in ("fa2", "cudnn"):
        for kind in ("forward", "both"):
            if f"{rival} {kind}" in med and f"ours {kind}" in med:
                result[f"ratio {rival} {kind}"] = med[f"ours {kind}"] / med[f"{rival} {kind}"]
                line += f" | {rival} {kind[0]} {result[f'ratio {rival} {kind}']:.2f}"
    print(line, flush=True)
    return result


def main():
    p = argparse.ArgumentParser()
    p.add_argument("lib")
    p.add_argument("out")
    p.add_argument("--cases", default="main")
    p.add_argument("--reps", type=int, default=10)
    p.add_argument("--no-rivals", action="store_true")
    p.add_argument("--no-backward", action="store_true")
    p.add_argument("--samples", default="0")
    p.add_argument("--path", type=int, default=0)
    p.add_argument("--capacity", type=int, default=64)
    args = p.parse_args()
    engine = Engine(args.lib)
    samples = [int(s) for s in args.samples.split(",")]
    cases = []
    if args.cases in ("main", "all"):
        cases += [("gauss1", 1, 64, 2048, 64), ("gauss1", 1, 16, 8192, 64), ("gauss1", 1, 8, 32768, 64),
                  ("gauss1", 1, 2, 131072, 64), ("gauss4", 1, 8, 32768, 64), ("local", 1, 8, 32768, 64),
                  ("topic16", 1, 8, 32768, 64), ("gauss0.5", 1, 8, 32768, 64)]
    if args.cases in ("dense", "all"):
        cases += [("gauss0.05", 1, 16, 8192, 64), ("gauss0.05", 1, 8, 32768, 64)]
    if args.cases in ("wide", "all"):
        cases += [("gauss1", 1, 8, 32768, 128)]
    if args.cases in ("short", "all"):
        cases += [("gauss1", 128, 16, 90, 32), ("gauss1", 128, 16, 512, 32)]
    results = []
    for case in cases:
        for sample in samples:
            try:
                results.append(run_case(engine, *case, args, sample, path=args.path))
            except RuntimeError as error:
                print("ERROR", case, str(error).splitlines()[0], flush=True)
                torch.cuda.empty_cache()
    driver = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                            capture_output=True, text=True).stdout.strip()
    json.dump(dict(device=driver, torch=torch.__version__, cuda=torch.version.cuda,
                   cudnn=torch.backends.cudnn.version(), date=time.strftime("%Y-%m-%d %H:%M:%S"),
                   command=" ".join(__import__("sys").argv), results=results), open(args.out, "w"), indent=1)


if __name__ == "__main__":
    main()
