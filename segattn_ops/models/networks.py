"""Networks: a backbone, a head, and an auxiliary head for training. They return logits by name, at the image's size."""

import difflib
import inspect
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.preprocessing import IMAGENET, Preprocessing
from ..nn._checks import feature_map
from .backbone import LAYERS, dilated_resnet
from .dfn import DFNHead
from .heads import ANNHead, CCNetHead, DANetHead, FCNHead, NonLocalHead


class SegmentationModel(nn.Module):
    """A backbone, a classifier and optionally an auxiliary classifier, as in ``torchvision.models.segmentation``.

    Args:
        backbone: image to a dictionary of feature maps.
        classifier: a head; its ``inputs`` name the feature maps it takes, in order. It returns logits or a dictionary
            of them.
        aux_classifier: a head for the output "aux", which only the loss uses. Set it to None after training.
        align_corners: of the bilinear upsampling; False as torchvision and mmsegmentation, True as the authors of
            DANet, CCNet and ANN.

    Attributes:
        preprocessing: makes the input of a picture: ``model(model.preprocessing(picture))``. ImageNet's, as
            torchvision's weights have it, until :func:`segattn_ops.checkpoints.load` sets that of the weights it loads
            (CCNet's and ANN's own take BGR). It is not part of the state dict.

    Shape:
        image (B, 3, H, W) of any size -> {"out": (B, num_classes, H, W), ...}: "aux" with an auxiliary head, and the
        head's other outputs.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        aux_classifier: nn.Module | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.align_corners = align_corners
        self.preprocessing: Preprocessing = IMAGENET

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """image (B, 3, H, W) -> logits by name, "out" first, each (B, num_classes, H, W)."""
        feature_map(type(self).__name__, "input", x, None)
        size = x.shape[2:]
        maps = self.backbone(x)
        logits = self._head(self.classifier, maps)
        outputs = logits if isinstance(logits, dict) else {"out": logits}
        if self.aux_classifier is not None:
            outputs = {**outputs, "aux": self._head(self.aux_classifier, maps)}
        return {
            name: F.interpolate(value, size, mode="bilinear", align_corners=self.align_corners)
            for name, value in outputs.items()
        }

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> dict[str, Tensor]: ...

    @staticmethod
    def _head(head: nn.Module, maps: dict[str, Tensor]) -> Any:
        inputs: Any = head.inputs
        return head(*(maps[name] for name in inputs))


class DANet(SegmentationModel):
    """DANet: Fu et al., CVPR 2019. Outputs "out", "position", "channel", and "aux" if there is such a head."""


class CCNet(SegmentationModel):
    """CCNet: Huang et al., ICCV 2019. Outputs "out", and "aux" if there is such a head."""


class ANN(SegmentationModel):
    """Asymmetric non-local network: Zhu et al., ICCV 2019. Outputs "out", and "aux" if there is such a head."""


class NonLocalNet(SegmentationModel):
    """Non-local segmentation network (mmsegmentation's NLNet). Outputs "out", and "aux" if there is such a head."""


class DFN(SegmentationModel):
    """DFN: Yu et al., CVPR 2018. Outputs "out", "smooth_2", "smooth_3", "smooth_4", "border"; see ``dfn_loss``."""


Network = TypeVar("Network", bound=SegmentationModel, covariant=True)


class Builder(Protocol[Network]):
    """The type of ``danet_resnet50`` and its siblings."""

    __name__: str
    __qualname__: str

    def __call__(
        self,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        aux_channels: int | None = None,
        weights_backbone: object = None,
        output_stride: int = ...,
        stem: str = "torchvision",
        align_corners: bool = False,
        **head: Any,
    ) -> Network: ...


def _assemble(
    network: type[Network],
    name: str,
    head_class: type[Any],
    num_classes: int,
    aux_loss: bool,
    aux_channels: int | None,
    align_corners: bool,
    backbone: dict[str, Any],
    head: dict[str, Any],
) -> Network:
    layers = [layer for layer in LAYERS if layer in head_class.inputs or (aux_loss and layer in FCNHead.inputs)]
    features = dilated_resnet(name, return_layers=layers, **backbone)
    channels = [features.channels[layer] for layer in head_class.inputs]
    inputs = (channels,) if head_class is DFNHead else channels
    classifier = head_class(*inputs, num_classes, **head)
    aux = FCNHead(features.channels["layer3"], num_classes, aux_channels) if aux_loss else None
    return network(features, classifier, aux, align_corners)


def _builder(network: type[Network], head_class: type[Any], resnet: str, stride: int) -> Builder[Network]:
    def build(
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        aux_channels: int | None = None,
        weights_backbone: object = None,
        output_stride: int = stride,
        stem: str = "torchvision",
        align_corners: bool = False,
        **head: Any,
    ) -> Network:
        _check_arguments(build.__name__, head_class, head)
        options = {"weights": weights_backbone, "output_stride": output_stride, "stem": stem}
        return _assemble(network, resnet, head_class, num_classes, aux_loss, aux_channels, align_corners, options, head)

    build.__doc__ = f"""{network.__name__} on a {resnet} of torchvision at output stride {stride}.

    Args:
        num_classes: channels of the logits.
        aux_loss: add an auxiliary head on layer3, whose logits are "aux".
        aux_channels: hidden channels of that head; a quarter of layer3's if None.
        weights_backbone: weights of the backbone as torchvision takes them ("DEFAULT" downloads); None for random
            ones.
        output_stride: input pixels per position of the last feature map: 8, 16 or 32.
        stem: "torchvision", "v1c" (mmsegmentation's ResNetV1c), "deep" or "ccnet"; see
            :func:`~segattn_ops.models.dilated_resnet`.
        align_corners: of the upsampling of the logits.
        head: further arguments of :class:`~segattn_ops.models.{head_class.__name__}`.

    Returns:
        {network.__name__}: image (B, 3, H, W) to a dictionary of logits (B, num_classes, H, W). ``preprocessing`` of
        the network makes the image from a picture.

    Raises:
        TypeError: for an argument that neither the network nor its head has.
        ValueError: for values out of range.
    """
    return build


# Arguments of other libraries' builders, and what to do here.
_LOAD = "no weights come with this package; build the network, then segattn_ops.checkpoints.load(model, file)"
_BACKBONE = 'use weights_backbone="DEFAULT" for torchvision\'s ImageNet weights'
_ELSEWHERE = {
    **dict.fromkeys(("pretrained", "weights", "checkpoint"), f"{_LOAD}, or {_BACKBONE}"),
    **dict.fromkeys(("pretrained_backbone", "pretrained_base", "backbone_weights"), _BACKBONE),
    **dict.fromkeys(("progress", "root", "local_rank"), f"nothing is downloaded for the network: {_LOAD}"),
    **dict.fromkeys(("nclass", "classes", "n_classes", "num_class", "num_labels"), "use num_classes"),
    **dict.fromkeys(("aux", "auxiliary", "aux_params"), "use aux_loss"),
    **dict.fromkeys(("backbone", "encoder_name", "depth"), "the name of the builder gives the backbone"),
    **dict.fromkeys(("in_channels", "low_channels", "high_channels"), "the backbone gives the channels of the head"),
    **dict.fromkeys(("dilated", "replace_stride_with_dilation"), "use output_stride"),
}


def _check_arguments(builder: str, head_class: type[Any], given: dict[str, Any]) -> None:
    """Raises TypeError for arguments that the head does not have, and says what is meant."""
    own = ("num_classes", "aux_loss", "aux_channels", "weights_backbone", "output_stride", "stem", "align_corners")
    channels = ("self", "num_classes", "in_channels", "low_channels", "high_channels")
    options = [name for name in inspect.signature(head_class.__init__).parameters if name not in channels]
    for name, value in given.items():
        if name in options:
            continue
        advice = _ELSEWHERE.get(name)
        if advice is None:
            close = difflib.get_close_matches(name, (*own, *options), 1)
            meant = f"do you mean {close[0]}? " if close else ""
            advice = f"{meant}it takes {', '.join(own)}, and for {head_class.__name__} {', '.join(options)}"
        raise TypeError(f"{builder}: there is no argument {name} (got {value!r}): {advice}")


def _named(name: str, build: Builder[Network]) -> Builder[Network]:
    build.__name__ = build.__qualname__ = name
    return build


danet_resnet50 = _named("danet_resnet50", _builder(DANet, DANetHead, "resnet50", 8))
danet_resnet101 = _named("danet_resnet101", _builder(DANet, DANetHead, "resnet101", 8))
ccnet_resnet50 = _named("ccnet_resnet50", _builder(CCNet, CCNetHead, "resnet50", 8))
ccnet_resnet101 = _named("ccnet_resnet101", _builder(CCNet, CCNetHead, "resnet101", 8))
ann_resnet50 = _named("ann_resnet50", _builder(ANN, ANNHead, "resnet50", 8))
ann_resnet101 = _named("ann_resnet101", _builder(ANN, ANNHead, "resnet101", 8))
nonlocal_resnet50 = _named("nonlocal_resnet50", _builder(NonLocalNet, NonLocalHead, "resnet50", 8))
nonlocal_resnet101 = _named("nonlocal_resnet101", _builder(NonLocalNet, NonLocalHead, "resnet101", 8))
dfn_resnet50 = _named("dfn_resnet50", _builder(DFN, DFNHead, "resnet50", 32))
dfn_resnet101 = _named("dfn_resnet101", _builder(DFN, DFNHead, "resnet101", 32))
