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
