"""The page is deterministic and replaces only earlier reports."""

import json
import re

import pytest

from lceval.analysis.report.payload import collect
from lceval.analysis.report.site import of_run, page_name
from lceval.cli import invoke
from lceval.records.results import read_runs

CONFIG = '"model": "lcft", "model_args": {"pretrained": "org/m", "kv": "KV"}'


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


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_site_has_a_page_a_run_and_is_replaced_as_a_whole(tmp_path, run_folder, capsys):
    site, other = tmp_path / "site", tmp_path / "other"
    other.mkdir()
    for file in run_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert invoke(["report", str(run_folder), str(other), "--site", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 14
    first = files(site)
    pages = {f"runs/{page_name(name)}.html" for name in ("run", "other")}
    assert {*first} == {"index.html", "table.csv", "table.json", *pages}
    assert [row["run"] for row in json.loads(first["table.json"])["rows"]] == ["run", "other"]
    assert invoke(["report", str(run_folder), str(other), "--site", str(site)]) == 0
    assert files(site) == first
    (site / "runs" / "mine").mkdir()
    for kept in ("mine/run.json", "notes.html"):
        (site / "runs" / kept).write_text("mine")
    assert invoke(["report", str(run_folder), "--site", str(site)]) == 0
    ours = {*first} - {f"runs/{page_name('other')}.html"}
    assert {*files(site)} == {*ours, "runs/mine/run.json", "runs/notes.html"}


@pytest.mark.parametrize("arguments", [[], ["--site", "a", "--output", "b"]])
def test_a_report_is_either_a_file_or_a_site(run_folder, arguments, capsys):
    assert invoke(["report", str(run_folder), *arguments]) == 2
    assert "either --output FILE or --site FOLDER" in capsys.readouterr().err


def test_a_folder_that_is_not_a_site_is_never_replaced(tmp_path, run_folder, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    for folder, message in (("mine", "not an lceval site"), ("mine/index.html", "is a file"), ("a" * 300, "too long")):
        assert invoke(["report", str(run_folder), "--site", str(tmp_path / folder)]) in (2, 4)
        assert message in capsys.readouterr().err.lower().replace("lceval: error: ", "")
    assert (tmp_path / "mine" / "index.html").read_text() == "mine"


@pytest.mark.parametrize("label", ["../../up", "a/b", "", "x" * 500, "\ud800 <b>"])
def test_the_page_of_a_run_stays_in_its_folder_whatever_the_run_is_called(label):
    assert re.fullmatch(r"[A-Za-z0-9.+=_-]{7,90}", page_name(label))
    assert not page_name(label).startswith(".")
    assert page_name(label) != page_name(label + "x")


def test_the_page_of_a_run_has_the_scores_under_full_but_not_its_samples(tmp_path, run_folder):
    half = tmp_path / "half"
    half.mkdir()
    for file in run_folder.iterdir():
        text = file.read_text().replace('"model": "hf", "model_args": "pretrained=org/m"', CONFIG)
        (half / file.name).write_text(text.replace("KV", "snapkv:0.5"))
        file.write_text(text.replace("KV", "full"))
    runs = read_runs([run_folder, half])
    data = of_run(runs[1], runs)
    assert [row["run"] for row in data["rows"]] == ["half"]
    own, full = data["blocks"]
    assert own["full"] == {"block": 1, "pairs": list(range(7))}
    assert (len(own["id"]), full["id"], full["score"]) == (7, [], own["score"])
    assert [block["full"] for block in of_run(runs[0], runs)["blocks"]] == [None]
