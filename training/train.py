"""A training run and its output folder.

`train.json` records the recipe and the data from the start; its status is `finished` only once the adapter is saved.
Rerunning the same recipe resumes from the last checkpoint; a different recipe in the same folder is an error.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from lceval.core.errors import UserError
from lceval.core.io import read_object, write_json
from lceval.training import compression_aware, data, precision, tabular, texts
from lceval.training.config import Config
from lceval.training.encode import Encoder, Packed
from lceval.training.rewards import Grader
from lceval.training.run_record import RECORD, check_data, recorded
from lceval.training.trainers import is_lead, last_checkpoint


@dataclass(frozen=True)
class TrainingSet:
    """The training and held-out data of a recipe.

    Attributes:
        contexts, held_out: packed contexts.
        rows, held_out_rows: the rows that they were encoded from.
        sequences: token sequences of plain text, instead of contexts.
    """

    contexts: tuple[Packed, ...]
    held_out: tuple[Packed, ...]
    rows: tuple[Any, ...]
    held_out_rows: tuple[Any, ...]
    sequences: tuple[tuple[int, ...], ...] = ()

    @property
    def questions(self) -> int:
        return sum(len(c.pairs) for c in self.contexts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each context or sequence."""
        return [c.tokens for c in self.contexts] + [len(ids) for ids in self.sequences]

    @property
    def digest(self) -> str:
        """Hash of the token ids of contexts, questions and answers."""
        digest = hashlib.sha256()
        for packed in self.contexts:
            digest.update(repr((packed.context, [(pair.question, pair.answer) for pair in packed.pairs])).encode())
        for ids in self.sequences:
            digest.update(repr(ids).encode())
        return digest.hexdigest()[:16]


def load(recipe: Config) -> tuple[Any, Any]:
    """The model, and an LCFT wrapper of it for `Encoder`, which also sets the attention function."""
    import torch
    from transformers import AutoModelForCausalLM

    from lceval import packaged
    from lceval.models.lcft import LCFT

    name = packaged.resolve(recipe.model.pretrained)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=recipe.model.revision,
        dtype=getattr(torch, recipe.model.dtype),
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model, LCFT(model, tokenizer=name, revision=recipe.model.revision)


def build(recipe: Config, lm: Any) -> TrainingSet:
    """The encoded data of a recipe.

    Raises:
        UserError: unknown dataset, mode, length or split.
    """
    if recipe.texts is not None:
        return TrainingSet((), (), (), (), tuple(texts.sequences(recipe.texts, lm.tok_encode)))
    encoder = Encoder(lm, chat_template=recipe.model.applies_template(lm.tokenizer))
    spec = recipe.data.model_copy(update={"tokenizer": recipe.model.pretrained})
    rows: Sequence[Any]
    if recipe.neighbourhoods is not None:
        rows = tabular.rows(recipe.neighbourhoods)
    else:
        rows = data.read(recipe.rows)[1] if recipe.rows else data.rows(spec)[0]
    held_out_rows: Sequence[Any] = []
    held_out: list[Packed] = []
    if recipe.eval_contexts:
        test = spec.model_copy(update={"split": "test", "seeds": (0,), "limit": None})
        held_out_rows = data.rows(test)[0]
        held_out = encoder.encode(held_out_rows)[: recipe.eval_contexts]
        ids = {row_id for packed in held_out for row_id in packed.ids}
        held_out_rows = [row for row in held_out_rows if row["id"] in ids]
    self_distillation = recipe.compression_aware is not None and recipe.compression_aware.self_distillation is not None
    contexts = encoder.encode(rows, self_distillation=self_distillation)
    return TrainingSet(tuple(contexts), tuple(held_out), tuple(rows), tuple(held_out_rows))


