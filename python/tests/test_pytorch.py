"""The operators with PyTorch's own machinery: compile, export, vmap, autocast, checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.func import grad, jacrev, vmap

import flash_entmax
from flash_entmax import _library
from reference import assert_close

operators = _library.operators


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def attention_arguments(
    tensors: list[Tensor], save: bool, extra: tuple[Any, ...] | None = None
) -> tuple[Any, ...]:
    extra = (None,) * 8 if extra is None else extra
    return (*tensors, *extra, 1.5, None, True, None, None, 0.0, 0, 0, save)


OPERATOR_CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "mapping": lambda: (torch.randn(3, 5, requires_grad=True), None, None, 0, 1.5, -1),
    "mapping_forward": lambda: (torch.randn(3, 5), None, torch.rand(3, 5) < 0.5, 0, 1.5, 1),
    "mapping_with_statistics": lambda: (
        torch.randn(3, 5, requires_grad=True), torch.full((1, 5), 1.7, requires_grad=True), None,
        0, 0.0, 0,
    ),
    "mapping_backward": lambda: (
        torch.randn(3, 5).softmax(-1).requires_grad_(), torch.randn(3, 5, requires_grad=True), None,
        0, 1.5, -1, False,
    ),
    "fenchel_young_loss": lambda: (
        torch.randn(3, 5, requires_grad=True), torch.arange(3), 0, 1.5, -100,
    ),
    "fenchel_young_loss_forward": lambda: (torch.randn(3, 5), torch.arange(3), 1, 2.0, -100),
    "attention": lambda: attention_arguments(qkv(2, 3, 6, 4), True),
    "attention_forward": lambda: attention_arguments(
        [t.detach().transpose(1, 2) for t in qkv(2, 3, 6, 4)], False
    ),
    "attention_support": lambda: attention_arguments(
        [t.detach() for t in qkv(2, 3, 6, 4)], False
    )[:-1],
}  # fmt: skip


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """The bytes kept for the backward pass that are not used have no defined value, except so."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(operators, name).default, OPERATOR_CASES[name]())


@pytest.mark.usefixtures("filled_memory")
def test_opcheck_with_every_gradient() -> None:
    extra = (
        torch.tensor([1.4, 1.5, 1.6], requires_grad=True),
        (0.5 + torch.rand(1, 3, 6)).requires_grad_(),
        torch.randn(6, 6, requires_grad=True),
        torch.rand(3).requires_grad_(),
        None,
        torch.ones(2, 6, dtype=torch.bool),
        None,
        None,
    )
    torch.library.opcheck(
        operators.attention.default, attention_arguments(qkv(2, 3, 6, 4), True, extra)
    )


def test_opcheck_of_backward() -> None:
    tensors = [t.detach() for t in qkv(2, 3, 6, 4)]
    arguments = attention_arguments(tensors, True)
    output, _, saved = operators.attention_forward(*arguments)
    torch.library.opcheck(
        operators.attention_backward.default,
        (*arguments[:-1], torch.randn_like(output), saved, 0b111),
    )


def test_backward_without_what_the_forward_kept() -> None:
    """The gradient does not need what was kept, only time."""
    tensors = [t.detach() for t in qkv(2, 3, 6, 4)]
    arguments = attention_arguments(tensors, True)
    output, _, saved = operators.attention_forward(*arguments)
    gradient = torch.randn_like(output)
    kept, again = (
        operators.attention_backward(*arguments[:-1], gradient, buffer, 0b111)
        for buffer in (saved, saved[:0])
    )
    for one, other in zip(kept[:3], again[:3], strict=True):
        assert torch.equal(one, other)


