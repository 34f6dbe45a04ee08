"""The promises of SECURITY.md, in its order.

Keys that a judge's server echoes are in test_judge_endpoint.py, members of archives in test_tasks_helmet.py.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from lm_eval.tasks import TaskManager, _yaml_loader
from markdown_it import MarkdownIt

import lceval
from lceval.cli import invoke
from lceval.core.credentials import refuse_secrets
from lceval.core.errors import UserError
from lceval.models.lcft import LCFT
from lceval.runs import doctor, foreign_code
from lceval.runs.configuration import configure
from lceval.runs.sweep.plan import Cell
from lceval.tasks import catalogue

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    file for folder in ("kernels", "lceval", "models", "tasks", "training") for file in (ROOT / folder).rglob("*.py")
)


def one_line(text: str) -> bool:
    return text.startswith("lceval: error: ") and text.count("\n") == 1 and is_visible(text)


def is_visible(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text)


# 1. Weights are safetensors -------------------------------------------------------------------------------------------


class Canary:
    """Unpickled, it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and its tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=3, eos_token_id=1, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def pickled(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the model's folder without its weights, with a canary in files of these names."""

    def make(*names: str) -> Path:
        folder = tmp_path / "pickled"
        folder.mkdir()
        for file in tiny.iterdir():
            if file.suffix == ".json":
                (folder / file.name).write_bytes(file.read_bytes())
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tiny), "target_modules": ["q_proj"], "r": 1}
        for name in names:
            if name == "adapter_model.bin":
                (folder / "adapter_config.json").write_text(json.dumps(adapter))
            (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        return folder

    return make


def refusal(tmp_path: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        LCFT(**{"device": "cpu", **arguments})
    assert not (tmp_path / "canary").exists()
    assert "allow_pickle=True" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_pickled_model_is_refused(pickled: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = pickled(name)
    assert refusal(tmp_path, pretrained=str(folder)).startswith(f"pretrained={folder}: {name} is a pickle")


@pytest.mark.parametrize(("argument", "name"), [("peft", "adapter_model.bin"), ("delta", "pytorch_model.bin")])
def test_a_pickled_adapter_or_delta_is_refused_before_the_model_is_loaded(
    pickled: Callable[..., Path], tmp_path: Path, argument: str, name: str
) -> None:
    folder, unusable = pickled(name), tmp_path / "unusable"
    unusable.mkdir()
    (unusable / "config.json").write_text("not read")
    arguments = {"pretrained": str(unusable), argument: str(folder)}
    assert refusal(tmp_path, **arguments).startswith(f"{argument}={folder}: {name} is a pickle")


@pytest.mark.parametrize("argument", ["pretrained", "peft"])
def test_a_pickle_beside_or_behind_safetensors_is_refused(
    pickled: Callable[..., Path], tiny: Path, tmp_path: Path, argument: str
) -> None:
    name = "adapter_model.bin" if argument == "peft" else "shard.bin"
    folder = pickled(name)
    (folder / "other.safetensors").touch()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert name in refusal(tmp_path, **{"pretrained": str(tiny), argument: str(folder)})


def test_allow_pickle_permits_it_and_is_recorded(pickled: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = pickled()
    torch.save(load_file(tiny / "model.safetensors"), folder / "pytorch_model.bin")
    assert LCFT(pretrained=str(folder), device="cpu", allow_pickle=True).model.num_parameters() > 0
    arguments = f"pretrained={folder},allow_pickle=True"
    line = ["--model=lcft", f"--model_args={arguments}", "--tasks=lc_filings_ao_1k", f"--output_path={tmp_path}"]
    assert configure(line).model_args["allow_pickle"] is True
    with pytest.raises(UserError, match="bad model argument allow_pickle='yes'"):
        LCFT(pretrained=str(folder), allow_pickle="yes")  # type: ignore[arg-type]


# 2. No pickle, eval, shell or unsafe loader in our code ---------------------------------------------------------------

PICKLING = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"}


def unsafe(source: str) -> Iterator[str]:
    """What a source file does that SECURITY.md excludes."""
    tree = ast.parse(source)
    safe_loaders = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "SafeLoader" in ast.dump(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.split(".")[0] in PICKLING)
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            function in FORBIDDEN
            or given.get("shell", "False") != "False"
            or (function.endswith("load") and given.get("allow_pickle", "False") != "False")
            or (function == "torch.load" and given.get("weights_only") != "True")
            or (function == "yaml.load" and ast.unparse(node.args[1]) not in safe_loaders)
        ):
            yield ast.unparse(node)


def test_our_code_uses_no_pickle_eval_shell_or_unsafe_loader() -> None:
    assert len(SOURCES) > 100
    uses = {str(file): [*unsafe(file.read_text(encoding="utf-8"))] for file in SOURCES}
    assert {file: lines for file, lines in uses.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "eval('1')", "subprocess.run('ls', shell=True)", "torch.load(f)",
        "np.load(f, allow_pickle=True)", "yaml.load(f, Loader)", "os.system('ls')",
    ],
)  # fmt: skip
def test_the_search_finds_each_of_them(line: str) -> None:
    assert [*unsafe(line)]


# 3. trust_remote_code is off ------------------------------------------------------------------------------------------


def test_trust_remote_code_is_never_turned_on_and_never_left_open() -> None:
    left_open = []
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"trust_remote_code\W{1,4}True", text), file
        for function in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)):
            source = ast.unparse(function)
            # Without a value transformers asks the user.
            if re.search(r"\.from_pretrained\(", source) and "trust_remote_code" not in source:
                left_open.append(f"{file.relative_to(ROOT)} {function.name}")
    # Our own folders.
    assert [*dict.fromkeys(left_open)] == ["lceval/packaged/__init__.py _convert"]


