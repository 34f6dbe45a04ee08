"""Training rows: rows of tasks with a target reply each, for several seeds, in one file.

A file is jsonl: a header with the inputs and a hash of the rest, then one row per line, grouped by context. It is
written atomically.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from lceval import packaged
from lceval.core.errors import UserError
from lceval.core.io import decode, objects_of, write_text
from lceval.tasks import catalogue, contexts
from lceval.tasks.build import rows_of
from lceval.tasks.catalogue import Task
from lceval.tasks.request import Request
from lceval.tasks.rows import Row, by_context, code_digest
from lceval.tasks.tokens import TokenMeter, meter_for
from lceval.training.formats import OUTPUT_FORMATS, target
from lceval.training.promotion import THRESHOLD, Judge, Promotion, promote

FORMAT = "lceval training rows 1"


class TrainingRow(Row):
    """A task's row with a target reply in `output_format` (lceval.training.formats).

    `cluster` identifies the context within a dataset, mode and seed.
    """

    dataset: str
    output_format: str
    data_seed: int
    target: str


class Spec(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Specification of training rows. Every field changes them.

    Attributes:
        datasets: datasets of the catalogue with gold ids or labels.
        modes: modes of each dataset.
        length_k: thousands of tokens of prompt and reply (`rj`: of the prompt only). Pool datasets support any length,
            others their own lengths; ignored for datasets of fixed length.
        split: train or test of the pool, or all; `all` for datasets without splits.
        seeds: seeds of the contexts.
        questions: questions per context; None: the dataset's default.
        negatives: ranking of the hard negatives: bm25, dense, hybrid or random; None: the dataset's default.
        length_matched: match the lengths of negatives to gold documents; None: where the dataset supports it.
        promote: similarity threshold for relabelling negatives as gold; None disables it.
        limit: maximum number of rows, in whole contexts; None: all.
        tokenizer: model whose tokenizer counts tokens, as `pretrained` in model_args.
    """

    datasets: Annotated[tuple[str, ...], Field(min_length=1)]
    modes: Annotated[tuple[str, ...], Field(min_length=1)] = ("ao",)
    length_k: Annotated[float, Field(gt=0)] = 1
    split: str = "train"
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1234,)
    questions: int | None = None
    negatives: str | None = None
    length_matched: bool | None = None
    promote: Annotated[float, Field(gt=0, le=1)] | None = THRESHOLD
    limit: Annotated[int, Field(ge=1)] | None = None
    tokenizer: str = "smollm2-135m"


def spec(**fields: Any) -> Spec:
    """A validated spec.

    Raises:
        UserError: an unknown or invalid field.
    """
    try:
        return Spec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"training data: {where}={first['input']!r:.80}: {first['msg']}.") from error


def rows(spec: Spec, judge: Judge | None = None) -> tuple[list[TrainingRow], Promotion]:
    """All rows of a spec, contexts in random order, and the counts of relabelled negatives.

    Args:
        judge: confirms relabelled negatives.

    Raises:
        UserError: unknown dataset, mode, length or split, or missing data.
    """
    rows: list[TrainingRow] = []
    total = Promotion(0, 0, 0)
    meter = meter_for("training data", {"pretrained": packaged.resolve(spec.tokenizer)})
    for task in (_task(spec, name, mode) for name in spec.datasets for mode in spec.modes):
        for seed in spec.seeds:
            drawn = rows_of(task, _metadata(spec, task, seed), limit_tokens=round(spec.length_k * 1024))
            if spec.promote is not None:
                drawn, promotion = promote(drawn, spec.promote, judge)
                total += promotion
            rows += [_training_row(row, task, seed, meter) for row in drawn]
    return _whole_contexts(rows, spec), total


def _task(spec: Spec, name: str, mode: str) -> Task:
    """The task of a dataset and mode; for a pool at any of its lengths, which `rows` overrides."""
    dataset = catalogue.datasets().get(name)
    if dataset is None:
        raise UserError(f"training data: unknown dataset {name!r}; see `lceval tasks`.")
    output_format = dataset.modes.get(mode)
    trainable = {
        mode: output_format for mode, output_format in dataset.modes.items() if output_format in OUTPUT_FORMATS
    }
    if output_format not in OUTPUT_FORMATS or not ("gold" in dataset.contexts or output_format in ("label", "target")):
        raise UserError(
            f"training data: {name} has no trainable mode {mode!r}: expected one of {', '.join(trainable) or 'none'}."
        )
    length = next((k for k in dataset.lengths if k == spec.length_k), None)
    if length is None and dataset.lengths:
        if not dataset.splits:
            lengths = ", ".join(map(str, dataset.lengths))
            raise UserError(f"training data: {name} has no length_k={spec.length_k:g}: expected one of {lengths}.")
        length = dataset.lengths[0]
    return Task(dataset, mode, length)


