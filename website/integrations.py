"""Public names of the integrations, read from their source: frameworks need not be installed."""

import ast
import pathlib
import textwrap
from typing import Any

from docutils import nodes
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

from website.docstrings import translated
from website.repository import ROOT

FOLDER = ROOT / "muonclip_jax" / "integrations"
# Napoleon's own configuration, where its type asks for Sphinx's.
_NAPOLEON: Any = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)
Definition = ast.FunctionDef | ast.ClassDef


def setup(app: Any) -> dict[str, bool]:
    """Adds the directive `.. integration:: NAME`."""
    app.add_directive("integration", Integration)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class Integration(SphinxDirective):
    """Shows the docstring of an integration, and every public name with its docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Returns what is shown."""
        return self.parse_text_to_nodes("\n".join(described(self.arguments[0])))


def described(name: str) -> list[str]:
    """Writes an integration as reStructuredText.

    Args:
      name: Name of a module or package of `muonclip_jax.integrations`.

    Returns:
      Its lines.

    Raises:
      ValueError: if a name of its `__all__` is defined nowhere in it.
    """
    main, *others = _files(name)
    definitions = {
        x.name: x for tree in (*others, main) for x in tree.body if isinstance(x, Definition)
    }
    own = [x.name for x in main.body if isinstance(x, Definition) and not x.name.startswith("_")]
    public = _all(main) or own
    if missing := sorted(set(public) - set(definitions)):
        raise ValueError(f"integration {name}: __all__ has {', '.join(missing)}, defined nowhere.")
    lines = _with_code_blocks(ast.get_docstring(main) or "")
    for x in (definitions[public_name] for public_name in public):
        lines += ["", *_entry(f"muonclip_jax.integrations.{name}", x)]
    return lines


def _files(name: str) -> list[ast.Module]:
    """The sources of a module, or of a package with `__init__` first."""
    folder = FOLDER / name
    paths: list[pathlib.Path] = [folder.with_suffix(".py")]
    if folder.is_dir():
        paths = [folder / "__init__.py", *sorted(folder.glob("[!_]*.py"))]
    return [ast.parse(path.read_text()) for path in paths]


def _all(tree: ast.Module) -> list[str]:
    for x in tree.body:
        if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__":
            return ast.literal_eval(x.value)
    return []


def _with_code_blocks(docstring: str) -> list[str]:
    """Translates the docstring of a module, whose indented paragraphs are code."""
    lines: list[str] = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith("    "):
            lines += [".. code-block:: text", "", *paragraph.splitlines(), ""]
        else:
            lines += [*translated(paragraph.splitlines()), ""]
    return lines


def _entry(module: str, x: Definition) -> list[str]:
    docstring = translated((ast.get_docstring(x) or "").splitlines())
    body = "\n".join(GoogleDocstring(docstring, _NAPOLEON).lines())
    if isinstance(x, ast.ClassDef):
        head = f".. py:class:: {module}.{x.name}"
        methods = [m for m in x.body if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)]
        shown = (_method(m) for m in methods if not m.name.startswith("_"))
        body = "\n\n".join([body, *shown])
    else:
        returns = f" -> {ast.unparse(x.returns)}" if x.returns else ""
        head = f".. py:function:: {module}.{x.name}({ast.unparse(x.args)}){returns}"
    return [head, "", *textwrap.indent(body, "   ").splitlines()]


def _method(x: ast.FunctionDef) -> str:
    docstring = translated((ast.get_docstring(x) or "").splitlines())
    body = "\n".join(GoogleDocstring(docstring, _NAPOLEON).lines())
    x.args.args = x.args.args[1:]  # without self
    head = f".. py:method:: {x.name}({ast.unparse(x.args)})"
    return f"{head}\n\n{textwrap.indent(body, '   ')}"
