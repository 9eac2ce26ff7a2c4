"""Checks every output and gradient against float64.

Channel and criss-cross attention are computed completely in float64. For position attention that would cost more than
the measurement, so it is sampled: the output and the query gradient at 64 positions (each depends only on its own row
of the attention map), and the key and value gradients at 64 positions, which need their column of the attention map,
and for that the logsumexp and delta of every row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import rivals
from .workloads import PAIRWISE, Workload

SAMPLES = 64
# Up to this many weights the statistics of all rows are computed in float64, beyond in float32.
FLOAT64_WEIGHTS = 2**26
# Added to twice eager's error: the relative L2 error from the dtype's rounding alone at any size, against float64 of
# the same, already rounded, inputs.
FLOOR = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}
# The limit without an eager result (it would not fit). Query gradients are sums of N terms that partly cancel: float32
# rounding alone gives 2.4e-5 at N = 32768 (torch.compile 1.9e-5 at N = 9409). ROUNDING times the largest energy is
# added, for the effect of rounded energies on their softmax (channel energies are sums over all positions: thousands).
ALONE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3}
ROUNDING = {"float64": 2e-16, "float32": 1e-7, "bfloat16": 1e-7, "float16": 1e-7}  # energies are kept in float32
GROSS = 0.1  # a rival with a larger relative error computes something else
FEW = 1024  # positions
ZERO = 1e-12  # a float64 gradient below this share of its cancelling terms is zero up to rounding


class WrongResult(RuntimeError):
    """A formulation's result is wrong."""


class _Uncentred(TorchFunctionMode):
    """A softmax whose backward omits the subtraction of delta, leaving the first of the two terms that cancel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.softmax:
            energy = args[0]
            return torch.exp(energy - energy.logsumexp(-1, keepdim=True).detach())
        return func(*args, **(kwargs or {}))


def _flat64(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(2).double()


def _scale(gradient: Tensor, terms: Tensor, positions: int) -> float:
    """The norm of the terms of which a gradient is the difference, to which its error is relative; 0 where it is
    relative to the gradient itself.

    Rounding is a share of the terms. With few positions they may cancel to any degree, and where the gradient is zero
    in exact arithmetic (a softmax over one key, or over equal ones) its own norm is only rounding.
    """
    size = float(terms.norm())
    return size if positions <= FEW or float(gradient.norm()) <= ZERO * size else 0.0


def expected(workload: Workload, leaves: dict[str, Tensor], grad_output: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The reference of all formulations: float64 tensors on the leaves' device, and in ``scales``, by the gradient's
    name in :func:`errors`, a lower bound of the norm to which a gradient's error is relative."""
    if workload.op in PAIRWISE:
        return _expected_position(leaves["query"], leaves["key"], leaves["value"], grad_output, seed)
    inputs = {name: leaf.detach().double() for name, leaf in leaves.items()}
    if workload.op == "rcca":
        inputs["gamma"] = inputs["gamma"].expand(grad_output.shape).contiguous()  # for the gradient per element
    output, gradients = _eager64(workload, inputs, grad_output)
    reference = {"output": output.detach(), **gradients, "scales": {}}
    if workload.op == "rcca":
        # A scalar sum of terms that may cancel to any degree. The terms' rounding errors are independent, so the error
        # of the sum has a standard deviation of the dtype's rounding times the terms' L2 norm. A single value, unlike a
        # norm over many, may reach three standard deviations, while eager's error is near zero.
        reference["gamma"] = gradients["gamma"].sum().view(1)
        reference["scales"]["grad_gamma"] = 3 * float(gradients["gamma"].norm())
    # Biases are compared together with their weights and need no scale: the gradient of the key's bias is always zero.
    sizes = {name: float(gradient.norm()) for name, gradient in gradients.items() if not name.endswith("_bias")}
    positions = grad_output.flatten(2).shape[2]
    if positions <= FEW or min(sizes.values()) < 1e-6 * max(sizes.values()):
        with _Uncentred():
            _, terms = _eager64(workload, inputs, grad_output)
        for name in sizes.keys() - {"gamma"}:
            reference["scales"][f"grad_{name}"] = _scale(gradients[name], terms[name], positions)
    if workload.op == "channel":
        reference["energy"] = inputs["input"].flatten(2).square().sum(-1).max()  # the largest entry of X X^T
    return reference


def _eager64(workload: Workload, inputs: dict[str, Tensor], grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = rivals.formulation("eager", workload.op)(*leaves.values())
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.double())
    return output, dict(zip(leaves, gradients, strict=True))


def _expected_position(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, seed: int) -> dict[str, Tensor]:
    n, m = query.flatten(2).shape[2], key.flatten(2).shape[2]
    generator = torch.Generator().manual_seed(seed)
    index, key_index = (
        torch.randperm(count, generator=generator)[:SAMPLES].sort().values.to(query.device) for count in (n, m)
    )
    k, v = _flat64(key), _flat64(value)
    q, g = _flat64(query[..., :]).index_select(2, index), _flat64(grad_output).index_select(2, index)
    attention = torch.softmax(q.transpose(1, 2) @ k, dim=-1)  # (B, samples, N)
    grad_attention = g.transpose(1, 2) @ v
    centred = grad_attention - (attention * grad_attention).sum(-1, keepdim=True)
    grad_query = k @ (attention * centred).transpose(1, 2)
    reference = {
        "index": index,
        "key_index": key_index,
        "output": v @ attention.transpose(1, 2),
        "query": grad_query,
        "scales": {"grad_query": _scale(grad_query, k @ (attention * grad_attention).transpose(1, 2), n)},
    }
    dtype = torch.float32 if n * m > FLOAT64_WEIGHTS and query.dtype != torch.float64 else torch.float64
    reference["logsumexp"], reference["delta"] = _row_statistics(query, key, value, grad_output, dtype)
    return reference


