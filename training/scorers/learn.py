"""A scorer's training run and its output folder.

`train.json` records recipe and data from the start; its status is `finished` only once the scorer is saved. The folder
`work` has checkpoints until then: rerunning the same recipe resumes from the last.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from lceval import packaged
from lceval.core.errors import UserError
from lceval.core.io import write_json
from lceval.models.lcft import LCFT
from lceval.models.loading import loading
from lceval.models.scorer import Scorer, dimensions_of
from lceval.models.scorer import load as load_scorer
from lceval.training import precision
from lceval.training.run_record import RECORD, check_data, recorded
from lceval.training.scorers.agreement import Agreement
from lceval.training.scorers.ridge import RidgeFit
from lceval.training.scorers.scored_contexts import ContextSet, ScoredContext, build, observe
from lceval.training.scorers.scorer_card import write as write_card
from lceval.training.scorers.spec import ScorerRecipe
from lceval.training.scorers.two_layers import MlpFit, sampled
from lceval.training.trainers import processes

# In a scorer file, and of attention inputs on disk.
BYTES_16_BIT = 2


def learn(recipe: ScorerRecipe) -> dict[str, Any]:
    """Train, resume, or return the record of the finished run (`train.json`).

    Raises:
        UserError: the output folder contains a different run, or the recipe cannot be trained.
    """
    if processes() > 1:
        raise UserError("lceval train scorer runs in one process: start it without accelerate")
    if recipe.model.dtype == "auto":
        model = recipe.model.model_copy(update={"dtype": precision.fast_dtype()})
        recipe = recipe.model_copy(update={"model": model})
    values = recipe.model_dump(mode="json", exclude={"output"})
    before = recorded(recipe.output, values)
    if before is not None and before["status"] == "finished":
        return before
    began = time.perf_counter()
    adapter: dict[str, Any] = {"peft": recipe.model.peft} if recipe.model.peft else {}
    lm = LCFT(recipe.model.pretrained, revision=recipe.model.revision, dtype=recipe.model.dtype, **adapter)
    contexts = build(recipe, lm)
    scorer = empty(recipe, lm)
    record: dict[str, Any] = {"status": "running", "recipe": values, "data": size(recipe, contexts)}
    check_data(recipe.output, before, record)
    work = recipe.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_json(recipe.output / RECORD, record)
    fitted = _fit(recipe, lm, contexts.fitted, scorer, work).half()
    if not all(parameter.isfinite().all() for parameter in fitted.parameters()):
        raise UserError("the scorer has numbers beyond 16 bit: raise linear.ridge, or reduce mlp.learning_rate")
    fitted.save(recipe.output)
    agreement = Agreement(load_scorer(str(recipe.output)).to(lm.base.device, lm.base.dtype))
    for slots in _observed(recipe, lm, contexts.held_out, "held out"):
        agreement.add(slots)
    record |= {
        "status": "finished",
        "wall_s": time.perf_counter() - began,
        "scorer": {"digest": fitted.digest, **dimensions(fitted)},
        "held_out": agreement.figures,
    }
    write_card(recipe.output, record)
    write_json(recipe.output / RECORD, record)
    shutil.rmtree(work)
    return record


def estimate(recipe: ScorerRecipe) -> dict[str, Any]:
    """Contexts, tokens and bytes of a recipe, without the model's weights.

    Raises:
        UserError: the model's configuration or tokenizer is not available, or the data is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = packaged.resolve(recipe.model.pretrained)
    with loading(pretrained=name), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, revision=recipe.model.revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config)
    lm = LCFT(model, tokenizer=name, revision=recipe.model.revision)
    scorer = empty(recipe, lm)
    data = size(recipe, build(recipe, lm))
    d, h = scorer.input_dim, scorer.output_dim
    if recipe.linear is None:
        work = data["tokens_used"] * scorer.n_modules * (d * BYTES_16_BIT + h * 4)
    else:
        work = scorer.n_modules * (d + 1) * (d + 1 + h) * 8
    return {"output": str(recipe.output), **data, "scorer": dimensions(scorer), "work_bytes": work}


def empty(recipe: ScorerRecipe, lm: LCFT) -> Scorer:
    """A scorer of the model's shape; its numbers are arbitrary."""
    hidden = None if recipe.mlp is None else recipe.mlp.hidden
    shape = dimensions_of(lm.engine.geometry, lm.base.config.get_text_config())
    return Scorer(**shape, hidden_dim=hidden).requires_grad_(False)


def size(recipe: ScorerRecipe, contexts: ContextSet) -> dict[str, Any]:
    """The record's `data`."""
    lengths = [context.tokens for context in contexts.fitted]
    return {
        "digest": contexts.digest,
        "contexts": len(contexts.fitted),
        "held_out": len(contexts.held_out),
        "questions": sum(len(context.pairs) for context in contexts.fitted),
        "tokens_a_context": fmean(len(context.ids) for context in contexts.fitted),
        "tokens_used": sum(lengths if recipe.mlp is None else sampled(recipe.mlp.tokens, lengths)),
    }


def dimensions(scorer: Scorer) -> dict[str, Any]:
    """Shape, parameters and bytes in 16 bit."""
    parameters = sum(parameter.numel() for parameter in scorer.parameters())
    return {**scorer.dimensions, "parameters": parameters, "bytes": parameters * BYTES_16_BIT}


def _fit(recipe: ScorerRecipe, lm: LCFT, contexts: Sequence[ScoredContext], scorer: Scorer, work: Path) -> Scorer:
    fit: RidgeFit | MlpFit
    if recipe.linear is not None:
        fit = RidgeFit(recipe.linear, scorer, work)
    else:
        assert recipe.mlp is not None
        fit = MlpFit(recipe.mlp, scorer, work, recipe.seed, [context.tokens for context in contexts])
    for slots in _observed(recipe, lm, contexts, "contexts", start=fit.contexts):
        fit.add(slots)
        if fit.contexts % recipe.save_contexts == 0 or fit.contexts == len(contexts):
            fit.save()
    return fit.finish()


def _observed(recipe: ScorerRecipe, lm: LCFT, contexts: Sequence[ScoredContext], what: str, start: int = 0) -> Any:
    """The slots of contexts from `start` on, one context at a time, with progress on stderr."""
    for context in tqdm(contexts[start:], total=len(contexts), initial=start, desc=what, file=sys.stderr):
        yield observe(lm, context, recipe)
