"""Fixtures that several test files share: one loaded model a session, and the shared data when it is at hand."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lceval.plugin

# No test asks a hub: without one, its client tries again for most of a minute. It reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The installed package does this by its .pth line; here it must also hold for a run from the source tree.
lceval.plugin.install()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real benchmark samples."""
    value = os.environ.get("LCEVAL_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("LCEVAL_DATA names no folder with benchmark samples")
    return Path(value)


@pytest.fixture(scope="session")
def study_of() -> Callable[[str], ModuleType]:
    """A function that loads a script of studies/ as a module."""

    def load(name: str) -> ModuleType:
        file = Path(__file__).parent.parent / "studies" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_study", file)
        assert spec is not None
        assert spec.loader is not None
        study = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(study)
        return study

    return load


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the packaged model; `make install` brings its package, so its absence is a failure."""
    from lceval.models import packaged

    return str(packaged.folder())


@pytest.fixture(scope="session")
def lcft_model(smollm2: str) -> Any:
    """The packaged model, loaded once; tests wrap it with `lcft`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


@pytest.fixture(scope="session")
def hf(smollm2: str) -> Any:
    """lm-eval's own model on the same weights: the reference."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=smollm2, device="cpu")


@pytest.fixture
def lcft(lcft_model: Any, smollm2: str) -> Any:
    """A function that wraps the loaded model under a recipe."""
    from lceval.models.lcft import LCFT

    def make(kv: str = "full", **kwargs: Any) -> LCFT:
        return LCFT(lcft_model, kv=kv, tokenizer=smollm2, **kwargs)

    return make


@pytest.fixture(scope="session")
def instances(smollm2: str) -> Any:
    """A function that builds a task's first requests as lm_eval would, chat template applied."""
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def build(task: str, limit: int, **metadata: Any) -> list[Any]:
        folder = str(Path(lceval.plugin.__file__).parent / "tasks")
        manager = TaskManager(include_path=folder, include_defaults=False, metadata={"pretrained": smollm2, **metadata})
        loaded = manager.load([task])["tasks"][task]
        loaded.build_all_requests(limit=limit, apply_chat_template=True, chat_template=template)
        return list(loaded.instances)

    return build
