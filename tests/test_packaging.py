"""What a user gets: the wheel, the autoload line, and lm_eval finding model and tasks by it.

These tests run other processes in a folder outside the source tree, so they see the installed package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path, **env: str) -> str:
    """Output of an interpreter that sees only what is installed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LCEVAL_AUTOLOAD")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=kept | env)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_a_plain_lm_eval_knows_the_model_and_keeps_its_own(tmp_path: Path) -> None:
    code = (
        "from lm_eval.api.registry import get_model, model_registry\n"
        "hf = get_model('hf')\n"
        "print(get_model('lcft').__name__, hf.__name__, hf.__module__, 'vllm' in model_registry)"
    )
    assert python(code, tmp_path) == "LCFT HFLM lm_eval.models.huggingface True"


def test_a_plain_lm_eval_finds_the_tasks_and_keeps_its_own(tmp_path: Path) -> None:
    code = (
        "from lm_eval.tasks import TaskManager\n"
        "ours = TaskManager().all_tasks\n"
        "print({'lc_nqopen_ao_2k', 'lc_quality_mc', 'lc_filings_ao_2k', 'lc_all'} <= set(ours), 'hellaswag' in ours)\n"
        "print([n for n in TaskManager(include_defaults=False).all_tasks])"
    )
    assert python(code, tmp_path).splitlines() == ["True True", "[]"]


def test_the_metrics_of_lm_eval_are_all_still_there(tmp_path: Path) -> None:
    code = "import lm_eval.api.metrics; from lm_eval.api.registry import metric_registry as r; print(sorted(r.keys()))"
    assert python(code, tmp_path) == python(code, tmp_path, LCEVAL_AUTOLOAD="0")


def test_a_users_task_folder_may_replace_a_task_of_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('task: "lc_quality_mc"\ndataset_path: "nowhere"\n')
    code = (
        "from lm_eval.tasks import TaskManager\n"
        f"m = TaskManager(include_path={str(tmp_path)!r})\n"
        "print(m.task_index['lc_quality_mc'].yaml_path.name, m.include_path)"
    )
    assert python(code, tmp_path) == f"mine.yaml {tmp_path}"


def test_the_autoload_line_can_be_switched_off(tmp_path: Path) -> None:
    code = "import sys; print('lceval' in sys.modules, [f for f in sys.meta_path if 'lceval' in type(f).__module__])"
    assert python(code, tmp_path, LCEVAL_AUTOLOAD="0") == "False []"


def test_the_autoload_line_imports_nothing_until_lm_eval_is(tmp_path: Path) -> None:
    code = "import sys; print(sorted(m for m in sys.modules if m.startswith(('lceval', 'lm_eval', 'importlib.m'))))"
    assert python(code, tmp_path) == "['lceval', 'lceval.plugin']"


def test_it_yields_where_lm_eval_reads_entry_points_itself(tmp_path: Path) -> None:
    code = (
        "import lm_eval.api.registry as registry\n"
        "registry.load_plugins = lambda *a, **k: []\n"
        "import lm_eval.models\n"
        "print('lcft' in registry.model_registry)"
    )
    assert python(code, tmp_path) == "False"


def test_the_entry_point_that_later_releases_read_is_declared(tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "(point,) = [e for e in entry_points(group='lm_eval.models') if e.name == 'lcft']\n"
        "print(point.load().__name__)"
    )
    assert python(code, tmp_path) == "LCFT"


@pytest.mark.slow
def test_the_wheel_brings_the_package_and_nothing_under_a_generic_name(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info"))
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "lceval",
        "lceval-autoload.pth",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    ours = {str(f.relative_to(ROOT)) for f in (ROOT / "tasks").rglob("*.yaml")}
    assert {n.removeprefix("lceval/") for n in names if n.startswith("lceval/tasks") and n.endswith(".yaml")} == ours
    python_files = {
        str(f.relative_to(ROOT)) for r in ("kernels", "models", "tasks", "training") for f in (ROOT / r).rglob("*.py")
    }
    assert python_files <= {n.removeprefix("lceval/") for n in names}
