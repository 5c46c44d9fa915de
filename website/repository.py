"""The address of the repository. It is set in one place, `Repository` of `[project.urls]`."""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
_COLAB = "https://colab.research.google.com"


def address() -> str | None:
    """Returns the address that `pyproject.toml` sets, without a slash at its end, or None."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = project.get("urls", {}).get("Repository")
    return None if found is None else found.rstrip("/")


def colab_badge(name: str, repository: str | None) -> str:
    """Writes the badge that opens a notebook in Colab.

    Args:
      name: The notebook, without its folder and `.ipynb`.
      repository: The result of `address`. Colab reads from GitHub only.

    Returns:
      Markdown, or an empty string for a repository that is not on GitHub.
    """
    owner = (repository or "").removeprefix("https://github.com/")
    if owner in ("", repository):
        return ""
    link = f"{_COLAB}/github/{owner}/blob/main/notebooks/{name}.ipynb"
    badge = f"{_COLAB}/assets/colab-badge.svg"
    return f"[![Open In Colab]({badge})]({link})"
