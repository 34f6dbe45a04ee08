"""One training run: its folder, what it may be resumed as, and what it leaves behind.

`train.json` states the recipe and the data from the start, and says `finished` only when the adapter is whole. The same
recipe goes on from the last checkpoint; another one is refused the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.training import compression_aware, data, precision, tabular, texts
from lceval.training.config import Config
from lceval.training.encode import Encoder, Packed
from lceval.training.rewards import Grader
from lceval.training.trainers import is_lead, last_checkpoint

RECORD = "train.json"


@dataclass(frozen=True)
class Plan:
    """What a recipe will train on.

    Attributes:
        contexts, held_out: packed contexts, and the rows that they were made from; `tokens` of one on average.
        sequences: of plain text, instead of contexts.
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
    def tokens(self) -> float:
        lengths = [c.tokens for c in self.contexts] + [len(ids) for ids in self.sequences]
        return sum(lengths) / len(lengths)

    @property
    def longest(self) -> int:
        return max([c.tokens for c in self.contexts] + [len(ids) for ids in self.sequences])

    @property
    def digest(self) -> str:
        """Of everything that is learned: tokens of contexts, questions and answers."""
        digest = hashlib.sha256()
        for packed in self.contexts:
            digest.update(repr((packed.context, [(t.question, t.answer) for t in packed.pairs])).encode())
        for ids in self.sequences:
            digest.update(repr(ids).encode())
        return digest.hexdigest()[:16]


def load(recipe: Config) -> tuple[Any, Any]:
    """The model, with our attention, and lm-eval's view of it (`Encoder`)."""
    import torch
    from transformers import AutoModelForCausalLM

    from lceval.models import packaged
    from lceval.models.lcft import LCFT

    name = packaged.resolve(recipe.model.pretrained)
    model = AutoModelForCausalLM.from_pretrained(
        name, revision=recipe.model.revision, dtype=getattr(torch, recipe.model.dtype)
    )
    return model, LCFT(model, tokenizer=name, revision=recipe.model.revision)


def plan(recipe: Config, lm: Any) -> Plan:
    """The packed contexts of a recipe's data.

    Raises:
        UserError: a dataset that has no such rows.
    """
    if recipe.texts is not None:
        return Plan((), (), (), (), tuple(texts.sequences(recipe.texts, lm.tok_encode)))
    template = lm.tokenizer.chat_template is not None
    chat = template if recipe.model.chat_template is None else recipe.model.chat_template
    encoder = Encoder(lm, chat_template=chat)
    spec = recipe.data.model_copy(update={"tokenizer": recipe.model.pretrained})
    rows: Sequence[Any]
    if recipe.neighbourhoods is not None:
        rows = tabular.rows(recipe.neighbourhoods)
    else:
        rows = data.read(recipe.rows)[1] if recipe.rows else data.rows(spec)[0]
    aside: Sequence[Any] = []
    held_out: list[Packed] = []
    if recipe.eval_contexts:
        test = spec.model_copy(update={"split": "test", "seeds": (0,), "limit": None})
        aside = data.rows(test)[0]
        held_out = encoder.encode(aside)[: recipe.eval_contexts]
        kept = {name for packed in held_out for name in packed.ids}
        aside = [row for row in aside if row["id"] in kept]
    self_distillation = recipe.compression_aware is not None and recipe.compression_aware.self_distillation is not None
    return Plan(
        tuple(encoder.encode(rows, self_distillation=self_distillation)), tuple(held_out), tuple(rows), tuple(aside)
    )


