"""`lceval run`: run folders, resuming after a signal, disks that take nothing, errors in one line."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lceval.analysis.table import main as table_text
from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.runs import runner
from lceval.runs.configuration import configure
from lceval.runs.demo import RECIPES

pytestmark = pytest.mark.model

LINE = ["--model_args", "pretrained=smollm2-135m,kv=snapkv:0.5", "--tasks", "lc_filings_ao_1k", "--limit", "8"]
SHORT = ["--model", "lcft", *LINE, "--gen_kwargs", "max_gen_toks=8", "--device", "cpu"]


def start(arguments: list[str], **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([str(Path(sys.executable).with_name("lceval")), *arguments], text=True, **kwargs)


def finish(arguments: list[str]) -> tuple[int, str, str]:
    process = start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def answered(folder: Path) -> int:
    file = folder / "responses.sqlite"
    if not file.is_file():
        return 0
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
        try:
            return int(db.execute("SELECT count(*) FROM response").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def scores(out: str) -> dict[str, Any]:
    (row,) = json.loads(out)["rows"]
    timings = ("first_token_s", "prefill_s", "prefill_tok_s", "decode_tok_s", "run")
    return {k: v for k, v in row.items() if k not in timings}


def digests(folder: Path) -> list[list[str]]:
    """lm-eval's hashes of each sample's row, prompt and target, and the answer."""
    (file,) = folder.glob("samples_*.jsonl")
    samples = map(json.loads, file.read_text().splitlines())
    return [[s["doc_hash"], s["prompt_hash"], s["target_hash"], json.dumps(s["resps"])] for s in samples]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(["run", "--json", *SHORT, "--output_path", str(folder)])
    assert code == 0, err
    return folder, out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_resumes_with_its_finished_samples_and_gives_the_same_table(
    uninterrupted: tuple[Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "killed"
    line = ["run", "--json", *SHORT, "--output_path", str(folder)]
    process = start(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while answered(folder) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "stopping after the current sample" in err
        assert err.splitlines()[-1] == "lceval: error: stopped by SIGTERM; rerun the same command to resume"
    done = answered(folder)
    assert 3 <= done < 8
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert not list(folder.glob("results_*"))
    code, out, err = finish(line)
    assert code == 0, err
    assert f"8 samples, {done} reused, {8 - done} run" in err
    assert scores(out) == scores(uninterrupted[1])
    assert digests(folder) == digests(uninterrupted[0])
    identities = [json.loads((f / "run.json").read_text())["identity"] for f in (folder, uninterrupted[0])]
    assert identities[0] == identities[1]
    assert answered(folder) == 8


def test_a_finished_run_is_printed_not_repeated_and_never_overwritten(uninterrupted: tuple[Path, str]) -> None:
    folder, out = uninterrupted
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    code, again, err = finish(["run", "--json", *SHORT, "--output_path", str(folder)])
    assert (code, again) == (0, out)
    assert "8 samples, 8 reused, 0 run" in err
    other = [a.replace("0.5", "0.25") for a in SHORT]
    code, out, err = finish(["run", *other, "--output_path", str(folder)])
    assert (code, out) == (2, "")
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith(f"lceval: error: {folder} contains another run (metadata.kv: 'snapkv:0.5'")
    )
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_the_run_folder_contains_identity_results_and_samples_with_telemetry(uninterrupted: tuple[Path, str]) -> None:
    folder, _ = uninterrupted
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["recipe"] == "snapkv:0.5"
    evict = {"name": "snapkv", "amount": 0.5, "window": 64, "pool": 5, "pooling": "average"}
    assert run["expanded"] == {"evict": evict, "store": None, "read": None}
    assert run["apply_chat_template"] is True
    assert run["identity"]["hashes"]["pretrained"]
    assert run["task_versions"] == {"lc_filings_ao_1k": "1.1"}
    (results,) = folder.glob("results_*.json")
    assert json.loads(results.read_text())["config"]["model"] == "lcft"
    (samples,) = folder.glob("samples_lc_filings_ao_1k_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert row["kv_bytes"] == pytest.approx(0.5 * row["kv_bytes_full"], rel=0.02)
        assert row["kv"].keys() >= {
            "bytes_allocated", "bytes_read_per_step", "state_bytes", "kept_tokens", "prefill_s", "shared_prefix",
            "compress_s", "decode_s", "new_tokens", "peak_bytes", "truncated", "kv_dtype",
        }  # fmt: skip
        assert row["arguments"]["gen_args_0"]["arg_0"].startswith("<|im_start|>system")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("size=1m", 4, "the disk cannot take 8 MiB (No space left on device): free space and run again"),
        ("size=16m,ro", 2, "run folder {folder}: Read-only file system: choose another --output_path"),
    ],
)
def test_a_disk_that_takes_nothing_is_reported_before_the_model_loads(
    tmp_path: Path, options: str, code: int, message: str
) -> None:
    """A file system of its own, mounted in a namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    lceval = Path(sys.executable).with_name("lceval")
    line = shlex.join([str(lceval), "run", *SHORT, "--output_path", str(tmp_path)])
    script = f"mount -t tmpfs -o {options} tmpfs {tmp_path} && {line}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], text=True, capture_output=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].endswith(message.format(folder=tmp_path))
    assert "Loading weights" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "lc_filing_ao_1k"], "unknown task 'lc_filing_ao_1k'; did you mean lc_filings_ao"),
        (["--model_args", "pretrained=smollm2-135m,kv=snapvk:0.5"], "did you mean 'snapkv'"),
        (["--model_args", "pretrained=smollm2-135m,kvv=full"], "unknown model argument 'kvv': did you mean 'kv'?"),
        (["--model_args", "kv=full"], "pretrained is required: --model_args pretrained=NAME"),
        (
            ["--model_args", "pretrained=smollm2-135m,max_length=512"],
            "8 of 8 prompts do not fit the model's 512 tokens",
        ),
        (["--tasks", "lc_nqopen_ao_2k"], "LCEVAL_DATA"),
        (["--model", "lfct"], "unknown model 'lfct'; did you mean lcft"),
        (["--use_cache", "x"], "--use_cache is not supported"),
    ],
)
def test_bad_input_gives_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    smollm2: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("LCEVAL_DATA", raising=False)
    line = dict(zip(SHORT[::2], SHORT[1::2], strict=True)) | dict([arguments])
    code = invoke(["run", *[part for pair in line.items() for part in pair], "--output_path", str(tmp_path / "x")])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    last_line = captured.err.strip().splitlines()[-1]
    assert last_line.startswith("lceval: error: ")
    assert message in last_line


