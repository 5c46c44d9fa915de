"""The cases of a test that run by day: each value of each parameter; at night every combination.

`make test` runs the tests without the mark `nightly`, and `make test-all` runs every test.
"""

import pytest


def by_day(values, *chosen):
    """Returns the values of one parameter, those that are not chosen with the mark `nightly`."""
    missing = [value for value in chosen if value not in values]
    assert not missing, f"there is no value {missing}"
    return [value if value in chosen else at_night(value)[0] for value in values]


def at_night(*cases):
    """Marks cases as nightly; a tuple has one value for each parameter."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly)
        for case in cases
    ]


def mark_combinations(items):
    """Marks cases without a new value as nightly, except in tests marked `every_combination`.

    Of a test with two parameters of three values, three of the nine cases run by day.
    """
    for cases in _cases_of_tests(items):
        kept = _cover([_values(case) for case in cases])
        for index in set(range(len(cases))) - kept:
            cases[index].add_marker(pytest.mark.nightly)


def _cases_of_tests(items):
    tests = {}
    for item in items:
        skipped = item.get_closest_marker("nightly") or item.get_closest_marker("every_combination")
        if hasattr(item, "callspec") and not skipped:
            tests.setdefault((item.path, item.originalname, item.cls), []).append(item)
    return tests.values()


def _values(case):
    """The values of a case, one for each `parametrize`, whose arguments are given together."""
    params = case.callspec.params
    groups = [_names(mark.args[0]) for mark in case.iter_markers("parametrize")]
    groups += [(name,) for name in params if not any(name in group for group in groups)]
    # By identity: values need not be hashable, and the values of all cases are alive.
    return frozenset((group, *(id(params[name]) for name in group)) for group in groups)


def _names(argnames):
    return tuple(argnames.replace(",", " ").split() if isinstance(argnames, str) else argnames)


def _cover(cases):
    """Indices of few cases that have every value: always the first of those with most new ones."""
    missing, kept = set().union(*cases), set()
    while missing:
        best = max(range(len(cases)), key=lambda index: (len(cases[index] & missing), -index))
        missing -= cases[best]
        kept.add(best)
    return kept
