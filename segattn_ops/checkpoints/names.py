"""Tables of parameter names: every published layout against ours.

A pair (theirs, ours) translates what precedes ``.weight``, ``.running_mean`` and so on; ``#`` stands for a number that
is the same on both sides. Ours are the authors' names, so the tables of the official repositories are identities.
"""

from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]


def _same(*names: str) -> Pairs:
    return tuple((name, name) for name in names)


def _prefixed(pairs: Pairs, theirs: str, ours: str) -> Pairs:
    return tuple((theirs + a, ours + b) for a, b in pairs)


@dataclass(frozen=True)
class Naming:
    """One layout.

    Attributes:
        system: danet, ccnet, ann, non_local, dfn (heads), or a block.
        format: its origin: official, mmsegmentation, mmcv, tramac, alexhex7, timm, external-attention, dfn_seg.
        anchors: names that identify the layout: a state dict of it has all of them under one prefix.
        pairs: (theirs, ours).
        head: whether it is a head; its network then has a backbone and optionally an auxiliary head.
        absent: names, any of which excludes the layout.
        exact: whether any other name under the prefix excludes it: for anchors that other modules have too.
    """

    system: str
    format: str
    anchors: tuple[str, ...]
    pairs: Pairs
    head: bool = False
    absent: tuple[str, ...] = ()
    exact: bool = False


_QKV = _same("query_conv", "key_conv", "value_conv")
_POSITION_MMSEG: Pairs = (
    ("query_project", "query_conv"),
    ("key_project", "key_conv"),
    ("value_project", "value_conv"),
    ("gamma.scale", "gamma"),
)
_POSITION_TRAMAC: Pairs = (
    ("conv_b", "query_conv"),
    ("conv_c", "key_conv"),
    ("conv_d", "value_conv"),
    ("alpha", "gamma"),
)
_NON_LOCAL_MMCV: Pairs = (
    ("g.conv", "g"),
    ("g.#.conv", "g.#"),
    ("theta.conv", "theta"),
    ("phi.conv", "phi"),
    ("phi.#.conv", "phi.#"),
    ("concat_project.conv", "concat_project.0"),
    ("conv_out.conv", "W.0"),
    ("conv_out.bn", "W.1"),
)
_NON_LOCAL_MMCV_PLAIN: Pairs = tuple((a, "W" if b == "W.0" else b) for a, b in _NON_LOCAL_MMCV if a != "conv_out.bn")
_NON_LOCAL_TIMM: Pairs = (("t", "theta"), ("p", "phi"), ("g", "g"), ("z", "W.0"), ("norm", "W.1"))
_STAGE = _same("stages.#.f_key", "stages.#.f_query", "stages.#.f_value", "stages.#.W")
_STAGE_MMSEG: Pairs = (
    ("stages.#.key_project.conv", "stages.#.f_key.0"),
    ("stages.#.key_project.bn", "stages.#.f_key.1.0"),
    ("stages.#.query_project.conv", "stages.#.f_query.0"),
    ("stages.#.query_project.bn", "stages.#.f_query.1.0"),
    ("stages.#.value_project", "stages.#.f_value"),
    ("stages.#.out_project", "stages.#.W"),
    ("bottleneck.conv", "conv_bn_dropout.0"),
)
_AFNB_MMSEG: Pairs = (*_STAGE_MMSEG, ("bottleneck.bn", "conv_bn_dropout.1"))
_APNB_MMSEG: Pairs = (*_STAGE_MMSEG, ("bottleneck.bn", "conv_bn_dropout.1.0"))


def _conv_modules(*pairs: tuple[str, str]) -> Pairs:
    """mmcv's ConvModule: conv and bn, where ours is a sequence."""
    return tuple(pair for a, b in pairs for pair in ((f"{a}.conv", f"{b}.0"), (f"{a}.bn", f"{b}.1")))


_JOINED_MMSEG = _conv_modules(("convs.0", "conva"), ("convs.1", "convb"), ("conv_cat", "bottleneck"))

