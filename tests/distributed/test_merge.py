"""The merge of attention over parts of the keys, as a function of the parts."""

import pytest
import torch

from segattn_ops.distributed._merge import merge


@pytest.mark.parametrize("energy", [0.0, 1000.0])
def test_parts_are_weighted_by_the_exact_logsumexp(energy):
    """At energies of 1000 the logsumexp in float32 is rounded by up to 3e-5, which would be the error of a weight. The
    parts have the rounding error, and the result has one too."""
    exact = [energy + torch.randn(2, 9, dtype=torch.float64) for _ in range(2)]
    outputs = [torch.randn(2, 6, 9) for _ in exact]
    parts = [
        (output.clone(), logsumexp.float(), (logsumexp - logsumexp.float().double()).float())
        for output, logsumexp in zip(outputs, exact, strict=True)
    ]
    output, logsumexp, low = merge(*parts)
    weights = torch.stack(exact).softmax(0)
    expected = sum(w.unsqueeze(1) * o.double() for w, o in zip(weights, outputs, strict=True))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)
    total = torch.logaddexp(*exact)
    torch.testing.assert_close(logsumexp.double() + low.double(), total, rtol=0, atol=3e-7)


def test_a_part_without_keys():
    """Its output is 0 and its logsumexp -inf. Of two, so are the results."""
    output, logsumexp = torch.randn(1, 4, 5), torch.randn(1, 5)
    zeros = torch.zeros(1, 5)
    empty = torch.zeros(1, 4, 5), zeros - torch.inf, zeros
    for parts in ((empty, (output, logsumexp, zeros)), ((output, logsumexp, zeros), empty)):
        merged, of_both, low = merge(*((o.clone(), *statistics) for o, *statistics in parts))
        assert torch.equal(merged, output) and torch.equal(of_both, logsumexp) and not low.any()
    merged, of_both, low = merge(empty, tuple(t.clone() for t in empty))
    assert not merged.any() and (of_both == -torch.inf).all() and not low.any()
