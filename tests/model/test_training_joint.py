"""Training under learned eviction: what is kept is what lcft keeps, and a scorer learns through its gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import answer_nll
from torch.nn import functional as F  # noqa: N812

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.models import recipe
from lceval.models import scorer as scorers
from lceval.models.lcft import LCFT
from lceval.training.config import LearnedScorer, parse
from lceval.training.joint import LearnedEviction, threshold_of
from lceval.training.packing import Packing, QAPair, pack
from lceval.training.run_record import SCORER
from lceval.training.train import train

pytestmark = [pytest.mark.model]
KV = "kvzap:0.27"
CONTEXT = tuple(torch.randint(10, 40000, (150,), generator=torch.Generator().manual_seed(0)).tolist())
PAIRS = [QAPair(CONTEXT[5:17], CONTEXT[40:44]), QAPair(CONTEXT[60:61], CONTEXT[70:73])]


@pytest.fixture(scope="module")
def model(lcft_model: Any, smollm2: str) -> LCFT:
    return LCFT(lcft_model, tokenizer=smollm2, kv=KV)


def losses(model: LCFT, **spec: Any) -> tuple[torch.Tensor, LearnedEviction]:
    """NLL per token of each answer, with gradient, in the middle of training."""
    learned = LearnedEviction(
        LearnedScorer(**spec), "smollm2-135m", model.base, model.engine.geometry, model.engine.protected_tokens
    )
    packed = {key: torch.tensor([row]) for key, row in pack(CONTEXT, PAIRS).items()}
    evictor: Any = model.recipe.evictor
    packing = Packing(packed["block"], packed["kind"], model.engine.geometry, evictor)
    learned.apply(packing, packed["input_ids"], evictor, 0.5)
    nll = answer_nll(model.model, packed, packing)
    learned.release()
    return nll, learned


@pytest.fixture(scope="module")
def evaluated(model: LCFT) -> list[float]:
    """The same over the cache that lcft compresses."""
    engine, kv = model.engine, model.recipe
    context = engine.prefill(CONTEXT, kv.stats_spec).compress(kv, consume=True)
    result = []
    for pair in PAIRS:
        cache = engine.batch([context], [pair.question], 64)
        logits = engine.forward(cache, torch.tensor([[*pair.question, *pair.answer[:-1]]]))[0, -len(pair.answer) :]
        result.append(float(F.cross_entropy(logits, torch.tensor(pair.answer))))
    return result


def test_a_fixed_scorer_evicts_in_training_what_lcft_evicts(model: LCFT, evaluated: list[float]) -> None:
    nll, _ = losses(model)
    assert nll.tolist() == pytest.approx(evaluated, abs=5e-5, rel=2e-5)


def test_a_cold_gate_is_the_mask_and_a_warm_one_passes_gradients_to_the_scorer(
    model: LCFT, evaluated: list[float]
) -> None:
    cold, _ = losses(model, learning_rate=1.0, temperature=(1e-6, 1e-6))
    assert cold.tolist() == pytest.approx(evaluated, abs=5e-5, rel=2e-5)
    warm, learned = losses(model, learning_rate=1.0, temperature=(1.0, 0.25))
    assert not torch.allclose(warm, cold, atol=1e-2)
    warm.sum().backward()
    model.base.zero_grad()
    for layer in learned.scorer.layers:
        gradients = [parameter.grad for parameter in layer.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients if gradient is not None)


def test_a_threshold_separates_what_is_kept() -> None:
    scores = [torch.tensor([[[torch.inf, 3.0, 1.0, -2.0]]]), torch.tensor([[[torch.inf, 0.5, -1.0, 2.0]]])]
    masks = [torch.tensor([[[True, True, True, False]]]), torch.tensor([[[True, False, False, True]]])]
    assert threshold_of(scores, masks) == 0.75
    everything = [torch.ones(1, 1, 4, dtype=torch.bool)] * 2
    assert threshold_of(scores, everything) in (1.0, 0.5)


def joint(output: Path, rows: Path, **more: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "model": {"dtype": "float32"},
        "rows": str(rows),
        "lora": {"r": 4, "alpha": 8},
        "optim": {"max_steps": 2, "contexts_per_step": 1, "warmup": 0.0, "schedule": "constant"},
        "compression_aware": {"evictors": ["kvzap"], "full": 0.0, "scorer": {"learning_rate": 1e-2}},
        "save_steps": 1,
        **more,
    }


@pytest.mark.slow
def test_joint_training_saves_an_adapter_and_its_scorer_and_resumes(
    tmp_path: Path, short_rows: Path, smollm2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(parse(joint(tmp_path / "whole", short_rows), "test"))
    trained, shipped = (
        scorers.load(str(tmp_path / "whole" / SCORER)),
        scorers.load(str(scorers.default("smollm2-135m"))),
    )
    assert whole["scorer"]["digest"] == trained.digest != shipped.digest
    assert trained.dimensions == shipped.dimensions
    # From the first checkpoint on.
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-1", folder / "checkpoints" / "checkpoint-1")
    record = json.loads((tmp_path / "whole" / "train.json").read_text()) | {"status": "running"}
    (folder / "train.json").write_text(json.dumps(record))
    resumed = train(parse(joint(folder, short_rows), "test"))
    assert resumed["losses"] == whole["losses"]
    assert resumed["scorer"] == whole["scorer"]
    adapter = LCFT(smollm2, peft=str(folder), scorer=str(folder / SCORER), kv=KV, device="cpu")
    assert adapter.scorer is not None
    assert adapter.scorer.digest == trained.digest
    line = ["train", "eval", str(folder), "--kv", KV, "--kv", "full", "--tasks", "lc_filings_ao_1k", "--limit", "1"]
    assert invoke([*line, "--json"]) == 0
    capsys.readouterr()
    runs = [json.loads(file.read_text()) for file in folder.glob("eval/*/run.json")]
    used = {(bool(run["model_args"].get("peft")), run["model_args"].get("scorer")) for run in runs}
    assert used == {(False, None), (True, None), (True, str(folder / SCORER))}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"query_aware": True}, "kvzap scores a context alone"),
        ({"evictors": ["snapkv"], "scorer": {"init": "somewhere"}}, "scorer is that of the evictor kvzap"),
        ({"scorer": {"temperature": [0.1, 1.0]}}, "first >= last"),
    ],
)
def test_a_section_without_sense_is_refused(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse({"output": str(tmp_path), "compression_aware": {"evictors": ["kvzap"], **section}}, "test")


def test_a_model_without_a_scorer_of_its_own_is_refused(model: LCFT) -> None:
    with pytest.raises(UserError, match="train one with `lceval train scorer`"):
        LearnedEviction(LearnedScorer(), "other", model.base, model.engine.geometry, model.engine.protected_tokens)
    assert isinstance(recipe.parse(KV).evictor, type(model.recipe.evictor))
