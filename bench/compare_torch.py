"""Times the mapping beside PyTorch's softmax and deep-spin's entmax: one process, in turns.

Attention: compare_cpu.py.
Run through `./dev bench torch`, which builds the library and installs the rivals.
"""

import argparse
import ctypes
import json
import platform
import statistics
import time

import torch

# After a parallel region idle threads spin for a while; a pause keeps one runtime's from taking
# the other's cores.
PAUSE_SECONDS = 0.02


def take_turns(contestants, repetitions):
    """Seconds of every run: {name: [seconds, ...]}. One uncounted warm-up each."""
    seconds = {name: [] for name in contestants}
    for run in range(repetitions + 1):
        for name, call in contestants.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if run > 0:
                seconds[name].append(elapsed)
    return seconds


def checked(result):
    if result != 0:
        raise SystemExit("a call of flash_entmax failed; its message is above")


class Library:
    def __init__(self, path, threads):
        self.calls = ctypes.CDLL(path)
        self.threads = threads

    def map(self, scores, out, alpha):
        checked(self.calls.flash_entmax_bench_map(
            ctypes.c_void_p(scores.data_ptr()), ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(scores.shape[0]), ctypes.c_int64(scores.shape[1]),
            ctypes.c_double(alpha), ctypes.c_int(self.threads)))

    def map_backward(self, probabilities, grad, out, alpha):
        checked(self.calls.flash_entmax_bench_map_backward(
            ctypes.c_void_p(probabilities.data_ptr()), ctypes.c_void_p(grad.data_ptr()),
            ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.shape[0]),
            ctypes.c_int64(out.shape[1]), ctypes.c_double(alpha), ctypes.c_int(self.threads)))


def report(title, seconds, baseline, results):
    base = statistics.median(seconds[baseline])
    print(f"\n{title}")
    print(f"  {'':34}{'median':>10}{'min':>10}{'max':>10}   times {baseline}")
    for name, runs in seconds.items():
        median = statistics.median(runs)
        print(f"  {name:34}{median * 1e3:8.2f}ms{min(runs) * 1e3:8.2f}ms{max(runs) * 1e3:8.2f}ms"
              f"   {median / base:8.3f}")
        results.append({"workload": title, "name": name, "median_s": median, "min_s": min(runs),
                        "max_s": max(runs), "ratio": median / base, "baseline": baseline})


def softmax_like(probabilities, name):
    error = (probabilities.sum(-1) - 1).abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"{name}: rows sum to 1 only within {error}")


def bench_mapping(library, rows, columns, repetitions, results):
    import entmax

    torch.manual_seed(0)
    scores = torch.randn(rows, columns)
    out = torch.empty_like(scores)
    ours = {}
    for alpha in (1.0, 1.25, 1.5, 2.0):
        library.map(scores, out, alpha)
        softmax_like(out, f"alpha {alpha}")
        ours[f"flash_entmax alpha {alpha:g}"] = lambda a=alpha: library.map(scores, out, a)
    library.map(scores, out, 1.5)
    difference = (out - entmax.entmax15(scores)).abs().max().item()
    print(f"largest difference to entmax.entmax15: {difference:.1e}")
    peer = torch.empty_like(scores)
    seconds = take_turns(
        {"torch.softmax(out=)": lambda: torch.softmax(scores, -1, out=peer), **ours}, repetitions)
    # The rivals take seconds, so they run less often.
    seconds.update(take_turns({"torch.softmax": lambda: torch.softmax(scores, -1),
                               "entmax.entmax15": lambda: entmax.entmax15(scores),
                               "entmax.sparsemax": lambda: entmax.sparsemax(scores),
                               "entmax.entmax_bisect 1.5":
                               lambda: entmax.entmax_bisect(scores, 1.5)}, 3))
    report(f"mapping {rows} x {columns}, float32, N(0, 1)", seconds, "torch.softmax(out=)",
           results)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True, help="libflash_entmax_bench_c.so")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = Library(arguments.library, arguments.threads)
    print(f"PyTorch {torch.__version__}, {arguments.threads} threads, {platform.machine()}; "
          f"medians of {arguments.repetitions} runs in turns")
    results = []
    bench_mapping(library, 4096, 4096, arguments.repetitions, results)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "threads": arguments.threads,
                       "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
