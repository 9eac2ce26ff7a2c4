"""The reference, the oracle of the other tests, against loops over the papers' formulas."""

import math

import pytest
import torch

import segattn_ops
from segattn_ops import reference


def softmax(energies: list[float]) -> list[float]:
    largest = max(energies)
    weights = [math.exp(e - largest) for e in energies]
    return [w / sum(weights) for w in weights]


def test_position_attention():
    q, k, v = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 5).double(), torch.randn(2, 4, 5).double()
    output, logsumexp = reference.position_attention(q, k, v, 0.7)
    for b in range(2):
        for y in range(2):
            for x in range(2):
                energies = [0.7 * sum(q[b, e, y, x].item() * k[b, e, j].item() for e in range(3)) for j in range(5)]
                weights = softmax(energies)
                for c in range(4):
                    assert output[b, c, y, x].item() == pytest.approx(
                        sum(w * v[b, c, j].item() for j, w in enumerate(weights))
                    )
                assert logsumexp[b, y, x].item() == pytest.approx(math.log(sum(map(math.exp, energies))))


def test_channel_attention():
    q, k, v = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 4, 2, 2).double(), torch.randn(2, 4, 3).double()
    output, logsumexp = reference.channel_attention(q, k, v, -0.6)
    for b in range(2):
        for c in range(3):
            energies = [-0.6 * (q[b, c] * k[b, j]).sum().item() for j in range(4)]
            for n in range(3):
                expected = sum(w * v[b, j, n].item() for j, w in enumerate(softmax(energies)))
                assert output[b, c, n].item() == pytest.approx(expected)
            assert logsumexp[b, c].item() == pytest.approx(math.log(sum(map(math.exp, energies))))


def test_cam_of_danet_is_a_softmin():
    x = torch.randn(2, 5, 3, 4).double()
    energy = x.flatten(2) @ x.flatten(2).mT
    attention = (energy.max(-1, keepdim=True)[0] - energy).softmax(-1)
    expected = (attention @ x.flatten(2)).view_as(x)
    torch.testing.assert_close(reference.channel_attention(x, x, x, -1.0)[0], expected)


def reach(y: int, x: int, height: int, width: int) -> list[tuple[int, int]]:
    """CCNet's order: the row, self included, then the column without self."""
    return [(y, j) for j in range(width)] + [(i, x) for i in range(height) if i != y]


@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 5), (5, 1), (1, 1)])
def test_criss_cross(height, width):
    q, k = (torch.randn(2, 3, height, width).double() for _ in range(2))
    v = torch.randn(2, 2, height, width).double()
    affinity = reference.criss_cross_affinity(q, k)
    output, logsumexp = reference.criss_cross_attention(q, k, v, 0.8)
    aggregated = reference.criss_cross_aggregation(affinity, v)
    assert affinity.shape == (2, height + width - 1, height, width)
    for b in range(2):
        for y in range(height):
            for x in range(width):
                seen = reach(y, x, height, width)
                energies = [(q[b, :, y, x] * k[b, :, i, j]).sum().item() for i, j in seen]
                assert affinity[b, :, y, x].tolist() == pytest.approx(energies)
                values = [v[b, :, i, j] for i, j in seen]
                summed = sum(e * value for e, value in zip(energies, values, strict=True))
                torch.testing.assert_close(aggregated[b, :, y, x], summed)
                weights = softmax([0.8 * e for e in energies])
                attended = sum(w * value for w, value in zip(weights, values, strict=True))
                torch.testing.assert_close(output[b, :, y, x], attended)
                exact = math.log(sum(math.exp(0.8 * e) for e in energies))
                assert logsumexp[b, y, x].item() == pytest.approx(exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_once(dtype):
    q, k, v = (torch.randn(1, 4, 3, 3).to(dtype) for _ in range(3))
    for function, arguments in (
        (reference.position_attention, (q, k, v, 1.0)),
        (reference.channel_attention, (q, k, v, 1.0)),
        (reference.criss_cross_attention, (q, k, v, 1.0)),
    ):
        output, logsumexp = function(*arguments)
        exact = function(*(a.float() if isinstance(a, torch.Tensor) else a for a in arguments))[0]
        assert output.dtype == dtype
        assert logsumexp.dtype == torch.float32
        assert torch.equal(output, exact.to(dtype))


def test_position_attention_map():
    q, k, v = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 6).double(), torch.randn(2, 2, 6).double()
    rows = segattn_ops.position_attention_map(q, k, torch.tensor([[0, 0], [3, 4], [-1, -2]]), 0.5)
    assert rows.shape == (2, 3, 6)
    output = segattn_ops.position_attention(q, k, v, 0.5)
    expected = torch.stack([output[:, :, 0, 0], output[:, :, 3, 4], output[:, :, 3, 3]], 1)
    torch.testing.assert_close(rows @ v.mT, expected)


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_criss_cross_attention_map(backend, recurrence):
    """The rows times the values equal the attention applied `recurrence` times."""
    height, width = 4, 5
    queries, keys = ([torch.randn(2, 3, height, width).double() for _ in range(recurrence)] for _ in range(2))
    v = torch.randn(2, 2, height, width).double()
    expected = v
    for q, k in zip(queries, keys, strict=True):
        expected = reference.criss_cross_attention(q, k, expected, 1.0)[0]
    queries, keys = ([t.to(backend.device) for t in side] for side in (queries, keys))
    points = torch.tensor([[0, 0], [3, 4], [-2, 1]])
    rows = segattn_ops.criss_cross_attention_map(queries, keys, points, recurrence).cpu()
    assert rows.shape == (2, 3, height, width)
    got = torch.einsum("bpyx,bcyx->bpc", rows, v)
    torch.testing.assert_close(got, torch.stack([expected[:, :, y, x] for y, x in points], 1))
    same = segattn_ops.criss_cross_attention_map(queries[0], keys[0], points, 1)
    assert torch.equal(same, segattn_ops.criss_cross_attention_map(queries[:1], keys[:1], points, 1))


