"""Makes `lm_eval --model lcft --tasks lc_…` work wherever lceval is installed.

lm-eval 0.4.13 discovers no plugins. A `.pth` line imports this module at every Python start, so it must be
cheap: it only installs an import finder. Once lm_eval's model registry or task manager is imported, the finder lets it
load as usual and then adds lceval's model, task folder and task names. Releases of lm-eval that read entry points find
the model without it. `LCEVAL_AUTOLOAD=0` in the environment disables all of this.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

MODEL = ("lcft", "lceval.models.lcft:LCFT")
# lm-eval's name of the option, and of the key of a task's metadata.
SYSTEM = "system_instruction"


def install() -> None:
    """Install the finder; a second call does nothing."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """A meta path finder that runs an action after the import of one of a few modules."""

    def find_spec(self, name: str, path: "Sequence[str] | None", target: object = None) -> "ModuleSpec | None":
        action = _ACTIONS.get(name)
        if action is None:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_act(module: "ModuleType") -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec


def _add_model(_: "ModuleType") -> None:
    # After lm_eval.models, never before: it registers the built-in models only while the registry is empty.
    from lm_eval.api import registry

    name, target = MODEL
    reads_entry_points = hasattr(registry, "load_plugins")
    if not reads_entry_points and name not in registry.model_registry:
        registry.model_registry.register(name, target=target)


def _add_tasks(manager: "ModuleType") -> None:
    from pathlib import Path

    from lceval import packaged
    from lceval.tasks import tokens

    tokens.ALIASES[packaged.NAME] = lambda: str(packaged.folder())
    ours = Path(__file__).parent / "tasks"
    original = manager.TaskManager.__init__

    def __init__(  # noqa: N807
        self: object,
        verbosity: str | None = None,
        include_path: str | Path | list[str | Path] | None = None,
        include_defaults: bool = True,
        metadata: dict[str, object] | None = None,
    ) -> None:
        theirs = [] if not include_path else include_path if isinstance(include_path, list) else [include_path]
        # Before the user's folders: later folders win, so a user can replace our tasks.
        paths = [ours, *theirs] if include_defaults else theirs
        original(self, verbosity, paths, include_defaults, metadata)
        self.include_path = include_path  # type: ignore[attr-defined]

    manager.TaskManager.__init__ = __init__


def _add_names(index: "ModuleType") -> None:
    """Add all tasks and groups of the catalogue to the index of our folder; read lm-eval's own folder once."""
    from functools import cache
    from pathlib import Path

    ours, theirs = (Path(__file__).parent / "tasks").resolve(), Path(str(index.__file__)).parent.resolve()
    original = index.TaskIndex.build

    @cache
    def lm_evals(**options: object) -> "dict[str, Any]":
        # 15,000 entries: seconds, for each of the managers of a run. lm-eval copies what it changes.
        entries: dict[str, Any] = original([theirs], **options)
        return entries

    def build(paths: "Iterable[Path]", **options: object) -> "dict[str, Any]":
        paths = [Path(path) for path in paths]
        first = bool(paths) and paths[0].resolve() == theirs
        entries = dict(lm_evals(**options)) if first else {}
        for name, entry in original(paths[1:] if first else paths, **options).items():
            if name in entries:
                known = entries[name].yaml_path
                index.log.warning("Task '%s' from %s overrides existing task from %s", name, entry.yaml_path, known)
            entries[name] = entry
        if any(path.resolve() == ours for path in paths):
            from lceval.tasks import catalogue, lm_eval_config

            own = [
                (name, index.Kind.TASK, lm_eval_config.task_config(task)) for name, task in catalogue.tasks().items()
            ]
            own += [(name, index.Kind.GROUP, lm_eval_config.group_config(name)) for name in catalogue.groups()]
            for name, kind, config in own:
                # A task of the same name in one of the user's folders has precedence.
                entries.setdefault(name, index.Entry(name=name, kind=kind, yaml_path=None, cfg=config))
        return entries

    index.TaskIndex.build = staticmethod(build)


def _count_system_instruction(config: "ModuleType") -> None:
    """Add `--system_instruction` to the metadata of tasks: it counts towards the length of lceval's prompts."""
    original = config.EvaluatorConfig._process_arguments

    def _process_arguments(self: "Any") -> object:
        original(self)
        self.metadata = _with_system(self.metadata, self.system_instruction)
        return self

    config.EvaluatorConfig._process_arguments = _process_arguments


def _with_system(metadata: "dict[str, Any] | None", system_instruction: str | None) -> "dict[str, Any]":
    return {**(metadata or {}), **({SYSTEM: system_instruction} if system_instruction else {})}


