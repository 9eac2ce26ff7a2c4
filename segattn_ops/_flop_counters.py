"""The ops in the FLOP counters of fvcore and mmengine, which trace a model and leave out operators they do not know.

PyTorch's own counter, ``torch.utils.flop_counter.FlopCounterMode``, reads the formulas that ``ops/_register.py``
registers.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix
from .ops import OPERATORS, Operator

Handle = Callable[[list[Any], list[Any]], int]


def flop_handles() -> dict[str, Handle]:
    """Handles for the counters of fvcore and mmengine, which trace a model with ``torch.jit``.

    Those of an installed fvcore are registered when segattn_ops is imported, and those of mmengine if it is imported
    before. For a counter made earlier, or one with a table of its own::

        FlopCountAnalysis(model, inputs).set_op_handle(**segattn_ops.flop_handles())

    Returns:
        dict: the traced operator's name, as ``"segattn::position_attention"``, to a function of its inputs and outputs
        in the graph. It returns multiply-adds, the unit of both libraries; PyTorch's ``FlopCounterMode`` counts two
        FLOP for each.
    """
    return {add_op_namespace_prefix(operator.name): _handle(operator) for operator in OPERATORS}


def _handle(operator: Operator) -> Handle:
    def multiply_adds(inputs: list[Any], outputs: list[Any]) -> int:
        return operator.flops(*_shapes(inputs)) // 2

    return multiply_adds


def _shapes(values: Iterable[Any]) -> list[list[int]]:
    """The shapes of the tensors among the values of a traced graph."""
    types = (value.type() for value in values)
    return [sizes for t in types if isinstance(t, torch._C.TensorType) and (sizes := t.sizes()) is not None]


def register() -> None:
    """Adds the handles to the tables of fvcore, if it is installed, and of mmengine, if it is imported already.

    fvcore adds 40 ms to an import of segattn_ops. mmengine is larger, and not imported for this alone.
    """
    if importlib.util.find_spec("fvcore") is not None:
        _extend("fvcore.nn.flop_count", "_DEFAULT_SUPPORTED_OPS")
    if "mmengine" in sys.modules:
        _extend("mmengine.analysis.complexity_analysis", "_DEFAULT_SUPPORTED_FLOP_OPS")


def _extend(module: str, table: str) -> None:
    """A counter copies the table when it is made. Another version of the library may have none: then the counter lists
    the ops among those it does not support."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fvcore uses torch.jit.script, which is deprecated
            getattr(importlib.import_module(module), table).update(flop_handles())
    except (ImportError, AttributeError) as error:
        warnings.warn(f"segattn_ops: {module} does not count the ops ({error})", RuntimeWarning, stacklevel=2)