MAPS = [segattn_ops.position_attention_map, segattn_ops.criss_cross_attention_map]


@pytest.mark.parametrize("rows_of", MAPS)
def test_maps_under_inference_mode_autocast_and_without_points(backend, rows_of):
    q, k = (torch.randn(2, 3, 5, 6, device=backend.device) for _ in range(2))
    points = torch.tensor([[1, 2], [4, 0]])
    plain = rows_of(q, k, points)
    with torch.inference_mode():
        assert torch.equal(rows_of(q.clone(), k.clone(), points), plain)
        assert rows_of(q, k, torch.zeros(0, 2, dtype=torch.long)).shape == (2, 0, 5, 6)
    with torch.autocast(backend.device, torch.bfloat16):  # the op rounds query and key, and nothing else
        mixed = rows_of(q, k.bfloat16(), points)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, rows_of(q.bfloat16(), k.bfloat16(), points))
    torch.testing.assert_close(mixed.flatten(2).sum(2), torch.ones(2, 2, device=backend.device))


@pytest.mark.parametrize("rows_of", MAPS)
def test_maps_are_differentiable(rows_of):
    q, k = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: rows_of(q, k, torch.tensor([[1, 2]])), (q, k))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([0, 1]), "positions must have shape"),
        (torch.tensor([[0.5, 1.0]]), "positions must be integers"),
        (torch.tensor([[0, 5]]), r"within the spatial size \[4, 5\] \(got \[0, 5\]\)"),
    ],
)
def test_map_positions_are_checked(positions, message):
    q = torch.randn(1, 3, 4, 5)
    with pytest.raises(ValueError, match=message):
        segattn_ops.position_attention_map(q, q, positions)
    with pytest.raises(ValueError, match=message):
        segattn_ops.criss_cross_attention_map(q, q, positions)


def test_map_recurrence_is_checked():
    q = torch.randn(1, 3, 4, 5)
    with pytest.raises(ValueError, match="recurrence must be a positive integer"):
        segattn_ops.criss_cross_attention_map(q, q, torch.tensor([[0, 0]]), 0)
    with pytest.raises(ValueError, match="one tensor or 2 of them"):
        segattn_ops.criss_cross_attention_map([q], [q], torch.tensor([[0, 0]]), 2)
    other = torch.randn(1, 3, 5, 4)
    with pytest.raises(RuntimeError, match="query must have spatial size"):
        segattn_ops.criss_cross_attention_map([q, other], [q, other], torch.tensor([[0, 0]]), 2)
