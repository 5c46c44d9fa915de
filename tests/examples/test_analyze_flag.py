"""`--analyze` prints what the program of the model shows, and writes no file."""

import pytest

from examples.language_model import program

ATTENTION = {
    "gqa": "blocks/attn: 4 x 4 heads, 2 key heads of 32 columns",
    "mla": "blocks/attn: 4 x 4 heads of 48 columns",
    "moe": "moe_blocks/attn: 3 x 4 heads of 48 columns",
}


@pytest.mark.parametrize("model", ATTENTION)
def test_analysis_of_the_model_is_printed(model, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert program.main(["--analyze", "--model", model]) == 0
    text = capsys.readouterr().out
    assert text.startswith("path ")
    assert ATTENTION[model] in text
    assert "4 attentions:" in text
    assert "warnings" not in text
    (head,) = (line.split() for line in text.splitlines() if line.startswith("lm_head/kernel"))
    assert head[3:] == "adamw -2 -> -1 - output head: no product with a parameter follows".split()
    assert not list(tmp_path.iterdir())
