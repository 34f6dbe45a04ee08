"""A judge behind an endpoint: faults, a server crash, a killed process, and secrecy of the key."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lceval.core.errors import UserError
from lceval.judge import backends, rubrics
from lceval.judge.client import Client, Limits
from lceval.judge.replies import Store
from lceval.judge.rubrics import Case

KEY = "canary-3f9c1e77-never-to-be-seen"
TASK = "lc_filings_rj_1k"
SAMPLES, CONCURRENCY = 500, 32
TIMEOUT_S = 3.0


def made_run(folder: Path, samples: int) -> Path:
    """The lm_eval output of an R+Judge task."""
    folder.mkdir()
    config = {"metadata": {"headline": "subem"}}
    results = {"configs": {TASK: config}, "n-samples": {TASK: {"effective": samples}}, "config": {"model": "hf"}}
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps(results))
    with (folder / f"samples_{TASK}_2026-01-01T00-00-00.jsonl").open("w") as out:
        for number in range(samples):
            doc = {
                "id": f"q{number}",
                "cluster": f"c{number // 4}",
                "question": f"What is figure {number}?",
                "answers": [str(number)],
                "docs": [{"pid": f"p{i}", "title": "", "text": f"Figure {number} is {number + i}."} for i in range(3)],
                "gold_pids": ["p0"],
            }
            answer = f"Document review: [DOC 0].\nThe answer is: {number}"
            row = {"doc_id": number, "doc": doc, "filtered_resps": [answer], "filter": "none", "subem": 1.0}
            out.write(json.dumps(row) + "\n")
    return folder


class Served:
    """An OpenAI-compatible endpoint on 127.0.0.1 with planned failures and a count of its answers.

    `plan(prompt, attempt)` is the outcome of a call: ok, timeout, 429, 500, 401, 400 or half (a truncated body).
    """

    def __init__(self, plan: Callable[[str, int], str], content: Callable[[str], str]) -> None:
        self.plan, self.content = plan, content
        self.lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.gate_at: int | None = None
        self.released = threading.Event()
        self.server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    def start(self) -> None:
        outer, self.up = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                pass  # a client that is killed or timed out

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        self.up.set()
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and stop answering open ones."""
        self.up.clear()
        assert self.server is not None
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def total(self) -> int:
        return sum(self.answered.values())

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        up = self.up
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        with self.lock:
            self.requests.append(body)
            self.headers.append(handler.headers.get("Authorization", ""))
            attempt = self.calls[prompt]
            self.calls[prompt] += 1
            gated = self.gate_at is not None and self.total >= self.gate_at
            outcome = self.plan(prompt, attempt)
            good = outcome == "ok" and not gated and up.is_set()
            if good:
                self.answered[prompt] += 1
        if gated or not up.is_set():
            self.released.wait(30)
            handler.close_connection = True
        elif outcome == "timeout":
            time.sleep(TIMEOUT_S + 0.5)
            handler.close_connection = True
        elif outcome in ("429", "500", "401", "400"):
            error = {"error": {"message": f"no, and your key is {KEY}: response_format", "type": "x", "param": None}}
            self.send(handler, int(outcome), error)
        else:
            message = {"role": "assistant", "content": self.content(body["messages"][1]["content"])}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "m-1", "usage": usage}
            self.send(
                handler, 200, {**completion, "system_fingerprint": "fp", "choices": [choice]}, half=outcome == "half"
            )

    def send(self, handler: BaseHTTPRequestHandler, code: int, value: Any, *, half: bool = False) -> None:
        data = json.dumps(value).encode()
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        if code == 429:
            handler.send_header("Retry-After", "0")
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            handler.close_connection = True


@contextmanager
def served(plan: Callable[[str, int], str], content: Callable[[str], str]) -> Iterator[Served]:
    server = Served(plan, content)
    try:
        yield server
    finally:
        server.released.set()
        if server.up.is_set():
            server.stop()


