"""`lceval data fetch`: target folders, existing files, failed downloads.

The hub is replaced by a local folder: `snapshot_download` copies from it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from lceval.cli import invoke
from lceval.core.errors import InfrastructureError, UserError
from lceval.data.fetch import FetchResult, fetch
from lceval.tasks import catalogue, sources

REVISION = "1" * 40
REPO = "owner/set"


class FakeHub:
    """Repositories as folders `<owner>/<name>`; counts downloads and can interrupt one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []
        self.fails_after: tuple[int, BaseException] | None = None

    def put(self, **files: str) -> None:
        for name, text in files.items():
            file = self.root / REPO / name.replace("__", "/").replace("_jsonl", ".jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def snapshot_download(
        self, *, repo_id: str, repo_type: str, revision: str, allow_patterns: list[str], local_dir: Path
    ) -> str:
        self.calls.append({"repo": repo_id, "type": repo_type, "revision": revision})
        # offline, the real client takes any files in the folder for the data
        assert not any(Path(local_dir).iterdir())
        repo = self.root / repo_id
        names = sorted(file.relative_to(repo).as_posix() for file in repo.rglob("*") if file.is_file())
        allowed = [name for name in names if any(fnmatchcase(name, pattern) for pattern in allow_patterns)]
        for done, name in enumerate([".cache/huggingface/notes", *allowed]):
            if self.fails_after is not None and done == self.fails_after[0]:
                raise self.fails_after[1]
            target = Path(local_dir) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if done:
                shutil.copyfile(repo / name, target)
            else:
                target.write_text("the client's metadata")
        return str(local_dir)


def dataset_of(name: str, **fields: Any) -> catalogue.Dataset:
    defaults = {"suite": "icr", "about": "", "rows": "", "version": 1, "layout": "text", "modes": {"ao": "ao"}}
    return catalogue.Dataset(**defaults | {"dataset": name} | fields)


