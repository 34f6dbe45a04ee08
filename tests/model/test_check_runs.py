"""The gate on real runs: gold_nll detects damage to the KV cache, and passes 8-bit quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lceval.analysis.check import baseline
from lceval.analysis.check.compare import TaskCheck, check
from lceval.models.policies import SnapKV

pytestmark = [pytest.mark.model, pytest.mark.slow]

TASK, RECIPE = "lc_filings_ao_1k", "snapkv:0.9"
# Six contexts of about 1k tokens with four questions each: the minimum with which gold_nll can pass.
LIMIT = 24
GATE = 0.2


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory, lcft_model: Any, smollm2: str) -> Callable[..., Path]:
    """A function that evaluates the task with lm-eval and writes a folder as `lm_eval --output_path` does."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    import lceval.plugin
    from lceval.models.lcft import LCFT

    tasks = Path(lceval.plugin.__file__).parent / "tasks"

    def run(name: str, kv: str = RECIPE) -> Path:
        folder = tmp_path_factory.mktemp(name)
        manager = TaskManager(include_path=str(tasks), include_defaults=False, metadata={"pretrained": smollm2})
        results = simple_evaluate(
            model=LCFT(lcft_model, kv=kv, tokenizer=smollm2, diagnose="gold", batch_size=4),
            tasks=[TASK],
            limit=LIMIT,
            # gold_nll needs no generation.
            gen_kwargs="max_gen_toks=1",
            apply_chat_template=True,
            task_manager=manager,
        )
        assert results is not None
        samples = results.pop("samples")
        tracker = EvaluationTracker(output_path=str(folder))
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(task_name=TASK, samples=samples[TASK])
        return folder

    return run


@pytest.fixture(scope="module")
def sound(evaluate: Callable[..., Path]) -> Path:
    return evaluate("sound")


def checked(base: Path, new: Path) -> TaskCheck:
    (task,) = check(baseline.read(base)[0], baseline.read(new)[0], gate=GATE, metric="gold_nll").tasks
    assert (task.n, task.clusters) == (LIMIT, 6)
    return task


def test_keeping_the_worst_slots_instead_of_the_best_fails_the_gate(
    evaluate: Callable[..., Path], sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = SnapKV.scores
    monkeypatch.setattr(SnapKV, "scores", lambda self, layer: -scores(self, layer))
    task = checked(sound, evaluate("inverted"))
    assert (task.verdict, task.new > task.base) == ("regression", True), task


def test_keys_and_queries_without_rotary_embedding_fail_the_gate(
    evaluate: Callable[..., Path], sound: Path, lcft_model: Any
) -> None:
    frequencies = lcft_model.model.rotary_emb.inv_freq
    original = frequencies.clone()
    frequencies.zero_()
    try:
        task = checked(sound, evaluate("no-rotary"))
    finally:
        frequencies.copy_(original)
    assert (task.verdict, task.new > task.base) == ("regression", True), task


def test_8_bit_quantization_passes_the_gate(evaluate: Callable[..., Path], sound: Path) -> None:
    task = checked(sound, evaluate("int8", f"{RECIPE}+int8"))
    assert task.verdict == "pass", task
    assert task.reason != "identical outputs"