def train(recipe: Config, grader: Grader | None = None) -> dict[str, Any]:
    """Train, resume, or return the record of the finished run (`train.json`).

    Args:
        grader: judge of the samples, for a reward that requires one.

    Raises:
        UserError: the output folder contains a different run, or the recipe cannot be trained.
    """
    for package in ("trl", *recipe.report_to):
        if find_spec(package) is None:
            raise UserError(f"lceval train requires the package {package}: run `pip install 'lceval[train]'`")
    if recipe.compression_aware is not None:
        compression_aware.check(recipe.compression_aware)
    recipe = precision.resolve(recipe)
    file, values = recipe.output / RECORD, recipe.model_dump(mode="json", exclude={"output", "report_to"})
    before = recorded(recipe.output, values)
    if before is not None and before["status"] == "finished":
        return before
    from transformers import set_seed

    set_seed(recipe.seed)
    model, lm = load(recipe)
    training_set = build(recipe, lm)
    record: dict[str, Any] = {
        "status": "running",
        "recipe": values,
        "data": {
            "digest": training_set.digest,
            "contexts": len(training_set.lengths),
            "questions": training_set.questions,
            "tokens_a_context": fmean(training_set.lengths),
        },
    }
    check_data(recipe.output, before, record)
    lead = is_lead()
    if lead:
        recipe.output.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
    began = time.perf_counter()
    if recipe.grpo is not None:
        outcome = _train_grpo(recipe, model, lm, training_set, grader)
    else:
        outcome = _train_supervised(recipe, model, lm, training_set)
    record |= {"status": "finished", "wall_s": time.perf_counter() - began, **outcome}
    if lead:
        from lceval.training.card import write as write_card

        (recipe.output / "training_args.bin").unlink(missing_ok=True)  # a pickle; train.json has the recipe
        _name_base(recipe.output / outcome.get("model", ""), recipe.model.pretrained)
        write_card(recipe.output, record)
        write_json(file, record)
    return record


def _name_base(folder: Path, pretrained: str) -> None:
    """Let a saved adapter name its base model as the recipe does; peft writes the folder that it was loaded from."""
    file = folder / "adapter_config.json"
    if file.is_file():
        write_json(file, {**read_object(file, "train again"), "base_model_name_or_path": pretrained})


def _train_supervised(recipe: Config, model: Any, lm: Any, training_set: TrainingSet) -> dict[str, Any]:
    from lceval.training import joint, longlora
    from lceval.training.sft import packed_trainer, text_trainer

    if recipe.texts is None:
        trainer: Any = packed_trainer(recipe, model, lm, training_set.contexts, training_set.held_out)
    else:
        model.set_attn_implementation("sdpa")
        tuned = model if recipe.longlora is None else longlora.prepare(model, recipe.longlora)
        trainer = text_trainer(recipe, tuned, lm.tokenizer, training_set.sequences)
    trainer.train(resume_from_checkpoint=last_checkpoint(recipe.output))
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    saved: dict[str, Any] = {}
    if recipe.longlora is None:
        trainer.save_model(str(recipe.output))
        if recipe.compression_aware is not None and recipe.compression_aware.scorer.is_trained and is_lead():
            saved |= {"scorer": joint.finish(recipe.output)}
    else:
        folder = recipe.output / "model"
        merged = longlora.needs_model_folder(trainer.model, recipe.longlora)
        saved = {"model": folder.name, "loads_as": "pretrained" if merged else "peft"}
        if is_lead():
            # A folder here is complete and of the same recipe: the run was killed after saving it.
            shutil.rmtree(folder, ignore_errors=True)
            longlora.save(trainer.model, recipe.longlora, folder, lm.tokenizer)
    return {"parameters": parameters, **saved, **_curves(trainer.state.log_history)}


def _train_grpo(
    recipe: Config, model: Any, lm: Any, training_set: TrainingSet, grader: Grader | None
) -> dict[str, Any]:
    from lceval.training import grpo
    from lceval.training.sft import lora

    assert recipe.grpo is not None
    result = grpo.train(
        model=model,
        tokenizer=lm.tokenizer,
        rows=training_set.rows,
        grpo=recipe.grpo,
        output=recipe.output,
        lora=lora(recipe),
        seed=recipe.seed,
        resume=True,
        grader=grader,
        held_out=training_set.held_out_rows,
        chat_template=recipe.model.chat_template,
        bf16=recipe.optim.bf16,
        report_to=recipe.report_to,
    )
    rewards = [[line["step"], line["reward"]] for line in result.history if "reward" in line]
    return {
        "parameters": result.parameters,
        "unjudged": result.unjudged,
        "rewards": rewards,
        **_curves(result.history),
    }


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "losses": [[line["step"], line["loss"]] for line in history if "loss" in line],
        "eval_losses": [[line["step"], line["eval_loss"]] for line in history if "eval_loss" in line],
    }