SHARDS = dataset_of("shards", hub=catalogue.Hub(REPO, REVISION, {"test": "data/test-*.jsonl"}))
SIBLING = dataset_of("sibling", hub=catalogue.Hub(REPO, REVISION, {"test": "other.jsonl"}))
LOCAL = dataset_of("local", files=("local/q.jsonl", "local/p.jsonl"))
ELSEWHERE = dataset_of("elsewhere", files=("elsewhere/q.jsonl",), fetch="a_module_of_ours.bring")
SHIPPED = dataset_of("shipped")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub with one repository, and a catalogue of datasets with several kinds of sources."""
    every = {dataset.dataset: dataset for dataset in (SHARDS, SIBLING, LOCAL, ELSEWHERE, SHIPPED)}
    tasks = {f"lc_{name}_ao": catalogue.Task(dataset, "ao", None) for name, dataset in every.items()}
    groups = {"lc_icr": ["lc_shards_ao", "lc_sibling_ao"], "lc_all": ["lc_icr"]}
    for attribute, value in (("datasets", every), ("tasks", tasks), ("groups", groups)):
        monkeypatch.setattr(catalogue, attribute, lambda value=value: value)
    fake = FakeHub(tmp_path / "the hub")
    fake.put(data__test_jsonl="", other_jsonl='{"text": "other"}\n', README="")
    fake.put(**{"data__test-0_jsonl": '{"text": "a"}\n', "data__test-1_jsonl": '{"text": "b"}\n'})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path / "data"))
    return fake


def files(root: Path) -> list[str]:
    """All files below a folder except revision markers."""
    names = (file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    return sorted(name for name in names if not name.endswith(".lceval-revision"))


def statuses(outcomes: Any) -> dict[str, str]:
    return {outcome.dataset: outcome.status for outcome in outcomes}


SHARD_FILES = [f"hub/{REPO}/data/test-{n}.jsonl" for n in (0, 1)]


def test_files_are_fetched_to_where_the_task_reads_them(hub: FakeHub, tmp_path: Path) -> None:
    (outcome,) = fetch(["shards"])
    assert outcome == FetchResult(
        "shards", "fetched", f"fetched {REPO} at {REVISION[:12]} into {tmp_path / 'data' / 'hub' / REPO}"
    )
    assert hub.calls == [{"repo": REPO, "type": "dataset", "revision": REVISION}]
    assert files(tmp_path / "data") == SHARD_FILES
    assert SHARDS.hub is not None
    read = sources.read_hub("t", SHARDS.hub, "test", {"text": str})
    assert [record["text"] for record in read.records] == ["a", "b"]


def test_existing_files_are_not_fetched_again(hub: FakeHub) -> None:
    assert statuses(fetch(["shards"])) == {"shards": "fetched"}
    assert statuses(fetch(["shards"])) == {"shards": "there"}
    assert len(hub.calls) == 1


def test_a_copy_provided_by_the_user_is_not_replaced(hub: FakeHub, tmp_path: Path) -> None:
    own = tmp_path / "data" / SHARD_FILES[0]
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert statuses(fetch(["shards"])) == {"shards": "there"}
    assert own.read_text() == "mine"
    assert hub.calls == []


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("broken")])
def test_an_interrupted_download_leaves_nothing_and_is_fetched_again(
    hub: FakeHub, tmp_path: Path, done: int, error: BaseException
) -> None:
    hub.fails_after = (done, error)
    with pytest.raises((InfrastructureError, KeyboardInterrupt)):
        list(fetch(["shards"]))
    assert list((tmp_path / "data" / "hub" / "owner").iterdir()) == []
    hub.fails_after = None
    assert statuses(fetch(["shards"])) == {"shards": "fetched"}
    assert files(tmp_path / "data") == SHARD_FILES


def test_a_killed_download_is_not_taken_as_complete(hub: FakeHub, tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys, huggingface_hub\n"
        "from lceval.data.fetch import fetch\n"
        "from lceval.tasks import catalogue\n"
        "def download(local_dir, **_):\n"
        "    (local_dir / 'data').mkdir()\n"
        "    (local_dir / 'data' / 'test-0.jsonl').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "huggingface_hub.snapshot_download = download\n"
        f"hub = catalogue.Hub({REPO!r}, {REVISION!r}, {{'test': 'data/test-*.jsonl'}})\n"
        "one = catalogue.Dataset('shards', 'icr', '', '', 1, 'text', {'ao': 'ao'}, hub=hub)\n"
        "catalogue.datasets = lambda: {'shards': one}\n"
        "list(fetch(['shards'], pathlib.Path(sys.argv[1])))\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    assert statuses(fetch(["shards"])) == {"shards": "fetched"}
    assert [(tmp_path / "data" / name).read_text() for name in SHARD_FILES] == ['{"text": "a"}\n', '{"text": "b"}\n']


def test_datasets_of_one_repository_share_its_folder(hub: FakeHub, tmp_path: Path) -> None:
    assert statuses(fetch(["lc_all"])) == {"shards": "fetched", "sibling": "fetched"}
    assert files(tmp_path / "data") == [*SHARD_FILES, f"hub/{REPO}/other.jsonl"]
    assert os.listdir(tmp_path / "data" / "hub" / "owner") == ["set"]
    assert statuses(fetch(["lc_icr", "shards"])) == {"shards": "there", "sibling": "there"}


def test_another_revision_replaces_the_fetched_copy(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(fetch(["shards", "sibling"]))
    moved = dataset_of("shards", hub=catalogue.Hub(REPO, "2" * 40, {"test": "data/test-*.jsonl"}))
    monkeypatch.setattr(catalogue, "datasets", lambda: {"shards": moved})
    (hub.root / REPO / "data" / "test-1.jsonl").unlink()
    assert statuses(fetch(["shards"])) == {"shards": "fetched"}
    assert hub.calls[-1]["revision"] == "2" * 40
    assert files(tmp_path / "data") == SHARD_FILES[:1]


def test_a_repository_without_the_files_raises(hub: FakeHub, tmp_path: Path) -> None:
    (hub.root / REPO / "other.jsonl").unlink()
    with pytest.raises(InfrastructureError, match=f"{REPO} at {REVISION} has no other.jsonl"):
        list(fetch(["sibling"]))
    assert files(tmp_path / "data") == []


def test_files_that_only_exist_locally_have_to_be_provided(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "local").mkdir(parents=True)
    (tmp_path / "data" / "local" / "q.jsonl").write_text("{}")
    assert invoke(["data", "fetch", "local", "shipped", "sibling"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"local: not on the hub in this format: copy local/p.jsonl into {tmp_path / 'data'}"
    assert lines[1] == "shipped: shipped with the package"
    assert lines[2].startswith(f"sibling: fetched {REPO}")
    (tmp_path / "data" / "local" / "p.jsonl").write_text("{}")
    assert invoke(["data", "fetch", "local", "--json"]) == 0
    assert [record["status"] for record in json.loads(capsys.readouterr().out)] == ["there"]


def test_a_dataset_may_define_its_own_fetch_function(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring(dataset: catalogue.Dataset, folder: Path) -> None:
        assert dataset is ELSEWHERE
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / "q.jsonl").write_text("{}")

    monkeypatch.setitem(sys.modules, "a_module_of_ours", SimpleNamespace(bring=bring))  # type: ignore[misc]
    assert statuses(fetch(["lc_elsewhere_ao"])) == {"elsewhere": "fetched"}
    assert statuses(fetch(["elsewhere"])) == {"elsewhere": "there"}
    monkeypatch.setitem(sys.modules, "a_module_of_ours", SimpleNamespace(bring=lambda *_: None))  # type: ignore[misc]
    with pytest.raises(InfrastructureError, match=r"elsewhere/q\.jsonl is still missing in"):
        list(fetch(["elsewhere"], tmp_path / "another"))


def test_to_overrides_the_folder_of_the_environment(hub: FakeHub, tmp_path: Path) -> None:
    assert statuses(fetch(["sibling"], tmp_path / "there")) == {"sibling": "fetched"}
    assert files(tmp_path / "there") == [f"hub/{REPO}/other.jsonl"]
    assert not (tmp_path / "data").exists()


def test_invalid_arguments_raise_before_anything_is_fetched(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown dataset 'shrads'; did you mean shards"):
        fetch(["sibling", "shrads"])
    monkeypatch.delenv("LCEVAL_DATA")
    with pytest.raises(UserError, match="set LCEVAL_DATA or pass --to FOLDER"):
        fetch(["sibling"])
    assert hub.calls == []


def test_offline_is_one_line_and_exit_4(tmp_path: Path) -> None:
    """With the real client in offline mode."""
    name, dataset = next(
        (name, dataset)
        for name, dataset in catalogue.datasets().items()
        if dataset.hub is not None and not dataset.fetch
    )
    assert dataset.hub is not None
    code = "import sys; from lceval.cli import invoke; sys.exit(invoke(sys.argv[1:]))"
    process = subprocess.run(
        [sys.executable, "-c", code, "data", "fetch", name, "--to", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (process.returncode, process.stdout) == (4, "")
    assert process.stderr.startswith(f"lceval: error: cannot fetch {name} from {dataset.hub.repo} on the hub (")
    assert process.stderr.count("\n") == 1
    assert files(tmp_path) == []
