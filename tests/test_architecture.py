"""The house rules, held by walking the syntax trees: imports point down, names stay where they belong."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli import spec

PACKAGE = Path(__file__).parent.parent / "lora_cli"
CONF = PACKAGE.parent / "conf"
LAYERS = (
    ("errors", "__init__"),
    ("axis", "spec"),
    (
        *("activations", "chart", "disk", "dot_plot", "dropout", "families", "gpus", "growing_cache"),
        *("hub", "lean_imports", "machine", "page", "parallel_plot", "process", "products"),
        *("traced", "xy_plot"),
    ),
    ("plain_attention",),
    (
        *("checkpointing", "compiled", "fitted_table", "isolation", "late_logits", "row_attention", "screen"),
        *("terminal", "terminal_plot", "tokenizer", "trackers", "words"),
    ),
    ("options",),
    ("misconfigured",),
    ("config", "frozen_cache", "nn", "runs", "sources", "tasks", "unpadded"),
    ("prepacked", "reader"),
    ("engine", "help", "merged", "models", "onnx_file", "preview"),
    ("certificate", "comparison_view", "ground", "health", "reuse", "saved"),
    ("experiment",),
    ("bench_view",),
    ("forecast", "ranks", "report_page", "serving", "sweep_page", "trials"),
    ("batch_size", "foresight", "sampled_steps", "train_view"),
    ("measured",),
    ("recording",),
    ("commands", "sweep_view"),
    ("together",),
    ("launchers",),
    ("sweepers",),
    ("cli",),
    ("__main__", "preload"),
)
"""From the bottom up. A unit (a folder is one) imports itself and lower layers; units of a layer do not meet."""
RANKS = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))
STDLIB_ONLY = ("errors", "spec")
TORCH_AT_IMPORT = (
    *(
        "batch_size",
        "nn",
        "engine",
        "experiment",
        "forecast",
        "foresight",
        "frozen_cache",
        "ground",
        "merged",
        "onnx_file",
        "plain_attention",
        "prepacked",
        "products",
        "recording",
        "sampled_steps",
        "saved",
        "serving",
        "traced",
    ),
)
HEAVY = ("torch", "transformers", "datasets", "evaluate", "sklearn", "scipy", "pyarrow", "huggingface_hub")
POINTS = {
    "base": {"${now:%Y-%m-%d_%H-%M-%S-%f}", "${hydra.job.num}"},
    **{verb: {"${recipe}", "${task}"} for verb in ("train.yaml", "plan.yaml")},
    "recipe": {"${recipe.epochs}", "${recipe.batch_per_device}", "${recipe.devices}"},
}
"""First part of a YAML file's path → what may stand there in place of values."""
COMPUTED = {f"{name}_seed" for name in ("init", "data", "dropout")}
COMPUTED |= {f"{split}{limit}" for split in ("train", "validation", "test") for limit in ("", "_limit")}
"""Keys read by getattr with a name that is put together."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names of all modules that import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module == "lora_cli":
                yield from (f"lora_cli.{alias.name}" for alias in node.names)


def when_imported(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not those in functions, nor under TYPE_CHECKING."""
    for node in tree.body:
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield node


def strings(tree: ast.Module) -> Iterator[str]:
    """String constants that are no docstrings."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def test_every_unit_has_its_place() -> None:
    assert {unit_of(path) for path in MODULES} == set(RANKS)


@each_module
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    for name in imported(ast.walk(tree_of(path))):
        parts = name.split(".")
        if parts[0] != "lora_cli" or len(parts) == 1:
            continue
        target = parts[1] if parts[1] in RANKS else "__init__"
        assert target == unit or RANKS[target] < RANKS[unit], f"{name_of(path)} imports {name}"


@each_module
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(when_imported(tree_of(path)))}
    allowed = {"torch", "safetensors"} if unit_of(path) in TORCH_AT_IMPORT else set()
    assert not roots & set(HEAVY) - allowed
    if unit_of(path) in STDLIB_ONLY:
        assert not roots & {"hydra", "omegaconf", "yaml", "rich", "numpy"}


@each_module
def test_each_thing_is_said_in_one_place(path: Path) -> None:
    tree, name = tree_of(path), name_of(path)
    roots = {module.split(".")[0] for module in imported(ast.walk(tree))}
    assert "peft" not in roots
    assert not roots & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    if name not in ("config", "misconfigured", "options", "launchers", "sweepers"):
        assert not roots & {"hydra", "omegaconf"}, "only config.py and Hydra's own plugins see a DictConfig"
    words = list(strings(tree))
    if name not in ("engine/device", "spec/names"):
        assert not [word for word in words if "cuda" in word.lower()], "only device.py says cuda"
    for attribute in (node for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
        assert attribute.attr != "cuda" or name == "engine/device"
    if unit_of(path) != "runs":
        assert not {"run.json", "metrics.jsonl", "config.yaml"} & set(words) - names_read_for_completion(name)


def names_read_for_completion(name: str) -> set[str]:
    return {"run.json"} if name == "cli" else set()


@each_module
def test_nothing_is_executed_unpickled_or_trusted_by_default(path: Path) -> None:
    for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec", "compile", "os.system", "instantiate")
        assert called != "yaml.load" or ast.unparse(call.keywords[0].value) == "_LOADER", "one that makes plain values"
        if called == "torch.load":
            assert name_of(path) == "nn/pickles", "the one place for tensors from other libraries' files"
            assert [ast.unparse(k.value) for k in call.keywords if k.arg == "weights_only"] == ["True"]
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert ast.unparse(keyword.value) != "True"
        if called.endswith(("from_pretrained", "AutoConfig.from_pretrained")) and "save" not in called:
            assert "trust_remote_code" in ast.unparse(call) or "**options" in ast.unparse(call), ast.unparse(call)


@each_module
def test_what_is_public_is_listed_and_documented(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree) or path.stat().st_size == 0, "the first line says what the file is about"
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = {node.name for node in defined if not node.name.startswith("_")}
    listed: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = set(ast.literal_eval(node.value))
    assert public <= listed, f"not in __all__: {public - listed}"
    for node in defined:
        assert node.name.startswith("_") or ast.get_docstring(node), f"{node.name} has no docstring"


def test_every_name_that_is_listed_exists() -> None:
    import importlib

    for path in MODULES:
        if path.name == "__main__.py":
            continue
        name = ".".join(("lora_cli", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        module = importlib.import_module(name)
        missing = [public for public in getattr(module, "__all__", []) if not hasattr(module, public)]
        assert not missing, f"{name}: {missing}"


def spec_fields() -> list[str]:
    classes = [value for value in vars(spec).values() if dataclasses.is_dataclass(value)]
    return sorted({field.name for cls in classes for field in dataclasses.fields(cls)})


@pytest.fixture(scope="module")
def attributes() -> set[str]:
    """Names of all attributes that are read outside spec/ and help.py."""
    trees = [tree_of(path) for path in MODULES if unit_of(path) not in ("spec", "help")]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", spec_fields())
def test_every_config_key_is_read_somewhere(name: str, attributes: set[str]) -> None:
    assert name in attributes | COMPUTED


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_config_files_hold_values_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not {"_target_", "_partial_", "_args_"} & set(text.replace(":", " ").split())
    assert set(re.findall(r"\$\{[^}]*\}?", text)) <= POINTS.get(path.relative_to(CONF).parts[0], set())
    assert "\t" not in text
