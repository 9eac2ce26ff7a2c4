"""Generated scenes for the examples, drawn with scikit-image, and small networks for them.

Context matters in the scenes. Each kind of shape has one colour in a scene, but not the same in all scenes. Fragments
without a recognisable shape belong to the kind that has their colour: which that is only the whole shapes say, which
may be anywhere in the scene. A network without attention can guess a fragment by the colour that is most frequent for a
kind; to know, it must look for whole shapes of the fragment's colour.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from skimage.draw import disk, ellipse, polygon
from torch import Tensor, nn

from segattn_ops import checkpoints
from segattn_ops.checkpoints import Preprocessing
from segattn_ops.models import CCNet, CCNetHead, DANet, DANetHead, FCNHead, SegmentationModel
from segattn_ops.nn import RecurrentCrissCrossAttention

CLASSES = ("background", "disk", "square", "triangle", "ellipse")
PALETTE = np.array([(40, 40, 46), (214, 69, 50), (55, 126, 205), (245, 190, 60), (80, 175, 90)], dtype=np.uint8)
WEIGHTS = Path(__file__).parent / "weights"
STRIDE = 4  # of the small backbone
PREPROCESSING = Preprocessing("RGB", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1 / 255)
# Share of the scenes whose colours are dealt to the kinds at random; in the others they are PALETTE's. With 1 a colour
# says nothing by itself, the features do not keep it, and attention has nothing to compare: in a trial 23% of the
# fragments were right after 1400 steps, against 96% after 1200 with 0.7.
EXCHANGED = 0.7
AREA = 380  # pixels of a scene for each shape
KEY_CHANNELS = 16
GAMMA = 0.5  # of the attention between positions, at the start of a training


def scene(seed: int, height: int, width: int, shapes: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene, its labels, and where its fragments are.

    Args:
        seed: of everything about the scene.
        height, width: in pixels.
        shapes: how many at most: a whole shape of each kind, then mostly fragments, as far as they have a place without
            touching; one for every AREA pixels if None.

    Returns:
        image (H, W, 3) float32 in [0, 1], labels (H, W) int64, indices of ``CLASSES``, fragments (H, W) bool.
    """
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.float32)
    image[:] = (0.16 + rng.normal(0, 0.03, 3)).clip(0, 1)
    labels = np.zeros((height, width), np.int64)
    fragments = np.zeros((height, width), bool)
    kinds = np.arange(1, len(CLASSES))
    colour_of = dict(zip(kinds, rng.permutation(kinds) if rng.random() < EXCHANGED else kinds, strict=True))
    placed = np.empty((0, 3))  # y, x, radius
    for index in range(shapes or max(height * width // AREA, len(kinds) + 2)):
        whole = index < len(kinds) or rng.random() < 0.1
        kind = int(kinds[index] if index < len(kinds) else rng.choice(kinds))
        radius = rng.uniform(8, 10.5) if whole else rng.uniform(5, 7.5)
        place = _free_place(rng, radius, placed, (height, width))
        if place is None:
            continue
        placed = np.vstack([placed, (*place, radius)])
        rows, columns = (
            _draw(kind, *place, radius, rng, (height, width))
            if whole
            else _fragment(*place, radius, rng, (height, width))
        )
        image[rows, columns] = (PALETTE[colour_of[kind]] / 255 + rng.normal(0, 0.03, 3)).clip(0, 1)
        labels[rows, columns] = kind
        fragments[rows, columns] = not whole
    image += rng.normal(0, 0.04, image.shape).astype(np.float32)
    return image.clip(0, 1), labels, fragments


def _free_place(
    rng: np.random.Generator, radius: float, placed: np.ndarray, size: tuple[int, int]
) -> tuple[float, float] | None:
    """(y, x) of a shape that touches no other and not the border; None if 60 places are taken."""
    for _ in range(60):
        y, x = (rng.uniform(min(radius, length / 2), max(length - radius, length / 2)) for length in size)
        if (np.hypot(placed[:, 0] - y, placed[:, 1] - x) > 1.08 * (placed[:, 2] + radius)).all():
            return y, x
    return None


def _draw(
    kind: int, y: float, x: float, radius: float, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of one whole shape, cut at the scene's border."""
    angle = rng.uniform(0, 2 * np.pi)
    if kind == 1:
        return disk((y, x), radius, shape=size)
    if kind == 4:
        return ellipse(y, x, radius * 1.35, radius * 0.5, shape=size, rotation=angle)
    corners, reach = (4, 1.2) if kind == 2 else (3, 1.45)
    turn = angle + 2 * np.pi * np.arange(corners) / corners
    return polygon(y + radius * reach * np.sin(turn), x + radius * reach * np.cos(turn), shape=size)


def _fragment(
    y: float, x: float, radius: float, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of an outline with nine corners at random distances."""
    turn, reach = 2 * np.pi * np.arange(9) / 9, radius * rng.uniform(0.55, 1.15, 9)
    return polygon(y + reach * np.sin(turn), x + reach * np.cos(turn), shape=size)


def batch(seed: int, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes as tensors: images (count, 3, size, size) float32, centred, labels (count, size, size) int64, fragments
    (count, size, size) bool."""
    scenes = (scene(seed * count + i, size, size) for i in range(count))
    images, labels, fragments = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
    return PREPROCESSING(images.permute(0, 3, 1, 2).contiguous()), labels, fragments


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
    """DANet or CCNet with the small backbone, at the start of a training.

    The attention starts as similarity: the projections of query and key are the same, and gamma is GAMMA. With the
    papers' start, independent projections and gamma 0, DANet learns the task too (84% of the fragments are right after
    1800 steps), but in a way that is hard to read: gamma became -0.3, and most points attended to other kinds than
    their own. Query and key have KEY_CHANNELS channels: an eighth of the features' channels would be 4.
    """
    networks = {"danet": DANet, "ccnet": CCNet}
    if system not in networks:
        raise ValueError(f"small_network: system must be danet or ccnet (got {system!r})")
    channels, inner, classes = SmallBackbone.channels, 32, len(CLASSES)
    head: nn.Module
    if system == "danet":
        head = DANetHead(channels, classes, inter_channels=inner, key_channels=KEY_CHANNELS)
    else:
        head = CCNetHead(channels, classes, inter_channels=inner)
        head.cca = RecurrentCrissCrossAttention(inner, key_channels=KEY_CHANNELS)
    model = networks[system](SmallBackbone(), head, FCNHead(channels, classes))
    attention = attention_of(model)
    attention.key_conv.load_state_dict(attention.query_conv.state_dict())
    nn.init.constant_(attention.gamma, GAMMA)
    model.preprocessing = PREPROCESSING
    return model


def attention_of(model: SegmentationModel) -> nn.Module:
    """A small network's attention between positions."""
    head = model.classifier
    attention: nn.Module = head.sa if isinstance(head, DANetHead) else head.cca
    return attention


def start_from(model: SegmentationModel, danet: Mapping[str, Tensor]) -> None:
    """Gives a small network the weights of a small DANet, wherever it has a layer of their shape.

    Raises:
        ValueError: if there is none.
    """
    counterparts = {"conva": "conv5a", "cca": "sa", "convb": "conv51"}
    state, found = model.state_dict(), 0
    for name, tensor in state.items():
        parts = name.split(".")
        source = danet.get(".".join([parts[0], counterparts.get(parts[1], parts[1]), *parts[2:]]))
        if source is not None and source.shape == tensor.shape:
            state[name], found = source, found + 1
    if not found:
        raise ValueError("start_from: the weights are not those of a small DANet of examples.train_shapes")
    model.load_state_dict(state)


def trained_network(system: str) -> SegmentationModel:
    """The small network with the weights of examples/weights, in evaluation mode."""
    model = small_network(system)
    model.load_state_dict(checkpoints.read(WEIGHTS / f"{system}.safetensors"))
    return model.eval()


def danet() -> SegmentationModel:
    """For ``python -m segattn_ops visualize --network examples.shapes:danet``."""
    return trained_network("danet")


def ccnet() -> SegmentationModel:
    """For ``python -m segattn_ops visualize --network examples.shapes:ccnet``."""
    return trained_network("ccnet")


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Mean intersection over union of the classes that are present; predicted and labels of one shape, int64."""
    n = len(CLASSES)
    confusion = torch.bincount((labels * n + predicted).flatten(), minlength=n * n).view(n, n).double()
    intersection, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return (intersection[union > 0] / union[union > 0]).mean().item()
