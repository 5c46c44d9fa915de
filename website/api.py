"""The pages of docs/api: lists of public names, which the site replaces by their docstrings."""

import pkgutil
import re

from website.repository import ROOT

FOLDER = ROOT / "docs" / "api"
# A line of a list that is one full name.
_ENTRY = re.compile(r"^- `(muonclip_jax(?:\.\w+)+)`$", re.MULTILINE)
_INTEGRATIONS = "- Every module of `muonclip_jax.integrations`."


def entries() -> list[str]:
    """Lists the full names, such as `muonclip_jax.muon`, that the pages have."""
    texts = (path.read_text() for path in sorted(FOLDER.glob("*.md")))
    return [name for text in texts for name in _ENTRY.findall(text)]


def integrations() -> list[str]:
    """Lists the modules and packages of `muonclip_jax.integrations`."""
    folder = ROOT / "muonclip_jax" / "integrations"
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def with_docstrings(text: str) -> str:
    """Replaces each entry of a page by the directive that shows its signature and docstring."""
    modules = "\n\n".join(
        f"## {name}\n\n```{{eval-rst}}\n.. integration:: {name}\n```" for name in integrations()
    )
    text = text.replace(_INTEGRATIONS, modules)
    return _ENTRY.sub(lambda match: _entry(match[1]), text)


def _entry(name: str) -> str:
    last = name.rpartition(".")[2]
    kind = "class" if last[0].isupper() else "function"
    return f"## {name.removeprefix('muonclip_jax.')}\n\n{_directive(kind, name)}\n"


def _directive(kind: str, name: str) -> str:
    members = "" if kind == "function" else "\n   :members:"
    lines = (".. py:currentmodule:: muonclip_jax", "", f".. auto{kind}:: {name}{members}")
    return "\n".join(("```{eval-rst}", *lines, "```"))
