"""The packages of the training program: each is described, small, and imports in one direction."""

import ast
import pathlib

import examples.language_model

ROOT = pathlib.Path(examples.language_model.__file__).parent
# A package may import those before it; the modules at the top that are not shared come last.
ORDER = ("flag_types", "models", "config", "data", "run_folder", "training", "measurement")
LAST = {"program", "requirements", "__main__", "__init__"}
FILES = {path.relative_to(ROOT): path.read_text() for path in ROOT.rglob("*.py")}


def room_of(module):
    return module.removeprefix("examples.language_model").lstrip(".").split(".")[0]


def imported_rooms(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "examples.language_model":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("examples.language_model."):
                yield room_of(node.module)


def test_imports_go_in_one_direction():
    wrong = []
    for path, source in FILES.items():
        room = path.parts[0].removesuffix(".py")
        allowed = set(ORDER) | LAST if room in LAST else set(ORDER[: ORDER.index(room) + 1])
        wrong += [f"{path} imports {name}" for name in set(imported_rooms(source)) - allowed]
    assert not wrong


def test_every_file_belongs_to_a_room():
    assert {path.parts[0].removesuffix(".py") for path in FILES} == set(ORDER) | LAST


def test_every_file_has_a_docstring_and_at_most_350_lines():
    for path, source in FILES.items():
        assert ast.get_docstring(ast.parse(source)), path
        assert len(source.splitlines()) <= 350, path
