"""Times the package on a GPU beside PyTorch's own attention, all through Python.

    python python/bench/train_gpt_gpu.py --output result.json

1. attention: forward, and forward and backward, beside PyTorch's flash and cuDNN backends. Medians
   of CUDA events; rivals in turns; the host's part is hidden, so that only GPU time counts. Some
   rows are first checked against a float64 computation.
2. overhead: what a call costs the host.
3. training: a small GPT compiled by torch.compile without graph breaks learns a local text, once
   with α = 1.5 and once with scaled_dot_product_attention, steps in turns. Time of a whole step
   (forward, backward, optimiser), in blocks of steps, because the sparsity changes as the model
   learns; and how many keys a query keeps before and after. With and without normalised queries
   and keys (Dehghani et al. 2023).

`--device cpu --quick` runs all of it on a toy, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_entmax

# heads, length, goals over PyTorch's flash backend: forward, forward and backward.
ATTENTION_ROWS = [(16, 8192, 0.75, 0.45), (8, 32768, 0.40, 0.20)]
TRAINING_GOAL = 1.0
ALLOWED_ERROR = {"output": 4.5e-3, "gradient of query": 1.1e-2}

# ---------------------------------------------------------------------------------------- timing


class Clock:
    """Milliseconds of pieces of work: by CUDA events, or on CPUs by the wall clock."""

    def __init__(self, device: str, hide_host: bool) -> None:
        self.cuda = device == "cuda"
        self.hide_host = hide_host
        self.marks: dict[str, list[Any]] = {}

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.hide_host:  # Keeps the GPU busy while the host queues the work.
                torch.cuda._sleep(2_000_000)
            start.record()
            result = function()
            end.record()
            self.marks.setdefault(name, []).append((start, end))
        else:
            begin = time.perf_counter()
            result = function()
            self.marks.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)
        return result

    def milliseconds(self) -> dict[str, list[float]]:
        if not self.cuda:
            return self.marks
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) for start, end in pairs]
            for name, pairs in self.marks.items()
        }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------- attention


def check_rows(tensors: list[Tensor], output: Tensor, grad_query: Tensor) -> dict[str, float]:
    """Relative errors of some rows of two heads against float64."""
    query, key, value, grad = (t.detach().cpu().double() for t in tensors)
    length, size = query.shape[2:]
    rows = torch.unique(torch.cat([torch.tensor([0, length - 1]), torch.randint(length, (24,))]))
    worst = dict.fromkeys(ALLOWED_ERROR, 0.0)
    for head in {0, query.shape[1] - 1}:
        leaf = query[0, head, rows].requires_grad_()
        scores = leaf @ key[0, head].T * size**-0.5
        mask = torch.arange(length) <= rows[:, None]
        expected = flash_entmax.entmax(scores, 1.5, mask=mask) @ value[0, head]
        (expected_grad,) = torch.autograd.grad(expected, leaf, grad[0, head, rows])
        for name, got, want in (
            ("output", output, expected),
            ("gradient of query", grad_query, expected_grad),
        ):
            difference = got[0, head, rows.to(got.device)].detach().cpu().double() - want.detach()
            worst[name] = max(worst[name], float(difference.norm() / want.norm()))
    return worst


def attention_row(
    heads: int, length: int, goals: tuple[float, float], device: str, repetitions: int
) -> dict[str, Any]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sets = [
        [
            torch.randn(1, heads, length, 64, device=device).to(dtype).requires_grad_(i < 3)
            for i in range(4)
        ]
        for _ in range(3)  # In turns, so that no input waits in a cache.
    ]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_entmax.attention(query, key, value, alpha=1.5, causal=True)

    def torch_with(backend: SDPBackend | None) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        return attend

    rivals: dict[str, Callable[..., Tensor]] = {"ours": ours}
    if device == "cuda":
        rivals["flash"] = torch_with(SDPBackend.FLASH_ATTENTION)
        rivals["cudnn"] = torch_with(SDPBackend.CUDNN_ATTENTION)
    else:
        rivals["flash"] = torch_with(None)
    output = ours(*sets[0][:3])
    (grad_query,) = torch.autograd.grad(output, sets[0][0], sets[0][3])
    errors = check_rows(sets[0], output, grad_query)
    correct = all(errors[name] <= ALLOWED_ERROR[name] for name in errors)

    def forward(attend: Callable[..., Tensor], tensors: list[Tensor]) -> None:
        with torch.no_grad():
            attend(*tensors[:3])

    def both(attend: Callable[..., Tensor], tensors: list[Tensor]) -> None:
        torch.autograd.grad(attend(*tensors[:3]), tensors[:3], tensors[3])

    functions = {}
    for name, attend in rivals.items():
        for label, pass_ in (("forward", forward), ("forward+backward", both)):
            try:
                pass_(attend, sets[0])
                synchronize(device)
                functions[f"{name} {label}"] = (pass_, attend)
            except RuntimeError as error:  # A rival may not run on this device; say so and go on.
                if name == "ours":
                    raise
                print(f"  {name} {label} cannot run: {str(error).splitlines()[0][:120]}")
    clock = Clock(device, hide_host=True)
    for i in range(repetitions + 2):
        if i == 2:
            clock.marks.clear()
        tensors = sets[i % len(sets)]
        for name, (pass_, attend) in functions.items():
            clock.run(name, lambda p=pass_, a=attend, t=tensors: p(a, t))
    medians = {name: statistics.median(times) for name, times in clock.milliseconds().items()}
    ratios = {
        f"over {rival} {label}": medians[f"ours {label}"] / medians[f"{rival} {label}"]
        for rival in ("flash", "cudnn")
        for label in ("forward", "forward+backward")
        if f"{rival} {label}" in medians
    }
    wanted = dict(zip(("over flash forward", "over flash forward+backward"), goals, strict=True))
    print(f"attention, {heads} heads of 64, {length:,} tokens, {dtype}, causal")
    print("  " + ("rows checked" if correct else "WRONG RESULTS") + f": {errors}")
    for name, median in medians.items():
        print(f"  {name:24s} {median:9.3f} ms")
    for name, ratio in ratios.items():
        goal = f"  (goal {wanted[name]})" if name in wanted else ""
        print(f"  {name:28s} {ratio:7.3f}{goal}")
    return {
        "heads": heads, "length": length, "dtype": str(dtype), "errors": errors,
        "correct": correct, "ms": medians, "ratios": ratios, "goals": wanted,
    }  # fmt: skip


# -------------------------------------------------------------------------------------- overhead


def overhead(device: str, calls: int) -> dict[str, float]:
    """Microseconds that the host spends on a call that gives the GPU next to nothing to do."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensor = torch.randn(1, 1, 16, 64, device=device).to(dtype)
    leaf = tensor.clone().requires_grad_()
    grad = torch.randn_like(tensor)

    def both(attend: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attend(leaf, leaf, leaf), leaf, grad)

    functions: dict[str, Callable[[], object]] = {}
    for name, attend in (
        ("ours", flash_entmax.attention),
        ("PyTorch's", F.scaled_dot_product_attention),
    ):
        functions[f"{name}, forward"] = lambda a=attend: a(tensor, tensor, tensor)
        functions[f"{name}, forward for a gradient"] = lambda a=attend: a(leaf, leaf, leaf)
        functions[f"{name}, forward and backward"] = lambda a=attend: both(a)
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(10):
        for name, function in functions.items():
            function()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.perf_counter() - start) / calls * 1e6)
            synchronize(device)
    print("host time of a call, 16 tokens")
    for name, microseconds in best.items():
        print(f"  {name:36s} {microseconds:8.1f} µs")
    return best