def _metadata(spec: Spec, task: Task, seed: int) -> dict[str, Any]:
    """Metadata as for `lm_eval --metadata`."""
    options = {"questions": spec.questions, "negatives": spec.negatives, "length_matched": spec.length_matched}
    if task.dataset.splits and spec.length_matched is None:
        options["length_matched"] = True
    if task.dataset.splits or spec.split != "all":
        options["split"] = spec.split
    options = {key: value for key, value in options.items() if value is not None}
    return {"pretrained": packaged.resolve(spec.tokenizer), "data_seed": seed, **options}


def _training_row(row: Row, task: Task, seed: int, meter: TokenMeter) -> TrainingRow:
    return {
        **row,
        "cluster": f"{row['cluster']}-{task.mode}-{seed}",
        "dataset": task.dataset.dataset,
        "output_format": task.output_format,
        "data_seed": seed,
        "target": target(row, task.output_format, lambda text: meter.pieces([text])[0]),
    }


def kept_out(spec: Spec, rows: Sequence[TrainingRow]) -> float | None:
    """Mean number of pool passages excluded per context because they contain an answer; None without pools."""
    from lceval.tasks.icr import pools

    counts: list[int] = []
    for dataset in (catalogue.datasets()[name] for name in spec.datasets):
        if dataset.splits:
            task = _task(spec, dataset.dataset, spec.modes[0])
            metadata = _metadata(spec, task, spec.seeds[0])
            setting = contexts.setting(task, metadata)
            request = Request(
                "training data", dataset, task.output_format, None, None, spec.seeds[0], metadata, setting
            )
            counts += pools.kept_out(request, [row for row in rows if row["dataset"] == dataset.dataset])
    return fmean(counts) if counts else None


def _whole_contexts(rows: Sequence[TrainingRow], spec: Spec) -> list[TrainingRow]:
    """Whole contexts in random order, as many as fit the limit, at least one."""
    groups = [*by_context(rows).values()]
    chosen: list[TrainingRow] = []
    for group in random.Random(f"training {spec.seeds}").sample(groups, len(groups)):
        if spec.limit is not None and chosen and len(chosen) + len(group) > spec.limit:
            break
        chosen += group
    return chosen


def write(path: Path, spec: Spec, rows: Sequence[TrainingRow], report: Mapping[str, Any]) -> None:
    """Write a data file atomically.

    Args:
        path: the file; an existing one is replaced.
        spec: specification of the rows.
        rows: the rows.
        report: statistics on the rows, for the header.

    Raises:
        UserError: the folder does not exist or is not writable.
    """
    body = "".join(json.dumps(row) + "\n" for row in rows)
    header = {
        "format": FORMAT,
        "rows": len(rows),
        "sha256": hashlib.sha256(body.encode()).hexdigest(),
        "inputs": inputs(spec, rows),
        "report": dict(report),
    }
    try:
        write_text(path, json.dumps(header) + "\n" + body)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): expected a file in an existing folder.") from error


def inputs(spec: Spec, rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """Everything that rows depend on: spec, contents of the sources, tokenizer, code."""
    meter = meter_for("training data", {"pretrained": packaged.resolve(spec.tokenizer)})
    return {
        "spec": spec.model_dump(mode="json"),
        "sources": sorted({row["source"] for row in rows}),
        "licences": sorted({row["licence"] for row in rows}),
        "tokenizer": meter.fingerprint,
        "code": [code_digest(), code_digest(Path(__file__).parent)],
    }


def read(path: Path) -> tuple[dict[str, Any], list[TrainingRow]]:
    """The header and the rows of a data file.

    Raises:
        UserError: no such file, not a data file, or the contents do not match the hash in the header.
    """
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        header = decode(first)
        known = isinstance(header, dict) and header.get("format") == FORMAT
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): create it with `lceval train data {path}`.") from error
    except ValueError:
        known = False
    if not known:
        raise UserError(f"{path} is not a file of training rows: create one with `lceval train data`.")
    if hashlib.sha256(body.encode()).hexdigest() != header.get("sha256"):
        raise UserError(f"{path} was modified after it was written: recreate it with `lceval train data`.")
    rows: Any = [row for _, row in objects_of(body.encode().split(b"\n"), str(path))]
    return header, rows
