"""What was built, what is loaded and what can be used, and the reason for anything that is missing."""

import platform
from pathlib import Path
from typing import Any

import torch

from ._backend import LIBRARIES
from ._library import has_extension
from ._position_engine import position_engine_setting
from ._version import __version__


def build_config() -> dict[str, Any]:
    """Describes this installation.

    Returns:
        A dictionary with

        - `version`; whether there is an `extension`, the compiled libraries; `python`, `platform` and `torch`, which
          are running; `torch_at_build`, `python_at_build` and the C++ `compiler`, of the build (None if unknown);
        - `cpu`: whether it is `native`, the `instruction_set` in use, the best one this processor `supports`, those
          `built`, those `skipped` because their library did not load (instruction set -> why), and `why_not` if the
          reference serves;
        - `cuda`: whether the kernels were `built` and, `native`, are loaded; whether they are `usable`: loaded, and a
          GPU is visible; the `architectures` of the build ("90a": with the kernels for Hopper alone) and its
          `toolkit`; the `position_engine` that is forced (SEGATTN_CUDA_POSITION), or "auto"; and `why_not`.
    """
    info = LIBRARIES.build_info
    cuda = info.get("cuda", {})
    loaded = LIBRARIES.serves("cuda")
    visible = torch.cuda.is_available()
    return {
        "version": __version__,
        "extension": has_extension(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_at_build": info.get("torch"),
        "python_at_build": info.get("python"),
        "compiler": info.get("compiler"),
        "cpu": {
            "native": LIBRARIES.serves("cpu"),
            "instruction_set": LIBRARIES.cpu_capability,
            "supports": LIBRARIES.cpu_capability_supported,
            "built": info.get("cpu_instruction_sets", []),
            "skipped": dict(LIBRARIES.skipped),
            "why_not": LIBRARIES.missing.get("cpu"),
        },
        "cuda": {
            "native": loaded,
            "usable": loaded and visible,
            "built": cuda.get("built", False),
            "architectures": cuda.get("architectures", []),
            "toolkit": cuda.get("toolkit"),
            "position_engine": position_engine_setting(),
            "why_not": LIBRARIES.missing.get("cuda", None if visible else "torch sees no GPU"),
        },
    }


def library_paths() -> list[Path]:
    """The libraries of the operators, for a program without Python that runs an AOTInductor package.

    Such a program loads them in this order, with `dlopen` or `torch.ops.load_library`, before it loads the package.

    Returns:
        The library with the schemas, the CPU kernels for the best instruction set of this processor (or for that in
        the environment variable SEGATTN_CPU_CAPABILITY) and, if it was built and torch has CUDA, the CUDA kernels.
        They are what this process loaded. A machine with another processor needs its own list.

    Raises:
        RuntimeError: if the libraries were not built or did not load.
    """
    if not LIBRARIES.serves("cpu"):
        raise RuntimeError(f"library_paths: {LIBRARIES.why_not('cpu')}")
    return list(LIBRARIES.paths)
