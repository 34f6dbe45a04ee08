"""What a user installs: the sdist, the wheel, an editable install, and lm_eval finding our model and tasks.

These tests run other processes outside the source tree, which see the installed package. The first part uses the
environment of the tests; the second builds and installs into fresh environments, without an index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

# Each test starts a Python of its own that imports lm_eval, or builds a package.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "models", "tasks", "training")


def python(code: str, cwd: Path, executable: Path = Path(sys.executable), **env: str) -> str:
    """Output of an interpreter that sees only what is installed."""
    return run([executable, "-c", code], cwd, **env)


def run(command: list[str | Path], cwd: Path, **env: str) -> str:
    """Output of a command whose environment names no source tree."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LCEVAL_AUTOLOAD")}
    child = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=inherited | env)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


PLAIN_MODEL = (
    "from lm_eval.api.registry import get_model, model_registry\n"
    "hf = get_model('hf')\n"
    "print(get_model('lcft').__name__, hf.__name__, hf.__module__, 'vllm' in model_registry)"
)


def test_a_plain_lm_eval_knows_the_model_and_keeps_its_own(tmp_path: Path) -> None:
    assert python(PLAIN_MODEL, tmp_path) == "LCFT HFLM lm_eval.models.huggingface True"


def test_a_plain_lm_eval_finds_the_tasks_and_keeps_its_own(tmp_path: Path) -> None:
    code = (
        "from lm_eval.tasks import TaskManager\n"
        "names = set(TaskManager().all_tasks)\n"
        "print({'lc_nqopen_ao_2k', 'lc_quality_mc', 'lc_filings_ao_2k', 'lc_all'} <= names, 'hellaswag' in names)\n"
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


def test_the_autoload_line_imports_nothing_else_until_lm_eval_is_imported(tmp_path: Path) -> None:
    code = "import sys; print(sorted(m for m in sys.modules if m.startswith(('lceval', 'lm_eval', 'importlib.m'))))"
    assert python(code, tmp_path) == "['lceval', 'lceval.plugin']"


def test_the_import_hook_yields_where_lm_eval_loads_entry_points_itself(tmp_path: Path) -> None:
    code = (
        "import lm_eval.api.registry as registry\n"
        "registry.load_plugins = lambda *a, **k: []\n"
        "import lm_eval.models\n"
        "print('lcft' in registry.model_registry)"
    )
    assert python(code, tmp_path) == "False"


def test_the_entry_point_that_later_releases_load_is_declared(tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "(point,) = [e for e in entry_points(group='lm_eval.models') if e.name == 'lcft']\n"
        "print(point.load().__name__)"
    )
    assert python(code, tmp_path) == "LCFT"


# --- builds and fresh environments ----------------------------------------------------------------------------------


def copy_tree(target: Path) -> Path:
    """The source tree as a checkout has it, without what earlier builds left."""
    built = shutil.ignore_patterns(".*", "build", "*.egg-info")

    def ignore(folder: str, names: list[str]) -> set[str]:
        return built(folder, names) | ({"runs"} if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    return target


def build(hook: str, source: Path, target: Path) -> Path:
    """Call a hook of the build backend without isolation; returns the file that it builds."""
    target.mkdir()
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    run([sys.executable, "-c", code, target], source)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return build("build_sdist", copy_tree(folder / "source"), folder / "dist")


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, as an installer builds it where it finds no wheel."""
    return build("build_wheel", unpacked, tmp_path_factory.mktemp("wheel") / "dist")


def fresh_environment(folder: Path) -> Path:
    """The Python of a new environment that has all that the tests' own has (by links), except lceval."""
    venv.create(folder, with_pip=False, symlinks=True)
    executable = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("lceval", "__editable__")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return executable


def install(executable: Path, *arguments: str, cwd: Path) -> None:
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    run([executable, "-m", "pip", "install", "--quiet", *offline, *arguments], cwd)


def assert_lm_eval_finds_lceval(executable: Path, cwd: Path, package: Path) -> None:
    code = (
        f"{PLAIN_MODEL}\n"
        "import lceval\n"
        "from lm_eval.tasks import TaskManager\n"
        "print(lceval.__file__)\n"
        "print('lc_filings_ao_2k' in TaskManager().all_tasks)"
    )
    expected = ["LCFT HFLM lm_eval.models.huggingface True", str(package / "__init__.py"), "True"]
    assert python(code, cwd, executable).splitlines() == expected


def test_the_sdist_contains_what_building_and_testing_require(unpacked: Path) -> None:
    names = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    assert {"Makefile", "constraints.txt", "lceval-autoload.pth", "CHANGELOG.md", "CITATION.cff", "LICENSE"} <= names
    for folder in ("tests", *FOLDERS):
        assert {str(f.relative_to(ROOT)) for f in (ROOT / folder).rglob("*.py")} <= names
    assert "lceval/packaged/scorer/model.safetensors" in names


def test_the_wheel_contains_the_package_and_nothing_under_a_generic_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"{wheel.name.split('-py3')[0]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lceval", "lceval-autoload.pth", metadata}
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".yaml")]
    expected = {f"lceval/{file.relative_to(ROOT)}" for file in files}
    # What is under the package's own name; its four links lead to the folders above.
    own = [f for f in (ROOT / "lceval").rglob("*") if f.relative_to(ROOT / "lceval").parts[0] not in FOLDERS]
    suffixes = (".py", ".yaml", ".html", ".css", ".js")
    expected |= {str(f.relative_to(ROOT)) for f in own if f.suffix in suffixes or f.name == "py.typed"}
    expected |= {f"lceval/packaged/scorer/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    assert {name for name in names if name.startswith("lceval/")} == expected
    for folder in ("judge/rubrics", "runs/sweep/presets", "tasks/modes", "training/recipes"):
        assert any(name.startswith(f"lceval/{folder}/") and name.endswith(".yaml") for name in names), folder


def test_an_installed_wheel_lets_a_plain_lm_eval_find_lceval(wheel: Path, tmp_path: Path) -> None:
    executable = fresh_environment(tmp_path / "environment")
    install(executable, str(wheel), cwd=tmp_path)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "environment")}))
    assert_lm_eval_finds_lceval(executable, tmp_path, site / "lceval")
    assert "Usage" in run([executable.with_name("lceval"), "--help"], tmp_path)


def test_an_editable_install_lets_a_plain_lm_eval_find_lceval(tmp_path: Path) -> None:
    source = copy_tree(tmp_path / "source")
    executable = fresh_environment(tmp_path / "environment")
    install(executable, "--editable", ".", cwd=source)
    assert_lm_eval_finds_lceval(executable, tmp_path, source / "lceval")
    (source / "models" / "edited.py").write_text("VALUE = 7\n")
    assert python("import lceval.models.edited as m; print(m.VALUE)", tmp_path, executable) == "7"