HEADS = (
    Naming(
        "danet",
        "official",
        ("sa.query_conv", "conv5a.0"),
        _same("conv5a", "conv5c", "sa", "sc", "conv51", "conv52", "conv6", "conv7", "conv8"),
        head=True,
    ),
    Naming(
        "danet",
        "mmsegmentation",
        ("pam.query_project", "pam_in_conv.conv"),
        (
            *_conv_modules(
                ("pam_in_conv", "conv5a"),
                ("cam_in_conv", "conv5c"),
                ("pam_out_conv", "conv51"),
                ("cam_out_conv", "conv52"),
            ),
            *_prefixed(_POSITION_MMSEG, "pam.", "sa."),
            ("cam.gamma.scale", "sc.gamma"),
            ("pam_conv_seg", "conv6.1"),
            ("cam_conv_seg", "conv7.1"),
            ("conv_seg", "conv8.1"),
        ),
        head=True,
    ),
    Naming(
        "danet",
        "tramac",
        ("pam.conv_b", "conv_p1.0"),
        (
            ("conv_p1", "conv5a"),
            ("conv_c1", "conv5c"),
            *_prefixed(_POSITION_TRAMAC, "pam.", "sa."),
            ("cam.beta", "sc.gamma"),
            ("conv_p2", "conv51"),
            ("conv_c2", "conv52"),
            ("conv_p3", "conv6"),
            ("conv_c3", "conv7"),
            ("out", "conv8"),
        ),
        head=True,
    ),
    Naming(
        "ccnet",
        "official",
        ("cca.query_conv", "conva.0"),
        _same("conva", "cca", "convb", "bottleneck"),
        head=True,
    ),
    Naming(
        "ccnet",
        "mmsegmentation",
        ("cca.query_conv", "convs.0.conv"),
        (
            *_JOINED_MMSEG,
            *_prefixed((*_QKV, ("gamma.scale", "gamma")), "cca.", "cca."),
            ("conv_seg", "bottleneck.3"),
        ),
        head=True,
    ),
    Naming(
        "ann",
        "official",
        ("fusion.stages.0.f_key.0", "context.2.stages.0.f_key.0"),
        _same("fusion", "context", "cls"),
        head=True,
    ),
    Naming(
        "ann",
        "mmsegmentation",
        ("fusion.stages.0.key_project.conv", "context.stages.0.key_project.conv"),
        (
            *_prefixed(_AFNB_MMSEG, "fusion.", "fusion."),
            *_prefixed(_APNB_MMSEG, "context.", "context.2."),
            ("bottleneck.conv", "context.0"),
            ("bottleneck.bn", "context.1.0"),
            ("conv_seg", "cls"),
        ),
        head=True,
    ),
    Naming(
        "non_local",
        "official",
        ("nl.theta", "conva.0"),
        _same("conva", "nl", "convb", "bottleneck"),
        head=True,
    ),
    Naming(
        "non_local",
        "mmsegmentation",
        ("nl_block.g.conv", "convs.0.conv"),
        (*_JOINED_MMSEG, *_prefixed(_NON_LOCAL_MMCV, "nl_block.", "nl."), ("conv_seg", "bottleneck.3")),
        head=True,
    ),
    Naming(
        "dfn",
        "official",
        ("rrb_db_1.conv1", "cab1.conv1", "out_conv"),
        _same("out_conv", "cab#", "rrb_d_#", "rrb_u_#", "rrb_db_#", "rrb_trans_#", "smooth_cls_#", "border_cls"),
        head=True,
    ),
)

