"""The table of CPU attention: this library beside PyTorch's flash attention, forward and backward.

One process, the same tensors, runs in turns. Some rows of every result are first compared with a
dense float64 computation. "f" is a forward pass, "f+b" forward and backward. Run through
`./dev bench cpu`.
"""

import argparse
import ctypes
import json
import math
import pathlib
import platform
import resource
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu"))
import workloads  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
# workload, heads, n, head size, type, alpha, goals: f and f+b over PyTorch's (None: none is set)
TABLE = [
    ("gauss1", 2, 8192, 64, F32, 1.5, (0.30, 0.12)),
    ("gauss1", 1, 32768, 64, F32, 1.5, (0.20, 0.07)),
    ("gauss1", 2, 8192, 64, BF16, 1.5, (0.30, 0.15)),
    ("gauss1", 1, 32768, 64, BF16, 1.5, (0.20, 0.07)),
    ("gauss0.05", 2, 8192, 64, F32, 1.5, (1.0, 1.0)),
    ("gauss1", 8, 512, 64, F32, 1.5, (0.8, 0.5)),
    ("gauss1", 8, 512, 128, F32, 1.5, (0.8, 0.5)),
    ("gauss1", 8, 2048, 64, F32, 1.5, (0.8, 0.5)),
    ("gauss1", 8, 2048, 128, F32, 1.5, (0.8, 0.5)),
    ("topic16", 1, 32768, 64, F32, 1.5, (0.15, 0.06)),
    ("local", 1, 32768, 64, F32, 1.5, (0.15, 0.06)),
    ("gauss1", 2, 8192, 64, F32, 1.0, (1.1, 1.1)),
    ("gauss0.25", 2, 8192, 64, F32, 1.5, None),
    ("gauss0.5", 2, 8192, 64, F32, 1.5, None),
    ("gauss2", 2, 8192, 64, F32, 1.5, None),
    ("gauss4", 2, 8192, 64, F32, 1.5, None),
    ("gauss1", 2, 8192, 64, F32, 1.25, None),
    ("gauss1", 2, 8192, 64, F32, 1.75, None),
    ("gauss1", 2, 8192, 64, F32, 2.0, None),
    ("gauss1", 2, 16384, 64, F32, 1.5, None),
    ("gauss1", 1, 65536, 64, F32, 1.5, None),
    # NAPE's slopes 1, 1/2, …, 1/64 on the first seven heads: alone, so that time a row is theirs.
    ("alibi", 7, 8192, 64, F32, 1.5, None),
    ("alibi", 7, 32768, 64, F32, 1.5, None),
    ("alibi", 7, 131072, 64, F32, 1.5, None),
    ("gauss1", 1, 131072, 64, F32, 1.5, None),
    # Powers that take a logarithm and an exponential, and supports of all kinds of size.
    ("gauss0.05", 2, 8192, 64, F32, 1.3, (1.0, 1.0)),
    ("gauss0.25", 2, 8192, 64, F32, 1.3, (1.0, 1.0)),
    ("gauss1", 2, 8192, 64, F32, 1.3, (1.0, 1.0)),
    ("gauss0.05", 2, 8192, 64, F32, 1.25, (1.0, 1.0)),
    ("gauss0.05", 2, 8192, 64, F32, 1.75, (1.0, 1.0)),
    ("gauss0.05", 2, 8192, 64, F32, 1.1, (1.0, 1.0)),
    ("gauss1", 2, 8192, 64, F32, 1.1, (1.0, 1.0)),
    ("gauss1", 2, 8192, 64, F32, 0.5, None),
]
# Norm of the error over the norm of the result; the backward pass of bfloat16 rounds p and dS.
ALLOWED = {F32: (2e-6, 2e-5), BF16: (4.5e-3, 1.1e-2)}
PAUSE_SECONDS = 0.01  # Idle threads of one OpenMP runtime spin for a while before they sleep.


