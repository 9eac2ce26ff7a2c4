"""Every operator of the CPU library once, forward and backward, for tools that take a minute for a second:

python -m tests.sanitizers.smoke
"""

import torch

from segattn_ops import ops

from ..families import FAMILIES

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
CASE = 0  # odd sizes, two samples


def backward(results: torch.Tensor | tuple[torch.Tensor, ...]) -> float:
    """Differentiates all results that can be, and reads every element of the results and gradients."""
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    sum(t.float().sum() for t in results if t.requires_grad).backward()
    return sum(float(t.detach().float().sum()) for t in results)


def parts(dtype: torch.dtype) -> dict[str, tuple]:
    """The arguments of the operators that tests/families.py does not list."""
    q, k, v = (torch.randn(2, channels, 5, 7).to(dtype) for channels in (8, 8, 13))
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "channel_energy": (q, k),
        "channel_apply": (torch.randn(2, 8, 13, dtype=accumulated), v, -0.3),
        "criss_cross_rows": (q, k, v, 0.5),
        "criss_cross_columns": (q, k, v, 0.5),
        "position_attention_partial": (q, k, v, 0.5),
    }


def main() -> None:
    torch.manual_seed(0)
    calls = 0
    for dtype in DTYPES:
        for family in FAMILIES:
            case = family.cases[CASE]
            inputs = [t.requires_grad_() for t in family.make(case, dtype)]
            backward(family.function(*inputs, *case.scalars))
            calls += 1
        for name, arguments in parts(dtype).items():
            leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
            backward(getattr(ops, name)(*leaves))
            calls += 1
    print(f"{calls} operators called")


if __name__ == "__main__":
    main()