BLOCKS = (
    Naming("afnb", "mmsegmentation", ("stages.0.key_project.conv", "bottleneck.bn"), _AFNB_MMSEG),
    Naming("apnb", "mmsegmentation", ("stages.0.key_project.conv", "bottleneck.bn"), _APNB_MMSEG),
    Naming("afnb", "official", ("stages.0.f_key.0", "conv_bn_dropout.1"), (*_STAGE, *_same("conv_bn_dropout"))),
    Naming("apnb", "official", ("stages.0.f_key.0", "conv_bn_dropout.1.0"), (*_STAGE, *_same("conv_bn_dropout"))),
    Naming(
        "da_module",
        "external-attention",
        ("position_attention_module.cnn", "channel_attention_module.cnn"),
        _same("position_attention_module", "channel_attention_module"),
    ),
    Naming("position", "mmsegmentation", ("query_project", "key_project", "gamma.scale"), _POSITION_MMSEG),
    Naming("position", "tramac", ("conv_b", "conv_c", "alpha"), _POSITION_TRAMAC),
    Naming("criss_cross", "mmcv", ("query_conv", "gamma.scale"), (*_QKV, ("gamma.scale", "gamma"))),
    Naming("query_key_value", "official", ("query_conv", "key_conv", "gamma"), (*_QKV, *_same("gamma"))),
    Naming("non_local_block", "mmcv", ("conv_out.conv", "conv_out.bn"), _NON_LOCAL_MMCV),
    Naming("non_local_block", "mmcv", ("conv_out.conv",), _NON_LOCAL_MMCV_PLAIN, absent=("conv_out.bn",)),
    Naming("non_local_block", "timm", ("t", "p", "g", "z", "norm"), _NON_LOCAL_TIMM),
    Naming("non_local_block", "alexhex7", ("W.0",), _same("g", "theta", "phi", "W", "concat_project")),
    Naming("non_local_block", "alexhex7", ("W", "g"), _same("g", "theta", "phi", "W", "concat_project")),
    Naming("non_local_block", "alexhex7", ("W", "g.0"), _same("g", "theta", "phi", "W", "concat_project")),
    Naming(
        "compact_position",
        "official",
        ("conv_query", "conv_key", "scale"),
        _same("conv_query", "conv_key", "conv_value", "scale"),
    ),
    Naming("refinement", "official", ("conv1", "conv2", "conv3", "bn"), _same("conv1", "conv2", "conv3", "bn")),
    Naming(
        "asymmetric", "official", ("f_key.0", "f_query.0", "f_value", "W"), _same("f_key", "f_query", "f_value", "W")
    ),
    Naming(
        "cross_level_gating",
        "official",
        ("conv_low.0", "conv_cat.0", "conv_att.0", "gamma"),
        _same("conv_low", "conv_cat", "conv_att", "conv_out", "gamma"),
    ),
    Naming(
        "compact_encoder",
        "official",
        ("conv1.0", "conv2.0", "conv3.0", "conv4.0"),
        _same(*(f"conv{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))),
        exact=True,
    ),
    Naming("channel_attention_block", "official", ("conv1", "conv2"), _same("conv1", "conv2"), exact=True),
    Naming("channel", "mmsegmentation", ("gamma.scale",), (("gamma.scale", "gamma"),), exact=True),
    Naming("channel", "tramac", ("beta",), (("beta", "gamma"),), exact=True),
    Naming("channel", "official", ("gamma",), _same("gamma"), exact=True),
    Naming("compact_channel", "official", ("scale",), _same("scale"), exact=True),
)

# The stem in each repository's numbering, against ours.
STEMS = {
    "torchvision": _same("conv1", "bn1"),
    "v1c": _same("stem.#"),
    "deep": (*((f"conv1.{i}", f"stem.{i}") for i in (0, 1, 3, 4, 6)), ("bn1", "stem.7")),
    "ccnet": (
        ("conv1", "stem.0"),
        ("bn1", "stem.1"),
        ("conv2", "stem.3"),
        ("bn2", "stem.4"),
        ("conv3", "stem.6"),
        ("bn3", "stem.7"),
    ),
}
STAGES = _same("layer1", "layer2", "layer3", "layer4")

# Auxiliary heads: the prefix in the checkpoint, and its layers against those of our FCNHead.
AUXILIARY = {
    "auxiliary_head.": (("convs.0.conv", "0"), ("convs.0.bn", "1"), ("conv_seg", "4")),
    "dsn.": (("0", "0"), ("1.0", "1"), ("1", "1"), ("3", "4")),
    "auxlayer.": (
        ("block.0", "0"),
        ("block.1", "1"),
        ("block.4", "4"),
        ("conv5.0", "0"),
        ("conv5.1", "1"),
        ("conv5.4", "4"),
    ),
    "aux_classifier.": _same("0", "1", "4"),
}

# Prefixes of each format's head, backbone and auxiliary head.
PREFIXES = {
    ("danet", "official"): ("head.", "pretrained.", None),
    ("ccnet", "official"): ("head.", "", "dsn."),
    ("ann", "official"): ("", "backbone.", "dsn."),
    ("dfn", "official"): ("", "resnet_features.", None),
    ("danet", "mmsegmentation"): ("decode_head.", "backbone.", "auxiliary_head."),
    ("ccnet", "mmsegmentation"): ("decode_head.", "backbone.", "auxiliary_head."),
    ("ann", "mmsegmentation"): ("decode_head.", "backbone.", "auxiliary_head."),
    ("non_local", "mmsegmentation"): ("decode_head.", "backbone.", "auxiliary_head."),
}

# Patterns of names that a network does not use, without the prefix of the network.
IGNORED = (
    r"(.*\.)?fc\.(weight|bias)",  # the ImageNet classifier
    r"layer[0-4]\.\d.*",  # dfn_seg registers its backbone's layers a second time
)
