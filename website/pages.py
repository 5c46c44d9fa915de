"""Collects what the site shows into one folder of Markdown, for Sphinx."""

import pathlib
import re
import shutil

from website import api
from website.links import (
    for_site,
    outside_of_blocks,
    targets,
    without_comments,
    without_folders,
)
from website.navigation import NAVIGATION, START
from website.notebook_pages import notebook_page
from website.repository import ROOT, address, colab_badge

# A picture that may have a twin for dark pages.
_PICTURE = re.compile(r"!\[([^\]]*)\]\((\S*images/[\w-]+)\.svg\)")


def collect(folder: pathlib.Path) -> None:
    """Writes every page of the navigation, and the files to which pages link.

    Args:
      folder: Replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chapters = {title: _expand(paths) for title, paths in NAVIGATION.items()}
    sources = [START, *(path for paths in chapters.values() for path in paths)]
    unlisted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    if missing := sorted(unlisted - set(sources)):
        raise ValueError(
            f"website/navigation.py lacks {', '.join(missing)}: add each to a chapter."
        )
    pages = {source: _page(source) for source in sources}
    texts = {source: _text(source, folder) for source in pages}
    for file in _linked_files(texts):
        pages.setdefault(file, f"files/{file}")
        _copy(file, folder / pages[file])
    for source, text in texts.items():
        text = for_site(without_comments(text), source, pages[source], pages, address())
        text = text if address() else without_folders(text)
        text = outside_of_blocks(text, _with_dark_twins)
        text = api.with_docstrings(text) if source.startswith("docs/api/") else text
        path = folder / pages[source]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + (_contents(chapters, pages) if source == START else ""))


def _expand(paths: tuple[str, ...]) -> list[str]:
    found = [[p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob(path))] for path in paths]
    return list(dict.fromkeys(path for group in found for path in group))


def _page(source: str) -> str:
    """Path on the site: without `docs/`, in lower case, and the folder's name for a README."""
    if source == START:
        return "index.md"
    path = pathlib.PurePosixPath(source.removeprefix("docs/"))
    path = path.parent if path.name == "README.md" else path
    return path.with_suffix(".md").as_posix().lower()


def _text(source: str, folder: pathlib.Path) -> str:
    if not source.endswith(".ipynb"):
        return (ROOT / source).read_text()
    path = ROOT / source
    text, pictures = notebook_page(path)
    for name, content in pictures.items():
        picture = folder / "notebooks" / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(content)
    return text.removeprefix(colab_badge(path.stem, address())).lstrip()


def _linked_files(texts: dict[str, str]) -> list[str]:
    linked = {target for source, text in texts.items() for target in targets(text, source)}
    return sorted(t for t in linked - set(texts) if (ROOT / t).is_file())


def _copy(file: str, to: pathlib.Path) -> None:
    twin = (ROOT / file).with_name(f"{pathlib.Path(file).stem}-dark.svg")
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / file, to)
    if twin.exists():
        shutil.copy(twin, to.with_name(twin.name))


def _with_dark_twins(text: str) -> str:
    """Shows `images/name-dark.svg` in place of `images/name.svg` where the page is dark."""

    def both(match: re.Match[str]) -> str:
        alt, path = match.groups()
        if not (ROOT / "docs" / "images" / f"{pathlib.Path(path).name}-dark.svg").exists():
            return match[0]
        return f"![{alt}]({path}.svg){{.only-light}}![{alt}]({path}-dark.svg){{.only-dark}}"

    return _PICTURE.sub(both, text)


def _contents(chapters: dict[str, list[str]], pages: dict[str, str]) -> str:
    """Writes the navigation as tables of contents. A page is in the first that lists it."""
    text, seen = "", set()
    for title, sources in chapters.items():
        names = [pages[source].removesuffix(".md") for source in sources if source not in seen]
        seen |= set(sources)
        listed = "\n".join(names)
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n"
    return text
