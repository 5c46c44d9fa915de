"""Rewrites README.md for PyPI, which has no files of the repository.

    python -m website.package_readme v0.2.0

The release workflow runs it before the package is built. Do not commit the result.
"""

import re
import sys

from website.links import for_site
from website.repository import ROOT, address


def for_package(text: str, repository: str, tag: str) -> str:
    """Makes every relative link of the README absolute.

    Args:
      text: Markdown.
      repository: Address of the repository.
      tag: The release to which links lead.

    Returns:
      Markdown. Pictures link to the file, other links to its page.
    """
    text = for_site(text, "README.md", "README.md", {}, repository)
    main = re.compile(rf"{re.escape(repository)}/(blob|tree)/main/")
    text = main.sub(lambda match: f"{repository}/{match[1]}/{tag}/", text)
    picture = re.compile(rf"(!\[[^\]]*\]\({re.escape(repository)})/blob/")
    return picture.sub(r"\1/raw/", text)


if __name__ == "__main__":
    repository = address()
    if repository is None:
        sys.exit("pyproject.toml: [project.urls] has no Repository. Set it: PyPI links to it.")
    readme = ROOT / "README.md"
    readme.write_text(for_package(readme.read_text(), repository, sys.argv[1]))
