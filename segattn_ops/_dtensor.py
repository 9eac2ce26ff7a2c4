"""Sharding rules of the operators for DTensor: which placements of the inputs are computed without communication.

The rules follow from the dimensions. An operator runs on shards of a dimension that it does not reduce non-linearly:
samples, the queries of a softmax, the channels of the values. A result that has this dimension is sharded; one that is
a sum over it, as grad_key over the queries, is partial. For any other placement DTensor redistributes the inputs to
those of the cheapest rule, all replicated among them.

``torch.distributed.tensor`` takes 0.4 s to import, so the rules are registered when it is imported.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch

from ._ops import ops

if TYPE_CHECKING:
    from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy
    from torch.distributed.tensor.placement_types import Placement

_DTENSOR = "torch.distributed.tensor"


@dataclass(frozen=True)
class Rules:
    """The dimensions of an operator's tensors, one letter each, and those that may be sharded.

    B samples, E key channels, C value channels, R the H + W - 1 positions of the reach, K the keys of channel
    attention. Lower case stands for all spatial dimensions: s of the queries, t of the keys and values.

    Attributes:
        inputs: tensor argument -> its dimensions, in the order of the schema.
        outputs: the dimensions of each result.
        sharded: the dimensions that may be sharded, in all tensors that have them. The others are replicated.
        summed: those among them over which the results without the dimension are sums. Otherwise these results do not
            depend on it.
        added: an input that is added once to a sum over such a dimension, so that its shards must be partial.
    """

    inputs: dict[str, str]
    outputs: tuple[str, ...]
    sharded: str
    summed: str = ""
    added: frozenset[str] = field(default_factory=frozenset)


_POSITION = {"query": "BEs", "key": "BEt", "value": "BCt"}
_CHANNEL = {"query": "BCs", "key": "BKs", "value": "BKt"}
_PAIR = {"query": "BEs", "key": "BEs"}
_CRISS_CROSS = {**_PAIR, "value": "BCs"}

_CRISS_CROSS_PART = Rules(_CRISS_CROSS, ("BCs", "Bs", "Bs"), "BC")
_CRISS_CROSS_PART_BACKWARD = Rules(
    {"grad_output": "BCs", **_CRISS_CROSS, "logsumexp": "Bs", "logsumexp_low": "Bs", "delta": "Bs"},
    ("BEs", "BEs", "BCs"),
    "BC",
    summed="C",
    added=frozenset({"delta"}),
)

# The gradient of the energies, P (dP - delta + grad_logsumexp), is linear in dP and delta, which are sums over C, and
# the sums that keys_complete allows for hold for each part: shards of C give parts of grad_query and grad_key.
RULES = {
    "position_attention": Rules({**_POSITION, "key_padding_mask": "Bt"}, ("BCs", "Bs", "BCs", "Bs"), "BsC"),
    "position_attention_backward": Rules(
        {
            "grad_output": "BCs",
            **_POSITION,
            "output": "BCs",
            "logsumexp": "Bs",
            "output_low": "BCs",
            "logsumexp_low": "Bs",
            "grad_logsumexp": "Bs",
            "key_padding_mask": "Bt",
        },
        ("BEs", "BEt", "BCt"),
        "BsC",
        summed="sC",
        added=frozenset({"grad_logsumexp"}),
    ),
    "position_attention_partial": Rules({**_POSITION, "key_padding_mask": "Bt"}, ("BCs", "Bs", "Bs"), "BsC"),
    "position_attention_partial_backward": Rules(
        {
            "grad_output": "BCs",
            **_POSITION,
            "logsumexp": "Bs",
            "logsumexp_low": "Bs",
            "delta": "Bs",
            "key_padding_mask": "Bt",
        },
        ("BEs", "BEt", "BCt"),
        "BsC",
        summed="sC",
        added=frozenset({"delta"}),
    ),
    "channel_attention": Rules(_CHANNEL, ("BCt", "BC"), "BCt"),
    "channel_attention_backward": Rules({"grad_output": "BCt", **_CHANNEL}, ("BCs", "BKs", "BKt"), "BCt", summed="Ct"),
    "channel_self_attention": Rules({"input": "BCs", "gamma": "BC"}, ("BCs", "BC"), "B"),
    "channel_self_attention_backward": Rules({"grad_output": "BCs", "input": "BCs", "gamma": "BC"}, ("BCs", "BC"), "B"),
    "channel_energy": Rules({"query": "BCs", "key": "BKs"}, ("BCK",), "Bs", summed="s"),
    "channel_energy_backward": Rules({"grad_energy": "BCK", "query": "BCs", "key": "BKs"}, ("BCs", "BKs"), "Bs"),
    "channel_apply": Rules({"energy": "BCK", "value": "BKt", "gamma": "BC"}, ("BCt", "BC"), "Bt"),
    "channel_apply_backward": Rules(
        {"grad_output": "BCt", "energy": "BCK", "value": "BKt", "gamma": "BC"}, ("BCK", "BKt", "BC"), "Bt", summed="t"
    ),
    "criss_cross_affinity": Rules(_PAIR, ("BRs",), "BE", summed="E"),
    "criss_cross_affinity_backward": Rules({"grad_affinity": "BRs", **_PAIR}, ("BEs", "BEs"), "BE"),
    "criss_cross_aggregation": Rules({"attention": "BRs", "value": "BCs"}, ("BCs",), "BC"),
    "criss_cross_aggregation_backward": Rules(
        {"grad_output": "BCs", "attention": "BRs", "value": "BCs"}, ("BRs", "BCs"), "BC", summed="C"
    ),
    "criss_cross_attention": Rules(_CRISS_CROSS, ("BCs", "Bs", "Bs"), "BC"),
    "criss_cross_attention_backward": Rules(
        {
            "grad_output": "BCs",
            **_CRISS_CROSS,
            "output": "BCs",
            "logsumexp": "Bs",
            "logsumexp_low": "Bs",
            "grad_logsumexp": "Bs",
        },
        ("BEs", "BEs", "BCs"),
        "BC",
        summed="C",
        added=frozenset({"grad_logsumexp"}),
    ),
    "criss_cross_rows": _CRISS_CROSS_PART,
    "criss_cross_rows_backward": _CRISS_CROSS_PART_BACKWARD,
    "criss_cross_columns": _CRISS_CROSS_PART,
    "criss_cross_columns_backward": _CRISS_CROSS_PART_BACKWARD,
}


def placements(rules: Rules, ranks: dict[str, int], needs: Sequence[bool] | None) -> list[list["Placement | None"]]:
    """What one dimension of a mesh can be used for.

    Args:
        rules: of the operator.
        ranks: the tensor arguments of the call -> their numbers of dimensions.
        needs: which results are wanted; None for all.

    Returns:
        For each use the placements of all results, then those of the tensors in ``ranks``.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    spatial = {rules.inputs[name][-1]: rank - len(rules.inputs[name]) + 1 for name, rank in ranks.items()}
    wanted = [True] * len(rules.outputs) if needs is None else needs
    found: list[list[Placement | None]] = [[Replicate()] * (len(rules.outputs) + len(ranks))]
    for letter in rules.sharded:
        for offset in range(spatial.get(letter, 1) if letter.islower() else 1):

            def place(dims: str, otherwise: "Placement", letter: str = letter, offset: int = offset) -> "Placement":
                return Shard(dims.index(letter) + offset) if letter in dims else otherwise

            absent = Partial() if letter in rules.summed else Replicate()
            results = [
                place(dims, absent) if needed else Replicate()
                for dims, needed in zip(rules.outputs, wanted, strict=True)
            ]
            tensors = [place(rules.inputs[name], absent if name in rules.added else Replicate()) for name in ranks]
            found.append([*results, *tensors])
    return found