def _wrap_evaluate(evaluator: "ModuleType") -> None:
    """Let `evaluate` log telemetry with every sample; let `simple_evaluate` count a system instruction, and add judged
    metrics if LCEVAL_JUDGE names a judge."""
    original, original_evaluate = evaluator.simple_evaluate, evaluator.evaluate

    def evaluate(*args: object, **kwargs: "Any") -> object:
        results = original_evaluate(*args, **kwargs)
        if results is not None and "samples" in results:  # without --log_samples there are none
            from lceval.tasks.scoring import add_repeats, add_telemetry, tasks_within

            tasks = tasks_within(kwargs.get("task_dict") or args[1])
            for name, samples in results["samples"].items():
                add_telemetry(samples)
                add_repeats(tasks[name], samples)
        return results

    evaluate.__wrapped__ = original_evaluate  # type: ignore[attr-defined]
    evaluate.__doc__ = original_evaluate.__doc__
    evaluator.evaluate = evaluate  # type: ignore[attr-defined]

    def simple_evaluate(*args: object, **kwargs: "Any") -> object:
        import os

        if kwargs.get("task_manager") is None:  # one that is given has its own metadata
            kwargs["metadata"] = _with_system(kwargs.get("metadata"), kwargs.get(SYSTEM))
        if not os.environ.get("LCEVAL_JUDGE"):
            return original(*args, **kwargs)
        from lceval.judge import during_run

        return during_run.evaluate(original, *args, **kwargs)

    simple_evaluate.__wrapped__ = original  # type: ignore[attr-defined]
    simple_evaluate.__doc__ = original.__doc__
    evaluator.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]


def _check_requests(task: "ModuleType") -> None:
    """Refuse requests of lceval's tasks that would be wrong, render those that are conversations, and drop lm-eval's
    warning on their metadata option.

    The key of `--cache_requests` lacks metadata, generation arguments and samples: a run would get another run's
    prompts. A system instruction that is not in the metadata is not counted in the length of the prompts.
    """
    import logging

    original = task.Task.build_all_requests

    def build_all_requests(self: "Any", *args: object, **options: object) -> None:
        from lceval.core.errors import UserError

        ours = "lc_task" in (self.config.dataset_kwargs or {})
        if ours and options.get("cache_requests"):
            raise UserError(
                f"{self.config.task}: --cache_requests is not supported: its key lacks what changes prompts, such as "
                "--metadata, --gen_kwargs and --samples; lceval caches the rows itself"
            )
        system, counted = options.get(SYSTEM) or "", (self.config.metadata or {}).get(SYSTEM) or ""
        if ours and system != counted:
            raise UserError(
                f"{self.config.task}: the length of its prompts includes the system instruction {counted!r}, not "
                f"{system!r}: pass the same text to TaskManager(metadata={{{SYSTEM!r}: TEXT}})"
            )
        original(self, *args, **options)

    task.Task.build_all_requests = build_all_requests

    original_context = task.ConfigurableTask.fewshot_context

    def fewshot_context(self: "Any", doc: "Any", *args: object, **options: "Any") -> object:
        if "lc_task" not in (self.config.dataset_kwargs or {}) or not doc.get("messages"):
            return original_context(self, doc, *args, **options)
        from lceval.tasks import prompts

        template = options.get("chat_template") if options.get("apply_chat_template") else None
        return prompts.conversation(doc, options.get(SYSTEM), template)

    task.ConfigurableTask.fewshot_context = fewshot_context
    logging.getLogger(task.__name__).addFilter(
        lambda record: not (record.msg.startswith("lc_") and "Custom kwargs can be passed" in record.msg)
    )


def _print_one_line(harness: "ModuleType") -> None:
    """Let `lm_eval` end with one line and lceval's exit code, not a traceback, where lceval raised the error."""
    original = harness.HarnessCLI.execute

    def execute(self: object, args: object) -> None:
        from lceval.core.errors import LcevalError

        try:
            original(self, args)
        except LcevalError as error:
            from lceval.core.credentials import without_secrets
            from lceval.core.safe_text import echo, printable

            echo(printable(f"lceval: error: {without_secrets(str(error))}"), err=True)
            sys.exit(error.exit_code)

    harness.HarnessCLI.execute = execute


_ACTIONS: "dict[str, Callable[[ModuleType], None]]" = {
    "lm_eval._cli.harness": _print_one_line,
    "lm_eval.api.task": _check_requests,
    "lm_eval.config.evaluate_config": _count_system_instruction,
    "lm_eval.evaluator": _wrap_evaluate,
    "lm_eval.models": _add_model,
    "lm_eval.tasks._index": _add_names,
    "lm_eval.tasks.manager": _add_tasks,
}

install()
