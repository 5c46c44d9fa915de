"""Configuration of Sphinx. `python -m website` collects the pages and builds them."""

import os
import re
import typing
from typing import Any

# Types of arrays as they are written: `Float[Array, "*batch m n"]`. Before jaxtyping is imported.
typing.GENERATING_DOCUMENTATION = "muonclip_jax"  # type: ignore

from website.repository import ROOT, address  # noqa: E402

_VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)

project = "muonclip-jax"
version = release = _VERSION.findall((ROOT / "muonclip_jax" / "__init__.py").read_text())[0]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "website.docstrings",
    "website.equations",
    "website.integrations",
]

myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 4  # as GitHub makes them
highlight_language = "text"
default_role = "py:obj"  # `muon` in a docstring is code, and a link
html_math_renderer = "svg"

autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 70
toc_object_entries = False  # each object has a heading of its own
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has the types
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_title = "muonclip-jax"
html_baseurl = os.environ.get("SITE_URL", "")  # the workflow that publishes the site sets it
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "light_css_variables": {"color-brand-primary": "#1d5479", "color-brand-content": "#1b6493"},
    "dark_css_variables": {"color-brand-primary": "#8ecbf0", "color-brand-content": "#7cc0ea"},
}
if _address := address():
    html_theme_options["footer_icons"] = [
        {"name": "Repository", "url": _address, "html": "Repository", "class": ""}
    ]
