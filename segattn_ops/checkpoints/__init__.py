"""Recognises checkpoints of the published repositories by their keys, translates, loads and exports them."""

from .export import to_mmseg, to_official
from .files import read, save
from .load import LoadReport, load
from .preprocessing import ANN, CCNET, IMAGENET, MMSEGMENTATION, Preprocessing
from .translate import Recognised, Translation, recognise, to_native

__all__ = [
    "ANN",
    "CCNET",
    "IMAGENET",
    "LoadReport",
    "MMSEGMENTATION",
    "Preprocessing",
    "Recognised",
    "Translation",
    "load",
    "read",
    "recognise",
    "save",
    "to_mmseg",
    "to_native",
    "to_official",
]
