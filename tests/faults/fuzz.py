"""Bytes that a fuzzer makes up, given to all that reads strangers' files: python -m faults.fuzz [seconds].

Only a UserError may come out, in one short line. Guided by coverage (atheris) where that is installed, else hypothesis
draws the bytes and damages good files with them.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["TARGETS", "main", "seeds", "try_out"]

SECONDS = 60


def _tensors(file: Path) -> None:
    from lora_cli.nn.untrusted import read_header, read_tensor

    for entry in read_header(file).values():
        read_tensor(file, entry)


def _settings(file: Path) -> None:
    from lora_cli.nn.stored import read_stored

    read_stored(file.parent)


def _rows(file: Path) -> None:
    from lora_cli.tasks.rows import read_file

    read_file(file)


def _config(file: Path) -> None:
    from lora_cli.runs.directory import read_saved_config

    read_saved_config(file.parent)


TARGETS: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("adapter_model.safetensors", _tensors),
    ("adapter_model.safetensors", _settings),
    ("adapter_config.json", _settings),
    ("rows.csv", _rows),
    ("rows.tsv", _rows),
    ("rows.jsonl", _rows),
    ("rows.txt", _rows),
    ("config.yaml", _config),
)
"""Name of the file, and what reads it."""


def seeds(folder: Path) -> dict[str, bytes]:
    """Good files to begin with, by name; those of an adapter lie in `folder` after this."""
    from nn.test_adapter import save_net

    save_net(folder)
    found = {name: (folder / name).read_bytes() for name, _ in TARGETS if (folder / name).exists()}
    found |= {"rows.csv": b'text,label\na,1\n"b\n""c""",2\n', "rows.tsv": b"text\tlabel\na\t1\n", "rows.txt": b"a\nb\n"}
    return found | {
        "rows.jsonl": b'{"text": "a", "label": [1.5, null]}\n',
        "config.yaml": b"task: {name: a, text: [b]}\n",
    }


def try_out(target: int, content: bytes, folder: Path, good: dict[str, bytes]) -> None:
    """Read `content` as the file of a target; anything but a UserError comes out."""
    from lora_cli.errors import UserError

    name, read = TARGETS[target % len(TARGETS)]
    file = folder / name
    file.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(file)
    except UserError as error:
        text = str(error).replace(str(folder), "")
        assert len(text.splitlines()) == 1, text
        assert len(text) <= 400, text
    finally:
        file.write_bytes(good[name])


def main(words: list[str]) -> int:
    """Fuzz for so many seconds."""
    seconds = int(words[0]) if words else SECONDS
    with TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        good = seeds(folder)
        (_guided if find_spec("atheris") else _drawn)(seconds, folder, good)
    return 0


def _guided(seconds: int, folder: Path, good: dict[str, bytes]) -> None:
    import atheris

    corpus = folder.parent / "corpus"
    corpus.mkdir()
    for number, (name, _) in enumerate(TARGETS):
        (corpus / str(number)).write_bytes(bytes([number]) + good[name])
    with atheris.instrument_imports(include=["lora_cli"]):
        import lora_cli.nn.stored
        import lora_cli.runs.directory
        import lora_cli.tasks.rows  # noqa: F401

    def one(data: bytes) -> None:
        if data:
            try_out(data[0], data[1:], folder, good)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-verbosity=1", str(corpus)], one)
    atheris.Fuzz()


def _drawn(seconds: int, folder: Path, good: dict[str, bytes]) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    tried, end = 0, time.monotonic() + seconds

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.integers(0, len(TARGETS) - 1), st.lists(st.tuples(st.integers(0, 900), st.binary(max_size=12)), max_size=4)
    )
    def one(target: int, changes: list[tuple[int, bytes]]) -> None:
        nonlocal tried
        tried += 1
        content = bytearray(good[TARGETS[target][0]])
        for position, piece in changes:
            at = position % (len(content) + 1)
            content[at : at + len(piece)] = piece
        try_out(target, bytes(content), folder, good)

    while time.monotonic() < end:
        one()
    print(f"{tried} inputs in {seconds} s: nothing but refusals")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
