"""Checkpoints of every system of the field, in and out: recognised by their keys, translated, loaded, exported."""

from .export import to_mmseg, to_official
from .files import read, save
from .load import LoadReport, load
from .translate import Recognised, Translation, recognise, to_native

__all__ = [
    "LoadReport",
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
