"""The papers' networks, their heads, dilated ResNets and training losses. Needs torchvision."""

from .backbone import Backbone, dilated_resnet
from .dfn import DFNHead
from .heads import ANNHead, CCNetHead, DANetHead, FCNHead, NonLocalHead
from .losses import dfn_loss, focal_loss, segmentation_loss, semantic_border
from .networks import (
    ANN,
    DFN,
    CCNet,
    DANet,
    NonLocalNet,
    SegmentationModel,
    ann_resnet50,
    ann_resnet101,
    ccnet_resnet50,
    ccnet_resnet101,
    danet_resnet50,
    danet_resnet101,
    dfn_resnet50,
    dfn_resnet101,
    nonlocal_resnet50,
    nonlocal_resnet101,
)

__all__ = [
    "ANN",
    "ANNHead",
    "Backbone",
    "CCNet",
    "CCNetHead",
    "DANet",
    "DANetHead",
    "DFN",
    "DFNHead",
    "FCNHead",
    "NonLocalHead",
    "NonLocalNet",
    "SegmentationModel",
    "ann_resnet101",
    "ann_resnet50",
    "ccnet_resnet101",
    "ccnet_resnet50",
    "danet_resnet101",
    "danet_resnet50",
    "dfn_loss",
    "dfn_resnet101",
    "dfn_resnet50",
    "dilated_resnet",
    "focal_loss",
    "nonlocal_resnet101",
    "nonlocal_resnet50",
    "segmentation_loss",
    "semantic_border",
]
