"""Equations as MathML, which browsers draw without a script, a font or a network."""

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer with Sphinx as `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext()))  # type: ignore
    raise nodes.SkipNode


def _block(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    mathml = latex2mathml.converter.convert(node.astext(), display="block")
    translator.body.append(f'<div class="equation">{mathml}</div>')  # type: ignore
    raise nodes.SkipNode
