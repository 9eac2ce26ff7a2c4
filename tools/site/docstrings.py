"""Docstrings of the package as mkdocstrings reads them: roles such as :func:`name` become `name`, a line that ends in
two colons before an indented block ends in one, and what "height, width: of the image" says is said of each."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)
# Several names at the start of an entry of a section, and what follows, up to the next entry.
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


def markdown(docstring: str) -> str:
    docstring = LITERAL.sub(":", ROLE.sub(r"`\1`", docstring))
    return SHARED.sub(
        lambda entry: "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", ")), docstring
    )


class Markdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
