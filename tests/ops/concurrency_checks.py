"""Calls for test_concurrency.py that new processes import, too."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

import segattn_ops

# More than 2^20 multiply-adds, from where on the kernels take several threads.
INPUTS = {
    "position_attention": ((1, 16, 24, 25), (1, 16, 24, 25), (1, 24, 24, 25)),
    "channel_attention": ((1, 64, 24, 25), (1, 64, 24, 25), (1, 64, 24, 25)),
    "criss_cross_attention": ((1, 32, 24, 25), (1, 32, 24, 25), (1, 64, 24, 25)),
}


def large_call() -> list[Tensor]:
    """The outputs and gradients of one call of each family."""
    results = []
    for name, shapes in INPUTS.items():
        generator = torch.Generator().manual_seed(1)
        leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        output = getattr(segattn_ops, name)(*leaves, scale=0.1)
        results += [output.detach(), *torch.autograd.grad(output, leaves, output.detach())]
    return results


def of_operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.segattn.position_attention(query, key, value, 1.0)[0]


def forked(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """For torch.jit.script."""
    futures = [torch.jit.fork(of_operator, query, key, value) for _ in range(4)]
    return [torch.jit.wait(future) for future in futures]


def attended(index: int) -> Tensor:
    x = torch.randn(1, 16, 24, 25, generator=torch.Generator().manual_seed(index))
    return segattn_ops.position_attention(x, x, x, 0.1)[0]


class Attended(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return attended(index)
