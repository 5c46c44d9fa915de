"""Which cases of a test run by day: each value of each parameter; at night every combination.

`make test` runs the tests without the mark `nightly`, and `make test-all` runs every test.
"""

import pytest


def by_day(values, *chosen):
    """Returns the values as parameters, nightly but for the chosen ones (as `str` gives them)."""
    missing = set(chosen) - {str(value) for value in values}
    assert not missing, f"there is no value {sorted(missing)}"
    return [
        value if str(value) in chosen else pytest.param(value, marks=pytest.mark.nightly)
        for value in values
    ]


def mark_combinations(items):
    """Marks as nightly what adds no value of a parameter, but for tests marked `every_combination`.

    Of a test with two parameters of three values, three of the nine cases run by day.
    """
    for cases in _cases_of_tests(items):
        kept = _cover([frozenset(case.callspec.indices.items()) for case in cases])
        for index in set(range(len(cases))) - kept:
            cases[index].add_marker(pytest.mark.nightly)


def _cases_of_tests(items):
    tests = {}
    for item in items:
        skipped = item.get_closest_marker("nightly") or item.get_closest_marker("every_combination")
        if hasattr(item, "callspec") and not skipped:
            tests.setdefault((item.path, item.originalname, item.cls), []).append(item)
    return tests.values()


def _cover(cases):
    """Indices of few cases that have every value: always the first of those with most new ones."""
    missing, kept = set().union(*cases), set()
    while missing:
        best = max(range(len(cases)), key=lambda index: (len(cases[index] & missing), -index))
        missing -= cases[best]
        kept.add(best)
    return kept
