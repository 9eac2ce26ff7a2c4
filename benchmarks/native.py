"""Whether "fused" really is this package's kernels. Where they are missing the package serves the reference, with a
warning: right for its users, but in a benchmark a figure of eager PyTorch under this package's name."""

from __future__ import annotations

import torch

from .children import BUILD_TOOLS, ROOT


class NotNative(RuntimeError):
    """The package's kernels are not what would run."""


def require_native(device_type: str) -> None:
    """Raises :class:`NotNative` unless the libraries with the kernels for "cpu" or "cuda" are loaded."""
    import segattn_ops

    config = segattn_ops.build_config()[device_type]
    if not config["native"]:
        why = config["why_not"]
        raise NotNative(f"segattn_ops has no native {device_type} kernels here; nothing is measured or checked: {why}")


def fault(device: torch.device) -> str | None:
    """Why the libraries of this tree do not serve, or None: they are of these sources, load, and run on the device.

    Loads the libraries, so it belongs in a process that ends before they are built anew.
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
    sources = BUILD_TOOLS["fingerprint"](ROOT)
    for name in used:
        if marks.get(name) != sources:
            return f"{name} was built of other sources ({marks.get(name, 'unknown')}) than this tree's ({sources})"
    try:
        with segattn_ops.use_backend("native"):
            x = torch.ones(1, 8, 2, 2, device=device, requires_grad=True)
            segattn_ops.position_attention(x, x, x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # no code for this architecture, say
        return f"a kernel does not run on {device}: {str(error).splitlines()[0]}"
    return None
