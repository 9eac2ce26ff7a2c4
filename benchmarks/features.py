"""Real features for the attention: a photograph from scikit-image's wheel, through a dilated ResNet-50.

The backbone is torchvision's ResNet-50 at output stride 8 (``replace_stride_with_dilation``), as in DANet and CCNet,
followed by the 3 x 3 convolution to 512 channels that precedes the attention in their heads. Trained weights are used
if they are given or in torch's cache; nothing is downloaded. Otherwise the weights are random from a seed, and batch
normalisation uses the photograph's own statistics, which keeps the features at a realistic scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .workloads import DTYPES, PYRAMID, Workload

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # inside scikit-image's wheel
STRIDE = 8
CHANNELS = 2048
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_photograph(name: str) -> np.ndarray:
    """(H, W, 3) uint8 of one of :data:`PHOTOGRAPHS`, from the installed package, or of an image file.

    Raises:
        ValueError: the name is neither, or the file is not an image.
    """
    if name in PHOTOGRAPHS:
        import skimage.data

        return np.asarray(getattr(skimage.data, name)())
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"photograph must be one of {', '.join(PHOTOGRAPHS)} or the path of a file (got {name!r})")
    from PIL import Image

    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"photograph {name} is not an image that PIL can read ({error})") from error


def fit(photograph: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part of the photograph with this aspect ratio, resized to (height, width, 3) uint8."""
    from PIL import Image

    rows, columns = photograph.shape[:2]
    ratio = min(rows / height, columns / width)
    part_rows, part_columns = max(round(height * ratio), 1), max(round(width * ratio), 1)
    top, left = (rows - part_rows) // 2, (columns - part_columns) // 2
    part = Image.fromarray(photograph[top : top + part_rows, left : left + part_columns])
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))


def cached_weights() -> Path | None:
    """Trained ResNet-50 weights in torch's cache, or None. Downloads nothing."""
    from torchvision.models import ResNet50_Weights

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for weights in (ResNet50_Weights.IMAGENET1K_V2, ResNet50_Weights.IMAGENET1K_V1):
        path = folder / Path(weights.url).name
        if path.is_file():
            return path
    return None


def _read_weights(path: Path) -> dict[str, Tensor]:
    from segattn_ops import checkpoints  # here: the GPU suite builds the libraries before it loads them

    if not path.is_file():
        raise ValueError(f"weights {path}: no such file")
    state = checkpoints.read(path)
    state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"weights {path}: the file holds no state dict")
    return {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in state.items()}


def least_bytes(channels: int, height: int, width: int) -> int:
    """Bytes that the features of one photograph need at least: the backbone's last two feature maps in bfloat16, and
    the weights of the convolution behind it."""
    return 2 * 2 * CHANNELS * height * width + 4 * 9 * CHANNELS * channels