class Engine:
    """One problem of the library, with its buffers."""

    def __init__(self, library, query, key, value, gradient, alpha, slopes, threads):
        self.calls, self.inputs, self.gradient = library, (query, key, value), gradient
        _, heads, length, size = query.shape
        self.slopes = slopes
        pointer = ctypes.c_void_p(slopes.data_ptr() if slopes is not None else None)
        self.sizes = [ctypes.c_int64(heads), ctypes.c_int64(length), ctypes.c_int64(size),
                      ctypes.c_int(query.dtype == BF16), ctypes.c_double(alpha), pointer]
        self.threads = ctypes.c_int(threads)
        library.flash_entmax_bench_saved_bytes.restype = ctypes.c_int64
        self.saved_bytes = library.flash_entmax_bench_saved_bytes(*self.sizes)
        if self.saved_bytes < 0:
            raise SystemExit("planning failed; the message is above")
        storage = torch.empty(self.saved_bytes + 64, dtype=torch.uint8)
        self.storage = storage[-storage.data_ptr() % 64:]
        self.output = torch.empty_like(query)
        self.gradients = [torch.empty_like(t) for t in self.inputs]

    def _call(self, function, tensors, *rest):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        if function(*pointers, *self.sizes, self.threads, *rest) != 0:
            raise SystemExit("a call failed; its message is above")

    def _saved(self):
        return ctypes.c_void_p(self.storage.data_ptr()), ctypes.c_int64(self.saved_bytes)

    def forward(self):
        self._call(self.calls.flash_entmax_bench_attention, (*self.inputs, self.output))

    def both(self):
        self._call(self.calls.flash_entmax_bench_attention_saving, (*self.inputs, self.output),
                   *self._saved())
        self._call(self.calls.flash_entmax_bench_attention_backward,
                   (*self.inputs, self.gradient, *self.gradients), *self._saved())


def threshold(z, order):
    """tau of each row by bisection; order = alpha - 1. Below 0 the sum rises with tau."""
    if order > 0:
        high = z.amax(-1, keepdim=True)
        low = high - 1
    else:
        high = z.amin(-1, keepdim=True) - 1
        low = high + 1 - float(z.shape[-1]) ** -order
    for _ in range(60):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).pow(1 / order).sum(-1, keepdim=True) >= 1
        above ^= order < 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def verify(engine, alpha, slopes, rows=24):
    """Errors of output and gradient of query in some rows, and their mean support."""
    query, key, value = engine.inputs
    _, heads, n, size = query.shape
    worst, support = [0.0, 0.0], []
    for head in sorted({0, heads - 1}):
        some = torch.unique(torch.cat([torch.tensor([0, n - 1]), torch.randint(n, (rows,))]))
        s = size ** -0.5 * query[0, head, some].double() @ key[0, head].double().T
        position = torch.arange(n)
        if slopes is not None:
            s -= slopes[head].double() * (position - some[:, None]).abs()
        s = s.masked_fill(position > some[:, None], -math.inf)
        if alpha == 1.0:
            p = u = torch.softmax(s, -1)
        else:
            order = alpha - 1
            w = (order * s - threshold(order * s, order)).clamp(min=0)
            p = w.pow(1 / order)
            u = torch.where(w > 0, w.pow((2 - alpha) / order), 0)
        dp = engine.gradient[0, head, some].double() @ value[0, head].double().T
        ds = u * (dp - (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True))
        wanted = (p @ value[0, head].double(), size ** -0.5 * ds @ key[0, head].double())
        for i, (got, want) in enumerate(zip((engine.output, engine.gradients[0]), wanted)):
            # As long as a typical row, where the gradient of a row with one key is exactly zero.
            error = float((got[0, head, some].double() - want).norm() / want.norm())
            worst[i] = error if not error <= worst[i] else worst[i]
        support.append(float((p > 0).sum(-1).double().mean()))
    return worst, statistics.mean(support)


def take_turns(functions, seconds, clock):
    """Runs the functions in turns for about this long each; {name: [seconds, …]}."""
    once = 0.0
    for function in functions.values():  # warm-up
        start = clock()
        function()
        once = max(once, clock() - start)
    runs = min(max(3, round(seconds / max(once, 1e-4))), 200)
    times = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            time.sleep(PAUSE_SECONDS)
            start = clock()
            function()
            times[name].append(clock() - start)
    return times


def pytorch(inputs, gradient):
    leaves = [t.detach().requires_grad_() for t in inputs]

    def forward():
        with torch.no_grad():
            scaled_dot_product_attention(*inputs, is_causal=True)

    def both():
        out = scaled_dot_product_attention(*leaves, is_causal=True)
        torch.autograd.grad(out, leaves, gradient)

    return {"PyTorch f": forward, "PyTorch f+b": both}