class Model(torch.nn.Module):
    """Everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = flash_entmax.nn.EntmaxAttention(
            16, 4, kv_heads=2, causal=True, learnable_alpha=True, positions="nape",
            scaling="asentmax",
        )  # fmt: skip
        self.gate = torch.nn.Linear(16, 16)
        self.loss = flash_entmax.nn.EntmaxLoss(1.5)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        hidden = self.attention(hidden) * flash_entmax.entmax(self.gate(hidden), 1.3)
        return self.loss(hidden.flatten(0, 1), target)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend: str) -> None:
    torch._dynamo.reset()
    model = Model()
    hidden, target = torch.randn(2, 9, 16, requires_grad=True), torch.randint(16, (18,))
    expected = model(hidden, target)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected_grads = torch.autograd.grad(expected, (hidden, *parameters))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    actual = compiled(hidden, target)
    assert_close(actual, expected, 1e-5)
    grads = torch.autograd.grad(actual, (hidden, *parameters))
    for name, one, other in zip(("hidden", *names), grads, expected_grads, strict=True):
        print(name)
        assert_close(one, other, 1e-4)


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_entmax.attention(query, key, value, causal=True).square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 30):
        tensors = qkv(2, 3, length, 8)
        grads = torch.autograd.grad(compiled(*tensors), tensors)
        others = torch.autograd.grad(function(*tensors), tensors)
        for one, other in zip(grads, others, strict=True):
            assert_close(one, other, 1e-5)


def test_compile_for_inference() -> None:
    torch._dynamo.reset()
    tensors = [t.detach() for t in qkv(2, 3, 7, 8)]
    compiled = torch.compile(
        lambda *t: flash_entmax.attention(*t, layout="bnhd"), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), flash_entmax.attention(*tensors, layout="bnhd"))


def test_compile_of_vmap() -> None:
    torch._dynamo.reset()
    query, scores = torch.randn(3, 2, 4, 6, 8), torch.randn(3, 5, 6)
    target = torch.randint(6, (3, 5))

    def function(q: Tensor, s: Tensor, t: Tensor) -> Tensor:
        mixed = vmap(lambda r: flash_entmax.attention(r, r, r))(q).sum()
        return mixed + vmap(flash_entmax.entmax15_loss)(vmap(flash_entmax.entmax)(s), t).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # No rule would be a warning.
        actual = compiled(query, scores, target)
    assert_close(actual, function(query, scores, target), 1e-5)


def test_export_with_dynamic_shapes(tmp_path: Path) -> None:
    module = flash_entmax.nn.EntmaxAttention(16, 4, causal=True, positions="rope")
    batch, length = (torch.export.Dim(name, min=1, max=512) for name in ("batch", "length"))
    program = torch.export.export(
        module, (torch.randn(2, 9, 16),), dynamic_shapes={"hidden": {0: batch, 1: length}}
    )
    torch.export.save(program, tmp_path / "module.pt2")
    again = torch.export.load(tmp_path / "module.pt2")
    hidden = torch.randn(3, 20, 16)
    assert_close(again.module()(hidden), module(hidden), 1e-5)


def test_one_openmp() -> None:
    """Two copies of OpenMP would mean two sets of threads, and set_num_threads for one of them."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists the libraries of a process")
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line}
    assert len({f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp"))}) == 1


def test_export() -> None:
    model = Model().eval()
    hidden, target = torch.randn(2, 9, 16), torch.randint(16, (18,))
    program = torch.export.export(model, (hidden, target))
    assert_close(program.module()(hidden, target), model(hidden, target), 1e-5)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "flash_entmax.attention.default" in names
    assert "flash_entmax.mapping.default" in names


def test_fake_and_meta_tensors() -> None:
    for device in ("meta",):
        query = torch.randn(2, 3, 7, 8, device=device, requires_grad=True)
        output = flash_entmax.attention(query, query, query)
        assert output.shape == query.shape and output.device.type == "meta"
        output.sum().backward()
        assert flash_entmax.entmax(query).shape == query.shape


@pytest.mark.parametrize("name", ["mapping", "attention"])
def test_vmap_over_grad(name: str) -> None:
    if name == "mapping":
        batch = torch.randn(5, 3, 4, dtype=torch.float64)

        def function(tensor: Tensor) -> Tensor:
            return flash_entmax.entmax(tensor, 1.7, 0).square().sum()
    else:
        batch = torch.randn(5, 2, 3, 6, 4, dtype=torch.float64)

        def function(tensor: Tensor) -> Tensor:
            return flash_entmax.attention(tensor, 2 * tensor, tensor, causal=True).square().sum()

    expected = torch.stack([grad(function)(entry) for entry in batch])
    assert_close(vmap(grad(function))(batch), expected, 1e-10)
    assert_close(grad(lambda b: vmap(function)(b).sum())(batch), expected, 1e-10)


def test_vmap_of_mapping_with_alphas_and_masks() -> None:
    scores = torch.randn(4, 3, 5, dtype=torch.float64)
    alpha = 1.1 + torch.rand(4, 3, 1, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    both = vmap(lambda s, a, m: flash_entmax.entmax(s, a, mask=m))(scores, alpha, mask)
    expected = torch.stack(
        [flash_entmax.entmax(scores[i], alpha[i], mask=mask[i]) for i in range(4)]
    )
    assert torch.equal(both, expected)
    only_alpha = vmap(lambda a: flash_entmax.entmax(scores[0], a))(alpha)
    expected = torch.stack([flash_entmax.entmax(scores[0], a) for a in alpha])
    assert torch.equal(only_alpha, expected)
    gradient = vmap(grad(lambda a, s: flash_entmax.entmax(s, a).square().sum()))(alpha, scores)
    expected = torch.stack(
        [
            grad(lambda a, s=s: flash_entmax.entmax(s, a).square().sum())(a)
            for a, s in zip(alpha, scores, strict=True)
        ]
    )
    assert_close(gradient, expected, 1e-12)


def test_vmap_of_losses() -> None:
    scores, target = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    function = flash_entmax.entmax15_loss
    expected = torch.stack([function(s, t) for s, t in zip(scores, target, strict=True)])
    assert_close(vmap(function)(scores, target), expected, 1e-6)
    gradient = vmap(grad(function))(scores, target)
    expected = torch.stack([grad(function)(s, t) for s, t in zip(scores, target, strict=True)])
    assert_close(gradient, expected, 1e-6)


@pytest.mark.parametrize("batched", ["query", "parameters", "lengths", "grad only"])
def test_vmap_of_attention(batched: str) -> None:
    query = torch.randn(5, 2, 4, 6, 8, dtype=torch.float64)
    key = torch.randn(5, 2, 2, 7, 8, dtype=torch.float64)
    alpha = 1.1 + 0.8 * torch.rand(5, 4, dtype=torch.float64)
    bias = torch.randn(5, 4, 1, 7, dtype=torch.float64)
    scale = torch.rand(5, 6, dtype=torch.float64)
    lengths = torch.randint(1, 8, (5, 2))

    def function(q: Tensor, k: Tensor, a: Tensor, b: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return flash_entmax.attention(
            q, k, k, alpha=a, bias=b, query_scale=s, key_lengths=n, causal=True
        )

    everything = (query, key, alpha, bias, scale, lengths)
    chosen = {
        "query": (0, None, None, None, None, None),
        "parameters": (None, 0, 0, 0, 0, None),
        "lengths": (0, 0, None, None, None, 0),
        "grad only": (None,) * 6,
    }[batched]
    inputs = tuple(
        tensor if dim == 0 else tensor[0] for tensor, dim in zip(everything, chosen, strict=True)
    )
    argnums = (0, 1, 2, 3, 4)
    if batched == "grad only":  # The rows of a Jacobian.
        jacobian = jacrev(function, argnums=argnums)(*inputs)
        for position in argnums:
            leaf = inputs[position].clone().requires_grad_()
            others = list(inputs)
            others[position] = leaf
            output = function(*others)
            (row,) = torch.autograd.grad(output[1, 2, 3, 4], leaf)
            assert_close(jacobian[position][1, 2, 3, 4], row, 1e-10)
        return
    entries = [
        tuple(t[i] if dim == 0 else t for t, dim in zip(inputs, chosen, strict=True))
        for i in range(5)
    ]
    expected = torch.stack([function(*entry) for entry in entries])
    assert_close(vmap(function, in_dims=chosen)(*inputs), expected, 1e-12)

    def loss(*arguments: Tensor) -> Tensor:
        return function(*arguments).square().sum()

    gradients = vmap(grad(loss, argnums=argnums), in_dims=chosen)(*inputs)
    for position in argnums:
        print("argument", position)
        expected = torch.stack([grad(loss, argnums=position)(*entry) for entry in entries])
        assert_close(gradients[position], expected, 1e-9)


def test_second_derivatives_under_transforms() -> None:
    scores = torch.randn(5, dtype=torch.float64)

    def function(s: Tensor) -> Tensor:
        return flash_entmax.entmax(s, 1.3).square().sum()

    hessian = torch.autograd.functional.hessian(function, scores)
    assert_close(jacrev(grad(function))(scores), hessian, 1e-12)
    query = torch.randn(1, 1, 3, 4)
    with pytest.raises(NotImplementedError, match="attention cannot be differentiated twice"):
        grad(lambda q: grad(lambda r: flash_entmax.attention(r, r, r).sum())(q).sum())(query)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    tensors = qkv(2, 3, 7, 8)
    alpha = torch.full((3,), 1.5, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        output = flash_entmax.attention(*tensors, alpha=alpha)
        assert output.dtype == dtype
        assert flash_entmax.entmax(tensors[0].to(dtype)).dtype == torch.float32  # As softmax.
        loss = flash_entmax.entmax15_loss(tensors[0][0, 0].to(dtype), torch.arange(7))
        assert loss.dtype == torch.float32
        double = torch.randn(1, 1, 3, 4, dtype=torch.float64)
        assert flash_entmax.attention(double, double, double).dtype == torch.float64
    output.float().square().sum().backward()
    for leaf in (*tensors, alpha):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    tensors = qkv(2, 3, 7, 8)
    plain = torch.autograd.grad(flash_entmax.attention(*tensors).square().sum(), tensors)
    output = torch.utils.checkpoint.checkpoint(
        flash_entmax.attention, *tensors, use_reentrant=reentrant
    )
    output.square().sum().backward()
    for tensor, expected in zip(tensors, plain, strict=True):
        assert tensor.grad is not None and torch.equal(tensor.grad, expected)


def test_fully_sharded_data_parallel(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        model = Model()
        hidden, target = torch.randn(2, 9, 16), torch.randint(16, (18,))
        expected = model(hidden, target)
        expected.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        mesh = distributed.init_device_mesh("cpu", (1,))
        fully_shard(model.attention, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = model(hidden, target)
        assert_close(loss, expected, 1e-6)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close(parameter.grad.full_tensor(), grads[name], 1e-5)
    finally:
        distributed.destroy_process_group()


def test_saved_tensors_are_small_and_freed() -> None:
    """What is kept for the backward pass grows with the rows, not with rows times keys."""
    sizes: list[int] = []
    tensors = qkv(1, 1, 1024, 16)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flash_entmax.attention(*tensors)
    assert max(sizes) < 1024 * 1024
