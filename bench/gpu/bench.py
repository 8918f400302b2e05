"""Times the GPU engine beside FlashAttention-2, cuDNN and AdaSplash in one process.

Every row is checked against a float64 reference before it is timed. Medians of CUDA events; the
rivals run alternately; inputs rotate over several sets, beyond the level-2 cache. "f" is a forward
pass, "f+b" forward and backward. Usage: bench.py --help
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/gpu"))

import engine as fe  # noqa: E402
import reference  # noqa: E402
import workloads  # noqa: E402

# workload, batch, heads, n, head size, goals over FlashAttention-2 (f, f+b) and over cuDNN
TABLE = [
    ("gauss1", 128, 16, 90, 32, (1.0, 1.0), None),
    ("gauss1", 128, 16, 512, 32, (1.0, 1.0), None),
    ("gauss1", 1, 64, 2048, 64, (1.1, 0.9), None),
    ("gauss1", 1, 16, 8192, 64, (0.75, 0.45), (1.0, 0.70)),
    ("gauss1", 1, 8, 32768, 64, (0.40, 0.20), (0.62, 0.30)),
    ("gauss1", 1, 2, 131072, 64, (0.30, 0.11), (0.46, 0.17)),
    ("gauss4", 1, 8, 32768, 64, (0.28, 0.11), None),
    ("local", 1, 8, 32768, 64, (0.24, 0.12), None),
    ("topic16", 1, 8, 32768, 64, (0.36, 0.20), None),
    ("gauss0.5", 1, 8, 32768, 64, None, None),
    ("gauss0.05", 1, 16, 8192, 64, (1.5, 1.2), None),
    ("gauss0.05", 1, 8, 32768, 64, (1.5, 1.2), None),
    ("gauss1", 1, 8, 32768, 128, (0.50, 0.25), (0.8, 0.4)),
    # With ALiBi slopes; the rivals run without a bias. "nape": the heads with and those without in
    # a call each. "alibi" has slopes in every head, always the same four, so that its time a row
    # shows what the length alone costs.
    ("nape", 1, 8, 8192, 64, None, None),
    ("nape", 1, 8, 32768, 64, None, None),
    ("nape", 1, 2, 131072, 64, None, None),
    ("alibi", 1, 4, 8192, 64, None, None),
    ("alibi", 1, 4, 32768, 64, None, None),
    ("alibi", 1, 4, 131072, 64, None, None),
    # With a factor a row (query_scale); the rivals run without one.
    ("asentmax", 1, 16, 8192, 64, None, None),
    ("asentmax", 1, 8, 32768, 64, None, None),
]
# AdaSplash tunes every kernel over a long list; these settings are the ones it picks most often.
ADASPLASH_BLOCKS = {(128, 64), (64, 64), (128, 32)}
ADASPLASH_CONFIGS = 6  # the above with two or three stages
ALLOWED_ERROR = {"output": 4.5e-3, "gradient of query": 1.1e-2}


def timed(functions, repetitions):
    """Statistics in ms for each function; one repetition runs them one after the other."""
    for _ in range(2):
        for function in functions.values():
            function(0)
    torch.cuda.synchronize()
    events = {name: [] for name in functions}
    for i in range(repetitions):
        for name, function in functions.items():
            start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            # Keeps the GPU busy while the host queues the call, so that only GPU time counts.
            torch.cuda._sleep(2_000_000)
            start.record()
            function(i)
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    result = {}
    for name, pairs in events.items():
        times = [start.elapsed_time(end) for start, end in pairs]
        result[name] = dict(median=statistics.median(times), low=min(times), high=max(times))
    return result


def verify(attention, inputs, slopes, factors, rows=48):
    """Largest errors of some rows of two heads against the dense float64 result."""
    q, k, v, gradient = inputs
    n = q.shape[2]
    worst = {}
    for head in sorted({0, q.shape[1] - 1}):
        some = torch.unique(torch.cat([torch.tensor([0, n - 1]), torch.randint(n, (rows,))])).cuda()
        scale = q.shape[3] ** -0.5 * torch.ones(len(some), 1, device="cuda", dtype=torch.float64)
        if factors is not None:
            scale = scale * factors[-1, head, some, None].double()
        z = 0.5 * scale * (q[-1, head, some].double() @ k[-1, head].double().T)
        if slopes is not None:
            distance = (some[:, None] - torch.arange(n, device="cuda")).abs()
            z = z - 0.5 * slopes[head].double() * distance
        z = z.masked_fill(torch.arange(n, device="cuda") > some[:, None], -float("inf"))
        tau = reference.solve_threshold(z, 0.5)
        u = (z - tau).clamp(min=0)
        p = u * u
        values = v[-1, head].double()
        dp = gradient[-1, head, some].double() @ values.T
        ds = u * (dp - (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True))
        dq = scale * (ds @ k[-1, head].double())
        for name, got, want in (("output", attention.output, p @ values),
                                ("gradient of query", attention.gradients[0], dq)):
            error = float((got[-1, head, some].double() - want).norm() / want.norm())
            worst[name] = error if not error <= worst.get(name, 0.0) else worst[name]
    return worst, float((u > 0).double().sum(-1).mean())


def load_adasplash(only=None):
    """AdaSplash's function, or None; only: the one of its settings to keep."""
    try:
        import adasplash.adasplash_v2 as module
        from adasplash import adasplash
    except ImportError as error:
        print("AdaSplash is not timed:", error)
        return None
    for name in dir(module):
        kernel = getattr(module, name)
        if hasattr(kernel, "configs"):
            kept = [c for c in kernel.configs if c.num_warps == 4 and c.num_stages in (2, 3) and
                    (c.kwargs.get("BLOCK_M"), c.kwargs.get("BLOCK_N")) in ADASPLASH_BLOCKS]
            kept = kept or kernel.configs[:4]
            kernel.configs = kept if only is None else [kept[only % len(kept)]]
    return adasplash


