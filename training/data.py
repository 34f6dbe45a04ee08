"""Training rows: the tasks' own rows, drawn several times, each with the reply to be learned, in one file.

A file is jsonl: a header that states the inputs and a hash of the rest, then a row a line, the rows of a context next
to each other. It appears whole or not at all.
"""

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lceval.errors import UserError
from lceval.models import packaged
from lceval.tasks import catalogue, contexts
from lceval.tasks.build import Request, rows_of
from lceval.tasks.catalogue import Task
from lceval.tasks.rows import Row, code_digest
from lceval.tasks.tokens import TokenMeter, meter_for
from lceval.training.formats import OUTPUT_FORMATS, target
from lceval.training.promotion import THRESHOLD, Judge, Promotion, promote

FORMAT = "lceval training rows 1"


class TrainingRow(Row):
    """A task's row, and what training needs besides.

    `cluster` is its context, of which there is one a dataset, mode, seed and draw; `target` is the reply to be
    learned, in the form `form` (lceval.training.formats).
    """

    dataset: str
    output_format: str
    data_seed: int
    target: str


class Spec(BaseModel):
    """What rows to make. Every field changes them.

    Attributes:
        datasets: of the catalogue, with gold ids or with labels.
        modes: of each dataset.
        length_k: thousands of tokens of prompt and room for the reply (`rj`: of the prompt alone). Datasets drawn from
            a pool take any, others one of their own; those of fixed length take no notice.
        split: train or test of the pool, or all; `all` for datasets that have no sides.
        seeds: each draws other contexts.
        questions: on a context; None: as many as the dataset usually has.
        negatives: what ranks the hard negatives: bm25, dense, hybrid or random; None: as the dataset usually does.
        alike: whether negatives are to be as long as gold documents; None: where the dataset can be asked for it.
        promote: least likeness at which a negative counts as gold; None: no negative does.
        limit: rows, in whole contexts; None: all.
        tokenizer: whose tokens are counted; as `pretrained` of model_args.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: Annotated[tuple[str, ...], Field(min_length=1)]
    modes: Annotated[tuple[str, ...], Field(min_length=1)] = ("ao",)
    length_k: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    split: str = "train"
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1234,)
    questions: int | None = None
    negatives: str | None = None
    length_matched: bool | None = None
    promote: Annotated[float, Field(gt=0, le=1)] | None = THRESHOLD
    limit: Annotated[int, Field(ge=1)] | None = None
    tokenizer: str = "smollm2-135m"


def spec(**fields: Any) -> Spec:
    """A spec.

    Raises:
        UserError: a field that is unknown or does not fit.
    """
    try:
        return Spec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"training data: {where}={first['input']!r:.80}: {first['msg']}.") from error


def rows(spec: Spec, judge: Judge | None = None) -> tuple[list[TrainingRow], Promotion]:
    """All rows of a spec, contexts in random order, and what became of their negatives.

    Args:
        spec: What to make.
        judge: Second stage of the promotion of negatives.

    Raises:
        UserError: a dataset, mode, length or split that there is not, or no data.
    """
    made: list[TrainingRow] = []
    total = Promotion(0, 0, 0)
    meter = meter_for("training data", {"pretrained": packaged.resolve(spec.tokenizer)})
    for task in (_task(spec, name, mode) for name in spec.datasets for mode in spec.modes):
        for seed in spec.seeds:
            drawn = rows_of(task, _metadata(spec, task, seed), limit_tokens=_limit(spec, task))
            if spec.promote is not None:
                drawn, found = promote(drawn, spec.promote, judge)
                total += found
            made += [_training_row(row, task, seed, meter) for row in drawn]
    return _some_contexts(made, spec), total


def _task(spec: Spec, name: str, mode: str) -> Task:
    """The task that rows are made of; of a pool one of any length, as another is put in its place."""
    dataset = catalogue.datasets().get(name)
    if dataset is None:
        raise UserError(f"training data: no dataset {name!r}; see `lceval tasks`.")
    output_format = dataset.modes.get(mode)
    fitting = {mode: output_format for mode, output_format in dataset.modes.items() if output_format in OUTPUT_FORMATS}
    if output_format not in OUTPUT_FORMATS or not ("gold" in dataset.contexts or output_format in ("label", "target")):
        raise UserError(f"training data: {name} has no mode {mode!r} to learn: it has {', '.join(fitting) or 'none'}.")
    length = next((k for k in dataset.lengths if k == spec.length_k), None)
    if length is None and dataset.lengths:
        if not dataset.splits:
            having = ", ".join(map(str, dataset.lengths))
            raise UserError(f"training data: {name} has no length_k={spec.length_k:g}: it has {having}.")
        length = dataset.lengths[0]
    return Task(dataset, mode, length)


def _limit(spec: Spec, task: Task) -> int | None:
    return round(spec.length_k * 1024) if task.length_k else None


def _metadata(spec: Spec, task: Task, seed: int) -> dict[str, Any]:
    """What `lm_eval --metadata` would be given."""
    asked = {"questions": spec.questions, "negatives": spec.negatives, "length_matched": spec.length_matched}
    if task.dataset.splits and spec.length_matched is None:
        asked["length_matched"] = True
    if task.dataset.splits or spec.split != "all":
        asked["split"] = spec.split
    given = {key: value for key, value in asked.items() if value is not None}
    return {"pretrained": packaged.resolve(spec.tokenizer), "data_seed": seed, **given}


def _training_row(row: Row, task: Task, seed: int, meter: TokenMeter) -> TrainingRow:
    return {
        **row,
        "cluster": f"{row['cluster']}-{task.mode}-{seed}",
        "dataset": task.dataset.dataset,
        "output_format": task.output_format,
        "data_seed": seed,
        "target": target(row, task.output_format, lambda text: meter.pieces([text])[0]),
    }


def kept_out(spec: Spec, made: Sequence[TrainingRow]) -> float | None:
    """Passages of the pool that a context could not have as they hold an answer: the mean over contexts."""
    from lceval.tasks.icr import pools

    found: list[int] = []
    for dataset in (catalogue.datasets()[name] for name in spec.datasets):
        if dataset.splits:
            task = _task(spec, dataset.dataset, spec.modes[0])
            metadata = _metadata(spec, task, spec.seeds[0])
            choice = contexts.setting(task, metadata)
            request = Request("training data", dataset, task.output_format, None, None, spec.seeds[0], metadata, choice)
            found += pools.kept_out(request, [row for row in made if row["dataset"] == dataset.dataset])
    return fmean(found) if found else None


def _some_contexts(made: Sequence[TrainingRow], spec: Spec) -> list[TrainingRow]:
    """Whole contexts in random order, as many as the limit has room for, at least one."""
    together: dict[str, list[TrainingRow]] = {}
    for row in made:
        together.setdefault(row["cluster"], []).append(row)
    order = random.Random(f"training {spec.seeds}").sample(list(together), len(together))
    chosen: list[TrainingRow] = []
    for context in order:
        if spec.limit is not None and chosen and len(chosen) + len(together[context]) > spec.limit:
            break
        chosen += together[context]
    return chosen


def write(path: Path, spec: Spec, made: Sequence[TrainingRow], report: Mapping[str, Any]) -> None:
    """Write a data file, whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        spec: What the rows were made from.
        made: The rows.
        report: Figures on them, for the header.

    Raises:
        UserError: the folder does not exist or cannot be written.
    """
    body = "".join(json.dumps(row) + "\n" for row in made)
    header = {
        "format": FORMAT,
        "rows": len(made),
        "sha256": hashlib.sha256(body.encode()).hexdigest(),
        "inputs": inputs(spec, made),
        "report": dict(report),
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(header) + "\n" + body, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name a file in a folder that is there.") from error
    finally:
        partial.unlink(missing_ok=True)


def inputs(spec: Spec, made: Sequence[TrainingRow]) -> dict[str, Any]:
    """Everything that rows depend on: the spec, the sources by content, the tokenizer, the code."""
    meter = meter_for("training data", {"pretrained": packaged.resolve(spec.tokenizer)})
    return {
        "spec": spec.model_dump(mode="json"),
        "sources": sorted({row["source"] for row in made}),
        "licences": sorted({row["licence"] for row in made}),
        "tokenizer": meter.fingerprint,
        "code": [code_digest(), code_digest(Path(__file__).parent)],
    }


def read(path: Path) -> tuple[dict[str, Any], list[TrainingRow]]:
    """The header and the rows of a data file.

    Raises:
        UserError: there is none, or it is not what its header says.
    """
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        header = json.loads(first)
        known = isinstance(header, dict) and header.get("format") == FORMAT
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it with `lceval train data {path}`.") from error
    except ValueError:
        known = False
    if not known:
        raise UserError(f"{path} is not a file of training rows: make one with `lceval train data`.")
    if hashlib.sha256(body.encode()).hexdigest() != header.get("sha256"):
        raise UserError(f"{path} was changed after it was written: make it again with `lceval train data`.")
    return header, [json.loads(line) for line in body.splitlines()]
