"""torch.compile and AOTInductor call the operators, although the table of decompositions lists them (see _onnx.py).

Inductor calls an operator that it has no translation for. With the variable CI set, as on most build servers, it
raises instead if the table lists the operator, unless the call has been registered.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverload


def registering(operator: OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake implementation of an operator, which also registers the operator with Inductor.

    Importing Inductor takes longer than importing PyTorch, so segattn_ops does not. Every program that Inductor
    compiles has been traced with fake tensors after Inductor was imported.
    """

    def registered(*arguments: Any, **keywords: Any) -> Any:
        lowering = sys.modules.get("torch._inductor.lowering")
        if lowering is not None and operator not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator))
            lowering.make_fallback(operator, layout_constraint=constraint, warn=False)
        return fake(*arguments, **keywords)

    return registered
