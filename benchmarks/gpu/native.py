"""Checks that the package's own kernels run. Without them the package falls back to the reference with a warning, and a
benchmark would report eager PyTorch as segattn_ops."""

from __future__ import annotations

import torch

from tools.compilers import ROOT, build_tools


class NotNative(RuntimeError):
    """The package's kernels would not run."""


def require_native(device_type: str) -> None:
    """Raises :class:`NotNative` unless the kernels for "cpu" or "cuda" are loaded."""
    import segattn_ops

    config = segattn_ops.build_config()[device_type]
    if not config["native"]:
        why = config["why_not"]
        raise NotNative(f"segattn_ops has no native {device_type} kernels here; nothing is measured or checked: {why}")


def fault(device: torch.device) -> str | None:
    """Why the libraries of this tree cannot be used, or None if they match the sources, load, and run on the device.

    Loads the libraries: call it in a process that ends before they are rebuilt.
    """
    import segattn_ops
    from segattn_ops import _backend

    try:
        require_native(device.type)
    except NotNative as missing:
        return str(missing)
    config = segattn_ops.build_config()
    used = ["_C", f"_cpu_{config['cpu']['instruction_set']}", *(["_C_cuda"] if device.type == "cuda" else [])]
    marks = _backend.LIBRARIES.build_info.get("sources", {})
    sources = build_tools.fingerprint(ROOT)
    for name in used:
        if marks.get(name) != sources:
            return f"{name} was built of other sources ({marks.get(name, 'unknown')}) than this tree's ({sources})"
    try:
        with segattn_ops.use_backend("native"):
            x = torch.ones(1, 8, 2, 2, device=device, requires_grad=True)
            segattn_ops.position_attention(x, x, x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # such as no code for this architecture
        return f"a kernel does not run on {device}: {str(error).splitlines()[0]}"
    return None
