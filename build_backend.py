"""setuptools' build backend. It names what pip's build environment needs besides setuptools: ninja and torch, and
nothing with SEGATTN_NO_EXTENSION=1 (torch alone is 3 GB)."""

import os
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [] if os.environ.get("SEGATTN_NO_EXTENSION") == "1" else ["ninja", "torch>=2.10"]


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel  # setup.py imports torch for every command
