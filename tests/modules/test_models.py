"""Heads against transcriptions of the published ones with their own state dicts; networks, losses and backbones."""

import pytest
import torch
from torch import nn as tnn

from segattn_ops import models
from segattn_ops.models.backbone import _named_weights

from ..peers import heads, randomise
from .test_nn import results


def without_dropout(module: tnn.Module) -> tnn.Module:
    for layer in module.modules():
        if isinstance(layer, (tnn.Dropout, tnn.Dropout2d)):
            layer.p = 0.0
    return module


class Stacked(tnn.Module):
    """Joins what a head returns into one tensor, in the order of `names` if it is a dictionary."""

    def __init__(self, head: tnn.Module, names: tuple[str, ...] = ()):
        super().__init__()
        self.head, self.names = head, names

    def forward(self, *maps):
        y = self.head(*maps)
        if isinstance(y, dict):
            y = [y[name] for name in self.names]
        return y if isinstance(y, torch.Tensor) else torch.cat(list(y), 1)


def map_(channels: int, height: int, width: int) -> tuple[int, ...]:
    return (2, channels, height, width)


STAGES = (4, 6, 8, 10)
HEADS = {
    "danet": (
        lambda: models.DANetHead(32, 5),
        lambda: heads.DANetHead(32, 5),
        (map_(32, 7, 6),),
        ("out", "position", "channel"),
    ),
    "ccnet": (lambda: models.CCNetHead(32, 5), lambda: heads.RCCAModule(32, 8, 5), (map_(32, 7, 6),), ()),
    "ccnet_out_channels": (
        lambda: models.CCNetHead(32, 5, out_channels=6, recurrence=1),
        lambda: heads.RCCAModule(32, 6, 5, 1),
        (map_(32, 7, 6),),
        (),
    ),
    "ann": (lambda: models.ANNHead(16, 32, 5), lambda: heads.ANNHead(16, 32, 5), (map_(16, 9, 8), map_(32, 9, 8)), ()),
    "dfn": (
        lambda: models.DFNHead(STAGES, 5),
        lambda: heads.DFNHead(STAGES, 5),
        tuple(map_(c, 16 >> i, 24 >> i) for i, c in enumerate(STAGES)),
        ("border", "out"),
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", HEADS)
def test_head_matches_the_published_one(name: str, training: bool) -> None:
    ours, theirs, shapes, names = HEADS[name]
    oracle = randomise(theirs()).double()
    head = ours().double()
    head.load_state_dict(oracle.state_dict())
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    oracle, head = (without_dropout(Stacked(h, names).train(training)) for h in (oracle, head))
    expected, expected_gradients, weight = results(oracle, inputs)
    output, gradients, _ = results(head, inputs, weight)
    torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-8)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def test_non_local_head_is_the_formula() -> None:
    head = randomise(models.NonLocalHead(16, 3)).double().eval()
    x = torch.randn(2, 16, 6, 7, dtype=torch.float64)
    y = head.conva(x)
    theta, phi, g = (layer(y).flatten(2) for layer in (head.nl.theta, head.nl.phi, head.nl.g))
    attention = (theta.mT @ phi / theta.shape[1] ** 0.5).softmax(-1)
    y = y + head.nl.W((g @ attention.mT).view(2, -1, 6, 7))
    torch.testing.assert_close(head(x), head.bottleneck(torch.cat([x, head.convb(y)], 1)))


def test_dfn_of_the_paper_has_a_classifier_for_every_stage() -> None:
    head = models.DFNHead(STAGES, 5, channels=12)
    outputs = head(*(torch.randn(1, c, 17 - 4 * i, 11 - 2 * i) for i, c in enumerate(STAGES)))
    assert {k: v.shape[1] for k, v in outputs.items()} == {
        "out": 5,
        "smooth_2": 5,
        "smooth_3": 5,
        "smooth_4": 5,
        "border": 1,
    }
    assert outputs["out"].shape[2:] == outputs["border"].shape[2:] == (17, 11)
    assert outputs["smooth_4"].shape[2:] == (5, 5)


BUILDERS = {
    "danet_resnet50": ["out", "position", "channel", "aux"],
    "ccnet_resnet50": ["out", "aux"],
    "ann_resnet50": ["out", "aux"],
    "nonlocal_resnet50": ["out", "aux"],
    "dfn_resnet50": ["out", "smooth_2", "smooth_3", "smooth_4", "border", "aux"],
}


@pytest.mark.parametrize("name", BUILDERS)
def test_network_trains_at_any_size(name: str) -> None:
    model = getattr(models, name)(3, aux_loss=True)
    x = torch.randn(2, 3, 35, 46)  # divisible by nothing
    outputs = model(x)
    assert list(outputs) == BUILDERS[name]
    assert all(v.shape == (2, 3, 35, 46) for v in outputs.values())
    target = torch.randint(0, 3, (2, 35, 46))
    target[:, :4] = 255
    loss = (models.dfn_loss if "border" in outputs else models.segmentation_loss)(outputs, target)
    loss.backward()
    assert torch.isfinite(loss)
    # At the first step zero-initialised gammas stop the gradients of the attention, and of nothing else.
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert model.eval()(x[:1])["out"].shape == (1, 3, 35, 46)


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_backbone_is_torchvisions(name: str, stride: int) -> None:
    from torchvision.models import get_model
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = models.dilated_resnet(name, output_stride=stride, return_layers=("layer1", "layer4")).eval()
    resnet = get_model(name, weights=None, replace_stride_with_dilation=[False, stride < 16, stride < 32]).eval()
    randomise(resnet)
    missing, unexpected = backbone.load_state_dict(resnet.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["fc.weight", "fc.bias"])
    x = torch.randn(1, 3, 33, 40)
    expected = IntermediateLayerGetter(resnet, {"layer1": "layer1", "layer4": "layer4"})(x)
    with torch.no_grad():
        maps = backbone(x)
    assert list(maps) == ["layer1", "layer4"]
    for key, value in maps.items():
        torch.testing.assert_close(value, expected[key])
    assert maps["layer4"].shape[2:] == (-(-33 // stride), -(-40 // stride))
    assert backbone.channels == {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}


def test_backbone_stems() -> None:
    for stem, width in (("v1c", 64), ("deep", 128), ("ccnet", 128)):
        backbone = models.dilated_resnet("resnet50", stem=stem)
        assert backbone.stem[6].out_channels == backbone.layer1[0].conv1.in_channels == width
        assert backbone(torch.randn(2, 3, 17, 17))["layer4"].shape == (2, 2048, 3, 3)
    assert backbone.layer3[0].conv2.dilation == (2, 2)
    assert backbone.layer4[0].conv2.dilation == backbone.layer4[0].conv2.padding == (4, 4)


def test_semantic_border_is_where_neighbours_differ() -> None:
    target = torch.randint(0, 3, (2, 9, 11))
    target[0, 2:4, 3:6] = 255
    border = models.semantic_border(target, radius=2)
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(11)).tolist():
        window = target[b, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        labels = set(window[window != 255].tolist())
        assert border[b, y, x].item() == (target[b, y, x] != 255 and len(labels) > 1)


def test_losses_are_their_formulas() -> None:
    logits, target = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randint(0, 4, (2, 5, 6))
    mask = torch.rand(2, 4, 5, 6) < 0.5
    p = torch.sigmoid(logits)
    p = torch.where(mask, p, 1 - p)
    torch.testing.assert_close(models.focal_loss(logits, mask, gamma=2.0), (-((1 - p) ** 2) * p.log()).mean())
    cross_entropy = torch.nn.functional.cross_entropy(logits, target)
    outputs = {"out": logits, "aux": logits, "position": logits}
    loss = models.segmentation_loss(outputs, target, weights={"position": 0.5})
    torch.testing.assert_close(loss.double(), cross_entropy * 1.9)
    outputs = {"out": logits, "smooth_2": logits, "border": logits[:, :1]}
    edge = models.semantic_border(target)[:, None]
    expected = 2 * cross_entropy + 0.1 * models.focal_loss(logits[:, :1], edge)
    torch.testing.assert_close(models.dfn_loss(outputs, target).double(), expected)
    per_class = edge & (target[:, None] == torch.arange(4)[:, None, None])
    expected = 2 * cross_entropy + 0.1 * models.focal_loss(logits, per_class)
    torch.testing.assert_close(models.dfn_loss({**outputs, "border": logits}, target).double(), expected)


BAD = [
    (lambda: models.dilated_resnet("resnet18"), "torchvision does not dilate resnet18"),
    (lambda: models.dilated_resnet("vgg16"), "'vgg16' is not a ResNet of torchvision"),
    (lambda: models.dilated_resnet(output_stride=4), "output_stride must be 8, 16 or 32 (got 4)"),
    (lambda: models.dilated_resnet(stem="v2"), "stem must be one of torchvision, v1c, deep, ccnet"),
    (lambda: models.dilated_resnet(stem="v1c", weights="DEFAULT"), "torchvision's weights have no v1c stem"),
    (lambda: models.dilated_resnet(return_layers=("conv1",)), "return_layers must name some of layer1"),
    (lambda: models.DANetHead(32, 0), "DANetHead: num_classes must be a positive integer (got 0)"),
    (lambda: models.DFNHead((1, 2, 3), 5), "DFNHead: in_channels must have 4 entries"),
    (lambda: models.DFNHead(STAGES, 5)(torch.zeros(1, 4, 2, 2)), "DFNHead: needs the maps of 4 stages (got 1)"),
    (lambda: models.CCNetHead(32, 5)(torch.zeros(1, 16, 2, 2)), "CCNetHead: input must have 32 channels (got 16)"),
    (lambda: models.semantic_border(torch.zeros(1, 2, 2).long(), 0), "radius must be at least 1"),
    (
        lambda: models.segmentation_loss({"out": torch.zeros(1, 2, 3, 3)}, torch.zeros(1, 3, 3).long(), {"sa": 1.0}),
        "no output is named sa (got out)",
    ),
    (
        lambda: models.segmentation_loss({"out": torch.zeros(1, 2, 3, 4)}, torch.zeros(1, 3, 3).long()),
        "out must have the size of target (3, 3) (got (3, 4))",
    ),
]


NOT_ARGUMENTS = [
    ({"pretrained": True}, "no weights come with this package; build the network, then segattn_ops.checkpoints.load"),
    ({"pretrained": True}, 'or use weights_backbone="DEFAULT" for torchvision\'s ImageNet weights'),
    ({"weights": "DEFAULT"}, "there is no argument weights (got 'DEFAULT'): no weights come with this package"),
    ({"pretrained_backbone": False}, '(got False): use weights_backbone="DEFAULT"'),
    ({"nclass": 19}, "there is no argument nclass (got 19): use num_classes"),
    ({"aux": True}, "use aux_loss"),
    ({"backbone": "resnet101"}, "the name of the builder gives the backbone"),
    ({"in_channels": 2048}, "the backbone gives the channels of the head"),
    ({"inter_chanels": 64}, "do you mean inter_channels? it takes num_classes, aux_loss"),
    ({"recurrence": 3}, "for DANetHead inter_channels, key_channels, norm_layer, dropout"),
]


@pytest.mark.parametrize(("arguments", "message"), NOT_ARGUMENTS, ids=[message for _, message in NOT_ARGUMENTS])
def test_arguments_of_other_libraries(arguments, message: str) -> None:
    with pytest.raises(TypeError) as error:
        models.danet_resnet101(**arguments)
    assert message in str(error.value) and str(error.value).startswith("danet_resnet101: ")


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_name_themselves(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: there is no argument pretrained"):
        getattr(models, name)(pretrained=True)


def test_weights_of_a_backbone_are_torchvisions() -> None:
    from torchvision.models import ResNet50_Weights

    with pytest.raises(TypeError, match=r"dilated_resnet: weights must be a name of torchvision's .* \(got True\)"):
        models.danet_resnet50(weights_backbone=True)
    with pytest.raises(
        ValueError, match=r"no weights 'net.pth' of resnet50, only IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT; load"
    ):
        models.danet_resnet50(weights_backbone="net.pth")
    for known in ("DEFAULT", "ResNet50_Weights.IMAGENET1K_V2"):
        assert _named_weights("resnet50", known) is ResNet50_Weights.IMAGENET1K_V2


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