def compile_adasplash(rows):
    """Fills Triton's cache, a process for each setting: tuning compiles them one after another."""
    start = time.time()
    command = [sys.executable, __file__, "--rows", ",".join(map(str, rows))]
    processes = [subprocess.Popen([*command, "--adasplash-setting", str(i)],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                 for i in range(ADASPLASH_CONFIGS)]
    for process in processes:
        try:
            process.wait(timeout=max(1, start + 300 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"AdaSplash compiled in {time.time() - start:.0f} s", flush=True)


def run_adasplash(rows, setting):
    """One forward and backward of every row with one setting."""
    adasplash = load_adasplash(setting)
    for _, batch, heads, n, size, *_ in rows:
        tensors = [torch.randn(batch, heads, n, size, device="cuda", dtype=torch.bfloat16)
                   for _ in range(4)]
        inputs = [t.requires_grad_() for t in tensors[:3]]
        try:
            adasplash(*inputs).backward(tensors[3])
            torch.cuda.synchronize()
        except Exception as error:  # A setting or a shape that it cannot run.
            print(error)


class HeadParts:
    """One attention over several ranges of heads, a call each, with the interface of fe.Attention.

    Heads without slopes then run on the kernels made for them, as the Python package has it.
    """

    def __init__(self, library, query, key, value, ranges, slopes, **settings):
        self.output = torch.empty_like(query)
        self.ranges = ranges
        self.parts = [
            fe.Attention(library, *self._slices((query, key, value), r), slopes=s,
                         output=self._slices((self.output,), r)[0], **settings)
            for r, s in zip(ranges, slopes)]
        self.engine = "+".join(part.engine for part in self.parts)
        self.plan = fe.PlanArg()
        for field in ("saved_bytes", "forward_bytes", "backward_bytes"):
            setattr(self.plan, field, sum(getattr(part.plan, field) for part in self.parts))

    @staticmethod
    def _slices(tensors, heads):
        return [t[:, heads[0]:heads[1]] for t in tensors]

    def use(self, query, key, value, output):
        self.output = output
        for part, heads in zip(self.parts, self.ranges):
            part.use(*self._slices((query, key, value, output), heads))

    def forward(self):
        for part in self.parts:
            part.forward()

    def prepare_backward(self, gradient, gradients=None):
        self.gradients = gradients or [torch.empty_like(gradient) for _ in range(3)]
        for part, heads in zip(self.parts, self.ranges):
            part.prepare_backward(*self._slices((gradient,), heads),
                                  self._slices(self.gradients, heads))

    def backward(self):
        for part in self.parts:
            part.backward()


def rivals(sets, adasplash):
    def of(attend):
        leaves = [[t.detach().clone().requires_grad_() for t in s[:3]] for s in sets]

        def forward(i):
            with torch.no_grad():
                attend(*sets[i % len(sets)][:3])

        def both(i):
            inputs = leaves[i % len(sets)]
            torch.autograd.grad(attend(*inputs), inputs, sets[i % len(sets)][3])

        return forward, both

    def sdpa(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True)
        return attend

    result = {"fa2": of(sdpa(SDPBackend.FLASH_ATTENTION)),
              "cudnn": of(sdpa(SDPBackend.CUDNN_ATTENTION))}
    if adasplash is not None:
        result["adasplash"] = of(lambda q, k, v: adasplash(q, k, v))
    return result


def run_row(library, row, arguments, adasplash):
    name, batch, heads, n, size, goal_fa2, goal_cudnn = row
    count = 3 if batch * heads * n * size < 7e7 else 2
    sets = [workloads.make(name, batch, heads, n, size, seed=10 + s) for s in range(count)]
    slopes, factors = workloads.slopes(name, heads), workloads.factors(name, batch, heads, n)
    settings = dict(causal=True, engine=arguments.engine, capacity=-1)
    if name == "nape":
        half = heads // 2
        make = lambda save: HeadParts(library, *sets[0][:3], ((0, half), (half, heads)),
                                      (slopes[:half], None), save=save, **settings)
    else:
        make = lambda save: fe.Attention(library, *sets[0][:3], save=save, slopes=slopes,
                                         query_scale=factors, **settings)
    training, inference = make(True), make(False)
    training.prepare_backward(sets[0][3])
    training.forward()
    training.backward()
    torch.cuda.synchronize()
    errors, support = verify(training, sets[0], slopes, factors)
    good = all(errors[key] <= allowed for key, allowed in ALLOWED_ERROR.items())
    result = dict(workload=name, batch=batch, heads=heads, n=n, head_size=size,
                  engine=training.engine, errors=errors, correct=good, support=support,
                  saved_bytes=training.plan.saved_bytes, forward_bytes=training.plan.forward_bytes,
                  backward_bytes=training.plan.backward_bytes)

    def forward(i):
        q, k, v, _ = sets[i % count]
        inference.use(q, k, v, inference.output)
        inference.forward()

    def both(i):
        q, k, v, gradient = sets[i % count]
        training.use(q, k, v, training.output)
        training.forward()
        training.prepare_backward(gradient, training.gradients)
        training.backward()

    functions = {"ours f": forward, "ours f+b": both}
    for rival, (rival_forward, rival_both) in rivals(sets, adasplash).items():
        for label, function in ((" f", rival_forward), (" f+b", rival_both)):
            try:
                function(0)
                torch.cuda.synchronize()
                functions[rival + label] = function
            except Exception as error:  # A rival may not run a shape; say so and go on.
                print(f"  {rival}{label} cannot run: {str(error).splitlines()[0][:120]}")
    result["ms"] = timed(functions, arguments.repetitions)
    median = {key: value["median"] for key, value in result["ms"].items()}
    result["ratios"] = {key: median["ours " + key.split()[1]] / value
                        for key, value in median.items() if not key.startswith("ours")}
    goals = {}
    for rival, goal in (("fa2", goal_fa2), ("cudnn", goal_cudnn)):
        if goal:
            goals.update({rival + " f": goal[0], rival + " f+b": goal[1]})
    result["goals"] = goals
    per_row = {key: 1e3 * median["ours " + key] / (batch * heads * n) for key in ("f", "f+b")}
    result["microseconds_per_row"] = per_row
    if slopes is not None or factors is not None:
        result["rivals"] = "without a bias" if factors is None else "without factors"
    line = f"{name:9s} n {n:6d} x {batch * heads:4d} d {size:3d} {training.engine:17s} "
    line += f"support {support:6.1f} {'ok ' if good else 'WRONG'} "
    line += " ".join(f"{key} {value:.3f}" for key, value in median.items())
    line += " | " + " ".join(
        f"{key} {value:.3f}" + (f" (goal {goals[key]})" if key in goals else "")
        for key, value in result["ratios"].items())
    if "rivals" in result:
        line += (f" | us a row f {per_row['f']:.4f} f+b {per_row['f+b']:.4f}; "
                 f"rivals {result['rivals']}")
    print(line, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default=str(ROOT / "build/gpu/bindings/c/libflash_entmax_c.so"))
    parser.add_argument("--output", help="write the results here as JSON")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--rows", help="only these rows of the table, as in 0,3,5")
    parser.add_argument("--engine", default="automatic", choices=list(fe.ENGINES))
    parser.add_argument("--adasplash", action="store_true", help="time AdaSplash too")
    parser.add_argument("--adasplash-setting", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = ([int(x) for x in arguments.rows.split(",")] if arguments.rows
              else range(len(TABLE)))
    if arguments.adasplash_setting is not None:
        run_adasplash([TABLE[i] for i in wanted], arguments.adasplash_setting)
        return 0
    library = fe.Library(arguments.library)
    adasplash = load_adasplash() if arguments.adasplash else None
    if adasplash is not None:
        compile_adasplash(wanted)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    about = dict(device=subprocess.run(query, capture_output=True, text=True).stdout.strip(),
                 torch=torch.__version__, cuda=torch.version.cuda,
                 cudnn=torch.backends.cudnn.version(), date=time.strftime("%Y-%m-%d"),
                 command="python3 bench/gpu/bench.py " + " ".join(sys.argv[1:]))
    print(about)
    results = []
    for index in wanted:
        try:
            results.append(run_row(library, TABLE[index], arguments, adasplash))
        except (fe.EngineError, torch.OutOfMemoryError) as error:
            results.append(dict(row=TABLE[index][:5], failed=str(error)))
            print(TABLE[index][:5], "failed:", error)
        torch.cuda.empty_cache()
        if arguments.output:
            with open(arguments.output, "w", encoding="utf-8") as file:
                json.dump(dict(**about, results=results), file, indent=1)
    return 0 if all(r.get("correct") for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
