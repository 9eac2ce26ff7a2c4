"""What was built and loaded, and the reason for anything that is missing."""

from typing import Any

import torch

from ._backend import LIBRARIES
from ._version import __version__


def build_config() -> dict[str, Any]:
    """Describes this installation.

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
