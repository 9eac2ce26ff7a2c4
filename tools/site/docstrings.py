"""Docstrings of the package in Markdown: roles such as :func:`name` become `name`, and a line that ends in two colons
before an indented block ends in one."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)


class Markdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = LITERAL.sub(":", ROLE.sub(r"`\1`", obj.docstring.value))
