"""Problems and results for the tests of determinism. As a program, prints the digest of every op and dtype."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

import segattn_ops

from .families import DTYPES, FAMILIES, Case, Family

# Their second derivatives are the operators themselves.
BILINEAR = ("criss_cross_affinity", "criss_cross_aggregation")
THREADS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Sizes:
    small: Case  # for the emulator: odd, more than one tile where that is cheap
    several: Case  # several work units for each of 8 CPU threads, or key and query groups


def _position(e: int, c: int, queries: tuple[int, ...], keys: tuple[int, ...], batch: int = 1) -> Case:
    return Case(((batch, e, *queries), (batch, e, *keys), (batch, c, *keys)), 0.3)


def _criss_cross(e: int, c: int, height: int, width: int) -> Case:
    return Case(((1, e, height, width), (1, e, height, width), (1, c, height, width)), 0.3)


CASES = {
    "position_attention": Sizes(_position(5, 9, (7, 5), (3, 11), 2), _position(9, 20, (31, 29), (23, 21))),
    "channel_attention": Sizes(
        Case(((2, 9, 4, 5), (2, 7, 4, 5), (2, 7, 11)), -0.3),
        Case(((1, 70, 19, 17), (1, 90, 19, 17), (1, 90, 23, 9)), -0.1),
    ),
    "channel_self_attention": Sizes(Case(((2, 9, 4, 5),), -0.3), Case(((1, 90, 19, 17),), -0.1)),
    "residual_channel_attention": Sizes(Case(((2, 9, 4, 5), (2, 9)), -0.3), Case(((1, 90, 19, 17), (1, 90)), -0.1)),
    "criss_cross_affinity": Sizes(
        Case(((2, 5, 4, 7), (2, 5, 4, 7))),
        Case(((1, 9, 29, 45), (1, 9, 29, 45))),
    ),
    "criss_cross_aggregation": Sizes(
        Case(((2, 10, 4, 7), (2, 5, 4, 7))),
        Case(((1, 73, 29, 45), (1, 9, 29, 45))),
    ),
    "criss_cross_attention": Sizes(_criss_cross(5, 9, 4, 7), _criss_cross(9, 20, 29, 45)),
}


def make(family: Family, case: Case, dtype: torch.dtype, device: str = "cpu"):
    """Inputs, scalars, grad_output, and a cotangent for the gradient of every input."""
    inputs = family.make(case, dtype, device)
    shape = family.definition(*(t[:1].double().cpu() for t in inputs), *case.scalars).shape[1:]
    generator = torch.Generator().manual_seed(1)

    def normal(shape) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return inputs, case.scalars, normal((inputs[0].shape[0], *shape)), [normal(t.shape) for t in inputs]


def derivatives(
    family: Family, inputs: list[Tensor], scalars: tuple[float, ...], grad_output: Tensor, cotangents: list[Tensor]
) -> list[Tensor]:
    """The output, the gradients, and the gradients of these."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad_output = grad_output.detach().requires_grad_()
    output = family.function(*leaves, *scalars)
    gradients = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
    second = torch.autograd.grad(gradients, [*leaves, grad_output], cotangents, allow_unused=True)
    return [t.detach() for t in (output, *gradients, *second) if t is not None]


def digest(family: Family, dtype: torch.dtype) -> str:
    """Of all results of the CPU kernels, on one thread: the bits of PyTorch's matrix products, which the second
    derivatives of softmax attention are, depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with segattn_ops.use_backend("native"):
            found = derivatives(family, *make(family, CASES[family.operator].small, dtype))
    finally:
        torch.set_num_threads(before)
    hashed = hashlib.sha256()
    for t in found:
        hashed.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


if __name__ == "__main__":
    for each in FAMILIES:
        for number in DTYPES:
            print(digest(each, number))
