"""What was built, what is loaded, and why not more."""

from typing import Any

import torch

from ._backend import LIBRARIES
from ._version import __version__


def build_config() -> dict[str, Any]:
    """What this installation is.

    Returns:
        A dictionary with `version`, `torch` (running) and `torch_at_build`; `cpu`: whether it is `native`, the
        `instruction_set` in use, the best one this processor `supports`, those `built`, and `why_not` if the
        reference serves; `cuda`: whether it is `built` and `native`, the `architectures` built for, and `why_not`.
    """
    info = LIBRARIES.build_info
    cuda = info.get("cuda", {})
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_at_build": info.get("torch"),
        "cpu": {
            "native": LIBRARIES.serves("cpu"),
            "instruction_set": LIBRARIES.cpu_capability,
            "supports": LIBRARIES.cpu_capability_supported,
            "built": info.get("cpu_instruction_sets", []),
            "why_not": LIBRARIES.missing.get("cpu"),
        },
        "cuda": {
            "native": LIBRARIES.serves("cuda"),
            "built": cuda.get("built", False),
            "architectures": cuda.get("architectures", []),
            "why_not": LIBRARIES.missing.get("cuda"),
        },
    }
