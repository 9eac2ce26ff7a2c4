"""Docstrings of the package as mkdocstrings reads them: roles such as :func:`name` become `name`, a line that ends in
two colons before an indented block ends in one, what "height, width: of the image" says is said of each, and a colon
in the text of a result does not end its type."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)
# Several names at the start of an entry of a section, and what follows, up to the next entry.
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
# A shape and more before a colon, which is no type: "(B, C, *S), in the inputs' dtype, and below: ...".
RETURNED = re.compile(r"^(Returns:\n +\S[^:\n]*[ (][^:]*):(?=\s)", re.MULTILINE)


def markdown(docstring: str) -> str:
    docstring = LITERAL.sub(":", ROLE.sub(r"`\1`", docstring))
    docstring = RETURNED.sub(r"\1&#58;", docstring)
    return SHARED.sub(
        lambda entry: "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", ")), docstring
    )


class Markdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
