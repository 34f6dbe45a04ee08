"""The page is deterministic and replaces only earlier reports."""

import json

import pytest

from lceval.analysis.report.payload import collect
from lceval.cli import invoke
from lceval.records.results import read_runs


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"configs": {"mc": {}}, "config": {"model": "hf", "model_args": "pretrained=org/m"}}
    (folder / "results_D.json").write_text(json.dumps(config))
    lines = [{"doc_id": i, "filtered_resps": ["\ud800</script>"], "metrics": ["acc"], "acc": i % 2} for i in range(7)]
    (folder / "samples_mc_D.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_same_runs_give_the_same_bytes_and_an_earlier_report_is_replaced(tmp_path, run_folder, capsys):
    html = tmp_path / "r.html"
    assert invoke(["report", str(run_folder), "--output", str(html), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 7
    first = html.read_bytes()
    assert invoke(["report", str(run_folder), "--output", str(html)]) == 0
    assert html.read_bytes() == first


def test_a_file_that_is_not_a_report_is_never_replaced(tmp_path, run_folder, capsys):
    html = tmp_path / "notes.html"
    html.write_text("mine")
    assert invoke(["report", str(run_folder), "--output", str(html)]) == 2
    assert "not an lceval report" in capsys.readouterr().err
    assert html.read_text() == "mine"


def test_verdicts_are_in_the_page(run_folder):
    lines = [
        {"id": str(i), "judge": "rule", "status": "judged", "judge_correct": 1.0, "reply": f"reply {i}"}
        for i in range(7)
    ]
    lines[3] |= {"status": "unjudged", "reason": "unparsable", "reply": ""}
    (run_folder / "judged_mc.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = collect(read_runs([run_folder]))
    (block,), (row,) = page["blocks"], page["rows"]
    assert block["judge"]["2"] == {"judge": "rule", "judge: status": "judged", "judge: reply": "reply 2"}
    assert block["judge"]["3"] == {"judge": "rule", "judge: status": "unjudged", "judge: reason": "unparsable"}
    assert (row["unjudged"], row["metrics"]["judge_correct"]) == (1, 1.0)
