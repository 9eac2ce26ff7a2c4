"""Hooks of MkDocs, when the site is built: equations become MathML, so that its pages load no script for them, and
names in tables may be broken after their parts, so that columns fit a phone."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves with `generic: true`.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)

CELL = re.compile(r"<t[dh]\b.*?</t[dh]>", re.DOTALL)
CODE = re.compile(r"<code>[^<]*</code>")
PART = re.compile(r"(?<=\w)[_./(=](?=\w)|(?<=[a-z])(?=[A-Z])")


def on_page_content(content: str, **_: Any) -> str:
    content = CELL.sub(lambda cell: CODE.sub(lambda code: PART.sub(r"\g<0><wbr>", code[0]), cell[0]), content)
    content = INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
    return BLOCK.sub(lambda match: f'<div class="equation">{_display(match[1])}</div>', content)


def _display(latex: str) -> str:
    return convert(html.unescape(latex).strip(), display="block")
