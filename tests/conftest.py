"""Fixtures that several test files share: the packaged model, loaded once a session, and real benchmark samples."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreter
import pytest
from hypothesis import settings

import lceval.plugin
from lceval import packaged

# No test uses a model hub: where there is none, its client retries for most of a minute. Set before it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The installed package does this by its .pth line; a run from the source tree needs it too.
lceval.plugin.install()

# The same few examples in every run; `pytest tests/unit/test_fuzz.py --hypothesis-profile=many` draws thousands of new
# ones for each surface.
settings.register_profile("few", derandomize=True)
settings.register_profile("many")
settings.load_profile("few")

# A test that requests one of these loads the packaged model's weights or tokenizer.
MODEL_FIXTURES = {"smollm2", "lcft_model", "hf", "lcft", "instances"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `model` what requests the packaged model, and `slow` what waits for Triton's interpreter.

    A test whose child process loads the model needs the mark by hand.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if MODEL_FIXTURES & fixtures:
            item.add_marker(pytest.mark.model)
        if "interpreted" in fixtures:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _packaged_model_only_where_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unmarked test that loads the packaged model fails, so that `-m "not model"` leaves out all that do."""

    def refuse() -> Path:
        pytest.fail("this test loads the packaged model: request the fixture smollm2 or mark the test `model`")

    if request.node.get_closest_marker("model") is None:
        monkeypatch.setattr(packaged, "folder", refuse)


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """A function that returns the result of one of the file's cases, all run under Triton's interpreter."""
    return interpreter.run_cases(request.module.__file__)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real benchmark samples."""
    value = os.environ.get("LCEVAL_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("LCEVAL_DATA is not set to a folder with benchmark samples")
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
    """Folder of the packaged model; `make install` installs its package, so its absence is a failure."""
    return str(packaged.folder())


@pytest.fixture(scope="session")
def lcft_model(smollm2: str) -> Any:
    """The packaged model, loaded once; `lcft` wraps it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


@pytest.fixture(scope="session")
def hf(smollm2: str) -> Any:
    """lm-eval's own model on the same weights: the reference."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=smollm2, device="cpu")


@pytest.fixture
def lcft(lcft_model: Any, smollm2: str) -> Any:
    """A function that wraps the loaded model with a KV recipe."""
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
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def build(task: str, limit: int, **metadata: Any) -> list[Any]:
        folder = str(Path(lceval.plugin.__file__).parent / "tasks")
        manager = TaskManager(include_path=folder, include_defaults=False, metadata={"pretrained": smollm2, **metadata})
        loaded = manager.load([task])["tasks"][task]
        loaded.build_all_requests(limit=limit, apply_chat_template=True, chat_template=template)
        return list(loaded.instances)

    return build
