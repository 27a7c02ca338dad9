"""Imports of transformers' model code without what a model hardly ever uses of other packages.

Compilers, tensors spread over machines, accelerate and scipy are two thirds of that import's time, and what a small
training keeps of them is an eighth of its memory. While `lean` works, a finder gives a stand-in for each of these
packages. What is taken from a stand-in is a `Later`: the real thing is imported once it is called, asked for something
or derived from. A package that is there already has no stand-in, and if anything goes wrong the work is done again
without any.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

__all__ = ["Later", "complete", "from_transformers", "lean", "valueless_on_meta"]

T = TypeVar("T")
_LATER = (
    "accelerate",
    "scipy",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
)
"""Packages that have a stand-in, with all that is in them."""
_shortened: list[ModuleType] = []
"""Modules imported meanwhile: in them there may be a `Later`."""
_is_open = False
"""Whether stand-ins are given."""


class Later:
    """Something of a module that is imported when it is used. Until then nothing is an instance of it."""

    def __init__(self, module: str, make: Callable[[], Any]) -> None:
        self._module, self._make = module, make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_open:
            return self._make()(*args, **kwargs)
        if args and inspect.isfunction(args[0]):
            return self._decorated(*args, **kwargs)
        return Later(self._module, lambda: self._make()(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)

    def __instancecheck__(self, instance: object) -> bool:
        return self._is_there() and isinstance(instance, self._make())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._is_there() and issubclass(subclass, self._make())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._make(),)

    def __or__(self, other: Any) -> Later:
        return Later(self._module, lambda: self._make() | other)

    def __ror__(self, other: Any) -> Later:
        return Later(self._module, lambda: other | self._make())

    def _is_there(self) -> bool:
        return not _is_open and self._module in sys.modules

    def _decorated(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """`function`, decorated once there is the module of the decorator: a compiler's say nothing before."""
        made: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args_: Any, **kwargs_: Any) -> Any:
            if not made and self._is_there():
                made.append(self._make()(function, *args, **kwargs))
            return (made[0] if made else function)(*args_, **kwargs_)

        return call


def lean(work: Callable[[], T]) -> T:
    """What `work` gives. Of what it imports, packages that are hardly ever used come when they are.

    Where other threads may be importing too, or torch itself is still to be imported, they come at once.
    """
    if _is_open or threading.active_count() > 1 or "torch" not in sys.modules:
        return work()
    try:
        with _stand_ins():
            return work()
    except MemoryError:
        raise
    except Exception:
        # Perhaps another version asks more of a stand-in; what was half imported has gone again.
        complete()
        return work()


def from_transformers(name: str) -> Any:
    """Something that transformers exports, imported by `lean`: the first of these brings the list of its models."""
    return lean(lambda: getattr(import_module("transformers"), name))


def complete() -> None:
    """Put the real things where a `Later` stands: before compilers, which look at the code that they compile."""
    while _shortened:
        names = vars(_shortened.pop())
        names.update({name: value._make() for name, value in names.items() if type(value) is Later})


@contextmanager
def valueless_on_meta() -> Iterator[None]:
    """Within the block tensors without memory get no values, neither drawn nor counted: torch's own way of giving them
    none is written in Python, and imports sympy.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Valueless(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            first = args[0] if args else kwargs.get("tensor")
            is_empty = getattr(first, "is_meta", False)
            if is_empty and getattr(function, "__module__", None) == "torch.nn.init":
                return first
            if is_empty and function is torch.empty_like and kwargs.keys() == {"device"}:
                return torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, **kwargs)
            if function is torch.arange and str(kwargs.get("device")) == "meta":
                numbers = torch.arange(*args, **{**kwargs, "device": "cpu"})
                return torch.empty_strided(numbers.shape, numbers.stride(), dtype=numbers.dtype, device="meta")
            return function(*args, **kwargs)

    with Valueless():
        yield


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Later:
        if name.startswith("__"):
            raise AttributeError(name)
        return Later(self.__name__, lambda: getattr(import_module(self.__name__), name))


class _Finder(MetaPathFinder, Loader):
    def __init__(self) -> None:
        self.undo: Callable[[], object] = bool

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "transformers.models":
            self.undo = _listed_once()
        if not any(name == package or name.startswith(f"{package}.") for package in _LATER):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


@contextmanager
def _stand_ins() -> Iterator[None]:
    global _is_open
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    _is_open = True
    try:
        yield
    finally:
        _is_open = False
        sys.meta_path.remove(finder)
        finder.undo()
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _StandIn):
                _remove(name)
            else:
                _shortened.append(sys.modules[name])


def _listed_once() -> Callable[[], object]:
    """Let transformers not read its two thousand files again for the list of what is in transformers.models, which it
    has made when it was imported; returns what undoes that.
    """
    package = sys.modules["transformers"]
    tools: Any = import_module("transformers.utils.import_utils")
    define, folder = tools.define_import_structure, Path(str(package.__file__)).parent / "models"

    def defined(path: Any, prefix: str | None = None) -> Any:
        if Path(path) != folder / "__init__.py" or prefix is not None:
            return define(path, prefix)
        # From its own cache.
        known = define(folder, prefix="models").items()
        inside = {
            needs: {name.removeprefix("models."): what for name, what in names.items() if name.startswith("models.")}
            for needs, names in known
        }
        return {needs: names for needs, names in inside.items() if names}

    tools.define_import_structure = defined
    return lambda: setattr(tools, "define_import_structure", define)


def _remove(name: str) -> None:
    module, (parent, _, child) = sys.modules.pop(name), name.rpartition(".")
    if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
        delattr(sys.modules[parent], child)
