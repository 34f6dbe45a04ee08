"""Every command of the documentation, run in a fresh folder; those that cannot run here are parsed, and named.

python tests/commands.py [PATTERN]     run those that contain PATTERN (default: all)

Needs an installed lceval. Prints a line for each command: `ran` with its seconds, with a limit where the command has
none, `dry run`, or `parsed` and why.
Exit code 1 if one failed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = "lceval|lm_eval|python3?|make|sh|accelerate|pytest|pip"
# Commands that are not run, by pattern. A sweep is run with --dry-run.
NOT_RUN = (
    (r"^make ", "builds a virtual environment"),
    (r"^pip |data fetch|paper_ao_sft", "needs a hub"),
    (r"openai:", "needs an endpoint"),
    (r"tests/gpu|^accelerate ", "needs a GPU"),
    (r"…|PEER_PYTHON", "has a placeholder"),
    (r"--plan .*runs/", "needs a run of hundreds of samples"),
    (r"predictions\.jsonl|preds\.jsonl|baseline\.json runs/new", "needs a file of yours"),
    (r"^python studies/\S+ (?!table)|^lceval bench|^pytest |tests/peers/(ruler|generate)", "takes long"),
)
DATA = r"nqopen|quality|kvlookup|squad|musique|calibrate|infinitebench|preset mini|require-kappa|runs/two|kvzip_linear"
# 1 is a gate that did not hold, which depends on the data; any other code but 0 is a failure.
GATED = r"--require-kappa|--gate"
# The run folders that the documentation's commands name, from two small evaluations.
FOLDERS = {
    "demo/full": ("full",),
    "demo/snapkv-0.25": ("snapkv",),
    "demo": ("sweep", "grid"),
    "gold": ("base", "new"),
    "rj": ("a", "b"),
}
PREPARATION = (
    "lceval demo --output_path runs/demo --limit 4",
    "lceval run --model lcft --model_args pretrained=smollm2-135m,diagnose=gold --tasks lc_filings_ao_1k --limit 4 "
    "--output_path runs/gold",
    "lceval run --model lcft --model_args pretrained=smollm2-135m --tasks lc_filings_rj_1k --limit 2 "
    "--output_path runs/rj",
)


def commands() -> list[str]:
    """Every line of the `sh` and `console` blocks, and the indented lines that begin with a program; in order."""
    lines: dict[str, None] = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", text, flags=re.DOTALL):
            lines |= dict.fromkeys(block.splitlines())
        lines |= dict.fromkeys(re.findall(rf"^    ((?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) .*)$", text, flags=re.MULTILINE))
    return [line.partition("  # ")[0].strip() for line in lines]


def parse(command: str) -> None:
    """Parse a command with the parser of its program.

    Raises:
        Exception: it is not accepted.
    """
    words = [
        word for word in shlex.split(command.partition(" > ")[0]) if not re.match(r"[A-Z_]+=", word) and word != "…"
    ]
    program, *arguments = words
    if program == "lceval":
        _parse_lceval(arguments)
    elif program == "lm_eval":
        _parse_lm_eval(arguments)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "accelerate":
        _parse_lceval(arguments[arguments.index("lceval") + 1 :])
    else:
        script = ROOT / arguments[0]
        usage = script.read_text(encoding="utf-8") if script.suffix == ".py" else "" if script.exists() else None
        if usage is None or (len(arguments) > 1 and arguments[1] not in usage and not arguments[1].isupper()):
            raise ValueError(f"no such script or argument: {command}")


def _parse_lceval(arguments: list[str]) -> None:
    import typer

    from lceval.cli import app

    def without_callbacks(command: Any) -> Any:
        for below in getattr(command, "commands", {}).values():
            without_callbacks(below)
        if not hasattr(command, "commands"):
            command.callback = lambda **_: None
        return command

    without_callbacks(typer.main.get_command(app)).main(arguments, prog_name="lceval", standalone_mode=False)
    if arguments[0] == "run":
        _parse_lm_eval(arguments)


def _parse_lm_eval(arguments: list[str]) -> None:
    from lm_eval._cli.harness import HarnessCLI

    words = arguments if arguments[0] == "run" else ["run", *arguments]
    try:
        HarnessCLI()._parser.parse_args(words)
    except SystemExit as error:
        raise ValueError(f"lm_eval does not accept {shlex.join(arguments)}") from error


def run_all(pattern: str) -> Iterator[tuple[str, str, float, str]]:
    """How each command was tried, the seconds that it took, and its error."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Studies are named relative to the repository.
        for name in ("studies", "tests", "docs", "training"):
            (folder / name).symlink_to(ROOT / name)
        sweep = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
        (folder / "grid.yaml").write_text(re.findall(r"```yaml\n(.*?)```", sweep, flags=re.DOTALL)[0], encoding="utf-8")
        for command in PREPARATION:
            if error := _run(command, folder)[1]:
                raise SystemExit(f"{command}\n{error}")
        for source, names in FOLDERS.items():
            for name in names:
                subprocess.run(["cp", "-r", f"runs/{source}", f"runs/{name}"], cwd=folder, check=True)
        for command in commands():
            if pattern not in command:
                continue
            reason = next((why for regex, why in NOT_RUN if re.search(regex, command)), "")
            if not reason and re.search(DATA, command) and not os.environ.get("LCEVAL_DATA"):
                reason = "needs LCEVAL_DATA"
            if reason:
                try:
                    parse(command)
                    yield command, f"parsed: {reason}", 0.0, ""
                except Exception as error:
                    yield command, f"parsed: {reason}", 0.0, str(error)
                continue
            how, added = "ran", ""
            if re.match(r"lceval sweep (?!.*--dry-run)", command):
                how, added = "dry run", " --dry-run"
            elif re.search(r"\b(lm_eval|lceval run) ", command) and "--limit" not in command:
                how, added = "ran with --limit 2", " --limit 2"
                # Without its chat template the model goes on until it is stopped.
                added += " --gen_kwargs max_gen_toks=64" if "lm_eval run" in command else ""
            seconds, error = _run(command.partition(" > ")[0] + added if added else command, folder)
            yield command, how, seconds, error


def _run(command: str, folder: Path) -> tuple[float, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    accepted = (0, 1) if re.search(GATED, command) else (0,)
    error = "" if done.returncode in accepted else f"exit code {done.returncode}\n{done.stderr[-2000:]}"
    return time.monotonic() - start, error


if __name__ == "__main__":
    failed = False
    for command, how, seconds, error in run_all(sys.argv[1] if sys.argv[1:] else ""):
        print(f"{'FAILED' if error else how:<28} {seconds:6.1f} s  {command}", flush=True)
        if error:
            failed = True
            print(error)
    sys.exit(failed)
