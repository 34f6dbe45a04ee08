"""`lceval run --help`: lm_eval's options, the model arguments of `lcft` and the names that KV recipes consist of.

Importing lcft takes transformers several seconds, so its arguments are read from its source: the signature gives names
and defaults, the docstring their meaning.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WIDTH = 80
INTRODUCTION = """\
Usage: lceval run --model lcft --model_args pretrained=NAME,kv=RECIPE
                  --tasks TASK --output_path FOLDER [OPTIONS]

  Run an evaluation and print its table. Rerun the same command to resume.
  The options are those of `lm_eval run`, below, with these differences:

  --output_path FOLDER  Run folder (required).
  --apply_chat_template Applied by default if the tokenizer has a chat template;
                        `false` disables it.
  --allow-code          Allow task files outside of lm_eval and lceval to run
                        Python code (!function, class, metric scripts).
  --json                Print the table as JSON."""
_NOT_SHOWN = ("self", "kwargs")


def run_help(width: int = WIDTH) -> str:
    """The help text. Loads torch, but neither transformers nor a model."""
    from lm_eval._cli.run import Run

    parser = argparse.ArgumentParser(prog="lceval", add_help=False)
    Run(parser.add_subparsers())
    # lm_eval has no public access to the parser of a subcommand.
    (subcommands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lm_eval_help = subcommands.choices["run"].format_help()
    return "\n\n".join([INTRODUCTION, lm_eval_help.rstrip(), _arguments_text(width), _recipes_text(width)])


def model_arguments() -> list[tuple[str, Any, str]]:
    """Name, default and meaning of lcft's own model arguments; a required one has the default `inspect._empty`."""
    spec = find_spec("lceval.models.lcft")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LCFT")
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [argument.arg for argument in init.args.args]
    required = [inspect.Parameter.empty] * (len(names) - len(init.args.defaults))
    defaults = dict(zip(names, [*required, *map(_default, init.args.defaults)], strict=True))
    meanings = _meanings(ast.get_docstring(cls) or "")
    return [(name, defaults[name], meanings.get(name, "")) for name in names if name not in _NOT_SHOWN]


def _default(node: ast.expr) -> Any:
    """The value of a default: a literal, or a constant of the recipe module such as `recipe.FULL`."""
    if isinstance(node, ast.Attribute):
        from lceval.models import recipe

        return getattr(recipe, node.attr)
    return ast.literal_eval(node)


def _meanings(docstring: str) -> dict[str, str]:
    """The entries of a Google-style `Args:` section, each on one line."""
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", docstring + "\n", flags=re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _arguments_text(width: int) -> str:
    lines = ["model arguments of lcft (--model_args NAME=VALUE,...), besides those of --model hf:"]
    for name, default, meaning in model_arguments():
        note = "Required" if default is inspect.Parameter.empty else f"Default: {default}"
        text = f"{meaning.rstrip('.')}. {note}."
        lines += textwrap.wrap(text, width, initial_indent=f"  {name}".ljust(24), subsequent_indent=" " * 24)
    return "\n".join(lines)


def _recipes_text(width: int) -> str:
    from lceval.models.policies import EVICTORS, QUANTIZERS, SPARSE_ATTENTION

    axes = {"evict": [*EVICTORS], "quantize": [*QUANTIZERS], "sparse attention": [*SPARSE_ATTENTION]}
    lines = ["KV recipes (kv=RECIPE): at most one name per axis, e.g. kv=snapkv:0.25+int4:"]
    for axis, names in axes.items():
        lines += textwrap.wrap(
            ", ".join(names), width, initial_indent=f"  {axis}".ljust(24), subsequent_indent=" " * 24
        )
    return "\n".join([*lines, "  `lceval methods` lists every method with its keys, defaults and source."])