def test_a_tokenizer_with_own_code_is_refused_without_a_question(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass Own: pass\n")
    line = ["--model=lcft", f"--model_args=pretrained={tmp_path}", "--tasks=lc_filings_ao_1k", "--output_path=out"]
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        configure(line)
    assert not (tmp_path / "canary").exists()


# 4. Data of the hub is pinned -----------------------------------------------------------------------------------------

# Their commits were not known when the tasks were written, and there is no hub here.
NOT_PINNED = ("framolfese/Loong", "openai/mrcr", "simonjegou/ruler")


def test_hub_data_is_pinned_to_commits() -> None:
    hubs = {dataset.hub.repo: dataset.hub.revision for dataset in catalogue.datasets().values() if dataset.hub}
    assert {repo for repo, revision in hubs.items() if not re.fullmatch("[0-9a-f]{40}", revision)} == {*NOT_PINNED}
    assert all(repo in (ROOT / "SECURITY.md").read_text() for repo in NOT_PINNED)


# 5. Foreign task files are data ---------------------------------------------------------------------------------------

DATA = (
    'task: "mine"\ndataset_path: "owner/nowhere"\noutput_type: "generate_until"\ndoc_to_text: "a"\ndoc_to_target: "b"\n'
)
LMEVAL = Path(_yaml_loader.__file__).parent
CODE = {
    "a function": {"mine.yaml": f"{DATA}process_docs: !function own.run\n"},
    "a function of a package": {"mine.yaml": f"{DATA}process_docs: !function subprocess.run\n"},
    "a class": {"mine.yaml": 'task: "mine"\nclass: !function own.Task\n'},
    "an include": {
        "mine.yaml": 'task: "mine"\ninclude: "below/one.yaml"\n',
        "below/one.yaml": "include: [../two.yaml]\n",
        "two.yaml": f"{DATA}process_docs: !function own.run\n",
    },
    "a group": {"mine.yaml": 'group: "mine"\ntask:\n  - task: "b"\n    doc_to_text: !function own.run\n'},
    "an anchor": {"mine.yaml": f"{DATA}metadata: {{a: &own [!function own.run]}}\nprocess_docs: *own\n"},
    "a metric": {"mine.yaml": f'{DATA}metric_list:\n  - metric: "./own"\n'},
    "a hub metric": {"mine.yaml": f'{DATA}metric_list:\n  - metric: "acc"\n    hf_evaluate: true\n'},
    "remote code": {"mine.yaml": f"{DATA}metadata: {{trust_remote_code: true}}\n"},
    "a pickle": {"mine.yaml": DATA.replace("owner/nowhere", "pandas")},
}


def foreign(folder: Path, files: dict[str, str]) -> Path:
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'canary')!r}).touch()\nrun = Task = print\n"
    )
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("files", CODE.values(), ids=CODE)
def test_a_foreign_task_file_with_code_needs_the_flag(tmp_path: Path, files: dict[str, str]) -> None:
    manager = TaskManager(include_path=str(foreign(tmp_path, files)), include_defaults=False)
    culprit = tmp_path / [*files][-1]
    with foreign_code.refused(unless=False), pytest.raises(UserError, match=rf"^{re.escape(str(culprit))} line \d+: "):
        manager.load(["mine"])
    assert not (tmp_path / "canary").exists()


