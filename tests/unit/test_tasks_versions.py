"""A prompt that changes must raise its version: `dataset.version` for its rows, the template's for its form.

prompts.json holds, for each dataset and mode, the version with a digest of the prompt around fixed documents, and for
the first mode, where the data ship or are at hand, of the first real prompt. After raising a version:
python tests/unit/test_tasks_versions.py writes the new digests, and refuses any whose version stayed.
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


def at_hand(dataset: catalogue.Dataset) -> bool:
    folder = Path(os.environ.get("LCEVAL_DATA", "/nowhere"))
    return (not dataset.files and dataset.hub is None) or (
        bool(dataset.files) and all((folder / file).is_file() for file in dataset.files)
    )


def words(folder: Path) -> str:
    """A tokenizer with one token a word, a digit or a punctuation mark."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pinned() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PINNED.read_text())
    return found


def test_every_dataset_and_mode_is_pinned_and_nothing_else(pinned: dict[str, Any]) -> None:
    assert set(pinned) == {f"{dataset.dataset}:{mode}" for dataset, mode in EVERY}


@pytest.mark.parametrize(("dataset", "mode"), EVERY, ids=lambda part: getattr(part, "dataset", part))
def test_a_prompt_changes_only_with_its_version(dataset: catalogue.Dataset, mode: str, pinned: dict[str, Any]) -> None:
    known = pinned[f"{dataset.dataset}:{mode}"]
    found = (version(dataset, mode), digest(around_fixed_documents(dataset, mode)))
    assert found == (known["version"], known["prompt"]), "raise the version, then run this file"


@pytest.mark.parametrize("dataset", catalogue.datasets().values(), ids=lambda dataset: dataset.dataset)
def test_the_first_real_prompt_changes_only_with_its_version(
    dataset: catalogue.Dataset, pinned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = pinned[f"{dataset.dataset}:{next(iter(dataset.modes))}"]
    if "first" not in known:
        assert dataset.hub is not None
        pytest.skip(f"{dataset.dataset} comes from the hub alone")
    if not at_hand(dataset):
        pytest.skip(f"LCEVAL_DATA does not hold {dataset.files}")
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    found = digest(first_prompt(dataset, words(tmp_path / "words")))
    assert found == known["first"], "raise the version, then run this file"


def renew() -> None:
    """Write the digests of today; those of an unchanged version may not change."""
    known: dict[str, Any] = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LCEVAL_CACHE"] = folder
        tokenizer = words(Path(folder) / "words")
        for dataset, mode in EVERY:
            name = f"{dataset.dataset}:{mode}"
            made[name] = {"version": version(dataset, mode), "prompt": digest(around_fixed_documents(dataset, mode))}
            if mode == next(iter(dataset.modes)):
                if at_hand(dataset):
                    made[name]["first"] = digest(first_prompt(dataset, tokenizer))
                elif "first" in known.get(name, {}):
                    made[name]["first"] = known[name]["first"]
            before = known.get(name)
            if before and before["version"] == made[name]["version"] and not before.items() <= made[name].items():
                sys.exit(f"{name} changed under version {before['version']}: raise it first")
    PINNED.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    renew()