# -------------------------------------------------------------------------------------- training


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, sparse: bool, normalised: bool) -> None:
        super().__init__()
        self.heads, self.sparse, self.normalised = heads, sparse, normalised
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.seen: list[float] | None = None  # Keys kept a query, where someone asks.

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.project(hidden).chunk(3, dim=-1)
        )
        if self.normalised:
            query, key = (F.rms_norm(t, t.shape[-1:]) for t in (query, key))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.sparse:
            mixed = flash_entmax.attention(query, key, value, alpha=1.5, causal=True)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if self.seen is not None:
            entries = flash_entmax.support(query, key, alpha=1.5, causal=True).key_index.numel()
            self.seen.append(entries / (batch * self.heads * length))
        projected: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(tensor.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, sparse: bool, normalised: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, sparse, normalised)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.before(hidden), cos, sin)
        mixed: Tensor = hidden + self.mix(self.between(hidden))
        return mixed


class GPT(nn.Module):
    """Bytes in, the mean loss of the next byte out; rotary positions."""

    def __init__(self, o: argparse.Namespace, sparse: bool, normalised: bool) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, o.width)
        self.blocks = nn.ModuleList(
            Block(o.width, o.heads, sparse, normalised) for _ in range(o.layers)
        )
        self.norm = nn.LayerNorm(o.width)
        self.head = nn.Linear(o.width, 256, bias=False)
        size = o.width // o.heads
        frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angle = torch.arange(o.length)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.byte(text[:, :-1])
        for block in self.blocks:
            hidden = block(hidden, self.cos, self.sin)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def text_of_the_library(device: str) -> Tensor:
    """Sources of Python's own library: every machine that runs this has them."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)


def train(o: argparse.Namespace, normalised: bool) -> dict[str, Any]:
    cast = torch.autocast(o.device, dtype=torch.bfloat16)
    data = text_of_the_library(o.device)
    generator = torch.Generator().manual_seed(1)

    def batch() -> Tensor:
        first = torch.randint(len(data) - o.length - 1, (o.batch,), generator=generator)
        return torch.stack([data[i : i + o.length + 1] for i in first.tolist()])

    models, compiled, optimisers = {}, {}, {}
    for name in ("sdpa", "alpha 1.5"):
        torch.manual_seed(0)
        models[name] = GPT(o, name != "sdpa", normalised).to(o.device)
        torch._dynamo.reset()
        compiled[name] = torch.compile(models[name], fullgraph=True, mode=o.mode)
        optimisers[name] = torch.optim.AdamW(
            models[name].parameters(), lr=6e-4, betas=(0.9, 0.95), fused=o.device == "cuda"
        )

    def step(name: str, inputs: Tensor) -> Tensor:
        with cast:
            loss: Tensor = compiled[name](inputs)
        loss.backward()
        optimisers[name].step()
        optimisers[name].zero_grad(set_to_none=True)
        return loss.detach().clone()

    def kept() -> list[float]:
        """Keys kept a query, by layer, on one batch, not compiled."""
        modules = [m for m in models["alpha 1.5"].modules() if isinstance(m, Attention)]
        for module in modules:
            module.seen = []
        with torch.no_grad(), cast:
            models["alpha 1.5"](batch()[:1])
        found = [module.seen[0] for module in modules if module.seen]
        for module in modules:
            module.seen = None
        return found

    parameters = sum(p.numel() for p in models["sdpa"].parameters())
    print(
        f"training, {o.layers} layers of {o.width}, {o.heads} heads, {parameters / 1e6:.1f} M "
        f"parameters, {o.batch} × {o.length:,} bytes a step, "
        f"{'normalised' if normalised else 'plain'} queries and keys"
    )
    kept_before = kept()
    start = time.perf_counter()
    # Not counted: compiling. It changes the models as any step does, both alike.
    for _ in range(3):
        inputs = batch()
        for name in models:
            step(name, inputs)
    synchronize(o.device)
    compiling = time.perf_counter() - start
    blocks = []
    losses: dict[str, list[Tensor]] = {name: [] for name in models}
    for _ in range(o.blocks):
        clock = Clock(o.device, hide_host=False)
        for i in range(o.steps):
            inputs = batch()
            order = list(models) if i % 2 == 0 else list(models)[::-1]
            for name in order:
                loss = clock.run(name, lambda n=name, x=inputs: step(n, x))
                losses[name].append(loss)
        medians = {name: statistics.median(times) for name, times in clock.milliseconds().items()}
        bits = {
            name: float(torch.stack(values[-o.steps :]).mean()) / 0.693147
            for name, values in losses.items()
        }
        ratio = medians["alpha 1.5"] / medians["sdpa"]
        blocks.append({"ms": medians, "ratio": ratio, "bits_per_byte": bits})
        print(
            f"  steps {len(losses['sdpa']) - o.steps:4d}–{len(losses['sdpa']) - 1:4d}  "
            + "  ".join(
                f"{name} {medians[name]:8.2f} ms ({bits[name]:.2f} bits a byte)" for name in models
            )
            + f"  ratio {ratio:.3f}"
        )
    kept_after = kept()
    for label, keys in (("before", kept_before), ("after", kept_after)):
        print(f"  keys kept a query {label}: " + " ".join(f"{k:.0f}" for k in keys))
    last = blocks[-1]["ratio"]
    middle = statistics.median(block["ratio"] for block in blocks)
    print(f"  a step over sdpa's: median of blocks {middle:.3f}, last {last:.3f} (goal ≤ 1)")
    return {
        "normalised": normalised, "parameters": parameters, "compile_seconds": compiling,
        "blocks": blocks, "ratio_median": middle, "ratio_last": last, "goal": TRAINING_GOAL,
        "keys_kept_before": kept_before, "keys_kept_after": kept_after,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ main


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    parser.add_argument("--output", help="write the results here as JSON")
    parser.add_argument("--only", help="some of attention,overhead,training")
    parser.add_argument("--normalised", choices=["off", "on", "both"], default="both")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=20, help="of each attention")
    parser.add_argument("--mode", help="of torch.compile, as in reduce-overhead")
    o = parser.parse_args()
    o.rows, o.calls = ATTENTION_ROWS, 200
    if o.quick:
        o.layers, o.width, o.heads, o.length, o.steps, o.blocks = 2, 32, 2, 64, 2, 2
        o.rows, o.repetitions, o.calls = [(2, 256, 0.75, 0.45)], 2, 20
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda; no GPU is here (--device cpu --quick runs anywhere)")
    return o


def main() -> int:
    o = options()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    about = {
        "device": torch.cuda.get_device_name() if o.device == "cuda" else "CPU",
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "flash_entmax": flash_entmax.__version__,
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv),
    }  # fmt: skip
    print(about)
    parts = o.only.split(",") if o.only else ["attention", "overhead", "training"]
    results: dict[str, Any] = dict(about)

    def save() -> None:
        if o.output:
            Path(o.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if "attention" in parts:
        results["attention"] = []
        for heads, length, *goals in o.rows:
            row = attention_row(heads, length, tuple(goals), o.device, o.repetitions)
            results["attention"].append(row)
            save()
    if "overhead" in parts:
        results["overhead_us"] = overhead(o.device, o.calls)
        save()
    if "training" in parts:
        results["training"] = []
        for normalised in {"off": [False], "on": [True], "both": [True, False]}[o.normalised]:
            results["training"].append(train(o, normalised))
            save()
    return 0 if all(row["correct"] for row in results.get("attention", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
