"""Writes docs/configuration.md from lora_cli/spec/: python docs/make_configuration.py (a test compares)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from lora_cli.help import Key, keys_of
from lora_cli.options import group_options
from lora_cli.spec import VERBS, nested_specs

TARGET = Path(__file__).with_name("configuration.md")
_INTRODUCTION = """\
# Configuration

Every key of every verb, made from `lora_cli/spec/` by `docs/make_configuration.py`. Do not edit this page.

A key is set by `key=value` on the command line.
A list is written `[a,b]`; quote the whole word if the shell would read it.
A table takes keys of your own: `lora.rank_pattern.query=4`, or whole, `"lora.rank_pattern={query: 4}"`.
A group is a file of values: `lora=dora` takes `conf/lora/dora.yaml`, and keys after it still count.
Files of the same groups under `./conf` are found by themselves.
Any other key that does not exist is an error, also with a `+` before it.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *_train(), *_others()])


def _train() -> Iterable[str]:
    schema = VERBS["train"]
    yield "## lora train\n\n| group | options |\n|---|---|"
    for group, nested in nested_specs(schema):
        if nested:
            yield f"| `{group}` | {', '.join(f'`{option}`' for option in group_options(group))} |"
    for section, keys in groupby(keys_of(schema), key=lambda key: key.section):
        yield f"\n### {section or 'The run'}\n\n{_table(keys)}"


def _others() -> Iterable[str]:
    known = {key.section for key in keys_of(VERBS["train"]) if key.section}
    as_in_train = dict(nested_specs(VERBS["train"]))
    for verb, schema in VERBS.items():
        if verb == "train":
            continue
        groups = [group for group, nested in nested_specs(schema) if nested]
        other = {group for group, nested in nested_specs(schema) if nested != as_in_train.get(group)}
        own = [key for key in keys_of(schema) if key.section not in known - other]
        shared = ", ".join(f"`{group}.*`" for group in groups if group in known - other)
        yield f"\n## lora {verb}\n"
        if own:
            yield _table(own) + "\n"
        if shared:
            yield f"Besides, {shared} as for `lora train`."
    yield ""


def _table(keys: Iterable[Key]) -> str:
    rows = [f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.help)} |" for key in keys]
    return "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
