"""A grid is rejected at its first error, and planned without loading a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.core.yaml_config import parse
from lceval.runs.configuration import configure
from lceval.runs.sweep.cost import cost, render
from lceval.runs.sweep.grid import Grid, presets, read
from lceval.runs.sweep.plan import Cell, plan
from lceval.tasks import catalogue

SMALL = {"models": ["smollm2-135m"], "tasks": ["lc_filings_ao_1k"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**SMALL, "recipe": ["full"]}, "recipe: unknown key; did you mean recipes?"),
        ({"models": ["m"]}, "tasks: field required"),
        ({**SMALL, "limit": 0}, "limit: input should be greater than 0"),
        ([], "expected keys such as models, adapters, recipes, got list"),
    ],
)
def test_a_bad_grid_is_rejected_at_its_first_error(values: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Grid, values, "grid.yaml")
    assert str(error.value).startswith("grid.yaml: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": ["snpkv:0.5"]}, "did you mean 'snapkv'"),
        ({"tasks": ["lc_filing_ao_1k"]}, "did you mean lc_filings_ao_1k"),
        ({"contexts": ["rag"]}, "no cell of the grid can be run"),
    ],
)
def test_a_bad_name_is_rejected_before_a_model_is_loaded(changes: dict[str, object], message: str) -> None:
    grid = {**SMALL, "tasks": ["lc_iris_ao_2k"], **changes} if "contexts" in changes else {**SMALL, **changes}
    with pytest.raises(UserError, match=message):
        plan(parse(Grid, grid, "grid"))


def test_datasets_are_crossed_with_modes_and_lengths_and_missing_tasks_are_listed() -> None:
    grid = Grid(models=["m"], tasks=["nqopen"], modes=["ao", "mc"], lengths=[2, 3], contexts=["full", "gold"])
    sweep_plan = plan(grid)
    assert {cell.task for cell in sweep_plan.cells} == {"lc_nqopen_ao_2k"}
    assert len(sweep_plan.cells) == 2
    assert [name for name, _ in sweep_plan.na] == ["lc_nqopen_ao_3k", "lc_nqopen_mc_2k", "lc_nqopen_mc_3k"]


def test_cells_that_differ_in_any_setting_have_different_folders() -> None:
    grid = Grid(
        models=["a/m", "b/m"], adapters=[None, "x/ao", "y/ao"], recipes=["full", "kvzap:0.5"],
        scorers=[None, "x/sc", "y/sc"],
        tasks=["lc_filings_ao_1k"], contexts=["full", {"context": "rag", "retriever": "bm25"}],
        seeds=[None, 1], limit=3,
    )  # fmt: skip
    cells = plan(grid).cells
    assert len(cells) == 2 * 3 * (1 + 3) * 2 * 2  # full has no scorer
    assert len({cell.group for cell in cells}) == 2 * 3 * 2 * 2
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(
        set(cell.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+=-_") for cell in cells
    )


def test_a_cell_has_the_arguments_of_lceval_run() -> None:
    cell = Cell(
        "m", "ad", "kvzap:0.5", "runs/sc", "lc_nqopen_ao_2k", (("context", "gold"),), 8, 2, (("diagnose", "gold"),)
    )
    assert cell.argv(Path("out")) == [
        "--model=lcft",
        "--model_args=pretrained=m,peft=ad,kv=kvzap:0.5,scorer=runs/sc,diagnose=gold",
        "--tasks=lc_nqopen_ao_2k",
        "--batch_size=2",
        "--output_path=out",
        "--limit=8",
        '--metadata={"context": "gold"}',
    ]


def test_finished_cells_are_not_part_of_the_cost(tmp_path: Path) -> None:
    sweep_plan = plan(Grid(**SMALL, recipes=["full", "int4"], limit=4))  # type: ignore[arg-type]
    assert (cost(sweep_plan, tmp_path)["samples"], cost(sweep_plan, tmp_path)["finished"]) == (8, 0)
    folder = tmp_path / sweep_plan.cells[0].name
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "finished"}')
    left = cost(sweep_plan, tmp_path)
    assert (left["samples"], left["finished"], left["prefill_tokens"]) == (4, 1, 4 * 1024)


@pytest.mark.model  # its chat template is looked up
def test_generation_arguments_are_part_of_a_cell() -> None:
    (plain,) = plan(Grid(**SMALL)).cells  # type: ignore[arg-type]
    (short,) = plan(Grid(**SMALL, gen_kwargs={"until": ["\n"], "max_gen_toks": 16})).cells  # type: ignore[arg-type]
    assert short.argv(Path("out")) == [*plain.argv(Path("out")), '--gen_kwargs={"max_gen_toks": 16, "until": ["\\n"]}']
    assert plain.group != short.group
    assert plain.name != short.name
    config = configure(short.argv(Path("out")))
    assert config.gen_kwargs == {"max_gen_toks": 16, "until": ["\n"]}


def finish(root: Path, cell: Cell, **kv: float) -> None:
    """A finished run folder with one sample that has this telemetry."""
    folder = root / cell.name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"status": "finished"}')
    sample = {"kv": {"compress_s": 0.0, "question_s": 0.0, **kv}}
    (folder / "samples_task_2026.jsonl").write_text(json.dumps(sample) + "\n")


def test_the_cost_is_measured_on_finished_cells_of_the_model(tmp_path: Path) -> None:
    sweep_plan = plan(Grid(models=["a/m", "b/m"], tasks=SMALL["tasks"], recipes=["full", "int4"], limit=1))
    costs = {"prefill_s": 2.0, "prefill_tokens": 500, "question_s": 1.0, "decode_s": 3.0, "new_tokens": 8}
    finish(tmp_path, sweep_plan.cells[0], **costs)
    left = cost(sweep_plan, tmp_path)
    # Of a, a prefill and an answer of the measured length are left; b's tokens follow from a's cell, b's time does not.
    assert left["seconds"] == pytest.approx(2.0 + 8 * (4.0 / 8))
    assert left["prefill_tokens"] == 2 * 500
    assert left["basis"]["a/m"] == "measured on 1 finished cell, 1 samples"
    assert left["basis"]["b/m"].startswith("time unknown and not counted")


def test_without_finished_cells_the_time_of_other_models_is_unknown(tmp_path: Path) -> None:
    other = cost(plan(Grid(models=["other"], tasks=SMALL["tasks"], limit=4)), tmp_path)
    packaged = cost(plan(Grid(models=["smollm2-135m"], tasks=SMALL["tasks"], limit=4)), tmp_path)
    assert packaged["seconds"] == pytest.approx(4 * 1024 * 0.0015 + 4 * 32 * 0.035)
    assert packaged["basis"] == {"smollm2-135m": "constants of the packaged model on two cores"}
    assert other["seconds"] == 0
    assert "unknown and not counted" in other["basis"]["other"]


def test_a_task_of_unknown_length_is_reported_as_not_counted(tmp_path: Path) -> None:
    sweep_plan = plan(Grid(models=["smollm2-135m"], tasks=["lc_quality_mc", "lc_filings_ao_1k"], limit=2))
    left = cost(sweep_plan, tmp_path)
    assert left["unknown_tokens"] == ["lc_quality_mc"]
    assert left["prefill_tokens"] == 2 * 1024
    assert "  not counted, because the context length is unknown: lc_quality_mc" in render(left)


@pytest.mark.parametrize("preset", presets())
def test_presets_are_planned_without_data_or_hub(preset: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("LCEVAL_DATA", raising=False)
    assert invoke(["sweep", "--preset", preset, "--dry-run", "--set", "adapters=[null, runs/ao]", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    _, grid = read(None, preset)
    truncations = {catalogue.find(cell.task).dataset.truncation for cell in plan(grid).cells} - {""}
    if truncations:  # the paper truncates at the end, whatever the benchmark
        assert {grid.model_args["overlong"]} == ({"end"} if preset.startswith("paper-") else truncations)
    adapted = sum("peft=runs/ao" in argument for cell in report["cells"] for argument in cell["run"])
    assert len(report["cells"]) == 2 * adapted > 0
    assert len(report["cells"]) % (2 * len(grid.recipes)) == 0
    assert report["cost"]["finished"] == 0


def test_the_grid_in_the_documentation_is_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text()
    values = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    assert set(values) == set(Grid.model_fields)
    sweep_plan = plan(parse(Grid, values, "docs/sweep.md"))
    assert {cell.task for cell in sweep_plan.cells} == {"lc_filings_ao_1k", "lc_nqopen_ao_2k", "lc_nqopen_ao_4k"}
    assert sweep_plan.na == ()
