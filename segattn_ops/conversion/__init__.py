"""Conversion of existing models: ``segattn_ops.convert`` and its report."""

from .convert import convert
from .report import ConversionReport, Entry

__all__ = ["ConversionReport", "Entry", "convert"]
