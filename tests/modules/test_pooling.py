"""Pyramid pooling in an exported program, where it is a product with pooling weights."""

import torch

from segattn_ops import nn

AUTO = torch.export.Dim.AUTO


def exported(dtype: torch.dtype):
    sample, dynamic = torch.randn(2, 4, 9, 11, dtype=dtype), ({0: AUTO, 2: AUTO, 3: AUTO},)
    program = torch.export.export(nn.PyramidPooling((1, 3, 8)), (sample,), dynamic_shapes=dynamic)
    adaptive = [node.args[1] for node in program.graph.nodes if "adaptive" in str(node.target)]
    assert adaptive == [[1, 1]], "AOTInductor and torch.onnx fix the sizes of others"
    return program.module()


def test_other_sizes_and_gradients():
    """Also fewer positions than cells, and multiples of them."""
    program, eager = exported(torch.float64), nn.PyramidPooling((1, 3, 8))
    for shape in ((2, 4, 9, 11), (1, 4, 5, 9), (3, 4, 24, 16), (2, 4, 97, 61)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected, pooled = eager(x), program(x)
        torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(expected)
        (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
        (gradient,) = torch.autograd.grad((pooled * weight).sum(), x)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_16_bit_inputs_are_accumulated_in_float32():
    x = 1000 + torch.rand(1, 4, 97, 61, dtype=torch.float16)  # sums of a row overflow float16
    expected = nn.PyramidPooling((1, 3, 8))(x.double()).half()
    torch.testing.assert_close(exported(torch.float16)(x), expected, rtol=1e-3, atol=0.0)
