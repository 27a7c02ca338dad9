"""What a hostile file may cost: under a second, and under 200 MiB more than there was."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lora_cli.errors import UserError
from lora_cli.nn.adapter import load_adapter
from lora_cli.runs.directory import read_saved_config
from nn.test_adapter import CONFIGS, FILES, Net, edit_config, save_net

MOST_S, MOST_MIB = 1.0, 200
ALIASES = "\n".join(
    ["a: &a [x,x,x,x,x,x,x,x,x]"]
    + [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
)
TEXTS = {
    "bomb": ALIASES,
    "itself": "task: &task [*task]",
    "tag": "task: !!python/object/apply:os.system ['true']",
    "target": "task: {_target_: os.system}",
    "environment": "task: {name: '${oc.env:HF_TOKEN}'}",
    "deep": "task: " + "[" * 400_000,
    "large": "a: ",
    "long": "[" + "x," * 500_000 + "x]",
    "many": "\n".join(f"k{n}: {n}" for n in range(80_000)),
    "quotes": '"' * 1_000_000,
    "anchors": "\n".join(f"k{n}: &a{n} 1" for n in range(60_000)),
}
NUM_X = {"large": 1 << 30}
"""How many x follow a text: made while its test runs, for this file is imported wherever tests are."""
ADAPTERS: dict[str, Callable[[Path], object]] = {
    **{name: partial(edit_config, **values) for name, (values, _) in CONFIGS.items()},
    "r of the table": partial(edit_config, r=20_000_000),
    **{name: damage for name, (damage, _) in FILES.items()},
}


def read_adapter(folder: Path) -> None:
    load_adapter(Net(), folder, fresh=["classifier"], fingerprint=None)


def measured(read: Callable[[Path], object], path: Path, answer: Connection) -> None:
    """Send (refusal, seconds, MiB above what the process had)."""
    Net()
    before, started, refusal = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), ""
    try:
        read(path)
    except UserError as error:
        refusal = str(error)
    wall = time.perf_counter() - started
    answer.send((refusal, wall, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def check(read: Callable[[Path], object], path: Path, record: Callable[[str, object], None]) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(read, path, theirs))
    process.start()
    theirs.close()
    refusal, wall_s, peak_mib = ours.recv()
    process.join()
    record("wall_ms", f"{1000 * wall_s:.0f}")
    record("peak_mib", f"{peak_mib:.0f}")
    assert refusal
    assert len(refusal) <= 300
    assert wall_s < MOST_S
    assert peak_mib < MOST_MIB


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_net(tmp_path_factory.mktemp("net") / "adapter")
    return tmp_path_factory.getbasetemp() / "net0" / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"config-{name}" for name in TEXTS] + [f"adapter-{name}" for name in ADAPTERS])
def test_a_hostile_file_costs_next_to_nothing(name: str, adapter: Path, tmp_path: Path, record_property) -> None:
    kind, _, what = name.partition("-")
    if kind == "config":
        (tmp_path / "config.yaml").write_text(TEXTS[what] + "x" * NUM_X.get(what, 0))
        check(read_saved_config, tmp_path, record_property)
    else:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        ADAPTERS[what](folder)
        check(read_adapter, folder, record_property)
