"""The gate on real runs: damage done to the model's cache is found by gold_nll, and an honest change is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lceval.check import baseline
from lceval.check.compare import TaskCheck, check
from lceval.models.policies import SnapKV

pytestmark = [pytest.mark.model, pytest.mark.slow]

TASK, RECIPE = "lc_filings_ao_1k", "snapkv:0.9"
# Six contexts of about 1k tokens with four questions each: the least that gold_nll can pass.
LIMIT = 24
GATE = 0.2


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory, lcft_model: Any, smollm2: str) -> Callable[..., Path]:
    """A function that lets lm-eval evaluate the task and write its folder, as `lm_eval --output_path` does."""
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
            # What is gated on is predicted, not generated.
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


def judged(base: Path, new: Path) -> TaskCheck:
    (task,) = check(baseline.read(base)[0], baseline.read(new)[0], gate=GATE, metric="gold_nll").tasks
    assert (task.n, task.clusters) == (LIMIT, 6)
    return task


def test_keeping_the_worst_slots_instead_of_the_best_fails_the_gate(
    evaluate: Callable[..., Path], sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = SnapKV.scores
    monkeypatch.setattr(SnapKV, "scores", lambda self, layer: -scores(self, layer))
    task = judged(sound, evaluate("inverted"))
    assert (task.verdict, task.new > task.base) == ("regression", True), task


def test_keys_and_queries_that_are_not_turned_by_their_positions_fail_the_gate(
    evaluate: Callable[..., Path], sound: Path, lcft_model: Any
) -> None:
    speeds = lcft_model.model.rotary_emb.inv_freq
    right = speeds.clone()
    speeds.zero_()
    try:
        task = judged(sound, evaluate("unturned"))
    finally:
        speeds.copy_(right)
    assert (task.verdict, task.new > task.base) == ("regression", True), task


def test_a_store_of_8_bits_passes_the_gate(evaluate: Callable[..., Path], sound: Path) -> None:
    task = judged(sound, evaluate("int8", f"{RECIPE}+int8"))
    assert task.verdict == "pass", task
    assert task.reason != "identical outputs"