def _row_statistics(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(B, N) twice: the logsumexp of each row of energies, and delta.

    delta must not be computed from the output under test: an output rounded to 16 bits hides the effect of that
    rounding on the gradients. Blocks of queries avoid storing the attention map. In float32 the errors, a few 1e-7, are
    far below the limits of the results, and N^2 exponentials take half the time.
    """
    q, k, v, g = (operand.detach().flatten(2).to(dtype) for operand in (query, key, value, grad_output))
    block = max(1, 2**22 // k.shape[2])
    logsumexp, delta = [], []
    for rows, grads in zip(q.split(block, dim=2), g.split(block, dim=2), strict=True):
        energy = rows.transpose(1, 2) @ k
        logsumexp.append(energy.logsumexp(-1))
        attention = energy.sub_(logsumexp[-1].unsqueeze(-1)).exp_()
        delta.append((grads * (v @ attention.transpose(1, 2))).sum(1))
    return torch.cat(logsumexp, dim=1).double(), torch.cat(delta, dim=1).double()


def errors(
    workload: Workload,
    leaves: dict[str, Tensor],
    grad_output: Tensor,
    reference: dict[str, Tensor],
    output: Tensor,
    gradients: tuple[Tensor, ...] | None,
) -> dict[str, float]:
    """||x - reference|| / ||reference|| of the output and of each gradient (None: there are none), and the largest
    energy.

    The error of a gradient whose terms cancel is relative to these (``scales`` of :func:`expected`).
    """
    if output.shape != grad_output.shape:
        raise WrongResult(f"{workload.label}: output has shape {list(output.shape)}, not {list(grad_output.shape)}")
    if gradients is None:
        sampled = output.flatten(2).index_select(2, reference["index"]) if workload.op in PAIRWISE else output
        found = {"output": _relative_error(sampled, reference["output"])}
        return found | {"energy": float(reference.get("energy", 0.0))}
    got = dict(zip(leaves, gradients, strict=True))
    if workload.op in PAIRWISE:
        pairs, scales = _position_pairs(leaves, grad_output, reference, output, got)
    else:
        scales = reference["scales"]
        pairs = {"output": (output, reference["output"])}
        pairs |= {f"grad_{name}": (gradient, reference[name]) for name, gradient in got.items()}
        pairs = _with_biases_joined(pairs)
    found = {name: _relative_error(*pair, scales.get(name, 0.0)) for name, pair in pairs.items()}
    return found | {"energy": float(reference.get("energy", 0.0))}


def _position_pairs(
    leaves, grad_output, reference, output, got
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    q, g = _flat64(leaves["query"]), _flat64(grad_output)
    k, v = (_flat64(leaves[name]).index_select(2, reference["key_index"]) for name in ("key", "value"))
    attention = torch.exp(q.transpose(1, 2) @ k - reference["logsumexp"].unsqueeze(-1))  # (B, N, samples)
    grad_attention = g.transpose(1, 2) @ v
    grad_key = q @ (attention * (grad_attention - reference["delta"].unsqueeze(-1)))
    scales = reference["scales"] | {"grad_key": _scale(grad_key, q @ (attention * grad_attention), q.shape[2])}

    def sample(tensor: Tensor, index: str) -> Tensor:
        return tensor.flatten(2).index_select(2, reference[index])

    pairs = {
        "output": (sample(output, "index"), reference["output"]),
        "grad_query": (sample(got["query"], "index"), reference["query"]),
        "grad_key": (sample(got["key"], "key_index"), grad_key),
        "grad_value": (sample(got["value"], "key_index"), g @ attention),
    }
    return pairs, scales


def _with_biases_joined(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A convolution's weight and bias as one vector: the gradient of the key's bias is zero, since softmax is invariant
    to it, and has no relative error."""

    def joined(weight: str, side: int) -> Tensor:
        bias = weight.removesuffix("_weight") + "_bias"
        return torch.cat([pairs[name][side].flatten().double() for name in (weight, bias)])

    return {
        name: (joined(name, 0), joined(name, 1)) if name.endswith("_weight") else pair
        for name, pair in pairs.items()
        if not name.endswith("_bias")
    }


def _relative_error(result: Tensor, reference: Tensor, scale: float = 0.0) -> float:
    result = result.detach().double()
    if not bool(torch.isfinite(result).all()):
        return math.inf
    norm = max(float(reference.norm()), scale)
    difference = float((result - reference).norm())
    return difference / norm if norm else difference


def check(workload: Workload, name: str, found: dict[str, float], eager: dict[str, float] | None) -> None:
    """Raises :class:`WrongResult` unless each error is at most twice eager's in the same dtype plus the dtype's floor.

    ``found`` and ``eager`` come from :func:`errors`. Without an eager result (None: it would not fit), or with a
    useless one (channel energies beyond float16's range are NaN), the limit is that of :data:`ALONE`.
    """
    floor = FLOOR[workload.dtype]
    rounding = ROUNDING[workload.dtype] * found["energy"]
    for result, error in found.items():
        if result == "energy":
            continue
        useful = eager is not None and eager[result] < GROSS
        allowed = 2 * eager[result] + floor if useful else ALONE[workload.dtype] + rounding
        if not error <= allowed:
            raise WrongResult(
                f"{workload.label}: {result} of {name} is wrong: relative error {error:.3g}, allowed {allowed:.3g}"
            )


def worst(found: dict[str, float]) -> float:
    """The largest relative error of :func:`errors`."""
    return max(error for result, error in found.items() if result != "energy")
