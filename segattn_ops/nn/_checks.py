"""Argument checks shared by the modules, with uniform error messages."""

import math
import numbers
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.functional import pad
from torch.overrides import has_torch_function

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def positive_int(module: str, name: str, value: Any) -> int:
    """Returns ``value`` if it is an int >= 1, else raises TypeError or ValueError, which name module and argument."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{module}: {name} must be a positive integer (got {value!r})")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{module}: {name} must be a positive integer (got {value!r})")
    return int(value)


def finite_float(module: str, name: str, value: Any) -> float:
    """Returns ``value`` as a float if it is a finite real number, else raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{module}: {name} must be a number (got {type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{module}: {name} must be a finite number (got {value!r})")
    return float(value)


def probability(module: str, name: str, value: Any) -> float:
    """Returns ``value`` as a float if it lies in [0, 1), else raises ValueError."""
    number = finite_float(module, name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{module}: {name} must lie in [0, 1) (got {value!r})")
    return number


def reduced_channels(module: str, name: str, in_channels: int, given: int | None, reduction: int) -> int:
    """``given`` if it is not None, else ``in_channels // reduction``, which must not be 0."""
    if given is not None:
        return positive_int(module, name, given)
    channels = in_channels // reduction
    if channels == 0:
        raise ValueError(
            f"{module}: in_channels must be at least {reduction}, because {name} defaults to in_channels // {reduction}"
            f" (got {in_channels}); give {name} explicitly for fewer channels"
        )
    return channels


def is_recorded(*inputs: Any) -> bool:
    """Whether torch.fx records a forward pass: it calls the module with proxies, which have no shape to check."""
    return any(isinstance(x, Proxy) for x in inputs)


def feature_map(module: str, name: str, x: Any, channels: int | None, spatial_dims: int = 2) -> None:
    """Raises unless ``x`` is a floating-point tensor (B, channels, *spatial) of the stated rank: TypeError if it is not
    a tensor, else ValueError."""
    if is_recorded(x):
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{module}: {name} must be a tensor (got {type(x).__name__})")
    if x.dim() != spatial_dims + 2:
        axes = {1: "(B, C, L)", 2: "(B, C, H, W)", 3: "(B, C, T, H, W)"}[spatial_dims]
        raise ValueError(
            f"{module}: {name} must have {spatial_dims + 2} dimensions {axes} (got shape {tuple(x.shape)})"
        )
    if not x.is_floating_point():
        raise ValueError(f"{module}: {name} must be of a floating-point dtype (got {x.dtype})")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{module}: {name} must have {channels} channels (got {x.shape[1]})")


def same_size(module: str, name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raises ValueError unless the two feature maps have the same batch and spatial sizes."""
    if is_recorded(x, other):
        return
    if x.shape[0] != other.shape[0]:
        raise ValueError(f"{module}: {name} must have batch size {other.shape[0]} like {other_name} (got {x.shape[0]})")
    if x.shape[2:] != other.shape[2:]:
        expected, got = tuple(other.shape[2:]), tuple(x.shape[2:])
        raise ValueError(f"{module}: {name} must have spatial size {expected} like {other_name} (got {got})")


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is PyTorch's 1 x 1 convolution: affine, and the same at every position. What a user may put in
    its place (an adapter, a quantised layer) need not be."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer).forward is nn.Conv2d.forward  # also of a layer with torch.nn.utils.parametrize
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding in ((0, 0), "valid", "same")
    )


def of_part(layer: nn.Module, part: torch.Tensor) -> torch.Tensor:
    """A pointwise layer of a rank's part of a feature map, which may have no positions: PyTorch's convolutions refuse
    it."""
    height, width = part.shape[2:]
    if height > 0 and width > 0:
        projected: torch.Tensor = layer(part)
    else:
        projected = layer(pad(part, (0, int(width == 0), 0, int(height == 0))))[:, :, :height, :width]
    return projected


class _Shared:
    """A mesh, which the copies of a block share."""

    def __init__(self, mesh: "DeviceMesh | None") -> None:
        self.mesh = mesh

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class Unscripted(nn.Module):
    """A module whose forward TorchScript cannot compile: it calls the public functions, which dispatch in Python.

    Attributes:
        mesh: whose ranks hold the parts of its feature maps; None for whole maps. It is not part of the state dict.
    """

    _shared_mesh = _Shared(None)

    @property
    def mesh(self) -> "DeviceMesh | None":
        return self._shared_mesh.mesh

    def _set_mesh(self, mesh: "DeviceMesh | None", refused: str | None = None, calls_ops: bool = False) -> None:
        """Sets the mesh, at the end of the constructor.

        Args:
            mesh: None to leave it.
            refused: what of the block has no exact form on parts of maps.
            calls_ops: whether the forward pass calls segattn_ops.distributed by itself; else the block becomes
                spatially parallel as a whole.

        Raises:
            TypeError, ValueError: for what is no mesh of one or two dimensions.
            NotImplementedError: for a block with `refused`.
        """
        if mesh is None:
            return
        name = type(self).__name__
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"{name}: mesh must be a torch.distributed.DeviceMesh (got {type(mesh).__name__})")
        if mesh.ndim not in (1, 2):
            raise ValueError(f"{name}: mesh must have 1 or 2 dimensions (got {mesh.ndim}: {list(mesh.shape)})")
        if refused is not None:
            raise NotImplementedError(f"{name}: {refused} has no exact form on parts of feature maps, for a mesh")
        self._shared_mesh = _Shared(mesh)
        if not calls_ops:
            from ..distributed import spatially_parallel

            spatially_parallel(self, mesh)

    def _mesh_for(self, x: torch.Tensor, *projections: nn.Module) -> "DeviceMesh | None":
        """The mesh, for a forward pass that calls segattn_ops.distributed by itself; None within a spatially parallel
        model, whose maps know their own.

        Raises:
            NotImplementedError: for a projection that is not the same at each position.
        """
        mesh = self.mesh
        if mesh is None or has_torch_function((x,)):
            return None
        for projection in projections:
            if not is_pointwise(projection):
                raise NotImplementedError(
                    f"{type(self).__name__}: the projections must be 1 x 1 convolutions where mesh is set (got "
                    f"{projection}); use segattn_ops.distributed.spatially_parallel instead of mesh"
                )
        return mesh

    def _mesh_repr(self) -> str:
        return "" if self.mesh is None else f", mesh={' x '.join(str(size) for size in self.mesh.shape)}"

    def extra_repr(self) -> str:
        return self._mesh_repr().removeprefix(", ")

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile this module; use torch.export, or torch.jit.trace"
        )


class ScalarShapes(Unscripted):
    """A module whose one-element parameters load from tensors of shape (1,) and ().

    The official repositories store the residual weight gamma as (1,), mmcv and mmsegmentation as (). PyTorch's
    ``load_state_dict`` loads (1,) into () but not () into (1,).
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            stored = state_dict.get(prefix + name)
            if parameter.numel() == 1 and isinstance(stored, torch.Tensor) and stored.numel() == 1:
                state_dict[prefix + name] = stored.reshape(
                    parameter.shape
                )  # load_state_dict passes a copy of the caller's dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
