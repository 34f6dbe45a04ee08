"""lcft in two processes, as under `accelerate launch`: the answers of one, and each context prefilled once.

The file is also the script that torchrun starts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import interpreter
import pytest
from answers import answered, requests
from tiny_models import save_model

METHODS = ("generate_until", "loglikelihood")


def model(folder: str) -> Any:
    from lceval.models.lcft import LCFT

    return LCFT(folder, kv="snapkv:0.5:window=8", device="cpu", dtype="float32", batch_size=2)


def plain(answer: Any) -> Any:
    """What JSON keeps of an answer, and its bytes."""
    return [list(answer) if isinstance(answer, tuple) else str(answer), answer.meta["kv_bytes"]]


def main(folder: str, output: Path) -> None:
    """Answer this process's share of the requests: every other document, as lm-eval deals them out."""
    lm = model(folder)
    given: dict[str, Any] = {"rank": lm.rank, "world_size": lm.world_size}
    for method in METHODS:
        own = [request for request in requests(method) if request.doc_id % lm.world_size == lm.rank]
        given[method] = [plain(answer) for answer in getattr(lm, method)(own, disable_tqdm=True)]
        given[f"{method} totals"] = dict(lm.totals)
    (output / f"{lm.rank}.json").write_text(json.dumps(given))


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one_and_prefill_each_context_once(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__, folder, str(tmp_path)]
    # accelerate launch starts a single process without devices; torchrun starts several.
    done = interpreter.python(*command, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(rank["rank"], rank["world_size"]) for rank in ranks] == [(0, 2), (1, 2)]
    alone = model(folder)
    for method in METHODS:
        answers = zip(requests(method), answered(alone, method), strict=True)
        expected = [(request.doc_id % 2, plain(answer)) for request, answer in answers]
        for rank, given in enumerate(ranks):
            of_rank = [answer for owner, answer in expected if owner == rank]
            for (text, size), (own_text, own_size) in zip(of_rank, given[method], strict=True):
                assert size == own_size
                assert own_text == text or own_text == pytest.approx(text, abs=1e-4)
            # The counts are those of both processes.
            assert given[f"{method} totals"] == dict(alone.totals)


def test_a_run_folder_belongs_to_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from lceval.cli import invoke

    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = f"pretrained={save_model(tmp_path / 'model')}"
    line = ["--model", "lcft", "--model_args", arguments, "--tasks", "lc_filings_ao_1k"]
    assert invoke(["run", *line, "--output_path", str(tmp_path / "run")]) == 2
    assert "a run folder belongs to one process, and this is one of 2: use `accelerate" in capsys.readouterr().err


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main(sys.argv[1], Path(sys.argv[2]))
