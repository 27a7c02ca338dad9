"""The trust boundary: whatever is wrong with an adapter, one line says so and the model stays as it was."""

from __future__ import annotations

import json
import math
import os
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.errors import AdapterError, UserError
from lora_cli.nn.adapter import fingerprint, load_adapter, read_adapter, save_adapter
from lora_cli.nn.inject import adapted_layers, inject
from lora_cli.nn.untrusted import read_header, read_json, read_tensor
from lora_cli.spec import LoraSpec

from .models import trained

A_KEY = "base_model.model.body.0.query.lora_A.weight"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.query(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(Block(), Block())
        self.classifier = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


def save_net(folder: Path, **kept: Any) -> Net:
    model = Net()
    print_ = fingerprint(model, fresh=["classifier"])
    injection = inject(model, LoraSpec(targets=["query"], r=2, alpha=4.0), groups={}, fresh=["classifier"])
    facts: dict[str, Any] = {"base_name": "base", "revision": "r1", "task_type": "SEQ_CLS", "fingerprint": print_}
    save_adapter(trained(model), injection, folder, **(facts | {"extra": {"labels": ["no", "yes"]}} | kept))  # type: ignore[arg-type]
    return model


def load_net(folder: Path, **options: Any) -> Net:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_adapter(model, folder, **({"fresh": ["classifier"], "fingerprint": None} | options))
    except UserError:
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
        raise
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_net(tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(AdapterError) as error:
        load_net(folder, **options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) <= 300
    return text


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_adapter_comes_back_bit_for_bit_with_its_facts(folder: Path) -> None:
    x = torch.randn(3, 6)
    file = read_adapter(folder)
    assert torch.equal(load_net(folder)(x), save_net(folder)(x))
    assert file.extra == {"labels": ["no", "yes"]}
    assert (file.config.base_name, file.config.revision, file.config.task_type) == ("base", "r1", "SEQ_CLS")
    assert (file.config.spec.r, file.config.spec.alpha) == (2, 4.0)


def test_file_read_before_can_be_loaded(folder: Path) -> None:
    injection = load_adapter(Net(), read_adapter(folder), fresh=["classifier"], fingerprint=None)
    assert [(row.pattern, row.modules) for row in injection.rows] == [("query", ("body.0.query", "body.1.query"))]
    assert injection.trained_whole == ("classifier",)


def test_only_classic_keys_and_plain_floats_are_written(folder: Path) -> None:
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "modules_to_save": ["classifier"],
        "peft_type": "LORA",
        "r": 2,
        "revision": "r1",
        "target_modules": ["query"],
        "task_type": "SEQ_CLS",
    }
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


def test_saving_again_replaces_and_leaves_nothing_beside(folder: Path) -> None:
    save_net(folder, extra={"second": True})
    assert read_adapter(folder).extra == {"second": True}
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="something else"):
        save_net(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_failed_save_leaves_the_old_adapter(folder: Path) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(TypeError):
        save_net(folder, extra={"not": {"json", "at all"}})
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_adapter_of_another_base_is_refused_unless_forced(folder: Path) -> None:
    model = Net()
    model.body[0].query.weight.data[0, 0] += 1
    other = fingerprint(model, fresh=["classifier"])
    assert "force_base=true" in refusal(folder, fingerprint=other)
    load_net(folder, fingerprint=other, force_base=True)
    load_net(folder, fingerprint=fingerprint(Net(), fresh=["classifier"]))


def test_fingerprint_ignores_fresh_modules_and_dtype() -> None:
    model = Net()
    expected = fingerprint(model, fresh=["classifier"])
    model.classifier.weight.data += 1
    assert fingerprint(model, fresh=["classifier"]) == expected
    assert fingerprint(model, fresh=[]) != expected
    assert fingerprint(model.bfloat16(), fresh=["classifier"]) == expected


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "r zero": ({"r": 0}, "lora.r=0"),
    "r negative": ({"r": -1}, "lora.r=-1"),
    "r text": ({"r": "8"}, "r=8: a int is needed"),
    "r fraction": ({"r": 1.5}, "r=1.5"),
    "r true": ({"r": True}, "r=True"),
    "r null": ({"r": None}, "r=None"),
    "r huge": ({"r": 10**9}, "lora.r=1000000000"),
    "r too many digits": ({"lora_alpha": 10**400}, "too large"),
    "r above layer": ({"r": 7}, "at most 6"),
    "alpha huge": ({"lora_alpha": 1e30}, "lora.alpha"),
    "alpha negative": ({"lora_alpha": -1}, "lora.alpha"),
    "alpha text": ({"lora_alpha": "x"}, "lora_alpha=x"),
    "dropout": ({"lora_dropout": 1.5}, "lora.dropout"),
    "bias": ({"bias": "some"}, "lora.bias"),
    "regex": ({"target_modules": "([a-z0-9._]+)+!"}, "expressions are not run"),
    "regex in a list": ({"target_modules": ["(.*)+query"]}, "match no layer"),
    "no match": ({"target_modules": ["nope"]}, "match no layer"),
    "integer": ({"target_modules": 3}, "target_modules=3"),
    "integers": ({"target_modules": [3]}, "target_modules"),
    "no targets": ({"target_modules": None}, "target_modules"),
    "not linear": ({"target_modules": ["norm"]}, "LayerNorm"),
    "rank regex": ({"rank_pattern": {"(a+)+!": 2}}, "rank_pattern"),
    "rank text": ({"rank_pattern": {"query": "2"}}, "rank_pattern"),
    "rank above layer": ({"rank_pattern": {"query": 4000}}, "at most 6"),
    "alpha list": ({"alpha_pattern": [1]}, "alpha_pattern"),
    "kind": ({"peft_type": "EVIL"}, "peft_type=EVIL"),
    "base changed": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "replication": ({"layer_replication": [[0, 4]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "some layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "saved": ({"modules_to_save": "classifier"}, "modules_to_save"),
    "saved too much": ({"modules_to_save": ["classifier", "norm"]}, "4 tensors are missing: body.0.norm.bias"),
    "many": ({"target_modules": ["x"] * 5000}, "target_modules"),
    "dora missing": ({"use_dora": True}, "2 tensors are missing: body.0.query.lora_magnitude_vector"),
    "rank differs": ({"r": 3}, "body.0.query.lora_A.weight has shape [2, 6], this model needs [3, 6]"),
    "task": ({"task_type": 5}, "task_type=5"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_cannot_be_used_is_refused_at_once(folder: Path, case: str) -> None:
    values, text = CONFIGS[case]
    edit_config(folder, **values)
    started = time.monotonic()
    assert text in refusal(folder)
    assert time.monotonic() - started < 1


def damaged(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change)


def raw(change: Callable[[bytes], bytes], name: str = "adapter_model.safetensors") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def to_link(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder / "x") and (folder / name).symlink_to(folder / "x")


def to_fifo(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def to_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


CONFIG = "adapter_config.json"
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one byte short": (raw(lambda d: d[:-1]), "truncated or damaged"),
    "half": (raw(lambda d: d[: len(d) // 5]), "truncated"),
    "empty": (raw(lambda d: b""), "truncated"),
    "trailing bytes": (raw(lambda d: d + b"x"), "truncated or damaged"),
    "8 EiB header": (raw(lambda d: struct.pack("<Q", 2**63) + d[8:]), "truncated"),
    "base tensor": (damaged(lambda t: t.update({"base_model.model.body.0.norm.weight": torch.ones(6)})), "body.0.norm"),
    "second name": (damaged(lambda t: t.update({A_KEY.replace("A.", "A.default."): t[A_KEY] + 1})), "do not belong"),
    "unknown tensor": (damaged(lambda t: t.update(x=torch.ones(1))), "1 tensors do not belong to this adapter: x"),
    "missing": (damaged(lambda t: t.pop(A_KEY)), "1 tensors are missing: body.0.query.lora_A.weight"),
    "none": (damaged(lambda t: t.clear()), "6 tensors are missing"),
    "shape": (damaged(lambda t: t.update({A_KEY: torch.ones(2, 5)})), "has shape [2, 5], this model needs [2, 6]"),
    "dtype": (damaged(lambda t: t.update({A_KEY: torch.ones(2, 6).int()})), "dtype I32; floats only"),
    "nan": (damaged(lambda t: t[A_KEY].fill_(math.nan)), "NaN or infinity"),
    "infinity": (damaged(lambda t: t.update({A_KEY: torch.full((2, 6), 1e300, dtype=torch.float64)})), "infinity"),
    "pickle": (to_pickle, "a pickle, which is never opened"),
    "link": (to_link("adapter_model.safetensors"), "not a regular file"),
    "config link": (to_link(CONFIG), "not a regular file"),
    "fifo": (to_fifo, "not a regular file"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "no adapter here"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
    "not JSON": (raw(lambda d: b"{", CONFIG), "not readable as JSON"),
    "list": (raw(lambda d: b"[]", CONFIG), "not a list"),
    "deep": (raw(lambda d: b"[" * 200_000, CONFIG), "nested too deep"),
    "NaN": (raw(lambda d: d.replace(b'"lora_alpha": 4', b'"lora_alpha": NaN'), CONFIG), "NaN is not"),
    "Infinity": (raw(lambda d: d.replace(b'"r": 2', b'"r": Infinity'), CONFIG), "Infinity is not"),
    "overflow": (raw(lambda d: d.replace(b'"lora_alpha": 4', b'"lora_alpha": 1e999'), CONFIG), "lora.alpha=inf"),
    "digits": (raw(lambda d: d.replace(b'"r": 2', b'"r": ' + b"9" * 9000), CONFIG), "not readable as JSON"),
    "twice": (raw(lambda d: d.replace(b'"r": 2', b'"r": 2, "r": 3'), CONFIG), "twice"),
    "not UTF-8": (raw(lambda d: b"\xff" + d, CONFIG), "not readable as JSON"),
    "large": (raw(lambda d: b" " * 2**21, CONFIG), "at most 1,048,576"),
    "newer": (raw(lambda d: d.replace(b'"format": 1', b'"format": 2'), "lora.json"), "format 2"),
    "facts": (raw(lambda d: b'{"format": 1, "extra": []}', "lora.json"), "extra"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_or_hostile_file_is_refused_before_the_model_is_touched(folder: Path, case: str) -> None:
    damage, text = FILES[case]
    damage(folder)
    assert text in refusal(folder)


def test_long_folder_and_tensor_names_still_make_one_short_line(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50) / ("folder" * 30)
    save_net(folder)
    edit_weights(folder, lambda t: t.update({f"{'key' * 100}{i}": torch.ones(1) for i in range(9)}))
    assert "adapter_model.safetensors" in refusal(folder)


def test_terminal_codes_in_a_file_are_not_echoed(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"\x1b[31mred": torch.ones(1)}))
    assert "\x1b" not in refusal(folder)


def test_unknown_setting_is_ignored_with_one_warning(folder: Path) -> None:
    edit_config(folder, shiny=True, unset=None, megatron_core="megatron.core")
    with pytest.warns(UserWarning, match="unknown settings are ignored: shiny$") as caught:
        load_net(folder)
    assert len(caught) == 1


def test_adapter_without_our_facts_loads(folder: Path) -> None:
    (folder / "lora.json").unlink()
    load_net(folder, fingerprint="something")
    assert read_adapter(folder).extra == {}


def test_all_linear_as_a_word_is_understood(folder: Path) -> None:
    edit_config(folder, target_modules="all-linear")
    assert list(adapted_layers(load_net(folder))) == ["body.0.query", "body.1.query"]


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "gap": header(a=tensor([1], [4, 8])) + bytes(8),
    "overlap": header(a=tensor([2], [0, 8]), b=tensor([1], [4, 8])) + bytes(8),
    "size": header(a=tensor([3], [0, 8])) + bytes(8),
    "huge": header(a=tensor([2**40, 2**20], [0, 2**62])),
    "negative": header(a=tensor([-1], [8, 4])),
    "fraction": header(a=tensor([1.0], [0, 4])) + bytes(4),
    "true": header(a=tensor([True], [0, 4])) + bytes(4),
    "dtype list": header(a=tensor([1], [0, 4], [])) + bytes(4),
    "dimensions": header(a=tensor([1] * 9, [0, 4])) + bytes(4),
    "offsets": header(a=tensor([1], [0])) + bytes(4),
    "entry": header(a=[]),
    "extra field": header(a=tensor([1], [0, 4]) | {"x": 1}) + bytes(4),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_that_does_not_add_up_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(HEADERS[case])
    with pytest.raises(AdapterError):
        read_header(tmp_path / "x")


def test_header_larger_than_the_cap_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 5 << 20) + b" " * (5 << 20))
    with pytest.raises(AdapterError, match="at most 4194304"):
        read_header(tmp_path / "x")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4), st.sampled_from(["float32", "bfloat16", "float64"])
)
def test_header_and_tensors_read_as_safetensors_wrote_them(shapes: list[list[int]], kind: str) -> None:
    tensors = {f"t{i}": torch.randn(shape).to(getattr(torch, kind)) for i, shape in enumerate(shapes)}
    path = WORK / "x.safetensors"
    save_file(tensors, path)
    entries = read_header(path)
    assert {name: (e.dtype, e.shape) for name, e in entries.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()
    }
    assert all(torch.equal(read_tensor(path, entries[name]), t) for name, t in tensors.items() if t.numel())


@pytest.fixture(scope="module", autouse=True)
def _work(tmp_path_factory: pytest.TempPathFactory) -> None:
    # One folder for all examples of the properties: hypothesis does not renew a function's fixtures.
    global WORK
    WORK = tmp_path_factory.mktemp("work")
    save_net(WORK / "adapter")


WORK: Path


def verdict(folder: Path) -> str:
    """The refusal, or nothing if it loads; any other exception is a failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown keys
            load_adapter(Net(), folder, fresh=["classifier"], fingerprint=None)
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_but_a_refusal_and_take_no_memory(data: st.DataObject) -> None:
    source = WORK / "adapter" / data.draw(st.sampled_from(["adapter_model.safetensors", CONFIG, "lora.json"]))
    whole = bytearray(source.read_bytes())
    original = bytes(whole)
    position = data.draw(st.integers(0, min(len(whole), 900) - 1))
    whole[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=8))
    source.write_bytes(whole)
    tracemalloc.start()
    text = verdict(WORK / "adapter")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    source.write_bytes(original)
    assert len(text) <= 300
    assert peak < 2 << 20


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["r", "lora_alpha", "target_modules", "rank_pattern", "modules_to_save", "bias", "use_dora"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    ),
)
def test_any_value_in_the_config_loads_or_is_refused(key: str, value: Any) -> None:
    path = WORK / "adapter" / CONFIG
    original = path.read_text()
    edit_config(WORK / "adapter", **{key: value})
    text = verdict(WORK / "adapter")
    path.write_text(original)
    assert len(text) <= 300


def test_json_reader_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nothing.json: No such file"):
        read_json(tmp_path / "nothing.json")
