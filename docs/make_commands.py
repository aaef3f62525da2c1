"""Write docs/commands.md from the parsers of the command line interface.

    .venv/bin/python docs/make_commands.py

`make docs` runs this and make_configuration.py.
"""

import argparse
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from realm.app.cli import main

PATH = Path(__file__).with_name("commands.md")
INTRODUCTION = """\
# Commands

<!-- Written by docs/make_commands.py from the command line's parsers; do not edit. -->

    realm COMMAND --help

prints the options of a command. `python -m realm` is the same program, for launchers such as
`torchrun` and `deepspeed` ([multiple processes](guide/several-processes.md)).

- Commands that take config fields accept every field of the [configuration](configuration.md) as
  `--section.field value`, for example `--pretrain.steps 1000`.
- `--config` takes a YAML file and creates the run folder that it names. `--run` takes an existing
  run folder and reads its `config.yaml`.
- Exit status: 0 on success; 2 for an error in the arguments, the config, the data or the file
  system (such as a full disk), with a message on standard error; 130 after an interrupt (rerun a
  training stage with `--resume` to continue).
"""
EXAMPLES = {
    "run": "realm run --config configs/demo.yaml --resume",
    "plan": "realm plan --config configs/single-gpu.yaml --passages 3000000",
    "prepare": "realm prepare --config my.yaml --skip-bad",
    "ict": "realm ict --config my.yaml --ict.steps 2000",
    "reader-pretraining": "realm reader-pretraining --config my.yaml --resume",
    "pretrain": "realm pretrain --config my.yaml --with-refresher",
    "refresh": "realm refresh --run runs/my",
    "verify": "realm verify runs/my",
    "finetune-retriever": "realm finetune-retriever --run runs/my --finetune_retriever.steps 100",
    "finetune": "realm finetune --run runs/my --questions train.json",
    "evaluate": "realm evaluate --run runs/my --questions test.json --compare initial ict pretrain bm25",
    "compare": "realm compare runs/a/evaluations/test.finetune.predictions.jsonl \\\n"
    "        runs/b/evaluations/test.finetune.predictions.jsonl",
    "ask": 'realm ask --run runs/demo "Who was the discoverer of hydrogen?"',
    "index ls": "realm index ls --run runs/demo",
    "index show": "realm index show --run runs/demo a01-step-000350-e1",
    "index verify": "realm index verify --run runs/demo",
    "index gc": "realm index gc --run runs/demo --dry-run",
    "index add": "realm index add --run runs/my new.jsonl --delete gone.txt",
    "bench spans": "realm bench spans --entities entities.conll --dates dates.conll",
    "bench attention": "realm bench attention --lengths 512 2048 8192 --precision bf16",
    "bench long": "realm bench long --tasks passkey",
    "bench index": "realm bench index --run runs/my --scale 1000000",
    "bench swaps": "realm bench swaps --rows 100000 --steps 400 --every 100",
    "bench faults": "realm bench faults --kills 50 --flips 100",
}
"""An example call of each command."""


def render() -> str:
    """Render the page."""
    parts = [INTRODUCTION]
    for name, about, parser in commands():
        level = "##" if " " not in name else "###"
        fields = " Takes config fields." if parser.get_default("takes_overrides") else ""
        parts.append(f"\n{level} realm {name}\n\n{wrapped(f'{about[0].upper()}{about[1:]}.{fields}')}\n")
        if name in EXAMPLES:
            parts.append(f"    {EXAMPLES[name]}\n")
            parts += [entry(action) for action in parser._actions if action.dest != "help"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def commands(*above: str) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, help and parser of every command, groups such as `index` before their commands."""
    for action in parser_of(*above)._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                path = (*above, choice.dest)
                yield " ".join(path), str(choice.help), parser_of(*path)
                yield from commands(*path)


def parser_of(*command: str) -> argparse.ArgumentParser:
    """The parser that prints the help of a command."""
    with patch.object(argparse.ArgumentParser, "print_help", autospec=True) as print_help, suppress(SystemExit):
        main([*command, "--help"])
    parser: argparse.ArgumentParser = print_help.call_args.args[0]
    return parser


def entry(action: argparse.Action) -> str:
    """One list item: the option with its value, and its help."""
    name = action.option_strings[-1] if action.option_strings else ""
    value = action.metavar or (f"{{{','.join(action.choices)}}}" if action.choices else action.dest)
    usage = [
        name,
        *([] if action.nargs == 0 else [str(value).upper() if name and value == action.dest else str(value)]),
    ]
    usage += ["…"] if action.nargs in ("+", "*") else []
    required = " (required)" if name and action.required else ""
    about = (action.help or "default: %(default)s") % vars(action)
    return wrapped(f"- **`{' '.join(usage).strip()}`**{required}: {about}", "  ")


def wrapped(text: str, indent: str = "") -> str:
    """The text in lines of at most 100 characters, `code` unbroken."""
    glued = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.fill(glued, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
