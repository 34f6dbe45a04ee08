"""The packaged model's scorer, and `lceval train scorer` on that model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lceval import packaged
from lceval.cli import invoke
from lceval.models import scorer
from lceval.training.scorers import scored_contexts, spec
from lceval.training.scorers.agreement import Agreement

TEXT = Path(__file__).parents[2] / "docs" / "concepts.md"


def test_a_scorer_of_two_contexts_is_trained_and_the_packaged_one_agrees_with_kvzip_on_them(
    lcft: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    values = {"texts": {"files": [str(TEXT)], "tokens": 150}, "contexts": 1, "held_out": 1, "linear": {}}
    file.write_text(json.dumps({"model": {"dtype": "float32"}, "output": str(tmp_path / "mine"), **values}))
    assert invoke(["train", "scorer", str(file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)

    model = lcft()
    recipe = spec.read(str(file))
    contexts = scored_contexts.build(recipe, model)
    header = model.tok_decode(list(contexts.held_out[0].ids[: contexts.held_out[0].first]), skip_special_tokens=False)
    assert header.endswith("<|im_end|>\n<|im_start|>user\n")
    ready = scorer.load(str(packaged.scorer_folder()))
    ready.check(model.engine.geometry, model.base.config)
    agreement = Agreement(ready.float())
    agreement.add(scored_contexts.observe(model, contexts.held_out[0], recipe))
    assert agreement.figures["overlap"]["0.1"] > record["held_out"]["overlap"]["0.1"]
    assert agreement.figures["overlap"]["0.25"] > 0.6
    assert (packaged.scorer_folder() / scorer.WEIGHTS).stat().st_size <= 1_000_000


def test_a_tenth_that_the_scorer_keeps_answers_better_than_the_half_that_snapkv_keeps(
    lcft: Any, requests: list[Any]
) -> None:
    """On annual reports, which the scorer was not trained on."""
    for request in requests:
        request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": 0})
    nll = {}
    for recipe in ("kvzap:0.1", "snapkv:0.5"):
        model = lcft(recipe, diagnose="gold", batch_size=4)
        nll[recipe] = sum(text.meta["gold_nll"] for text in model.generate_until(requests, disable_tqdm=True))
    assert nll["kvzap:0.1"] < nll["snapkv:0.5"]