def share(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


def faulty(prompt: str, attempt: int) -> str:
    """10% of first calls time out, 33% fail in some way; a few fail twice."""
    place = share(f"{prompt} {attempt}")
    if attempt > 1:
        return "ok"
    for limit, outcome in ((0.10, "timeout"), (0.18, "429"), (0.26, "500"), (0.33, "half")):
        if place < limit * (1 if attempt == 0 else 0.3):
            return outcome
    return "ok"


def figure(user: str) -> int:
    return int(user.split("What is figure ")[1].split("?")[0])


def garbled(number: int) -> bool:
    return number % 50 == 7


def graded(user: str) -> str:
    number = figure(user)
    reply = json.dumps({"reasoning": number % 2, "grounding": number // 2 % 2, "answer": 1})
    return reply[: len(reply) // 2] if garbled(number) else reply


def start(arguments: list[str], **env: str) -> subprocess.Popen[str]:
    code = "import sys; from lceval.cli import invoke; sys.exit(invoke(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "judge", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LCEVAL_JUDGE_KEY": KEY, **env},
    )


def filed(file: Path) -> int:
    if not file.is_file():
        return 0
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
        try:
            return int(db.execute("SELECT count(*) FROM reply").fetchone()[0])
        except sqlite3.OperationalError:
            return 0
        finally:
            db.commit()


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, limit: float = 60.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, process.communicate() if process else ""
        time.sleep(0.01)


@pytest.mark.slow
def test_every_verdict_is_paid_once_despite_faults_a_server_crash_and_a_killed_process(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", SAMPLES)
    replies = tmp_path / "replies.sqlite"
    originals = {file.name: file.read_bytes() for file in run.iterdir()}
    with served(faulty, graded) as server:
        line = [str(run), "--judge", f"openai:m@{server.url}", "--concurrency", str(CONCURRENCY), "--json"]
        line += ["--timeout", str(TIMEOUT_S), "--replies", str(replies)]

        server.gate_at = 150
        first = start(line)
        until(lambda: server.total == 150 and filed(replies) == 150, first)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        assert not (run / "judge.json").exists()
        server.gate_at = None
        server.released.set()

        second = start(line)
        until(lambda: server.total >= 300, second)
        server.stop()
        time.sleep(0.3)  # calls fail on a closed port
        server.start()
        out, err = second.communicate(timeout=60)
        assert second.returncode == 0, err
        (report,) = json.loads(out)
        assert report == json.loads((run / "judge.json").read_text())
        assert set(server.answered.values()) == {1}
        assert server.total == SAMPLES
        assert report["reused"] == 150
        assert {"timeout", "429", "500", "no connection"} <= set(report["retried"])

        calls = sum(server.calls.values())
        third = start(line)
        out, _ = third.communicate(timeout=60)
        assert (third.returncode, sum(server.calls.values())) == (0, calls)
        assert json.loads(out)[0]["tasks"] == report["tasks"]

    rows = [json.loads(text) for text in (run / f"judged_{TASK}.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q{number}" for number in range(SAMPLES)]
    for number, row in enumerate(rows):
        if garbled(number):
            assert (row["status"], row["reason"], row["grades"]) == ("unjudged", "unparsable", None)
            assert "judge_sum" not in row
        else:
            parts = [number % 2, number // 2 % 2, 1]
            assert [row[f"judge_{part}"] for part in ("reasoning", "grounding", "correct")] == parts
            assert (row["judge_sum"], row["rj_paper"]) == (sum(parts), sum(parts) + 1.0)
    task = report["tasks"][TASK]
    assert (task["judged"], task["unjudged"], task["reasons"]) == (490, 10, {"unparsable": 10})
    assert task["coverage"] == 0.98
    assert task["scores"]["judge_sum"] == sum(row.get("judge_sum", 0) for row in rows) / 490
    assert {name: (run / name).read_bytes() for name in originals} == originals


LOUD = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from lceval.cli import invoke
sys.exit(invoke(["judge", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("plan", ["ok", "500", "401", "400"])
def test_the_key_is_sent_only_to_the_endpoint(tmp_path: Path, plan: str) -> None:
    run = made_run(tmp_path / "run", 6)
    with served(lambda prompt, attempt: plan, lambda user: f"{graded(user)} your key is {KEY}") as server:
        line = [
            str(run),
            "--judge",
            f"openai:m@{server.url}",
            "--retries",
            "1",
            "--replies",
            str(tmp_path / "r.sqlite"),
        ]
        env = {**os.environ, "LCEVAL_JUDGE_KEY": KEY, "OPENAI_API_KEY": f"{KEY}-2", "LCEVAL_DEBUG": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", LOUD, *line], capture_output=True, text=True, env={**env, "OPENAI_LOG": "debug"}
        )
    assert ran.returncode == {"ok": 0, "500": 4, "401": 2, "400": 4}[plan], ran.stderr[-2000:]
    assert set(server.headers) == {f"Bearer {KEY}"}
    assert "DEBUG" in ran.stderr
    (tmp_path / "out").write_text(ran.stdout + ran.stderr)
    leaks = [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert leaks == []
    assert (run / "judge.json").exists() == (plan != "401")


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    with Store(tmp_path / "replies.sqlite") as store:

        def judged(server: Served, cases: int = 3, **limits: Any) -> tuple[list[Any], Client]:
            judge = backends.make(f"openai:m@{server.url}", timeout=TIMEOUT_S)
            client = Client(judge, store, Limits(**({"first_wait": 0.01, "retries": 1} | limits)))
            questions = [Case(f"What is figure {number}?", (str(number),), "It is.") for number in range(cases)]
            try:
                return client.judge_all(rubrics.load("rj"), questions), client
            finally:
                judge.close()

        yield judged


def test_after_a_400_calls_omit_the_json_schema(ask: Callable[..., Any]) -> None:
    with served(lambda prompt, attempt: "ok", graded) as server:
        server.plan = lambda prompt, attempt: "400" if "response_format" in server.requests[-1] else "ok"
        verdicts, _ = ask(server, 5, concurrency=1)
    assert all(verdict.grades for verdict in verdicts)
    sent = ["response_format" in body for body in server.requests]
    assert sent == [True, False, False, False, False, False]
    assert server.requests[0]["response_format"]["json_schema"]["schema"]["required"] == [
        "reasoning",
        "grounding",
        "answer",
    ]
    assert all(body["temperature"] == 0 for body in server.requests)


def test_the_call_limit_includes_retries_and_the_rest_is_unjudged(ask: Callable[..., Any]) -> None:
    with served(lambda prompt, attempt: "ok" if attempt else "500", graded) as server:
        verdicts, client = ask(server, 6, calls=7, retries=3, concurrency=4)
    assert len(server.requests) == client.spent.calls == 7
    unjudged = [verdict.reason for verdict in verdicts if verdict.grades is None]
    assert set(unjudged) <= {"budget"}
    assert len(unjudged) == 6 - server.total


def test_an_unreachable_endpoint_is_abandoned_and_counted(ask: Callable[..., Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = type("Gone", (), {"url": f"http://127.0.0.1:{port}/v1"})()
    verdicts, client = ask(server, 40, concurrency=2, retries=1)
    reasons = Counter(verdict.reason for verdict in verdicts)
    assert all(verdict.grades is None for verdict in verdicts)
    assert reasons["failed: no connection"] >= 6
    assert reasons["stopped"] >= 30
    assert client.spent.calls <= 16


def test_a_wrong_key_stops_at_once_with_an_error_without_the_key(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCEVAL_JUDGE_KEY", KEY)
    with served(lambda prompt, attempt: "401", graded) as server, pytest.raises(UserError) as raised:
        ask(server, 50, concurrency=2)
    assert "401" in str(raised.value)
    assert KEY not in str(raised.value)
    assert raised.value.__suppress_context__
    assert len(server.requests) <= 10
