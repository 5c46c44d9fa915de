"""Links of a Markdown file, as they are on the repository host and as they are on the site."""

import pathlib
import posixpath
import re
from collections.abc import Callable

from website.repository import ROOT

_FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
# The target of a link or picture, without its anchor.
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")


def outside_of_blocks(text: str, change: Callable[[str], str]) -> str:
    """Changes a Markdown text, except for its fenced blocks."""
    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def without_comments(text: str) -> str:
    """Removes HTML comments: notes for the tests and the scripts that write a page."""
    return outside_of_blocks(text, lambda part: re.sub(r"<!--.*?-->\n?", "", part, flags=re.DOTALL))


def targets(text: str, source: str) -> list[str]:
    """Lists the files and folders of the repository to which a page links.

    Args:
      text: Markdown.
      source: Path of the page in the repository.

    Returns:
      Paths in the repository, sorted.
    """
    found = set()
    for part in _FENCE.split(text):
        if not part.startswith("```"):
            found |= {_in_repository(target, source) for target, _ in _LINK.findall(part)}
    return sorted(found - {""})


def for_site(text: str, source: str, page: str, pages: dict[str, str], address: str | None) -> str:
    """Changes the links of a page to what they are on the site.

    Args:
      text: Markdown.
      source: Path of the page in the repository.
      page: Path of the page on the site, `.md`.
      pages: Path on the site of everything that the site has, by path in the repository.
      address: Address of the repository, or None.

    Returns:
      Markdown. A link to what the site does not have leads to the repository, if its address is
      known.
    """

    def change(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = _in_repository(target, source)
        if not path:
            return match[0]
        if path in pages:
            return posixpath.relpath(pages[path], posixpath.dirname(page) or ".") + anchor
        if address is None or not (ROOT / path).exists():  # such as a plot of a notebook
            return match[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{address}/{kind}/main/{path}{anchor}"

    return outside_of_blocks(text, lambda part: _LINK.sub(change, part))


def without_folders(text: str) -> str:
    """Keeps the text of links to folders, which a site without a repository cannot show."""
    folder = re.compile(r"\[([^\]]*)\]\((\.\.?/[^)\s]*/[^).\s]*)\)")
    return outside_of_blocks(text, lambda part: folder.sub(r"\1", part))


def _in_repository(target: str, source: str) -> str:
    """Path in the repository to which a link leads; empty for an address, `mailto:` and so on."""
    if ":" in target:
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def github_anchor(heading: str, separator: str = "-") -> str:
    """Makes the anchor of a heading as GitHub does, so that links work in both places."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def markdown_files(folder: pathlib.Path) -> list[str]:
    """Lists the Markdown files below a folder, as paths in the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for path in folder.rglob("*.md"))