def _strategy(rules: Rules, schema: "OpSchema") -> "OpStrategy":
    from torch.distributed.tensor._op_schema import OpStrategy
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    names = [argument.name for argument in schema.op._schema.arguments]
    arguments = {**dict(zip(names, schema.args_schema, strict=False)), **schema.kwargs_schema}
    tensors = {name: argument for name, argument in arguments.items() if isinstance(argument, OpStrategy)}
    ranks = {name: tensor.ndim for name, tensor in tensors.items()}
    needs = cast("Sequence[bool] | None", arguments.get("needs_input_grad"))
    uses = placements(rules, ranks, needs)
    expanded = expand_to_full_mesh_op_strategy(
        schema.get_mesh_from_args(), schema, uses, input_index=len(rules.outputs)
    )
    channels = [t.shape[1] if rules.inputs[name][1].isupper() else None for name, t in tensors.items()]
    return OpStrategy([use for use in expanded.strategies if _has_channels(use, channels)])


def _has_channels(use: "OpSpec", channels: Sequence[int | None]) -> bool:
    """Whether every rank has a channel of every tensor, as the operators demand. Of 5 channels on 4 ranks, 2, 2 and 1
    are stored, and none on the last.

    channels: of each input, None for one without channels, as the logsumexp."""
    from torch.distributed.tensor import Shard

    for spec, count in zip(use.input_specs or (), channels, strict=True):
        if count is None:
            continue
        sizes = {count}
        for placement, ranks in zip(spec.placements, spec.mesh.shape, strict=True):
            if placement == Shard(1):
                most = {-(-size // ranks) for size in sizes}
                sizes = most | {size - (ranks - 1) * -(-size // ranks) for size in sizes}
        if min(sizes) < 1:
            return False
    return True


def _register() -> None:
    """Not by ``torch.distributed.tensor.experimental.register_sharding``, which leaves all arguments but tensors and
    integers out of the key under which DTensor caches results: those of a call with another ``needs_input_grad`` would
    be taken."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rules in RULES.items():
        operator = getattr(ops, name).default
        # From here on what is not a tensor decides about the results: all but the scale.
        optional = sum(not argument.has_default_value() for argument in operator._schema.arguments)
        propagator.register_op_strategy(
            operator, partial(_strategy, rules), RuntimeSchemaInfo(optional, needs_pytree=True)
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the rules at the end of the import of ``torch.distributed.tensor``."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DTENSOR or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _try_to_register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _try_to_register() -> None:
    """Without rules, DTensor refuses the operators with an error that names them."""
    try:
        _register()
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(
            f"segattn_ops: DTensor does not serve the ops with torch {torch.__version__} ({error})",
            RuntimeWarning,
            stacklevel=2,
        )


def register() -> None:
    """Registers the rules now if ``torch.distributed.tensor`` is imported, else when it is."""
    if _DTENSOR in sys.modules:
        _try_to_register()
    else:
        sys.meta_path.insert(0, _Finder())
