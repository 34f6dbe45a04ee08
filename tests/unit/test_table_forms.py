"""Every format has the same rows, escaped and complete, with quoted results marked as quoted."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lceval.analysis.table import KEYS, Table, build, main, to_csv, to_html, to_json, to_latex, to_markdown, to_terminal
from lceval.analysis.table.references import load
from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.records.results import Run, Sample, TaskResult

TELEMETRY = {
    "kv_dtype": "float32",
    "status": "wrong_format",
    "bytes_read_per_step": 5_000_000,
    "prefill_s": 6.94,
    "prefill_tokens": 8192,
    "decode_tokens": 12,
    "decode_s": 0.9,
}


def run(label: str, scores: list[float], recipe: str = "full", **keys: Any) -> Run:
    samples = tuple(
        Sample(f"q{i}", f"c{i}", score, 106_000_000, 425_000_000, TELEMETRY, "wrong_format", {"gold_nll": 1 + score})
        for i, score in enumerate(scores)
    )
    task = TaskResult("lc_filings_ao_1k", "1.0", "subem", filters=("none",), samples=samples, **keys)
    return Run(Path(label), label, "lcft", "org/m", None, recipe, True, {}, (task,))


def table(*labels: str) -> Table:
    full = run("full", [1.0, 0.0, 1.0, 1.0] * 8)
    return build([full, *(run(label, [1.0, 0.0, 0.0, 1.0] * 8, "snapkv:0.25") for label in labels)])


class Cells(HTMLParser):
    """Rows of all tables as lists of texts, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.rows[-1][-1] += data


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line] for line in lines]


def test_markdown_html_and_latex_have_the_same_cells() -> None:
    compared = table("less")
    markdown = markdown_rows(to_markdown(compared))
    assert markdown[0][:6] == ["run", "recipe", "n", "score [95% CI]", "retention %", "Δ vs full"]
    assert [row[:2] for row in markdown[1:]] == [["full", "full"], ["less", "snapkv:0.25"]]
    assert markdown[2][4].startswith("67 [")
    assert markdown[2][5].startswith("-25.0 [")
    assert Cells(to_html(compared)).rows == markdown
    body = to_latex(compared).split("\\toprule\n")[1].split("\n\\bottomrule")[0].replace("\\midrule\n", "")
    unescaped = re.sub(r"\{([\[\]])\}", r"\1", body).replace("\\%", "%").replace("\\_", "_")
    unescaped = unescaped.replace("\\ensuremath{\\Delta}", "Δ")
    assert [line.removesuffix(" \\\\").split(" & ") for line in unescaped.splitlines()] == markdown


def test_html_is_a_standalone_page_with_escaped_names() -> None:
    text = to_html(table("<script>alert(1)</script>&amp;"))
    page = Cells(text)
    assert page.rows[2][0] == "<script>alert(1)</script>&amp;"
    assert text.startswith("<!doctype html>")
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert re.search(r"https?:|url\(|@import|src=|href=", text) is None


def test_latex_special_characters_are_escaped() -> None:
    text = to_latex(table(r"a&b%c$d#e_f{g}h~i^j\k<l>m|n[o]"))
    row = next(line for line in text.splitlines() if line.startswith("a\\&b"))
    assert row.startswith(
        r"a\&b\%c\$d\#e\_f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k"
        r"\textless{}l\textgreater{}m\textbar{}n{[}o{]} & snapkv:0.25 & 32 & "
    )
    spec = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert spec is not None
    for line in text.split("\\toprule\n")[1].split("\\bottomrule")[0].splitlines():
        if line != "\\midrule":
            assert len(re.findall(r"(?<!\\)&", line)) == len(spec[1]) - 1
            assert line.endswith(" \\\\")
    for begun in re.findall(r"\\begin\{(\w+)\}", text):
        assert text.count(f"\\begin{{{begun}}}") == text.count(f"\\end{{{begun}}}")
    outside = re.sub(r"\\[&%$#_{}]|^%.*$", "", text, flags=re.MULTILINE)
    assert re.search(r"[%$#_~^]", outside) is None
    assert outside.count("{") == outside.count("}")


def test_csv_is_flat_with_a_column_per_metric() -> None:
    one, two = run("a", [1.0, 0.0]), run("b", [1.0, 0.0], "int8")
    samples = tuple(
        Sample(s.id, s.cluster, s.score, None, None, {}, "ok", metrics={"subem": 1.0, "ids_f1": 0.5})
        for s in two.tasks[0].samples
    )
    other = Run(
        Path("b"), "b", "hf", "org/m", None, "-", True, {}, (TaskResult("mmlu", headline="acc", samples=samples),)
    )
    first, second = csv.DictReader(io.StringIO(to_csv(build([one, other]))))
    assert list(first) == [*(key for key in KEYS if key != "metrics"), "metrics.subem", "metrics.ids_f1"]
    assert (first["metrics.ids_f1"], second["metrics.ids_f1"]) == ("", "0.5")
    assert not any(cell.startswith("{") for cell in second.values())


def test_the_same_runs_give_the_same_bytes_in_every_format() -> None:
    for render in (to_terminal, to_markdown, to_latex, to_csv, to_html, to_json):
        assert render(table("a", "b")) == render(table("a", "b")), render


def header_lines(text: str) -> str:
    return text.split("─")[0]


