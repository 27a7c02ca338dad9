"""What `lora --help` and `lora <verb> --help` print, read from the specs. Knows nothing of torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import pkgutil
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from lora_cli import __version__, spec
from lora_cli.options import PLUG_INS, group_options, own_plug_ins, plug_ins

__all__ = ["Key", "keys_of", "print_overview", "print_verb"]

_FLAGS = """\
  -m, --multirun       run every combination of comma-separated values
  --cfg job            print the composed configuration and stop
  --config-dir DIR     add groups of your own (those in ./conf are found by themselves)
  --hydra-help         Hydra's own flags
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One config key as help shows it. `section` is its first dotted part, "" for a key of the root."""

    section: str
    name: str
    type: str
    default: str
    help: str


def print_overview() -> None:
    """All verbs with one line each, and where to read on."""
    print(f"lora {__version__}: fine-tune transformers with low-rank adapters\n")
    print("usage: lora VERB [key=value ...] [flags]\n")
    for verb, schema in spec.VERBS.items():
        print(f"  {_strong(f'{verb:8}')} {_verb_line(schema)}")
    print("\nlora VERB --help shows its keys. Examples:")
    print("  lora train task=sst2 model=roberta-base lora.r=16")
    print("  lora train -m lora.r=4,8,16")
    print('  lora eval run=latest\n  lora infer run=latest text="a fine film"')
    print('\nTab completion: eval "$(lora -sc install=bash)", in zsh after bashcompinit;')
    print("                in fish: lora -sc install=fish | source")


def print_verb(verb: str, words: Sequence[str] = ()) -> None:
    """The groups, keys, types, defaults and help of one verb, section by section.

    `words` may name folders with options of the user's own (--config-dir).
    """
    schema = spec.VERBS[verb]
    print(f"lora {verb}: {_verb_line(schema)}\n\nusage: lora {verb} [key=value ...] [flags]\n\n{_FLAGS}")
    groups = [name for name, nested in spec.nested_specs(schema) if nested]
    print(_strong("groups") + "  (group=option)")
    for group in groups:
        if options := group_options(group, words):
            print(_wrapped(f"  {group:9} ", ", ".join(options)))
    section = None
    for key in keys_of(schema):
        if key.section != section:
            section = key.section
            print("\n" + _strong(section or "run"))
        left = f"  {key.name:26} {key.type:22} {key.default:>14}  "
        print(_wrapped(left, key.help))
    if verb == "train":
        _print_sweeping()


def keys_of(schema: type) -> Iterator[Key]:
    """Every key of a verb's config, root keys first, in the order they are written in spec/."""
    nested = dict(spec.nested_specs(schema))
    yield from (_key("", "", field, schema) for field in dataclasses.fields(schema) if not nested[field.name])
    for name, schemas in nested.items():
        # Kinds of task share keys: each stands where the first kind has it.
        shared: dict[str, Key] = {}
        for key in (key for inner in schemas for key in _section(name, name + ".", inner)):
            shared.setdefault(key.name, key)
        yield from shared.values()


def _print_sweeping() -> None:
    """What -m takes besides the keys: how jobs are run, and how they are chosen."""
    print(
        "\n" + _strong("hydra") + "  (how -m runs the jobs, which hydra/launcher=isolated does unless another is named)"
    )
    for kind in PLUG_INS:
        print(_wrapped(f"  {f'hydra/{kind}':26} ", ", ".join(sorted(plug_ins(kind)))))
    for kind in PLUG_INS:
        for name, (target, settings) in own_plug_ins(kind).items():
            typed = [f"hydra.{kind}.{key}={_shown(value)}" for key, value in settings.items()]
            about = (pkgutil.resolve_name(target).__doc__ or "").splitlines()[0]
            print(_wrapped(f"  {f'hydra/{kind}={name}':26} ", f"{about} {', '.join(typed)}"))


def _section(section: str, prefix: str, schema: type) -> Iterator[Key]:
    for field, (_, nested) in zip(dataclasses.fields(schema), spec.nested_specs(schema), strict=True):
        if nested:
            for inner in nested:
                yield from _section(section, f"{prefix}{field.name}.", inner)
        else:
            yield _key(section, prefix, field, schema)


def _key(section: str, prefix: str, field: dataclasses.Field[object], schema: type) -> Key:
    help_text = next(text[field.name] for base in schema.__mro__ if field.name in (text := _field_help(base)))
    # Python's None is null where a person writes it.
    return Key(section, prefix + field.name, str(field.type), _default(field), help_text.replace("None:", "null:"))


def _default(field: dataclasses.Field[object]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value == "???":
        return "(needed)"
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return "{}" if isinstance(value, dict) else _shown(value)


def _shown(value: object) -> str:
    """A value as it is typed."""
    return str(value).lower().replace("none", "null") if isinstance(value, bool) or value is None else str(value)


@functools.cache
def _field_help(schema: type) -> dict[str, str]:
    """Field → the string written beneath it in the class body."""
    if schema is object:
        return {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = (
                following.value.value
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                else None
            )
            if isinstance(text, str):
                found[node.target.id] = " ".join(text.split())
    return found


def _verb_line(schema: type) -> str:
    return (schema.__doc__ or "").splitlines()[0].partition(": ")[2]


def _wrapped(left: str, text: str) -> str:
    width = max(shutil.get_terminal_size((110, 24)).columns, 90)
    lines = textwrap.wrap(text, max(width - len(left), 30), break_on_hyphens=False) or [""]
    return left + ("\n" + " " * len(left)).join(lines)


def _strong(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text
