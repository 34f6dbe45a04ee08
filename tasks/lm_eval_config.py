"""lm-eval's configurations of the catalogue's tasks and groups."""

import pkgutil
from typing import Any

from lceval.tasks import catalogue
from lceval.tasks.build import dataset
from lceval.tasks.catalogue import FunctionName, Task

_METRIC = {"aggregation": "mean", "higher_is_better": True}  # defaults of a metric in a template


def _resolved(value: Any) -> Any:
    if isinstance(value, FunctionName):
        return pkgutil.resolve_name(value)
    if isinstance(value, dict):
        return {key: _resolved(item) for key, item in value.items()}
    return [_resolved(item) for item in value] if isinstance(value, list) else value


def task_config(task: Task) -> dict[str, Any]:
    """Return lm-eval's configuration of a task."""
    config: dict[str, Any] = _resolved(catalogue.output_format_config(task.output_format))
    metadata = config["metadata"]
    truncation = {"truncation": task.dataset.truncation} if task.dataset.truncation else {}
    metrics = [*config["metric_list"], *_resolved(catalogue.output_format_config("_telemetry"))["metric_list"]]
    return {
        **config,
        "metric_list": [{**_METRIC, **metric} for metric in metrics],
        "task": task.name,
        "custom_dataset": dataset,
        "dataset_kwargs": {"lc_task": task.name},
        "metadata": {**metadata, **truncation, "version": f"{task.dataset.version}.{metadata['version']}"},
    }


def group_config(name: str) -> dict[str, Any]:
    """Return lm-eval's configuration of a group."""
    metric = catalogue.group_metrics().get(name)
    mean = {"aggregate_metric_list": [{"metric": metric, "aggregation": "mean", "weight_by_size": False}]}
    config = {"group": name, "task": list(catalogue.groups()[name]), "metadata": {"version": "1"}}
    return config | (mean if metric else {})