def test_a_narrow_terminal_omits_optional_columns_and_lists_them() -> None:
    wide, narrow = to_terminal(table("less"), 200), to_terminal(table("less"), 100)
    assert "Δ vs full" in header_lines(wide)
    assert "Omitted at this width" not in wide
    assert "retention" in header_lines(narrow)
    assert "Δ vs full" not in header_lines(narrow)
    assert "Omitted at this width: Δ vs full" in narrow
    assert max(len(line) for line in narrow.splitlines()) <= 100
    assert "read MB/step: " in wide
    assert "read MB/step: " not in narrow


def test_answers_in_a_bad_format_are_counted_and_explained() -> None:
    text = to_markdown(table("less"))
    assert markdown_rows(text)[0][-1] == "bad format"
    assert markdown_rows(text)[1][-1] == "32"
    assert "- bad format: answers not in the requested format" in text


# Quoted results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper-table1", "paper-table2"])
def test_the_printed_means_match_the_quoted_numbers(name: str) -> None:
    """Detects copying errors: means of numbers rounded to a tenth are printed to a tenth."""
    (reference,) = load([name])
    assert len(reference.columns) == len(reference.metrics)
    for row in reference.rows:
        *numbers, average = row["values"]
        assert len(row["values"]) == len(reference.columns)
        if average is not None:
            assert average == pytest.approx(sum(numbers) / len(numbers), abs=0.1001)


@pytest.mark.parametrize("fmt", ["terminal", "markdown", "latex", "csv", "html", "json"])
def test_quoted_results_are_marked_in_every_format(tmp_path: Path, fmt: Any) -> None:
    plain = main([write_run(tmp_path / "run")], fmt)
    text = main([tmp_path / "run"], fmt, reference=["paper-table1", "paper-table2"])
    assert "quoted: R+Judge" in text
    assert "81.1" in text or "0.811" in text
    assert "2601.18527" in text
    assert "quoted: " not in plain


def test_quoted_results_are_not_in_the_rows_or_means(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for by in ("task", "suite", "length"):
        alone = json.loads(main([folder], "json", by=by))
        quoted = json.loads(main([folder], "json", by=by, reference=["paper-table1"]))
        assert quoted["rows"] == alone["rows"]
        assert (alone["quoted"], len(quoted["quoted"])) == ([], 35)
    (best,) = [r for r in quoted["quoted"] if (r["run"], r["task"]) == ("quoted: AO", "HotpotQA")]
    assert best == {
        "run": "quoted: AO",
        "pretrained": "Qwen2.5-7B-Instruct-1M",
        "task": "HotpotQA",
        "metric": "subem",
        "unit": "share",
        "score": 0.811,
        "quoted": "paper-table1: arXiv 2601.18527, table 1",
    }
    rows = list(csv.DictReader(io.StringIO(main([folder], "csv", reference=["paper-table2"]))))
    assert [row["quoted"] != "" for row in rows] == [False] + [True] * 72
    assert [row["score"] for row in rows if row["task"] == "Loong financial"][:2] == ["49.9", "39.5"]


def test_figures_of_kvpress_are_quoted_as_printed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = main([folder], "markdown", reference=["kvpress-ruler-4k"])
    assert "| quoted: KVzip, Llama 3.1 8B | kvzip:0.5 | 95.5 |" in text
    assert "| quoted: KVzap, Qwen3 8B, 10% of the rows | kvzap:threshold=-4 | 94.49 |" in text
    quoted = json.loads(main([folder], "json", reference=["kvpress-ruler-4k"]))["quoted"]
    assert [row["score"] for row in quoted if row["recipe"] == "kvzap:threshold=-4"] == [0.9449]


def test_an_unknown_reference_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown reference 'paper-table3': expected one of kvpress-ruler-4k, paper"):
        main([tmp_path], "json", reference=["paper-table3"])


def write_run(folder: Path) -> Path:
    """A plain lm-eval folder of an lceval task."""
    task = "lc_filings_ao_1k"
    folder.mkdir()
    (folder / "results_D.json").write_text(json.dumps({"configs": {task: {}}, "config": {"model": "hf"}}))
    lines = [
        {"doc_id": i, "doc": {"id": f"q{i}", "cluster": f"c{i}"}, "metrics": ["subem", "em"], "subem": i % 2, "em": 0.0}
        for i in range(6)
    ]
    (folder / f"samples_{task}_D.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_command_accepts_formats_means_and_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    options = ["--by", "suite", "--reference", "paper-table1", "--reference", "paper-table2", "--format", "latex"]
    assert invoke(["table", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "suite finance, mode ao: mean in \\%" in out
    assert out.count("quoted, not measured here") == 2
    assert invoke(["table", str(folder), "--by", "colour"]) == 2
    assert invoke(["table", str(folder), "--reference", "nature"]) == 2
    assert "unknown reference 'nature'" in capsys.readouterr().err


PAGE = Path(__file__).parents[2] / "docs" / "table.md"


def test_every_command_of_the_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    for name in ("runs/full", "runs/snapkv", "runs/sweep/full", "runs/sweep/snapkv"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    lceval (table .*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        line, _, file = command.partition(" > ")
        assert invoke(line.split()) == 0, command
        assert bool(file) == ("html" in line)
        assert re.search(r"filings|suite finance", capsys.readouterr().out)


def test_the_page_names_every_key() -> None:
    text = PAGE.read_text()
    for key in KEYS:
        assert re.search(rf"`{key}(`|_lo|\[)", text) or f"`{re.sub(r'_(lo|hi)$', '', key)}" in text, key
