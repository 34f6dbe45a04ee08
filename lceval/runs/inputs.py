"""The files that a run reads, with digests: another file behind the same name makes another run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lceval import packaged
from lceval.core.digests import content_hash, hub_commit
from lceval.data.listing import hub_folder
from lceval.tasks import catalogue, sources

MODELS = ("pretrained", "peft", "tokenizer", "delta", "scorer", "heads")


def digests(config: Any) -> dict[str, str]:
    """Digests of models, adapters, tokenizers, task files and data that an EvaluatorConfig names.

    A local file or folder has a digest of its contents, a hub name the commit that the hub or its local cache gives.
    A name that cannot be resolved has none: loading it fails later, or it is no file.
    """
    arguments = {**config.model_args, **_default_scorer(config)}
    named = {name: content_hash(path) for name, path in _paths(config, arguments)}
    revision = config.model_args.get("revision", "main")
    for key in MODELS:
        name = arguments.get(key)
        if (
            isinstance(name, str)
            and name
            and key not in named
            and (commit := hub_commit(name, "main" if key == "scorer" else str(revision)))
        ):
            named[key] = commit
    return named


def _default_scorer(config: Any) -> dict[str, str]:
    """`scorer` of a recipe that requires one where none is named: what lcft will load."""
    if config.model != "lcft" or config.model_args.get("scorer"):
        return {}
    from lceval.models import recipe, scorer

    name = scorer.default(str(config.model_args.get("pretrained")))
    return {"scorer": name} if name and recipe.parse(config.model_args.get("kv", recipe.FULL)).needs_scorer else {}


def _paths(config: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    for key, value in arguments.items():
        if isinstance(value, str) and (key in MODELS or os.sep in value):
            path = Path(packaged.resolve(value))
            if value and path.exists():
                yield key, path
    if config.include_path:
        for file in sorted(Path(config.include_path).rglob("*")):
            if file.suffix in (".yaml", ".yml", ".py"):
                yield f"include_path/{file.relative_to(config.include_path)}", file
    for name in config.tasks:
        if Path(name).is_file():
            yield name, Path(name)
    root = sources.data_folder()
    for dataset in _datasets(config.tasks) if root is not None else ():
        assert root is not None
        local = [root / name for name in dataset.files]
        copies = [] if dataset.hub is None else hub_folder(dataset, root).glob("**/*")
        for file in (*local, *sorted(copies)):
            if file.is_file() and not file.name.startswith("."):
                yield f"data/{file.relative_to(root)}", file


def _datasets(names: list[str]) -> list[catalogue.Dataset]:
    """The datasets of task names, group names and patterns; names of other tasks have none."""
    tasks, groups = catalogue.tasks(), catalogue.groups()
    datasets: dict[str, catalogue.Dataset] = {}
    remaining = list(names)
    while remaining:
        name = remaining.pop()
        if name in tasks:
            datasets[tasks[name].dataset.dataset] = tasks[name].dataset
        elif name in groups:
            remaining += groups[name]
        elif set(name) & set("*?["):
            remaining += [known for known in (*tasks, *groups) if fnmatchcase(known, name)]
    return [datasets[name] for name in sorted(datasets)]
