"""The table for a paper and a page, and quoted figures beside it."""

import json

import pytest

from lceval.cli import invoke
from lceval.results import Run, Sample, TaskResult
from lceval.table import build, main, to_html, to_latex
from lceval.table.quoted import NAMES, quoted, to_markdown, to_text


@pytest.fixture
def runs(tmp_path):
    config = {"configs": {"mc": {}}, "config": {"model": "hf", "model_args": "pretrained=org/m"}}
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run" / "results_D.json").write_text(json.dumps(config))
    lines = [{"doc_id": i, "filtered_resps": ["x"], "metrics": ["acc"], "acc": i % 2} for i in range(6)]
    (tmp_path / "a_run" / "samples_mc_D.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [tmp_path / "a_run"]


def test_latex_escapes_what_runs_are_called_and_closes_what_it_opens(runs):
    text = main(runs, "latex")
    assert r"a\_run" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in body}) == 1
    assert r"score [95\% CI]" in text


def test_html_shows_a_tag_in_a_name_as_text():
    samples = tuple(Sample(str(i), f"c{i}", i % 2, None, None, {}, "ok") for i in range(4))
    run = Run(
        "p",
        "<script>x</script>",
        "hf",
        None,
        None,
        "-",
        True,
        {},
        (TaskResult("t", samples=samples, headline="acc", filters=("none",)),),
    )
    page = to_html(build([run]))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<tr>") == page.count("</tr>") == 2
    assert "script" in to_latex(build([run]))


@pytest.mark.parametrize("name", NAMES)
def test_quoted_tables_are_whole_and_their_means_are_those_of_their_cells(name):
    table = quoted(name)
    assert all(len(row) == len(table.columns) for row in table.rows)
    for row in table.rows:
        for place in range(row[1].count("→") + 1):
            values = [cell.split("→")[place] for cell in row[1:]]
            if values[-1] != "-":
                numbers = [float(value) for value in values]
                assert numbers[-1] == pytest.approx(sum(numbers[:-1]) / len(numbers[:-1]), abs=0.15), row
    assert "quoted" in to_text(table)
    assert to_markdown(table).count("\n| ") == len(table.rows) + 2


@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "html", "json"])
def test_a_reference_stands_beside_our_rows_and_says_that_it_is_quoted(runs, form, capsys):
    plain = main(runs, form)
    assert "quoted" not in plain
    assert invoke(["table", str(runs[0]), "--format", form, "--reference", "paper-table2"]) == 0
    text = capsys.readouterr().out
    assert "quoted from arXiv" in text
    assert "R+Judge" in text
    if form == "json":
        assert json.loads(text)["rows"] == json.loads(plain)["rows"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--reference", "paper-table9"], "one of paper-table1"),
        (["--reference", "paper-table1", "--format", "csv"], "than csv"),
    ],
)
def test_a_reference_that_cannot_be_shown_is_refused(runs, line, says, capsys):
    assert invoke(["table", str(runs[0]), *line]) == 2
    assert says in capsys.readouterr().err
