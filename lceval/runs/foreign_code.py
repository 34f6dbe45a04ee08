"""Task files from elsewhere are data: what would run code in them requires `--allow-code`.

A task YAML of lm-eval can name Python functions (`!function`, also as `class:`), metrics that are scripts, and models'
own code. The check is where lm-eval opens a YAML file, so that `include:`, groups and folders cannot pass it by, and
before anything in the file is imported. Files of lm-eval and lceval are exempt. Prompt templates (Jinja) run in Jinja's
sandbox: lm-eval's environment would give them all of Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import lceval
from lceval.core.errors import UserError

FLAGS = ("--allow-code", "--allow_code")
# Keys of a task that run code from elsewhere, whatever their value.
_CODE_KEYS = ("hf_evaluate", "trust_remote_code")


@contextmanager
def refused(*, unless: bool) -> Iterator[None]:
    """Within the block, lm-eval loads no foreign task file with code.

    Args:
        unless: allow it.

    Raises:
        UserError: in the block, at such a file.
    """
    import lm_eval.tasks
    from lm_eval.tasks import _yaml_loader

    _sandbox_templates()
    original = _yaml_loader._make_loader
    own = [Path(lm_eval.tasks.__file__).parent.resolve(), (Path(lceval.__file__).parent / "tasks").resolve()]

    def make_loader(folder: Path, *, resolve_funcs: bool) -> Any:
        loader: Any = original(folder, resolve_funcs=resolve_funcs)
        if unless or not resolve_funcs or any(folder.is_relative_to(root) for root in own):
            return loader

        class WithoutCode(loader):  # type: ignore[misc]
            def construct_document(self, node: yaml.Node) -> Any:
                _check(node)
                return super().construct_document(node)

        return WithoutCode

    _yaml_loader._make_loader = make_loader
    try:
        yield
    finally:
        _yaml_loader._make_loader = original


def _sandbox_templates() -> None:
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        unsafe = utils.env
        utils.env = SandboxedEnvironment(
            loader=unsafe.loader, undefined=unsafe.undefined, keep_trailing_newline=unsafe.keep_trailing_newline
        )
        utils.env.filters = unsafe.filters


def _check(document: yaml.Node) -> None:
    """Raise for the first node that runs code. An anchored node is visited once, however often it is referred to."""
    pending, visited = [document], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        code = _code(node)
        if code:
            mark = node.start_mark
            raise UserError(
                f"{mark.name} line {mark.line + 1}: {code} runs Python code: read it, then pass {FLAGS[0]} to allow it"
            )
        if isinstance(node, yaml.MappingNode):
            pending += [part for pair in reversed(node.value) for part in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            pending += reversed(node.value)


def _code(node: yaml.Node) -> str | None:
    """What in this node runs code; None if nothing does."""
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        return f"{node.tag} {node.value if isinstance(node, yaml.ScalarNode) else ''}".strip()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in _CODE_KEYS:
            return f"{key.value}"
        if key.value == "dataset_path" and value.value == "pandas":
            return "dataset_path: pandas (a pickle)"
        if key.value == "metric_list" and (script := _unknown_metric(value)):
            return f"metric: {script} (no metric of lm-eval, so a script of the hub)"
    return None


def _unknown_metric(metrics: yaml.Node) -> str | None:
    """The name of a metric that lm-eval does not have; it would load a script of that name."""
    import lm_eval.api.metrics  # noqa: F401  # fills the registry
    from lm_eval.api.registry import metric_registry

    entries = [entry for entry in metrics.value if isinstance(entry, yaml.MappingNode)]
    named = [value.value for entry in entries for key, value in entry.value if key.value == "metric"]
    return next((name for name in named if isinstance(name, str) and name not in metric_registry), None)
