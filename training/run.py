"""One training run: its folder, what it may be resumed as, and what it leaves behind.

`train.json` states the recipe and the data from the start, and says `finished` only when the adapter is whole. The same
recipe goes on from the last checkpoint; another one is refused the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.training import data, robust
from lceval.training.config import Config
from lceval.training.encode import Encoder, Packed

RECORD = "train.json"


@dataclass(frozen=True)
class Plan:
    """What a recipe will train on.

    Attributes:
        contexts, held_out: packed contexts; `tokens` read in a step on average.
    """

    contexts: tuple[Packed, ...]
    held_out: tuple[Packed, ...]

    @property
    def questions(self) -> int:
        return sum(len(c.turns) for c in self.contexts)

    @property
    def tokens(self) -> float:
        return sum(c.tokens for c in self.contexts) / len(self.contexts)

    @property
    def digest(self) -> str:
        """Of everything that is learned: tokens of contexts, questions and answers."""
        digest = hashlib.sha256()
        for packed in self.contexts:
            digest.update(repr((packed.context, [(t.question, t.answer) for t in packed.turns])).encode())
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
    return model, LCFT(model, tokenizer=name)


def plan(recipe: Config, lm: Any) -> Plan:
    """The packed contexts of a recipe's data.

    Raises:
        UserError: a dataset that has no such rows.
    """
    template = lm.tokenizer.chat_template is not None
    chat = template if recipe.model.chat_template is None else recipe.model.chat_template
    encoder = Encoder(lm, chat_template=chat)
    spec = recipe.data.model_copy(update={"tokenizer": recipe.model.pretrained})
    rows = data.read(recipe.rows)[1] if recipe.rows else data.rows(spec)[0]
    held_out: list[Packed] = []
    if recipe.eval_contexts:
        test = spec.model_copy(update={"split": "test", "seeds": (0,), "limit": None})
        held_out = encoder.encode(data.rows(test)[0])[: recipe.eval_contexts]
    return Plan(tuple(encoder.encode(rows)), tuple(held_out))


def train(recipe: Config) -> dict[str, Any]:
    """Train, or go on with, or find finished, what a recipe asks for; returns the record.

    Raises:
        UserError: the output folder holds another run, or a recipe that cannot be trained.
    """
    if recipe.robust is not None:
        robust.check(recipe.robust)
    before = _record(recipe.output)
    if before is not None and before["recipe"] != _plain(recipe):
        changed = sorted(key for key, value in _plain(recipe).items() if before["recipe"].get(key) != value)
        raise UserError(f"{recipe.output} holds a run with other {', '.join(changed)}: choose another output=FOLDER")
    if before is not None and before["status"] == "finished":
        return before
    from transformers import set_seed

    model, lm = load(recipe)
    planned = plan(recipe, lm)
    record: dict[str, Any] = {
        "status": "running",
        "recipe": _plain(recipe),
        "data": {
            "digest": planned.digest,
            "contexts": len(planned.contexts),
            "questions": planned.questions,
            "tokens_a_context": planned.tokens,
        },
    }
    if before is not None and before["data"] != record["data"]:
        raise UserError(f"{recipe.output}: its data is not what it was begun with: choose another output=FOLDER")
    recipe.output.mkdir(parents=True, exist_ok=True)
    _write(recipe.output, record)
    from lceval.training.sft import last_checkpoint, trainer

    set_seed(recipe.seed)
    began = time.perf_counter()
    made = trainer(recipe, model, lm.tokenizer, planned.contexts, planned.held_out)
    made.train(resume_from_checkpoint=last_checkpoint(recipe.output))
    made.save_model(str(recipe.output))
    (recipe.output / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe stands in train.json
    history = made.state.log_history
    record |= {
        "status": "finished",
        "parameters": sum(p.numel() for p in made.model.parameters() if p.requires_grad),
        "wall_s": time.perf_counter() - began,
        "losses": [[line["step"], line["loss"]] for line in history if "loss" in line],
        "eval_losses": [[line["step"], line["eval_loss"]] for line in history if "eval_loss" in line],
    }
    from lceval.training.card import write as write_card

    write_card(recipe.output, record)
    _write(recipe.output, record)
    return record


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