class Extractor(nn.Module):
    """Photograph -> (1, channels, H, W) features at an eighth of its size.

    Args:
        channels: C of the feature map.
        weights: a ResNet-50 state dict (.pth or .safetensors) in torchvision's names; None for torch's cache, or random
            weights without one.
        seed: seed of the random weights.

    Raises:
        ValueError: the file is missing or no state dict, or not of a ResNet-50.
    """

    def __init__(self, channels: int = 512, weights: str | Path | None = None, seed: int = 0):
        super().__init__()
        from torchvision.models import resnet50

        path = Path(weights) if weights else cached_weights()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
            self.head = nn.Sequential(
                nn.Conv2d(CHANNELS, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            )
        if path:
            try:
                missing, _ = network.load_state_dict(_read_weights(path), strict=False)
            except RuntimeError as error:  # sizes differ
                raise ValueError(f"{path.name} is not a ResNet-50: {str(error).splitlines()[-1].strip()}") from error
            missing = [name for name in missing if not name.startswith("fc.")]
            if missing:
                raise ValueError(f"{path.name} is not a ResNet-50: it lacks {missing[0]} and {len(missing) - 1} more")
        self.backbone = nn.Sequential(*list(network.children())[:-2])
        self.trained = path is not None
        self.description = f"trained weights ({path.name})" if path else f"random weights (seed {seed}), untrained"

    @torch.inference_mode()
    def forward(self, photograph: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> (1, channels, ceil(H / 8), ceil(W / 8)) float32."""
        image = torch.tensor(photograph).permute(2, 0, 1).float().div_(255).unsqueeze(0)
        image = (image - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        image = image.contiguous(memory_format=torch.channels_last)
        self.to(memory_format=torch.channels_last)
        self.backbone.train(not self.trained)
        self.head.train()  # the head is untrained, so it uses the photograph's statistics
        # Twice as fast on processors with bfloat16 products; the benchmarks do not depend on the features' accuracy.
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            features = self.head(self.backbone(image))
        return features.float().contiguous()


class FeatureSource:
    """Features for any size up to the largest, cut from one pass over one photograph.

    Args:
        photograph: (H, W, 3) uint8.
        sizes: feature-map sizes (height, width) that will be used.
    """

    def __init__(self, photograph: np.ndarray, sizes: list[tuple[int, int]], extractor: Extractor, seed: int = 0):
        self.height, self.width = (max(size[axis] for size in sizes) for axis in (0, 1))
        if self.height * self.width == 1:
            self.width = 2  # batch normalisation needs more than one position
        photograph = fit(photograph, self.height * STRIDE, self.width * STRIDE)
        self.features = extractor(photograph).clone()  # out of inference mode
        self.seed = seed

    def window(self, height: int, width: int) -> Tensor:
        """(1, C, height, width): the centre of the features."""
        if height > self.height or width > self.width:
            raise ValueError(f"features go up to {self.height}x{self.width} (got {height}x{width})")
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return self.features[:, :, top : top + height, left : left + width].contiguous()

    def leaves(self, workload: Workload) -> dict[str, Tensor]:
        """The workload's operands: the features, or their seeded 1 x 1 projections, in its dtype.

        The samples of a batch are the features shifted along the width, so that they differ.
        """
        x = self.window(workload.height, workload.width)
        if x.shape[1] != workload.channels:
            raise ValueError(f"features have {x.shape[1]} channels, the workload {workload.channels}")
        if workload.batch > 1:
            shifts = [int(i * workload.width / workload.batch) for i in range(workload.batch)]
            x = torch.cat([x.roll(shift, dims=3) for shift in shifts])
        return operands(workload, x, self.seed)


def projections(workload: Workload, seed: int) -> dict[str, nn.Conv2d]:
    """The block's query, key and value convolutions with PyTorch's default initialisation, from a seed."""
    key_channels, value_channels = workload.widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            name: nn.Conv2d(workload.channels, width, 1)
            for name, width in (("query", key_channels), ("key", key_channels), ("value", value_channels))
        }


@torch.no_grad()
def operands(workload: Workload, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The workload's leaves from features x (B, C, H, W)."""
    dtype = DTYPES[workload.dtype]
    if workload.op == "channel":
        return {"input": x.to(dtype)}
    convolutions = {name: c.to(x.device) for name, c in projections(workload, seed).items()}
    if workload.op == "rcca":
        leaves = {"input": x}
        for name, convolution in convolutions.items():
            leaves |= {f"{name}_weight": convolution.weight, f"{name}_bias": convolution.bias}
        leaves["gamma"] = torch.full((1,), 0.5, device=x.device)
        return {name: leaf.detach().to(dtype) for name, leaf in leaves.items()}
    leaves = {name: F.conv2d(x, c.weight, c.bias) for name, c in convolutions.items()}
    if workload.op == "ann":
        leaves |= {name: pooled(leaves[name]) for name in ("key", "value")}
    return {name: leaf.to(dtype) for name, leaf in leaves.items()}


def pooled(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 110): ANN's pyramid of averages."""
    return torch.cat([F.adaptive_avg_pool2d(x, side).flatten(2) for side in PYRAMID], dim=2)


def grad_output(workload: Workload, seed: int = 1, device: str | torch.device = "cpu") -> Tensor:
    """A standard normal gradient of the output, the same for every rival."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(workload.output_shape(), generator=generator, device=device).to(DTYPES[workload.dtype])
