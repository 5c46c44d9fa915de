"""The table of mutants fits the package, so that `python -m tests.mutants` can use it."""

import ast

from tests.mutants.table import PACKAGE, ROOT, mutants

TABLE = mutants()


def test_every_mutant_fits_its_file():
    faults = []
    for mutant in TABLE:
        text = (ROOT / mutant.file).read_text()
        if text.count(mutant.original) != 1:
            faults.append(f"{mutant}: the text occurs {text.count(mutant.original)} times")
        elif ast.dump(ast.parse(mutant.apply(text))) == ast.dump(ast.parse(text)):
            faults.append(f"{mutant}: is the same program")
    assert faults == []


def test_every_package_has_mutants():
    parts = {path.name for path in (ROOT / PACKAGE).iterdir() if path.name[:2] not in ("__", "py")}
    assert parts == {mutant.package for mutant in TABLE}
    assert len(TABLE) >= 40
    assert len(set(TABLE_KEYS := [(m.file, m.original, m.mutated) for m in TABLE])) == len(
        TABLE_KEYS
    )


def test_tests_of_every_mutant_exist():
    for mutant in TABLE:
        for name in (mutant.folder, *(test.split("::")[0] for test in mutant.tests)):
            assert (ROOT / name).exists(), name