def test_the_flag_allows_code_and_files_of_lm_eval_need_none(tmp_path: Path) -> None:
    foreign(tmp_path, CODE["a function"] | {"theirs.yaml": f'include: "{LMEVAL}/hellaswag/hellaswag.yaml"\n'})
    with foreign_code.refused(unless=False):
        assert callable(_yaml_loader.load_yaml(tmp_path / "theirs.yaml")["process_docs"])
    with foreign_code.refused(unless=True):
        assert callable(_yaml_loader.load_yaml(tmp_path / "mine.yaml")["process_docs"])
    assert (tmp_path / "canary").exists()


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own tasks, whose index takes ten seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.mark.usefixtures("no_index")
def test_a_run_names_file_and_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = foreign(tmp_path, CODE["a function"]) / "mine.yaml"
    line = ["run", "--model=dummy", f"--tasks={file}", f"--output_path={tmp_path / 'run'}"]
    assert invoke(line) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{file} line 6: !function own.run runs Python code" in error
    assert "--allow-code" in error
    assert not (tmp_path / "canary").exists()
    assert invoke([*line, "--allow-code"]) != 0  # its dataset does not exist
    assert (tmp_path / "canary").exists()


def test_templates_run_in_a_sandbox() -> None:
    from jinja2.exceptions import SecurityError
    from lm_eval.utils import apply_template

    with foreign_code.refused(unless=False):
        pass
    assert apply_template("{{ a | regex_replace('x', 'y') }}\n", {"a": "xz"}) == "yz\n"
    with pytest.raises(SecurityError):
        apply_template("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})


# 6. Text is shown as text ---------------------------------------------------------------------------------------------

EVIL = "=1+1 <script>alert(1)</script><img src=x onerror=alert(1)><!--\x1b[2J\x1b]0;t\x07\x08\r\nPASS\u202e"
EVIL += " | **b** _i_ `c` [l](http://x.y) [r]: http://x.y &lt;p&gt; ~~s~~ \\input{x} $x$ % # ]]>"
LABEL = EVIL.replace("/", "")[:80]
TASK = "t" + LABEL


def run_folder(folder: Path, score: float, task: str = TASK) -> Path:
    folder.mkdir(parents=True)
    arguments = {"pretrained": EVIL, "peft": EVIL, "kv": EVIL}
    results = {"configs": {task: {}}, "config": {"model": EVIL, "model_args": arguments}, "versions": {task: EVIL}}
    (folder / "results_D.json").write_text(json.dumps(results))
    lines = [
        {
            "doc_id": i, "doc": {"id": f"{i}{EVIL}", "cluster": f"c{i}", "question": EVIL, "answers": [EVIL]},
            "filter": EVIL, "filtered_resps": [f"{score}{EVIL}"], "metrics": ["acc", EVIL], "acc": score, EVIL: 1.0,
            "arguments": {"gen_args_0": {"arg_0": EVIL}}, "kv": {"status": EVIL},
        }
        for i in range(40)
    ]  # fmt: skip
    (folder / f"samples_{task}_D.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def two_runs(tmp_path: Path) -> list[str]:
    return [str(run_folder(tmp_path / name / LABEL, score)) for name, score in (("=a", 1.0), ("b", 0.0))]


class Elements(HTMLParser):
    """The elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def assert_markdown_is_inert(text: str) -> None:
    assert is_visible(text)
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    assert {*Elements(rendered).tags} <= {"h3", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "p"}
    assert "&lt;script&gt;alert(1)" in rendered
    assert "&amp;lt;p&amp;gt;" in rendered


def table(two_runs: list[str], capsys: pytest.CaptureFixture[str], form: str) -> str:
    assert invoke(["table", *two_runs, "--format", form]) == 0
    text = capsys.readouterr().out
    assert is_visible(text)
    return text


def test_a_terminal_gets_no_control_characters(two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = table(two_runs, capsys, "terminal")
    assert "\\x1b" in text
    assert not any(line.startswith("PASS") for line in text.splitlines())
    assert invoke(["check", *two_runs, "--gate", "0.05"]) == 1
    text = capsys.readouterr().out
    assert is_visible(text)
    assert "\\x1b" in text
    assert not any(line.startswith("PASS") for line in text.splitlines())
    assert invoke(["table", f"nowhere{EVIL}"]) == 2
    assert one_line(capsys.readouterr().err)


def test_html_and_json_tables_are_inert(two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    page = Elements(table(two_runs, capsys, "html"))
    assert {"script", "img"}.isdisjoint(page.tags)
    assert page.attributes <= {"class", "lang", "charset"}
    text = table(two_runs, capsys, "json")
    assert json.loads(text)["rows"][0]["pretrained"] == EVIL
    assert invoke(["check", *two_runs, "--gate", "0.05", "--json"]) == 1
    text = capsys.readouterr().out
    assert is_visible(text)
    assert EVIL in json.loads(text)["tasks"][0]["flips"][0]["new_answer"]


def test_csv_has_no_formulas(two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*csv.reader(io.StringIO(table(two_runs, capsys, "csv")))]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) == 3
    cells = [cell for row in rows for cell in row]
    assert not [cell for cell in cells if re.match(r"[=+@]|-[^\d]", cell)]
    assert any(cell.startswith("'=1+1") for cell in cells)


def test_markdown_and_latex_are_escaped(two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert_markdown_is_inert(table(two_runs, capsys, "markdown"))
    text = table(two_runs, capsys, "latex")
    assert "\\textbackslash{}input" in text
    outside = re.sub(r"\\[&%$#_{}]|^% needs .*$", "", text, flags=re.MULTILINE)
    assert re.search(r"\\input|[%$#_~^]", outside) is None
    assert outside.count("{") == outside.count("}")


def test_reports_of_a_check_are_escaped(two_runs: list[str], tmp_path: Path) -> None:
    junit, markdown = tmp_path / "junit.xml", tmp_path / "check.md"
    assert invoke(["check", *two_runs, "--gate", "0.05", "--junit", str(junit), "--markdown", str(markdown)]) == 1
    assert_markdown_is_inert(markdown.read_text())
    assert is_visible(junit.read_text())
    suite = ElementTree.parse(junit).getroot()
    assert [element.tag for element in suite.iter()] == ["testsuite", "testcase", "failure", "system-out"]


def test_the_report_has_its_own_scripts_only(
    two_runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / f"{LABEL}.html"
    assert invoke(["report", *two_runs, "--output", str(html)]) == 0
    assert is_visible(capsys.readouterr().out)
    text = html.read_text()
    page = Elements(text)
    assert page.tags.count("script") == 3
    assert not {"img", "iframe", "onerror", "src"} & {*page.tags, *page.attributes}
    embedded = re.search(r'id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert embedded is not None
    assert "<" not in embedded[1]
    assert EVIL in json.loads(embedded[1])["texts"]


def test_the_output_of_a_judge_is_visible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / LABEL, 1.0, "lc_filings_rj_1k")
    file = folder / "samples_lc_filings_rj_1k_D.jsonl"
    doc = {"id": EVIL, "cluster": EVIL, "question": EVIL, "answers": [EVIL], "gold_pids": [EVIL]}
    doc |= {"docs": [{"pid": EVIL, "title": EVIL, "text": EVIL}]}
    file.write_text(json.dumps({"doc_id": 0, "doc": doc, "filtered_resps": [EVIL], "subem": 1.0}))
    assert invoke(["judge", str(folder), "--judge", "rule", "--replies", str(tmp_path / "r.sqlite")]) == 0
    text = capsys.readouterr().out
    assert is_visible(text)
    assert "\\x1b" in text
    assert not any(line.startswith("PASS") for line in text.splitlines())


def test_all_output_passes_through_echo() -> None:
    package = Path(lceval.__file__).parent
    calls = {
        f"{file.relative_to(package)} {ast.unparse(call.func)}"
        for file in package.rglob("*.py")
        # The installed package has the four top-level folders in itself; they print no text of others.
        if file.relative_to(package).parts[0] not in ("kernels", "models", "tasks", "training")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("print", "typer.echo", "click.echo")
    }
    assert calls == {"core/safe_text.py print"}


# 7. Secrets -----------------------------------------------------------------------------------------------------------

KEY = "canary-7d1e-never-to-be-seen"


@pytest.mark.parametrize(
    "option",
    [
        "--model_args=token=hf_x", "--model_args=api_key=12345", f"--model_args=base=http://me:{KEY}@host/",
        f"--gen_kwargs=note={KEY}", "--metadata=hf_token=abc", "--gen_kwargs=note=hf_" + "ABcd" * 8,
    ],
)  # fmt: skip
def test_a_secret_in_an_argument_is_refused_and_not_repeated(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder = tmp_path / "run"
    assert invoke(["run", "--model=dummy", "--tasks=lc_filings_ao_1k", option, f"--output_path={folder}"]) == 2
    captured = capsys.readouterr()
    assert one_line(captured.err)
    assert "looks like a secret" in captured.err
    assert option.rpartition("=")[2] not in captured.out + captured.err
    assert not folder.exists()


def test_arguments_about_tokens_are_no_secrets() -> None:
    arguments = {"add_bos_token": True, "prefix_token_id": 3, "think_end_token": "</think>", "tokenizer": "org/m"}
    refuse_secrets("model_args", {**arguments, "token": True, "pretrained": "/data/hf_models/sk-7b", "key_bits": 4})


def test_an_error_contains_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError(f"401: your key is {KEY}")

    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(doctor, "examine", broken)
    assert invoke(["doctor"]) == 4
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    assert "[HF_TOKEN]" in captured.err


# 8. Names from data are not paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["../out", "/etc/out", "a/../../out", "..", ""])
def test_a_task_name_in_results_is_no_path(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", 1.0, "a")
    (folder / "samples_a").mkdir()
    results = folder / "results_D.json"
    results.write_text(json.dumps({"configs": {task: {}}, "config": {"model": "hf"}}))
    for line in (["table", str(folder)], ["judge", str(folder), "--judge", "rule"]):
        assert invoke(line) == 2
        error = capsys.readouterr().err
        assert one_line(error)
        assert "without '/'" in error


@pytest.mark.usefixtures("no_index")
def test_a_task_name_in_a_task_file_is_no_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"a": "b"}\n')
    files = f'dataset_kwargs: {{data_files: {{test: "{tmp_path / "data.jsonl"}"}}}}\ntest_split: "test"\n'
    (tmp_path / "mine.yaml").write_text(DATA.replace("mine", "../../out").replace("owner/nowhere", "json") + files)
    line = ["run", "--model=dummy", f"--tasks={tmp_path / 'mine.yaml'}", f"--output_path={tmp_path / 'run'}"]
    assert invoke(line) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lceval: error: task '../../out'")


@pytest.mark.parametrize("name", ["results_D.json", "samples_a_D.jsonl", "judged_a.jsonl", "run.json"])
def test_a_link_in_a_run_folder_is_not_followed(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", 1.0, "a")
    outside = tmp_path / "outside"
    outside.write_text((folder / name).read_text() if (folder / name).exists() else '{"status": "finished"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    assert invoke(["table", str(folder)]) == 2
    error = capsys.readouterr().err
    assert one_line(error)
    assert f"{folder / name}: a symbolic link is not followed" in error


def test_names_of_sweep_folders_and_of_the_catalogue_stay_in_their_folder() -> None:
    cell = Cell("../../etc/..", "/root/..", "../..", "../s", "../x", (("context", "../y"),), None, 1, ())
    assert PurePosixPath(cell.name).name == cell.name
    for dataset in catalogue.datasets().values():
        for name in (*dataset.files, *(dataset.hub.files.values() if dataset.hub else ())):
            assert not PurePosixPath(name).is_absolute(), name
            assert ".." not in PurePosixPath(name).parts, name