def test_a_folder_with_other_files_is_left_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert invoke(["run", *SHORT, "--output_path", str(tmp_path)]) == 2
    assert "contains files but no run.json" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


CONFIG = """\
model: lcft
model_args:
  pretrained: smollm2-135m
  kv: snapkv:0.25
tasks: [lc_filings_ao_1k]
limit: 2
apply_chat_template: false
output_path: runs/cfg
device: cpu
"""


def test_a_configuration_file_counts_as_its_flags_do(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    config = configure(["--config", str(file)])
    assert (config.apply_chat_template, config.output_path, config.limit) == (False, "runs/cfg", 2)
    assert (config.tasks, config.model_args["kv"], config.log_samples) == (["lc_filings_ao_1k"], "snapkv:0.25", True)
    config = configure(["--config", str(file), "--limit", "3", "--apply_chat_template", "--output_path", "x"])
    assert (config.apply_chat_template, config.output_path, config.limit) == (True, "x", 3)
    file.write_text(CONFIG.replace("apply_chat_template: false\n", ""))
    assert configure(["--config", str(file)]).apply_chat_template is True


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("use_cache: x", "--use_cache is not supported by lceval run: the run folder already stores"),
        ("cache_requests: 'true'", "--cache_requests is not supported by lceval run: its key lacks"),
        ("limits: 2", "unknown key 'limits'; did you mean limit"),
        ("limit: many", "bad limit='many': expected float | null"),
        ("limit: [", "config.yaml"),
    ],
)
def test_a_bad_configuration_file_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.replace("limit: 2", line))
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        configure(["--config", str(file)])
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([a.replace("snapkv", "snapvk") for a in SHORT], "did you mean 'snapkv'"),
        ([*SHORT, "--cache_requests", "true"], "lc_filings_ao_1k: --cache_requests is not supported: its key lacks"),
    ],
)
def test_plain_lm_eval_ends_with_the_error_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    ran = subprocess.run([sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    last_line = ran.stderr.strip().splitlines()[-1]
    assert last_line.startswith("lceval: error: ")
    assert message in last_line
    assert "Custom kwargs can be passed" not in ran.stderr


@pytest.mark.slow
def test_plain_lm_eval_writes_samples_with_telemetry_and_the_prompts_of_hf(
    smollm2: str, data_folder: Path, tmp_path: Path
) -> None:
    """A plain lm_eval command, and the same task under `--model hf`."""
    common = ["--tasks", "lc_nqopen_ao_2k", "--apply_chat_template", "--log_samples", "--gen_kwargs", "max_gen_toks=4"]
    rows = {}
    for name, model, arguments, limit in (
        ("ours", "lcft", "pretrained=smollm2-135m,kv=snapkv:0.5", "2"),
        ("hf", "hf", f"pretrained={smollm2}", "1"),
    ):
        line = ["--model", model, "--model_args", arguments, "--limit", limit, "--output_path", str(tmp_path / name)]
        ran = subprocess.run(
            [sys.executable, "-m", "lm_eval", *line, *common], capture_output=True, text=True, cwd=tmp_path
        )
        assert ran.returncode == 0, ran.stderr
        (file,) = (tmp_path / name).rglob("samples_lc_nqopen_ao_2k_*.jsonl")
        rows[name] = [json.loads(text) for text in file.read_text().splitlines()]
    assert [r["kv"]["shared_prefix"] for r in rows["ours"]] == [False, True]
    assert all(0.49 < r["kv_bytes"] / r["kv_bytes_full"] < 0.51 for r in rows["ours"])
    assert all("kv" not in r for r in rows["hf"])
    assert [r["prompt_hash"] for r in rows["hf"]] == [r["prompt_hash"] for r in rows["ours"][:1]]
    assert [r["doc_hash"] for r in rows["hf"]] == [r["doc_hash"] for r in rows["ours"][:1]]
    # Both runs are in the table of their folder: `hf` with scores, lcft also with costs.
    hf, ours = json.loads(table_text([tmp_path], "json"))["rows"]
    assert [(r["run"], r["model"], r["recipe"], r["n"]) for r in (hf, ours)] == [
        ("hf", "hf", "-", 1),
        ("ours", "lcft", "snapkv:0.5", 2),
    ]
    for row in (hf, ours):
        assert (row["suite"], row["mode"], row["length_k"], row["metric"]) == ("icr", "ao", 2, "subem")
        assert row["metrics"].keys() == {"subem", "subem_raw", "em", "f1", "parse_rate"}
        assert row["metrics"]["subem"] == row["score"]
        assert row["wrong_format"] == round(row["n"] * (1 - row["metrics"]["parse_rate"]))
        assert row["retention"] is None
    assert (hf["kept_share"], hf["bytes_read_per_step"], hf["decode_tok_s"]) == (None, None, None)
    assert ours["bytes_read_per_step"] == pytest.approx(ours["kv_mb"] * 1e6, rel=0.02)


def test_lm_eval_collects_its_description_of_the_environment_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import collect_env

    calls: list[str] = []
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: calls.append("pip list") or "environment")
    for _ in range(2):
        runner._collect_environment_once()
        assert collect_env.get_pretty_env_info() == "environment"
    assert calls == ["pip list"]


def test_the_demo_prefills_each_context_once_for_all_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["demo", "--limit", "2", "--output_path", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["recipe"], row["n"]) for row in rows] == [(recipe, 2) for recipe in RECIPES]
    infos = [json.loads(file.read_text())["config"]["lcft"] for file in tmp_path.glob("*/results_*.json")]
    assert {info["recipe"]: info.get("contexts", 0) for info in infos} == dict.fromkeys(RECIPES, 0) | {"full": 1}
