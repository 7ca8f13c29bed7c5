"""Formulas as MathML, which browsers set themselves: no script, no font to load, nothing from a network."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

# latex2mathml lets bars grow with what stands beside them, and takes two operators for letters.
_BAR = '<mo stretchy="false" lspace="0" rspace="0">{}</mo>'
_MEANT = {f"<mo>{bar}</mo>": _BAR.format(bar) for bar in ("&#x02016;", "&#x0007C;")}
_MEANT |= {"<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>", "<mi>&#x000B1;</mi>": "<mo>&#x000B1;</mo>"}


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula of a line of text."""
    self.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def display(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula that stands alone, in a box that scrolls where the screen is narrower."""
    number = f'<span class="eqno">({get_node_equation_number(self, node)})</span>' if node["number"] else ""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(number + _mathml(node.astext(), "block") + "</div>\n")
    raise nodes.SkipNode


def _mathml(latex: str, kind: str) -> str:
    out = convert(" ".join(latex.split()), display=kind)
    for wrong, right in _MEANT.items():
        out = out.replace(wrong, right)
    if "\\" in out:  # it writes down what it does not know, as a name
        raise ValueError(f"the formula {latex!r} has a command that latex2mathml does not know: {out}")
    return out


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer as `html_math_renderer = "mathml"`.

    Args:
        app: of the build.

    Returns:
        What Sphinx wants to know of an extension.
    """
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(display, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