def peak_mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(library, threads, n=131072, size=64):
    """Peak memory of forward and backward of one head beyond inputs and outputs, in MiB."""
    inputs = workloads.make("gauss1", 1, 1, n, size, F32, 1, "cpu")
    before = peak_mebibytes()
    engine = Engine(library, *inputs, 1.5, None, threads)
    engine.both()
    outputs = 4 * n * size * 4 / 2**20
    return max(0.0, peak_mebibytes() - before - outputs)


def run_row(library, row, threads, seconds, clock):
    name, heads, n, size, dtype, alpha, goal = row
    slopes = torch.tensor([2.0 ** -i for i in range(heads)]) if name == "alibi" else None
    inputs = workloads.make("gauss1" if name == "alibi" else name, 1, heads, n, size, dtype,
                            seed=1, device="cpu")
    engine = Engine(library, *inputs, alpha, slopes, threads)
    engine.both()
    errors, support = verify(engine, alpha, slopes)
    good = all(e <= allowed for e, allowed in zip(errors, ALLOWED[dtype]))
    functions = {"ours f": engine.forward, "ours f+b": engine.both}
    # PyTorch's flash attention knows no slopes, and minutes of it are not needed at 131,072.
    if slopes is None and n <= 65536:
        functions.update(pytorch(inputs[:3], inputs[3]))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        times = take_turns(functions, seconds, clock)
    median = {key: statistics.median(value) for key, value in times.items()}
    ratios = {}
    if "PyTorch f" in median:
        ratios = {key: median["ours " + key] / median["PyTorch " + key] for key in ("f", "f+b")}
    line = (f"{name:9s} n {n:6d} x {heads} d {size:3d} {str(dtype)[6:]:8s} alpha {alpha:4g} "
            f"threads {threads} support {support:7.1f} {'ok   ' if good else 'WRONG'} | "
            + " ".join(f"{key} {value * 1e3:.2f}" for key, value in median.items()) + " ms")
    for key, ratio in ratios.items():
        line += f" | {key} {ratio:.3f}"
        if goal:
            wanted = goal[0 if key == "f" else 1]
            line += f" (goal {wanted}{'' if ratio <= wanted else ', missed'})"
    if not ratios:
        line += f" | f+b a row {median['ours f+b'] / (n * heads) * 1e6:.3f} µs"
    print(line, flush=True)
    return dict(workload=name, heads=heads, n=n, head_size=size, dtype=str(dtype)[6:], alpha=alpha,
                threads=threads, support=support, errors=errors, correct=good, ratios=ratios,
                goal=goal, seconds={key: dict(median=statistics.median(v), low=min(v), high=max(v),
                                              runs=len(v)) for key, v in times.items()})


def processor():
    for line in open("/proc/cpuinfo", encoding="utf-8"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True, help="libflash_entmax_bench_c.so")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", help="only these rows of the table, as in 0,3,5")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each contestant")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    parser.add_argument("--processor-time", action="store_true", help="time of the processor, not of "
                        "the clock: for a machine that others use, with --threads 1")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    library = ctypes.CDLL(arguments.library)
    about = dict(processor=processor(), torch=torch.__version__, threads=arguments.threads,
                 date=time.strftime("%Y-%m-%d"), command="./dev bench cpu " + " ".join(sys.argv[3:]))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    about["memory_mebibytes_131072"] = measure_memory(library, arguments.threads)
    print(f"peak memory beyond inputs and outputs, n 131072, 1 head, f+b: "
          f"{about['memory_mebibytes_131072']:.0f} MiB (goal 256)")
    wanted = ([int(x) for x in arguments.rows.split(",")] if arguments.rows else range(len(TABLE)))
    results = []
    for index in wanted:
        for threads in {arguments.threads, 1} if index < 2 and not arguments.rows else {
                arguments.threads}:
            torch.set_num_threads(threads)
            results.append(run_row(library, TABLE[index], threads, arguments.seconds, clock))
            if arguments.output:
                with open(arguments.output, "w", encoding="utf-8") as file:
                    json.dump(dict(**about, results=results), file, indent=1)
    return 0 if all(r["correct"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
