"""Results are written with their provenance, as JSON and as tables."""

import json

import pytest

from benchmarks import max_logit_cost, report


def test_provenance_has_command_versions_and_machine():
    head = report.provenance("step_time", "optax")
    assert set(head) == {"command", "date", "versions", "machine", "load_before"}
    assert head["command"] == "python -m benchmarks.step_time"
    assert {"python", "muonclip-jax", "jax", "jaxlib", "optax"} == set(head["versions"])


def test_rounded_keeps_four_digits_and_whole_numbers():
    nest = {"a": [1.23456, 2.0], "b": {"c": (123456.7, "text", None, True)}}
    expected = {"a": [1.235, 2], "b": {"c": [123500, "text", None, True]}}
    assert report.rounded(nest) == expected


def test_json_has_one_line_per_row(tmp_path):
    results = {"command": "x", "rows": [{"a": 1}, {"a": [2, 3]}], "note": "τ"}
    report.write_json(tmp_path / "results.json", results, per_line="rows")
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == results
    assert '    {"a":1},\n    {"a":[2,3]}\n' in text
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_columns_are_aligned_to_the_right():
    assert report.columns([("a", "long"), (1, 2)]) == "a long\n1    2"


def test_markdown_table_has_a_rule_below_its_head():
    assert report.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


@pytest.mark.nightly
def test_max_logits_cost_what_their_product_costs(tmp_path, capsys):
    """Exact max logits: one more product beside 6, and half of the logits of 1024 positions."""
    max_logit_cost.main(["--lengths", "1024", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "max_logit_cost.json").read_text())["lengths"]
    assert row["exact_flops_full"] == round(7 / 6, 3)
    assert row["lse_bound_flops_full"] == row["lse_bound_flops_causal"] == 1
    assert row["by_all_logits"] == 0.5
    assert "exact_flops_full" in capsys.readouterr().out
