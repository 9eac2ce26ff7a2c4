"""Generated scenes for the examples: shapes on a noisy background, drawn with scikit-image, and a small network for
them."""

import numpy as np
import torch
from skimage.draw import disk, ellipse, polygon
from torch import Tensor, nn

from segattn_ops.checkpoints import Preprocessing
from segattn_ops.models import CCNet, CCNetHead, DANet, DANetHead, FCNHead, SegmentationModel

CLASSES = ("background", "disk", "square", "triangle", "ellipse")
PALETTE = np.array([(40, 40, 46), (230, 85, 60), (70, 140, 220), (240, 190, 60), (90, 185, 110)], dtype=np.uint8)
STRIDE = 4  # of the small backbone
PREPROCESSING = Preprocessing("RGB", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1 / 255)
COLOUR_SPREAD = 0.12  # of a shape's colour about its class's: colour alone does not separate the classes


def scene(seed: int, height: int, width: int, shapes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A scene and its labels.

    Every shape has a colour near its class's; later shapes hide earlier ones.

    Args:
        seed: of everything about the scene.
        height, width: in pixels.
        shapes: how many; one for every 800 pixels if None.

    Returns:
        image (H, W, 3) float32 in [0, 1], labels (H, W) int64, indices of ``CLASSES``.
    """
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.float32)
    image[:] = (PALETTE[0] / 255 + rng.normal(0, COLOUR_SPREAD, 3)).clip(0, 1)
    labels = np.zeros((height, width), np.int64)
    for _ in range(shapes or max(height * width // 800, 1)):
        kind = int(rng.integers(1, len(CLASSES)))
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(8, 16)
        rows, columns = _draw(kind, y, x, radius, rng.uniform(0, 2 * np.pi), (height, width))
        image[rows, columns] = (PALETTE[kind] / 255 + rng.normal(0, COLOUR_SPREAD, 3)).clip(0, 1)
        labels[rows, columns] = kind
    image += rng.normal(0, 0.04, image.shape).astype(np.float32)
    return image.clip(0, 1), labels


def _draw(
    kind: int, y: float, x: float, radius: float, angle: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of one shape, cut at the scene's border."""
    if kind == 1:
        return disk((y, x), radius, shape=size)
    if kind == 4:
        return ellipse(y, x, radius * 1.3, radius * 0.55, shape=size, rotation=angle)
    corners = 4 if kind == 2 else 3
    turn = angle + 2 * np.pi * np.arange(corners) / corners
    return polygon(y + radius * 1.2 * np.sin(turn), x + radius * 1.2 * np.cos(turn), shape=size)


def batch(seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Scenes as tensors: images (count, 3, size, size) float32, centred, and labels (count, size, size) int64."""
    scenes = [scene(seed * count + i, size, size) for i in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in scenes])).permute(0, 3, 1, 2).contiguous()
    return PREPROCESSING(images), torch.from_numpy(np.stack([labels for _, labels in scenes]))


class SmallBackbone(nn.Module):
    """Two strided convolutions and two dilated residual blocks: feature maps at a quarter of the image's size, for
    training on a CPU."""

    channels = 64

    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

        self.stem = nn.Sequential(conv(3, 32, stride=2), conv(32, 64, stride=2))
        self.layer3 = nn.Sequential(conv(64, 64), conv(64, 64))
        self.layer4 = nn.Sequential(conv(64, 64, dilation=2), conv(64, 64, dilation=2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """image (B, 3, H, W) -> {"layer3", "layer4"}, (B, 64, H/4, W/4)."""
        x = self.stem(x)
        low = x + self.layer3(x)
        return {"layer3": low, "layer4": low + self.layer4(low)}


def small_network(system: str) -> SegmentationModel:
    """DANet or CCNet with the small backbone."""
    kinds = {"danet": (DANet, DANetHead), "ccnet": (CCNet, CCNetHead)}
    if system not in kinds:
        raise ValueError(f"small_network: system must be danet or ccnet (got {system!r})")
    network, head = kinds[system]
    channels = SmallBackbone.channels
    model = network(SmallBackbone(), head(channels, len(CLASSES), inter_channels=32), FCNHead(channels, len(CLASSES)))
    model.preprocessing = PREPROCESSING
    return model


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Mean intersection over union of the classes that are present; predicted and labels of one shape, int64."""
    n = len(CLASSES)
    confusion = torch.bincount((labels * n + predicted).flatten(), minlength=n * n).view(n, n).double()
    intersection, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return (intersection[union > 0] / union[union > 0]).mean().item()
