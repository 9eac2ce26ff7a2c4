"""Checks of the distributed ops: ``python -m tests.distributed.op_checks 3`` or ``2x2`` (see processes.py)."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import segattn_ops
from segattn_ops import distributed

from ..families import eager_channel, eager_criss_cross, eager_position, eager_residual
from ..region_features import region_features
from ..tolerance import assert_as_exact_as_eager
from .processes import Check, main

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Uneven; the middle one of three has nothing.
HEIGHTS = {1: (9,), 2: (4, 5), 3: (4, 0, 5), 4: (1, 3, 2, 3)}
WIDTHS = {1: (7,), 2: (5, 2)}


def part_of(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a map of 9 x 7 positions."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    part = tensor.split(HEIGHTS[mesh.shape[0]], 2)[coordinate[0]]
    if mesh.ndim == 2:
        part = part.split(WIDTHS[mesh.shape[1]], 3)[coordinate[1]]
    return part.contiguous()


def drawn(*channels: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, 9, 7, generator=generator, dtype=torch.float64) for c in channels]


@dataclass(frozen=True)
class Op:
    """An op of tensors (B, channels, 9, 7): for whole maps, by eager PyTorch, and for parts."""

    whole: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    parts: Callable[..., Tensor]
    channels: tuple[int, ...] = (6, 6, 10)


def _heads(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def with_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op(*(t.unflatten(1, (2, -1)).flatten(0, 1) for t in (q, k, v)), 0.5).unflatten(0, (-1, 2)).flatten(1, 2)

    return with_heads


def _position(method: str) -> Op:
    return Op(
        lambda q, k, v: segattn_ops.position_attention(q, k, v, 0.5),
        lambda q, k, v: eager_position(q, k, v, 0.5),
        lambda q, k, v, mesh: distributed.position_attention(q, k, v, mesh=mesh, scale=0.5, method=method),
    )


OPS = {
    "position, ring": _position("ring"),
    "position, gather": _position("gather"),
    "position, heads": Op(
        lambda q, k, v: segattn_ops.position_attention(q, k, v, 0.5, num_heads=2),
        _heads(eager_position),
        lambda q, k, v, mesh: distributed.position_attention(q, k, v, mesh=mesh, scale=0.5, num_heads=2),
    ),
    "criss-cross": Op(
        lambda q, k, v: segattn_ops.criss_cross_attention(q, k, v, 0.5),
        lambda q, k, v: eager_criss_cross(q, k, v, 0.5),
        lambda q, k, v, mesh: distributed.criss_cross_attention(q, k, v, mesh=mesh, scale=0.5),
    ),
    "criss-cross, heads": Op(
        lambda q, k, v: segattn_ops.criss_cross_attention(q, k, v, 0.5, num_heads=2),
        _heads(eager_criss_cross),
        lambda q, k, v, mesh: distributed.criss_cross_attention(q, k, v, mesh=mesh, scale=0.5, num_heads=2),
    ),
    "channel": Op(
        lambda q, k, v: segattn_ops.channel_attention(q, k, v, 0.1),
        lambda q, k, v: eager_channel(q, k, v, 0.1),
        lambda q, k, v, mesh: distributed.channel_attention(q, k, v, mesh=mesh, scale=0.1),
        (6, 5, 5),
    ),
    "channel, self": Op(
        lambda x: segattn_ops.channel_attention(x, x, x, -0.1),
        lambda x: eager_channel(x, x, x, -0.1),
        lambda x, mesh: distributed.channel_attention(x, x, x, mesh=mesh, scale=-0.1),
        (6,),
    ),
    "residual channel": Op(
        lambda x: segattn_ops.residual_channel_attention(x, 0.7, -0.1),
        lambda x: eager_residual(x, torch.full((2, 6), 0.7, dtype=x.dtype), -0.1),
        lambda x, mesh: distributed.residual_channel_attention(x, 0.7, mesh=mesh, scale=-0.1),
        (6,),
    ),
}


def with_gradients(op: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output = op(*leaves)
    output.backward(grad_output)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype, mesh: DeviceMesh, energy: float = 12) -> None:
    """Output and gradients of the parts against those of the whole map in float64, and their bits in a second run."""
    whole = [t.to(dtype) for t in inputs]
    exact = with_gradients(op.whole, [t.double() for t in whole], (grad := torch.randn_like(_like(op, whole))).double())
    eager = with_gradients(op.eager, whole, grad)
    parts = [part_of(t, mesh) for t in whole]
    of_parts = functools.partial(op.parts, mesh=mesh)
    got, again = (with_gradients(of_parts, parts, part_of(grad, mesh)) for _ in range(2))
    for i, (g, a, e, x) in enumerate(zip(got, again, eager, exact, strict=True)):
        assert torch.equal(g, a), f"result {i}: other bits in the second run"
        gathered = distributed.unshard(g, mesh=mesh)
        assert_as_exact_as_eager(f"result {i}", gathered, e, x, energy)


def _like(op: Op, whole: Sequence[Tensor]) -> Tensor:
    return op.whole(*whole)


def noise(name: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    op = OPS[name]
    compare(op, drawn(*op.channels), dtype, mesh)


def regions(name: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """Features like those of trained networks, with energies of about 10."""
    op = OPS[name]
    query, key, value = region_features(9, 7, 6, 10, torch.float64, 20)
    features = [query, key, value] if op.channels == (6, 6, 10) else [value[:, :c] for c in op.channels]
    compare(op, [t.expand(2, -1, -1, -1) for t in features], dtype, mesh)


def large_energies(name: str, mesh: DeviceMesh) -> None:
    """Logsumexps of some hundreds, whose rounding errors would weigh the parts wrongly."""
    op = OPS[name]
    query, key, value = drawn(*op.channels)
    compare(op, [query * 20, key * 20, value], torch.float32, mesh, energy=2000)


def with_logsumexp(function: str, options: dict, mesh: DeviceMesh) -> None:
    inputs = [t.requires_grad_() for t in drawn(6, 6, 10)]
    expected = getattr(segattn_ops, function)(*inputs, 0.5, return_logsumexp=True)
    parts = [part_of(t.detach(), mesh).requires_grad_() for t in inputs]
    got = getattr(distributed, function)(*parts, mesh=mesh, scale=0.5, return_logsumexp=True, **options)
    incoming = [torch.randn_like(t) for t in expected]
    torch.autograd.backward(expected, incoming)
    torch.autograd.backward(got, [part_of(t, mesh) for t in incoming])
    pairs = [*zip(got, expected, strict=True), *((p.grad, t.grad) for p, t in zip(parts, inputs, strict=True))]
    for g, e in pairs:
        torch.testing.assert_close(g, part_of(e, mesh), rtol=0, atol=1e-12)
    only = getattr(distributed, function)(*parts, mesh=mesh, scale=0.5, return_logsumexp=True, **options)[1]
    (gradient,) = torch.autograd.grad(only.sum(), parts[0])
    expected_only = getattr(segattn_ops, function)(*inputs, 0.5, return_logsumexp=True)[1]
    (whole,) = torch.autograd.grad(expected_only.sum(), inputs[0])
    torch.testing.assert_close(gradient, part_of(whole, mesh), rtol=0, atol=1e-12)


def padding(method: str, mesh: DeviceMesh) -> None:
    """The first sample has padded keys, NaN, on every rank, and the second one nothing else."""
    query, key, value = drawn(6, 6, 10)
    mask = torch.zeros(2, 9, 7, dtype=torch.bool)
    mask[0, 2:, 3:] = mask[1] = True
    key = key.masked_fill(mask.unsqueeze(1), torch.nan)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    expected = segattn_ops.position_attention(*inputs, 0.5, key_padding_mask=mask)
    parts = [part_of(t.detach(), mesh).requires_grad_() for t in inputs]
    part_of_mask = part_of(mask.unsqueeze(1), mesh).squeeze(1)
    got = distributed.position_attention(*parts, mesh=mesh, scale=0.5, key_padding_mask=part_of_mask, method=method)
    torch.testing.assert_close(got, part_of(expected, mesh), rtol=0, atol=1e-12)
    incoming = torch.randn_like(expected)
    expected.backward(incoming)
    got.backward(part_of(incoming, mesh))
    for part, whole in zip(parts, inputs, strict=True):
        torch.testing.assert_close(part.grad, part_of(whole.grad, mesh), rtol=0, atol=1e-12)


def needed_gradients(name: str, mesh: DeviceMesh) -> None:
    op = OPS[name]
    inputs = drawn(*op.channels)
    for needed in range(len(inputs)):
        whole = [t.clone().requires_grad_(i == needed) for i, t in enumerate(inputs)]
        parts = [part_of(t, mesh).requires_grad_(i == needed) for i, t in enumerate(inputs)]
        expected, got = op.whole(*whole), op.parts(*parts, mesh=mesh)
        incoming = torch.randn_like(expected)
        expected.backward(incoming)
        got.backward(part_of(incoming, mesh))
        torch.testing.assert_close(parts[needed].grad, part_of(whole[needed].grad, mesh), rtol=0, atol=1e-12)
        assert all(p.grad is None for i, p in enumerate(parts) if i != needed)
    with torch.no_grad():
        assert not op.parts(*(part_of(t, mesh) for t in inputs), mesh=mesh).requires_grad


def memory_formats(name: str, mesh: DeviceMesh) -> None:
    op = OPS[name]
    parts = [part_of(t, mesh) for t in drawn(*op.channels)]
    expected = op.parts(*parts, mesh=mesh)
    got = op.parts(*(t.contiguous(memory_format=torch.channels_last) for t in parts), mesh=mesh)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, check_stride=False)
    assert got.numel() == 0 or got.is_contiguous(memory_format=torch.channels_last)
    strided = [torch.stack([t, t], -1)[..., 0] for t in parts]
    torch.testing.assert_close(op.parts(*strided, mesh=mesh), expected, rtol=0, atol=1e-12)


def autocast(name: str, mesh: DeviceMesh) -> None:
    op = OPS[name]
    parts = [part_of(t, mesh).float() for t in drawn(*op.channels)]
    with torch.autocast("cpu", torch.bfloat16):
        got = op.parts(*parts, mesh=mesh)
    if name == "residual channel":
        assert got.dtype == torch.float32
    else:
        assert torch.equal(got, op.parts(*(t.bfloat16() for t in parts), mesh=mesh))


def dtensors(name: str, mesh: DeviceMesh) -> None:
    op = OPS[name]
    placements = [Shard(2), Shard(3)][: mesh.ndim]
    whole = [t.requires_grad_() for t in drawn(*op.channels)]
    sharded = [distribute_tensor(t.detach(), mesh, placements).requires_grad_() for t in whole]
    expected, got = op.whole(*whole), op.parts(*sharded, mesh=None)
    assert isinstance(got, DTensor) and got.placements == tuple(placements) and got.shape == expected.shape
    torch.testing.assert_close(got.full_tensor(), expected, rtol=0, atol=1e-12)
    incoming = torch.randn_like(expected)
    expected.backward(incoming)
    got.backward(distribute_tensor(incoming, mesh, placements))
    for part, t in zip(sharded, whole, strict=True):
        torch.testing.assert_close(part.grad.full_tensor(), t.grad, rtol=0, atol=1e-12)


def compiled(name: str, backend: str, mesh: DeviceMesh) -> None:
    """One graph, with its gradients."""
    op = OPS[name]
    torch._dynamo.reset()
    function = torch.compile(functools.partial(op.parts, mesh=mesh), backend=backend, fullgraph=True)
    parts = [part_of(t, mesh) for t in drawn(*op.channels)]
    grad = torch.randn_like(op.parts(*parts, mesh=mesh))
    expected = with_gradients(functools.partial(op.parts, mesh=mesh), parts, grad)
    got = with_gradients(function, parts, grad)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-13)


def graphs_of_other_sizes(mesh: DeviceMesh) -> None:
    """Each rank had its sizes before, beside others of the other rank, so none compiles again."""
    for function, message in (
        (lambda x: distributed.position_attention(x, x, x, mesh=mesh, method="gather"), "position_attention"),
        (lambda x: distributed.unshard(x, mesh=mesh), "unshard"),
    ):
        torch._dynamo.reset()
        graph = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
        for rows in ((4, 2), (3, 4)):
            graph(torch.ones(1, 2, rows[dist.get_rank()], 3))
        error = f"{message}: the ranks run graphs that were compiled for different sizes"
        assert_raises(RuntimeError, error, lambda: graph(torch.ones(1, 2, 4, 3)))  # noqa: B023


def long_description(mesh: DeviceMesh) -> None:
    x = part_of(drawn(4)[0], mesh)
    heads: object = "x" * 5000 if dist.get_rank() == 0 else 1
    kind = TypeError if dist.get_rank() == 0 else RuntimeError
    call = functools.partial(distributed.position_attention, x, x, x, mesh=mesh, num_heads=heads)
    assert_raises(kind, "num_heads must be an int", call)


def errors_of_one_rank(mesh: DeviceMesh) -> None:
    """Those that it finds before it communicates."""
    x = part_of(drawn(4)[0], mesh)
    first = dist.get_rank() == 0
    for function, kind, wrong, message in (
        (distributed.position_attention, ValueError, {"method": "x"}, "method must be one of"),
        (distributed.position_attention, TypeError, {"scale": "x"}, "scale must be a number"),
        (distributed.position_attention, TypeError, {"key_padding_mask": 5}, "key_padding_mask must be a torch.Tensor"),
        (distributed.criss_cross_attention, TypeError, {"query": None}, "query must be a torch.Tensor"),
        (distributed.channel_attention, TypeError, {"scale": "x"}, "scale must be a number"),
    ):
        arguments = {"query": x, "key": x, "value": x, **(wrong if first else {})}
        assert_raises(kind if first else RuntimeError, message, functools.partial(function, **arguments, mesh=mesh))
    unshard = functools.partial(distributed.unshard, None if first else x, mesh=mesh)
    assert_raises(TypeError if first else RuntimeError, "tensor must be a torch.Tensor", unshard)


def permuted_mesh(name: str, mesh: DeviceMesh) -> None:
    """The order is that of the mesh, not that of the ranks."""
    other = DeviceMesh("cpu", mesh.mesh.flip(tuple(range(mesh.ndim))))
    op = OPS[name]
    inputs = drawn(*op.channels)
    compare(op, inputs, torch.float64, other)
    assert torch.equal(distributed.unshard(part_of(inputs[0], other), mesh=other), inputs[0])


def shards(mesh: DeviceMesh) -> None:
    (whole,) = drawn(3)
    whole.requires_grad_()
    part = distributed.shard(whole, mesh=mesh)
    back = distributed.unshard(part, mesh=mesh)
    assert torch.equal(back, whole)
    weights = torch.randn_like(whole)
    (back * weights).sum().backward()
    (whole_weights,) = torch.autograd.grad(distributed.shard(weights.requires_grad_(), mesh=mesh).sum(), weights)
    assert torch.equal(whole.grad, weights * whole_weights)


def assert_raises(kind: type[Exception], message: str, action: Callable[[], object]) -> None:
    try:
        action()
    except kind as error:
        assert message in str(error), f"got: {error}"
    else:
        raise AssertionError(f"no error; expected: {message}")


def on_one_rank(
    change: Callable[[list[Tensor]], list[Tensor]], here: tuple[type[Exception], str], elsewhere: str, mesh: DeviceMesh
) -> None:
    """Wrong arguments on the last rank: every rank raises at once, and the group goes on."""
    for name in ("position, ring", "criss-cross"):
        op = OPS[name]
        parts = [part_of(t, mesh) for t in drawn(*op.channels)]
        last = dist.get_rank() == dist.get_world_size() - 1
        kind, message = here if last else (RuntimeError, elsewhere)
        assert_raises(kind, message, lambda: op.parts(*(change(parts) if last else parts), mesh=mesh))  # noqa: B023
        op.parts(*parts, mesh=mesh)


WRONG: dict[str, tuple[Callable[[list[Tensor]], list[Tensor]], tuple[type[Exception], str], str]] = {
    "another dtype": (
        lambda t: [x.float() for x in t],
        (RuntimeError, "the calls of the ranks must be of the same op"),
        "query [2, 6",
    ),
    "mixed dtypes": (
        lambda t: [t[0], t[1].float(), t[2]],
        (RuntimeError, "key must be float64 like query (got float32)"),
        "raised an error: distributed.",
    ),
    "another batch": (
        lambda t: [x[:1] for x in t],
        (RuntimeError, "of the same dtypes, batch and channels"),
        "of the same dtypes, batch and channels",
    ),
    "other channels": (
        lambda t: [t[0], t[1][:, :5], t[2]],
        (RuntimeError, "key must have 6 channels like query (got 5)"),
        "key must have 6 channels like query (got 5)",
    ),
    "another gradient": (
        lambda t: [t[0].clone().requires_grad_(), *t[1:]],
        (RuntimeError, "require a gradient"),
        "require a gradient",
    ),
}


def other_options(mesh: DeviceMesh) -> None:
    parts = [part_of(t, mesh) for t in drawn(6, 6, 10)]
    scale = 0.5 if dist.get_rank() == 0 else 0.25
    assert_raises(RuntimeError, "scale=0.25", lambda: distributed.position_attention(*parts, mesh=mesh, scale=scale))
    function = distributed.position_attention if dist.get_rank() == 0 else distributed.criss_cross_attention
    assert_raises(RuntimeError, "of the same op", lambda: function(*parts, mesh=mesh))


def parts_that_form_no_map(mesh: DeviceMesh) -> None:
    parts = [part_of(t, mesh) for t in drawn(6, 6, 10)]
    if dist.get_rank() == dist.get_world_size() - 1:
        parts = [t[..., :-1] for t in parts]
    last = dist.get_world_size() - 1
    assert_raises(
        RuntimeError, f"rank {last} must have a part of", lambda: distributed.criss_cross_attention(*parts, mesh=mesh)
    )
    assert_raises(RuntimeError, f"rank {last} must have a part of", lambda: distributed.unshard(parts[0], mesh=mesh))


def wrong_arguments(mesh: DeviceMesh) -> None:
    """The same on every rank."""
    query, key, value = parts = [part_of(t, mesh) for t in drawn(6, 6, 10)]
    attention = distributed.position_attention
    assert_raises(TypeError, "mesh must be given", lambda: attention(*parts))
    assert_raises(TypeError, "mesh must be a torch.distributed.DeviceMesh (got int)", lambda: attention(*parts, mesh=3))
    assert_raises(TypeError, "query must be a torch.Tensor", lambda: attention(None, key, value, mesh=mesh))
    assert_raises(ValueError, "method must be one of", lambda: attention(*parts, mesh=mesh, method="tree"))
    assert_raises(TypeError, "scale must be a number", lambda: attention(*parts, mesh=mesh, scale="1"))
    assert_raises(RuntimeError, "scale must be finite", lambda: attention(*parts, mesh=mesh, scale=float("inf")))
    assert_raises(RuntimeError, "divisible by num_heads = 4", lambda: attention(*parts, mesh=mesh, num_heads=4))
    meta = [t.to("meta") for t in parts]
    assert_raises(RuntimeError, "mesh must be of device type meta", lambda: attention(*meta, mesh=mesh))
    cube = DeviceMesh("cpu", mesh.mesh.reshape(1, 1, -1))
    assert_raises(ValueError, "mesh must have 1 dimension", lambda: attention(*parts, mesh=cube))
    nothing = [t[:, :, :0] for t in (key, value)]
    assert_raises(RuntimeError, "at least 1 position on some rank", lambda: attention(query, *nothing, mesh=mesh))
    placed = [distribute_tensor(t, mesh, [Replicate()] * mesh.ndim) for t in drawn(6, 6, 10)]
    assert_raises(RuntimeError, "the DTensors must have Shard(2)", lambda: attention(*placed))
    assert_raises(
        TypeError, "DTensors or plain tensors, not both (plain: key", lambda: attention(placed[0], key, value)
    )


def second_derivatives_are_refused(mesh: DeviceMesh) -> None:
    """Also where the gradient that arrives is a constant."""
    parts = [part_of(t, mesh).requires_grad_() for t in drawn(6, 6, 10)]
    for attention in (distributed.position_attention, distributed.criss_cross_attention):
        output = attention(*parts, mesh=mesh)
        (gradient,) = torch.autograd.grad(output.sum(), parts[0], create_graph=True)
        assert_raises(NotImplementedError, "the op has no second derivative", gradient.sum().backward)


def second_derivatives_of_channel_attention(mesh: DeviceMesh) -> None:
    (whole,) = drawn(6)
    part = part_of(whole, mesh).requires_grad_()
    whole.requires_grad_()
    for x, op in (
        (whole, segattn_ops.residual_channel_attention),
        (part, functools.partial(distributed.residual_channel_attention, mesh=mesh)),
    ):
        (gradient,) = torch.autograd.grad(op(x, 0.7, scale=-0.1).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    torch.testing.assert_close(part.grad, part_of(whole.grad, mesh), rtol=1e-10, atol=1e-10)


def a_mesh_of_one(mesh: DeviceMesh) -> None:
    """Of the dimension of space; the other one holds replicas."""
    ranks = mesh.mesh.numel()
    both = DeviceMesh("cpu", torch.arange(ranks).reshape(ranks, 1), mesh_dim_names=("data", "space"))
    inputs = drawn(6, 6, 10, seed=dist.get_rank())
    for name in ("position, ring", "criss-cross"):
        got = OPS[name].parts(*inputs, mesh=both["space"])
        torch.testing.assert_close(got, OPS[name].whole(*inputs), rtol=0, atol=1e-13)


def a_plane_beside_replicas(mesh: DeviceMesh) -> None:
    """Two replicas, each on a mesh of two dimensions, which needs a process group of its own."""
    dims = ("data", "height", "width")
    plane = DeviceMesh("cpu", torch.arange(4).reshape(2, 1, 2), mesh_dim_names=dims)["height", "width"]
    inputs = drawn(6, 6, 10, seed=dist.get_rank() // 2)
    parts = [t.split(WIDTHS[2], 3)[dist.get_rank() % 2].contiguous() for t in inputs]
    for name in ("position, ring", "criss-cross", "channel"):
        operands = (inputs[0], inputs[1], inputs[1]) if name == "channel" else inputs
        got = OPS[name].parts(*((parts[0], parts[1], parts[1]) if name == "channel" else parts), mesh=plane)
        expected = OPS[name].whole(*operands).split(WIDTHS[2], 3)[dist.get_rank() % 2]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def checks(shape: Sequence[int]) -> dict[str, Check]:
    found: dict[str, Check] = {}
    for name in OPS:
        for dtype in DTYPES:
            found[f"{name}, {dtype}"] = functools.partial(noise, name, dtype)
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{name}, regions, {dtype}"] = functools.partial(regions, name, dtype)
        found[f"{name}, permuted mesh"] = functools.partial(permuted_mesh, name)
        found[f"{name}, needed gradients"] = functools.partial(needed_gradients, name)
        found[f"{name}, memory formats"] = functools.partial(memory_formats, name)
        found[f"{name}, autocast"] = functools.partial(autocast, name)
        found[f"{name}, DTensor"] = functools.partial(dtensors, name)
    for name in ("position, ring", "position, gather", "criss-cross"):
        found[f"{name}, large energies"] = functools.partial(large_energies, name)
    for method in ("ring", "gather"):
        found[f"position, {method}, logsumexp"] = functools.partial(
            with_logsumexp, "position_attention", {"method": method}
        )
        found[f"position, {method}, padding"] = functools.partial(padding, method)
    found["criss-cross, logsumexp"] = functools.partial(with_logsumexp, "criss_cross_attention", {})
    for name, wrong in WRONG.items():
        found[f"wrong: {name}"] = functools.partial(on_one_rank, *wrong)
    for check in (
        shards,
        other_options,
        parts_that_form_no_map,
        wrong_arguments,
        second_derivatives_are_refused,
        second_derivatives_of_channel_attention,
        a_mesh_of_one,
    ):
        found[check.__name__.replace("_", " ")] = check
    if tuple(shape) == (2,):
        for name in ("position, ring", "position, gather", "channel"):
            found[f"{name}, compiled"] = functools.partial(compiled, name, "aot_eager")
        found["graphs of other sizes"] = graphs_of_other_sizes
        found["errors of one rank"] = errors_of_one_rank
        found["long description"] = long_description
        found["channel, inductor"] = functools.partial(compiled, "channel", "inductor")
    if tuple(shape) == (2, 2):
        found["a plane beside replicas"] = a_plane_beside_replicas
        found["criss-cross, compiled"] = functools.partial(compiled, "criss-cross", "aot_eager")
    return found


if __name__ == "__main__":
    main(checks, sys.argv[1])
