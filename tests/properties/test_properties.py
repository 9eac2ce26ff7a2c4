"""Properties of the ops over calls that hypothesis draws: sizes, dtypes, layouts, contents, scales, padding, heads,
threads, emulated devices and engines. SEGATTN_FUZZ_MINUTES draws others, for so many minutes (docs/reliability.md)."""

from functools import partial

import pytest

from . import properties
from .calls import OPS, SOFTMAX_OPS
from .strategies import EMULATED_BUDGETS, calls

THREE_INPUTS = ("position_attention", "channel_attention", "criss_cross_attention")
CRISS_CROSS = tuple(op for op in OPS if op.startswith("criss_cross"))


def strategy(backend, **options):
    if backend.name == "emulated":
        return calls(emulated=True, **(options | {"budgets": EMULATED_BUDGETS}))
    return calls(**options)


def examples(backend, on_the_cpu: int) -> int:
    """In `make test`."""
    return {"cpu": on_the_cpu, "cuda": on_the_cpu, "reference": on_the_cpu // 4, "emulated": on_the_cpu // 3}[
        backend.name
    ]


@pytest.mark.parametrize("op", OPS)
def test_equals_float64(backend, explore, op):
    explore(strategy(backend, ops=(op,)), partial(properties.equals_float64, backend=backend), examples(backend, 24))


def check(explore, backend, holds, on_the_cpu: int = 24, **options) -> None:
    explore(strategy(backend, **options), partial(holds, backend=backend), examples(backend, on_the_cpu))


def test_rows_of_weights_sum_to_one(backend, explore):
    check(explore, backend, properties.rows_of_weights_sum_to_one, ops=THREE_INPUTS)


def test_permuting_positions_permutes_results(backend, explore):
    check(explore, backend, properties.permuting_positions_permutes_results)


def test_transposing_the_image_commutes(backend, explore):
    check(explore, backend, properties.transposing_the_image_commutes, ops=CRISS_CROSS)


def test_adding_a_constant_to_all_energies_changes_nothing(backend, explore):
    check(explore, backend, properties.adding_a_constant_to_all_energies_changes_nothing, ops=THREE_INPUTS)


def test_parts_of_the_keys_merge_to_the_whole(backend, explore):
    # tests/ops has parts without keys, queries or samples
    options = {"ops": THREE_INPUTS, "heads": (1,), "empty": False}
    check(explore, backend, properties.parts_of_the_keys_merge_to_the_whole, **options)


def test_a_batch_is_its_samples(backend, explore):
    check(explore, backend, properties.a_batch_is_its_samples, batches=(2, 3, 5))


def test_samples_do_not_reach_each_other(kernels, explore):
    check(explore, kernels, properties.samples_do_not_reach_each_other, batches=(2, 3, 5), empty=False)


def test_memory_and_threads_change_no_bit(kernels, explore):
    check(explore, kernels, properties.memory_and_threads_change_no_bit, budgets=(20_000, 100_000, 4_000_000))


def test_a_gradient_does_not_depend_on_the_others(kernels, explore):
    check(explore, kernels, properties.a_gradient_does_not_depend_on_the_others, ops=SOFTMAX_OPS)
