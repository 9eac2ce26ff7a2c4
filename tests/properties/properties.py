"""What holds for every call: functions of a call and the backend that is selected, which raise AssertionError."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from segattn_ops.ops import channel_apply, channel_energy, criss_cross_columns, criss_cross_rows
from segattn_ops.ops._check import accumulation_dtype

from ..backends import Backend
from ..ops.test_criss_cross_parts import merged
from ..ops.test_position_partial import results_of_parts
from .calls import ARGUMENTS, Call, Data, function, make, results, settings
from .exactness import assert_equal, assert_exact, assert_same

Relabelling = dict[str, Callable[[Tensor], Tensor]]


def equals_float64(call: Call, backend: Backend) -> None:
    data = make(call)
    assert_exact(call, results(call, data), data)


def rows_of_weights_sum_to_one(call: Call, backend: Backend) -> None:
    """Values of one give an output of one, or of zero where every key is padding."""
    data = make(call)
    ones = torch.ones_like(data.inputs[2], memory_format=torch.contiguous_format)
    output = function(call, data.mask)(*data.inputs[:2], ones)[0].double()
    kept = torch.ones(output.shape[0], dtype=torch.bool) if data.mask is None else ~data.mask.flatten(1).all(1)
    assert not output[~kept].any()
    keys = torch.Size(ones.shape[2:]).numel() if call.op == "position_attention" else sum(ones.shape[1:])
    # Weights of 16 bits are rounded, their sum is not. On tensor cores the sums of float32 are truncated.
    allowed = 2 * torch.finfo(call.torch_dtype).eps
    allowed += (16 + keys / 4) * torch.finfo(accumulation_dtype(call.torch_dtype)).eps
    if output[kept].numel():
        error = (output[kept] - 1).abs().max().item()
        assert error <= allowed, f"a row of weights differs from one by {error:.3e}, allowed {allowed:.3e}"


def _relabelled(call: Call, data: Data, relabel: Relabelling) -> tuple[Call, Data]:
    inputs = [relabel[name](t).contiguous() for name, t in zip(ARGUMENTS[call.op], data.inputs, strict=True)]
    clean = [relabel[name](t).contiguous() for name, t in zip(ARGUMENTS[call.op], data.clean, strict=True)]
    changed = Data(
        inputs,
        relabel["output"](data.grad_output).contiguous(),
        None if data.grad_logsumexp is None else relabel["logsumexp"](data.grad_logsumexp).contiguous(),
        None if data.mask is None else relabel["mask"](data.mask).contiguous(),
        clean,
    )
    return dataclasses.replace(call, shapes=tuple(tuple(t.shape) for t in inputs)), changed


def _relabelled_results(found: dict[str, Tensor], relabel: Relabelling) -> dict[str, Tensor]:
    return {name: relabel[name.removeprefix("grad_")](t).contiguous() for name, t in found.items()}


def _assert_commutes(call: Call, relabel: Relabelling) -> None:
    """Results of relabelled tensors are the relabelled results."""
    data = make(call)
    before = _relabelled_results(results(call, data), relabel)
    changed_call, changed = _relabelled(call, data, relabel)
    assert_same(changed_call, results(changed_call, changed), before, changed)


def _at(dimension: int, order: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_select(dimension, order)


def _of_positions(order: Tensor, first: int = 2) -> Callable[[Tensor], Tensor]:
    return lambda t: t.flatten(first).index_select(first, order).view(t.shape)


def _both(*functions: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def composed(t: Tensor) -> Tensor:
        for f in functions:
            t = f(t)
        return t

    return composed


def permuting_positions_permutes_results(call: Call, backend: Backend) -> None:
    """Of position attention the queries, and the keys with the values; of channel attention the channels and the
    positions; of criss-cross attention the rows and the columns. Of all, the channels of query and key, and those of
    value."""
    generator = torch.Generator().manual_seed(call.seed)

    def order(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    def channels(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        return _at(1, order(shape[1])) if call.heads == 1 else torch.clone

    shapes = call.shapes
    first, last = shapes[0], shapes[-1]
    if call.op == "position_attention":
        queries, keys = (torch.Size(shape[2:]).numel() for shape in shapes[:2])
        by_query, by_key = order(queries), order(keys)
        of_energies, of_values = channels(first), channels(last)
        relabel = {
            "query": _both(of_energies, _of_positions(by_query)),
            "key": _both(of_energies, _of_positions(by_key)),
            "value": _both(of_values, _of_positions(by_key)),
            "output": _both(of_values, _of_positions(by_query)),
            "logsumexp": _of_positions(by_query),
            "mask": _of_positions(by_key, 1),
        }
    elif call.op.startswith("criss_cross"):
        of_image = torch.clone
        if call.op == "criss_cross_attention":
            of_image = _both(_at(2, order(first[2])), _at(3, order(first[3])))
        of_energies, of_values = channels(first), channels(last)
        relabel = {
            "query": _both(of_energies, of_image),
            "key": _both(of_energies, of_image),
            "value": _both(of_values, of_image),
            "output": _both(of_values, of_image),
            "logsumexp": of_image,
            "attention": torch.clone,
        }
        if call.op == "criss_cross_affinity":
            relabel["output"] = torch.clone
    elif call.op == "channel_attention":
        of_queries, of_keys = _at(1, order(first[1])), _at(1, order(last[1]))
        contracted = _of_positions(order(torch.Size(first[2:]).numel()))
        stored = _of_positions(order(torch.Size(last[2:]).numel()))
        relabel = {
            "query": _both(of_queries, contracted),
            "key": _both(of_keys, contracted),
            "value": _both(of_keys, stored),
            "output": _both(of_queries, stored),
        }
    else:
        of_channels, of_positions = _at(1, order(first[1])), _of_positions(order(torch.Size(first[2:]).numel()))
        relabel = dict.fromkeys(("input", "output"), _both(of_channels, of_positions)) | {"gamma": of_channels}
    _assert_commutes(call, relabel)


def _transposed_reach(a: Tensor) -> Tensor:
    """(B, H + W - 1, H, W), as by criss_cross_affinity -> the same of the transposed image, (B, H + W - 1, W, H)."""
    height, width = a.shape[2:]
    y, x = torch.arange(height).view(1, height, 1), torch.arange(width).view(1, 1, width)
    i, j = torch.arange(height).view(height, 1, 1), torch.arange(width - 1).view(width - 1, 1, 1)
    row = torch.where(i == y, x, width + i - (i > y).long())  # channels of the keys (i, x)
    column = (j + (j >= x).long()).expand(width - 1, height, width)  # of the keys (y, j), without self
    channels = torch.cat([row.expand(height, height, width), column])
    return a.gather(1, channels.expand(a.shape[0], -1, -1, -1)).mT


def transposing_the_image_commutes(call: Call, backend: Backend) -> None:
    """Criss-cross operators of the transposed image give the transposed results."""
    relabel: Relabelling = dict.fromkeys(("query", "key", "value", "output", "logsumexp"), lambda t: t.mT)
    relabel["attention"] = _transposed_reach
    if call.op == "criss_cross_affinity":
        relabel["output"] = _transposed_reach
    _assert_commutes(call, relabel)


def adding_a_constant_to_all_energies_changes_nothing(call: Call, backend: Backend) -> None:
    """One more channel of query and key, in channel attention one more position, in which both are constant. The
    logsumexp grows by the constant."""
    data = make(call)
    generator = torch.Generator().manual_seed(call.seed)
    of_query, of_key = (2.0 ** torch.randint(-1, 4, (2,), generator=generator)).tolist()
    before = results(call, data)

    def with_channel(t: Tensor, constant: float) -> Tensor:
        of_heads = t.unflatten(1, (call.heads, -1))
        return torch.cat([of_heads, torch.full_like(of_heads[:, :, :1], constant)], 2).flatten(1, 2)

    def with_position(t: Tensor, constant: float) -> Tensor:
        return torch.cat([t.flatten(2), torch.full_like(t[:, :, ..., :1].flatten(2)[..., :1], constant)], 2)

    is_channel = call.op == "channel_attention"
    extend = with_position if is_channel else with_channel
    inputs = [extend(data.inputs[0], of_query), extend(data.inputs[1], of_key), data.inputs[2]]
    longer = dataclasses.replace(call, shapes=tuple(tuple(t.shape) for t in inputs))
    after = results(longer, data.changed(inputs=inputs))
    for name in ("query", "key"):
        if f"grad_{name}" in after:
            shape = before[f"grad_{name}"].shape
            gradient = after[f"grad_{name}"]
            gradient = gradient[..., :-1] if is_channel else gradient.unflatten(1, (call.heads, -1))[:, :, :-1]
            after[f"grad_{name}"] = gradient.reshape(shape)
    shift = call.scale * of_query * of_key
    if "logsumexp" in after:
        after["logsumexp"] = after["logsumexp"] - shift
    assert_same(call, after, before, data, more_energy=abs(shift))


def parts_of_the_keys_merge_to_the_whole(call: Call, backend: Backend) -> None:
    """Position attention over parts of the keys, criss-cross attention over rows and over columns, merged by their
    logsumexp; channel attention from energies that are summed over parts of the positions."""
    call = dataclasses.replace(call, needs=(True,) * len(call.needs), with_logsumexp=call.op != "channel_attention")
    data = make(call)
    dtype = call.torch_dtype
    query, key, value = data.inputs
    if call.op == "position_attention":
        mask = None if data.mask is None else data.mask.flatten(1)
        parts = 1 + call.seed % 4
        found = results_of_parts(data.inputs, [data.grad_output, data.grad_logsumexp], parts, mask, call.scale)
        output, logsumexp, *gradients = found
    elif call.op == "criss_cross_attention":
        leaves = [t.detach().requires_grad_() for t in data.inputs]
        parts = [part(*leaves, call.scale) for part in (criss_cross_rows, criss_cross_columns)]
        output, logsumexp, _ = merged(*parts)
        logsumexp = logsumexp.unsqueeze(1)
        given = [data.grad_output.to(output.dtype), data.grad_logsumexp]
        gradients = torch.autograd.grad([output, logsumexp], leaves, given)
    else:
        n = torch.Size(query.shape[2:]).numel()
        cut = call.seed % (n + 1)
        leaves = [t.detach().requires_grad_() for t in data.inputs]
        pieces = [t.flatten(2).split((cut, n - cut), 2) for t in leaves[:2]]
        energy = sum(channel_energy(q, k) for q, k in zip(*pieces, strict=True))
        output = channel_apply(energy, leaves[2], call.scale)
        gradients = torch.autograd.grad(output, leaves, data.grad_output)
    merged_results = {"output": output.detach().to(dtype)}
    if call.with_logsumexp:
        merged_results["logsumexp"] = logsumexp.detach()
    names = (f"grad_{name}" for name in ARGUMENTS[call.op])
    merged_results |= {name: g.to(dtype) for name, g in zip(names, gradients, strict=True)}
    assert_exact(call, merged_results, data)


def _of_sample(call: Call, data: Data, sample: int) -> tuple[Call, Data]:
    one = slice(sample, sample + 1)
    relabel: Relabelling = dict.fromkeys((*ARGUMENTS[call.op], "output", "logsumexp", "mask"), lambda t: t[one])
    return _relabelled(call, data, relabel)


def a_batch_is_its_samples(call: Call, backend: Backend) -> None:
    data = make(call)
    found = results(call, data)
    for sample in range(call.shapes[0][0]):
        alone, of_sample = _of_sample(call, data, sample)
        assert_same(alone, results(alone, of_sample), {n: t[sample : sample + 1] for n, t in found.items()}, of_sample)


def samples_do_not_reach_each_other(call: Call, backend: Backend) -> None:
    """NaN in the other samples changes no bit of a sample."""
    data = make(call)
    sample = call.seed % call.shapes[0][0]
    others = torch.arange(call.shapes[0][0]) != sample

    def poisoned(t: Tensor) -> Tensor:
        t = t.contiguous().clone()
        t[others] = torch.nan
        return t

    changed = data.changed(inputs=[poisoned(t) for t in data.inputs], grad_output=poisoned(data.grad_output))
    before, after = results(call, data), results(call, changed)
    assert_equal({n: t[sample] for n, t in after.items()}, {n: t[sample] for n, t in before.items()})


def memory_and_threads_change_no_bit(call: Call, backend: Backend) -> None:
    """Contiguous copies of the tensors, on one thread, have results of the same bits. So has another run."""
    data = make(call)
    found = results(call, data)
    assert_equal(results(call, data), found)
    contiguous = Data(
        [t.contiguous() for t in data.inputs],
        data.grad_output.contiguous(),
        None if data.grad_logsumexp is None else data.grad_logsumexp.contiguous(),
        None if data.mask is None else data.mask.contiguous(),
        data.clean,
    )
    with settings(dataclasses.replace(call, threads=1), backend):
        assert_equal(results(call, contiguous), found)


def a_gradient_does_not_depend_on_the_others(call: Call, backend: Backend) -> None:
    """Each gradient that is asked for has the bits that it has among all."""
    data = make(call)
    some = results(call, data)
    every = results(dataclasses.replace(call, needs=(True,) * len(call.needs)), data)
    assert_equal({name: t for name, t in every.items() if name in some}, some)


PROPERTIES: dict[str, Callable[[Call, Backend], None]] = {
    holds.__name__: holds
    for holds in (
        equals_float64,
        rows_of_weights_sum_to_one,
        permuting_positions_permutes_results,
        transposing_the_image_commutes,
        adding_a_constant_to_all_energies_changes_nothing,
        parts_of_the_keys_merge_to_the_whole,
        a_batch_is_its_samples,
        samples_do_not_reach_each_other,
        memory_and_threads_change_no_bit,
        a_gradient_does_not_depend_on_the_others,
    )
}
