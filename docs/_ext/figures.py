"""Takes the alternative texts of figures from the cells that draw them.

A cell that draws a figure has a comment ``# Figure:`` that describes the figure. The
lines of the comment are joined. A figure without such a comment is a warning, which
fails the build.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def description(source: str) -> str | None:
    """The text of the comment ``# Figure:`` in a cell, if there is one."""
    found = re.search(r"^ *# Figure: (.*(?:\n *# .*)*)", source, re.MULTILINE)
    return " ".join(re.sub(r"\n *# ", " ", found[1]).split()) if found else None


def describe(app: Sphinx, doctree: nodes.document) -> None:
    """Sets the alternative text of every image that is the output of a cell."""
    del app
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") != "cell_code":
            continue
        text = description(next(cell.findall(nodes.literal_block)).astext())
        for image in cell.findall(nodes.image):
            if text is None:
                message = "a cell that draws a figure has no comment '# Figure: ...'"
                LOGGER.warning(message, location=cell)
            else:
                image["alt"] = text


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the alternative texts with Sphinx."""
    app.connect("doctree-read", describe)
    return {"parallel_read_safe": True, "version": "1"}
