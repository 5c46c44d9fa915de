"""Reads `table.toml`: faults, each as a file, a text in it, and the text to put in its place."""

import pathlib
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = "muonclip_jax"
# The tests of modules outside of a package.
FOLDERS = {
    "_head_layouts": "qk_clip",
    "_muonclip.py": "muon",
    "linen.py": "attention",
    "nnx.py": "attention",
}


class Mutant(NamedTuple):
    """One fault.

    Attributes:
      file: Path from the root of the repository.
      original: Text that occurs once in the file.
      mutated: The text in its place.
      tests: Arguments of pytest that are tried before the folder.
    """

    file: str
    original: str
    mutated: str
    tests: list[str]

    @property
    def package(self) -> str:
        """The package, or the module at the top."""
        return self.file.removeprefix(f"{PACKAGE}/").split("/")[0]

    @property
    def folder(self) -> str:
        """The folder of its tests."""
        return f"tests/{FOLDERS.get(self.package, self.package.lstrip('_'))}"

    def apply(self, text: str) -> str:
        """Returns the text of the file with the fault in it."""
        if (count := text.count(self.original)) != 1:
            raise ValueError(f"{self.file}: {self.original!r} occurs {count} times, not once")
        return text.replace(self.original, self.mutated)

    def __str__(self) -> str:
        return f"{self.file}: {self.original.strip()!r} -> {self.mutated.strip()!r}"


def mutants() -> list[Mutant]:
    """Returns the table."""
    table = tomllib.loads((pathlib.Path(__file__).parent / "table.toml").read_text())
    return [Mutant(**{"tests": [], **row}) for row in table["mutant"]]
