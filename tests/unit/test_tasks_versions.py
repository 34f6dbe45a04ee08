"""A changed prompt requires a new version: `dataset.version` for its rows, the template's for its output format.

prompts.json has, for each dataset and mode, the version and a digest of the prompt around fixed documents, and for the
first mode, if the data is available, a digest of the first real prompt. After increasing a version, run
python tests/unit/test_tasks_versions.py to write the new digests; it rejects changes without a new version.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.tasks import build, catalogue, prompts

PINNED = Path(__file__).parent / "prompts.json"
EVERY = [(dataset, mode) for dataset in catalogue.datasets().values() for mode in dataset.modes]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def version(dataset: catalogue.Dataset, mode: str) -> str:
    output_format = catalogue.output_format_config(dataset.modes[mode])
    return f"{dataset.version}.{output_format['metadata']['version']}"


def around_fixed_documents(dataset: catalogue.Dataset, mode: str) -> str:
    output_format, layout = dataset.modes[mode], dataset.layout
    context = prompts.block(layout, ["One.", "Two."])
    config = catalogue.output_format_config(output_format)
    parts = [prompts.render(layout, output_format, context, "Which?", list("wxyz")), config.get("gen_prefix", "")]
    return "\n".join([*parts, json.dumps(config.get("generation_kwargs"), sort_keys=True)])


def first_prompt(dataset: catalogue.Dataset, tokenizer: str) -> str:
    mode = next(iter(dataset.modes))
    task = catalogue.find(catalogue.Task(dataset, mode, min(dataset.lengths, default=None)).name)
    return prompts.prompt(build.rows_of(task, {"pretrained": tokenizer})[0])


def is_available(dataset: catalogue.Dataset) -> bool:
    folder = Path(os.environ.get("LCEVAL_DATA", "/nowhere"))
    needed = dataset.files[:1] if dataset.by_length else dataset.files  # of a file a length, that of the shortest
    return (not dataset.files and dataset.hub is None) or (
        bool(dataset.files) and all((folder / file).is_file() for file in needed)
    )


def words(folder: Path) -> str:
    """A tokenizer with one token per word, digit or punctuation mark."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pinned() -> dict[str, Any]:
    versions: dict[str, Any] = json.loads(PINNED.read_text())
    return versions


def test_every_dataset_and_mode_is_pinned_and_nothing_else(pinned: dict[str, Any]) -> None:
    assert set(pinned) == {f"{dataset.dataset}:{mode}" for dataset, mode in EVERY}


@pytest.mark.parametrize(("dataset", "mode"), EVERY, ids=lambda part: getattr(part, "dataset", part))
def test_a_prompt_changes_only_with_its_version(dataset: catalogue.Dataset, mode: str, pinned: dict[str, Any]) -> None:
    known = pinned[f"{dataset.dataset}:{mode}"]
    current = (version(dataset, mode), digest(around_fixed_documents(dataset, mode)))
    assert current == (known["version"], known["prompt"]), "increase the version, then run this file"


@pytest.mark.parametrize("dataset", catalogue.datasets().values(), ids=lambda dataset: dataset.dataset)
def test_the_first_real_prompt_changes_only_with_its_version(
    dataset: catalogue.Dataset, pinned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = pinned[f"{dataset.dataset}:{next(iter(dataset.modes))}"]
    if "first" not in known:
        assert dataset.hub is not None
        pytest.skip(f"{dataset.dataset} is only on the hub")
    if not is_available(dataset):
        pytest.skip(f"LCEVAL_DATA has no {dataset.files}")
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    current = digest(first_prompt(dataset, words(tmp_path / "words")))
    assert current == known["first"], "increase the version, then run this file"


def renew() -> None:
    """Write the current digests; those of an unchanged version must not change."""
    known: dict[str, Any] = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    digests: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LCEVAL_CACHE"] = folder
        tokenizer = words(Path(folder) / "words")
        for dataset, mode in EVERY:
            name = f"{dataset.dataset}:{mode}"
            digests[name] = {"version": version(dataset, mode), "prompt": digest(around_fixed_documents(dataset, mode))}
            if mode == next(iter(dataset.modes)):
                if is_available(dataset):
                    digests[name]["first"] = digest(first_prompt(dataset, tokenizer))
                elif "first" in known.get(name, {}):
                    digests[name]["first"] = known[name]["first"]
            before = known.get(name)
            if before and before["version"] == digests[name]["version"] and not before.items() <= digests[name].items():
                sys.exit(f"{name} changed under version {before['version']}: increase it first")
    PINNED.write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    renew()