def train(recipe: Config, grader: Grader | None = None) -> dict[str, Any]:
    """Train, or go on with, or find finished, what a recipe asks for; returns the record.

    Args:
        grader: gives J, for a reward that has one.

    Raises:
        UserError: the output folder holds another run, or a recipe that cannot be trained.
    """
    for package in ("trl", *recipe.report_to):
        if find_spec(package) is None:
            raise UserError(f"lceval train needs the package {package}: run `pip install 'lceval[train]'`")
    if recipe.compression_aware is not None:
        compression_aware.check(recipe.compression_aware)
    recipe = precision.resolve(recipe)
    before = _record(recipe.output)
    if before is not None and before["recipe"] != _plain(recipe):
        changed = sorted(key for key, value in _plain(recipe).items() if before["recipe"].get(key) != value)
        raise UserError(f"{recipe.output} holds a run with other {', '.join(changed)}: choose another output=FOLDER")
    if before is not None and before["status"] == "finished":
        return before
    from transformers import set_seed

    set_seed(recipe.seed)
    model, lm = load(recipe)
    planned = plan(recipe, lm)
    record: dict[str, Any] = {
        "status": "running",
        "recipe": _plain(recipe),
        "data": {
            "digest": planned.digest,
            "contexts": len(planned.contexts) or len(planned.sequences),
            "questions": planned.questions,
            "tokens_a_context": planned.tokens,
        },
    }
    if before is not None and before["data"] != record["data"]:
        raise UserError(f"{recipe.output}: its data is not what it was begun with: choose another output=FOLDER")
    lead = is_lead()
    if lead:
        recipe.output.mkdir(parents=True, exist_ok=True)
        _write(recipe.output, record)
    began = time.perf_counter()
    if recipe.grpo is not None:
        made = _reinforce(recipe, model, lm, planned, grader)
    elif recipe.texts is not None:
        made = _read(recipe, model, lm, planned)
    else:
        made = _supervise(recipe, model, lm, planned)
    record |= {"status": "finished", "wall_s": time.perf_counter() - began, **made}
    if lead:
        from lceval.training.card import write as write_card

        (recipe.output / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe stands in train.json
        write_card(recipe.output, record)
        _write(recipe.output, record)
    return record


def _supervise(recipe: Config, model: Any, lm: Any, planned: Plan) -> dict[str, Any]:
    from lceval.training.sft import trainer

    made = trainer(recipe, model, lm.tokenizer, planned.contexts, planned.held_out)
    made.train(resume_from_checkpoint=last_checkpoint(recipe.output))
    made.save_model(str(recipe.output))
    parameters = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    return {"parameters": parameters, **_curves(made.state.log_history)}


def _read(recipe: Config, model: Any, lm: Any, planned: Plan) -> dict[str, Any]:
    from lceval.training import longlora
    from lceval.training.sft import text_trainer

    model.set_attn_implementation("sdpa")
    tuned = model if recipe.longlora is None else longlora.prepare(model, recipe.longlora)
    made = text_trainer(recipe, tuned, lm.tokenizer, planned.sequences)
    made.train(resume_from_checkpoint=last_checkpoint(recipe.output))
    parameters = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    if recipe.longlora is None:
        made.save_model(str(recipe.output))
        return {"parameters": parameters, **_curves(made.state.log_history)}
    folder = recipe.output / "model"
    if is_lead():
        # What is there is whole, and this recipe's: the run was killed before it said finished.
        shutil.rmtree(folder, ignore_errors=True)
        loads = longlora.save(made.model, recipe.longlora, folder, lm.tokenizer)
    else:
        loads = "pretrained" if longlora.needs_model_folder(made.model, recipe.longlora) else "peft"
    return {"parameters": parameters, "model": "model", "loads_as": loads, **_curves(made.state.log_history)}


def _reinforce(recipe: Config, model: Any, lm: Any, planned: Plan, grader: Grader | None) -> dict[str, Any]:
    from lceval.training import grpo
    from lceval.training.sft import lora

    assert recipe.grpo is not None
    trained = grpo.train(
        model=model,
        tokenizer=lm.tokenizer,
        rows=planned.rows,
        grpo=recipe.grpo,
        output=recipe.output,
        lora=lora(recipe),
        seed=recipe.seed,
        resume=True,
        grader=grader,
        held_out=planned.held_out_rows,
        chat_template=recipe.model.chat_template,
        bf16=recipe.optim.bf16,
        report_to=recipe.report_to,
    )
    rewards = [[line["step"], line["reward"]] for line in trained.history if "reward" in line]
    return {
        "parameters": trained.parameters,
        "unjudged": trained.unjudged,
        "rewards": rewards,
        **_curves(trained.history),
    }


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "losses": [[line["step"], line["loss"]] for line in history if "loss" in line],
        "eval_losses": [[line["step"], line["eval_loss"]] for line in history if "eval_loss" in line],
    }


def _plain(recipe: Config) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(recipe.model_dump_json(exclude={"output", "report_to"}))
    return plain


def _record(output: Path) -> dict[str, Any] | None:
    file = output / RECORD
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def _write(output: Path, record: dict[str, Any]) -> None:
    partial = output / f".{RECORD}"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, output / RECORD)
