"""A base in 4 or 8 bits, by the real command line: trained, scored, resumed, merged, compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the extra 'quant' is not installed")

from commands.conftest import FILMS, TINY, Finished, read_jsonl, write_films
from conftest import Completed

QLORA = ("lora=qlora", *TINY, *FILMS)
SHORT = (*QLORA, "train.max_steps=4", "train.save_every=2", "train.keep=9", "model.dropout=0.1")


@pytest.fixture(scope="module")
def quantised(
    tmp_path_factory: pytest.TempPathFactory, lora: Callable[..., Completed], blocked: dict[str, str]
) -> Finished:
    home = tmp_path_factory.mktemp("quantised")
    write_films(home)
    process = lora("train", *QLORA, "train.epochs=1", cwd=home, env=blocked)
    assert process.returncode == 0, process.stderr
    assert not Path(blocked["DIALLED"]).exists()
    return Finished(home, (home / "runs" / "latest").resolve(), process, blocked)


@pytest.fixture
def at_home(quantised: Finished, monkeypatch: pytest.MonkeyPatch, call: Callable[..., object]) -> Path:
    """The folder that the run was started from, as the current one."""
    monkeypatch.chdir(quantised.home)
    return quantised.path


def test_a_run_says_and_records_what_was_quantised(quantised: Finished) -> None:
    assert "quantised  13 linear layers as nf4: " in quantised.process.stderr
    facts = quantised.facts()
    found = facts["base"]["quantized"]
    # Six to a block, and the pooler's; not the classifier.
    assert (found["kind"], found["layers"]) == ("nf4", 13)
    assert found["bytes"] < 0.35 * found["fp32_bytes"]
    assert "bitsandbytes" in facts["versions"]
    assert json.loads((quantised.path / "adapter" / "lora.json").read_text())["extra"]["quantization"] == "nf4"


def test_eval_finds_the_figures_of_the_run_to_the_last_digit(at_home: Path, call, tmp_path: Path) -> None:
    assert call("eval", "run=latest", f"output={tmp_path / 'out'}").code == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    facts = json.loads((at_home / "run.json").read_text())
    assert found["metrics"] == facts["metrics"]["validation"]


def test_the_adapter_can_be_used_on_the_base_as_it_was_loaded(at_home: Path, call, tmp_path: Path) -> None:
    answer = call("eval", "run=latest", "model.quantization=none", f"output={tmp_path / 'out'}")
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    known = json.loads((at_home / "run.json").read_text())["metrics"]["validation"]
    assert found["loss"] != known["loss"]
    assert found["loss"] == pytest.approx(known["loss"], rel=0.5)


@pytest.mark.parametrize(
    ("words", "base"),
    [
        ((), "dequantised from nf4; model.quantization=none merges into the weights as they were loaded"),
        (("model.quantization=none",), "as it was loaded; the adapter was trained on it in nf4"),
    ],
    ids=["quantised", "as loaded"],
)
def test_merge_says_into_which_base_and_writes_plain_weights(words, base, at_home, call, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification

    answer = call("merge", "run=latest", f"output={tmp_path / 'm'}", *words)
    assert answer.code == 0, answer.err
    assert base in answer.err
    certificate = json.loads((tmp_path / "m" / "certificate.json").read_text())
    assert certificate["base"] == base
    assert certificate["dtypes"]["fp32"]["largest_difference"] < 1e-4
    assert certificate["dtypes"]["fp32"]["changed"] == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "quantization_config" not in model.config.to_dict()


def test_layers_without_an_adapter_are_dequantised_too(films, call, tmp_path) -> None:
    from safetensors import safe_open

    words = ("model.quantization=int8", "lora.targets=[query]", "train.max_steps=2")
    assert call("train", *QLORA, *words).code == 0
    assert call("merge", "run=latest", f"output={tmp_path / 'm'}").code == 0
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert not [name for name in names if "absmax" in name]
    assert "bert.encoder.layer.0.output.dense.weight" in names


@pytest.mark.parametrize("lora", ["qlora", "loftq"])
def test_a_resumed_training_is_bit_equal(lora: str, films: Path, call: Callable[..., object]) -> None:
    words = (f"lora={lora}", *SHORT[1:])
    assert call("train", *words, "hydra.run.dir=run").code == 0
    whole = (films / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in ("checkpoints/step-000004", "adapter"):
        shutil.rmtree(films / "run" / name)
    facts = json.loads((films / "run" / "run.json").read_text())
    (films / "run" / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    answer = call("train", *words, "hydra.run.dir=run", "resume=auto")
    assert answer.code == 0, answer.err
    assert "from step 2" in answer.err
    assert (films / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_a_run_with_loftq_saves_an_ordinary_adapter_and_scores_as_it_did(films: Path, call, tmp_path: Path) -> None:
    assert call("train", "lora=loftq", *SHORT[1:], "hydra.run.dir=run").code == 0
    config = json.loads((films / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config.get("init_lora_weights", True)) == ("LORA", 8, True)
    assert call("eval", "run=run", f"output={tmp_path / 'out'}").code == 0
    known = json.loads((films / "run" / "run.json").read_text())["metrics"]["validation"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"] == known


def test_loftq_without_quantisation_is_refused_by_name(films: Path, call) -> None:
    answer = call("train", "lora=loftq", "model.quantization=none", *TINY, *FILMS)
    assert (answer.code, "lora.init=loftq: needs model.quantization=nf4 or int8" in answer.err) == (2, True)


def test_a_training_is_not_resumed_with_another_bitsandbytes(films: Path, call, monkeypatch) -> None:
    from lora_cli import experiment

    assert call("train", *SHORT, "hydra.run.dir=run").code == 0
    facts = json.loads((films / "run" / "run.json").read_text())
    (films / "run" / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    known = experiment.version
    monkeypatch.setattr(experiment, "version", lambda name: "0.0.1" if name == "bitsandbytes" else known(name))
    answer = call("train", *SHORT, "hydra.run.dir=run", "resume=auto")
    assert answer.code == 2
    assert "library versions" in answer.err


@pytest.mark.parametrize(
    "words",
    [("lora=dora", "model.quantization=nf4"), ("lora=rslora", "model.quantization=int8")],
    ids=" ".join,
)
def test_other_methods_train_on_a_quantised_base(words, films, call) -> None:
    settings = [word for word in (*TINY, *FILMS) if not word.startswith("lora.")]
    answer = call("train", *words, *settings, "train.max_steps=2")
    assert answer.code == 0, answer.err
    assert "linear layers as" in answer.err


def test_a_decoder_is_quantised_and_writes(scratch, call) -> None:
    rows = [json.dumps({"prompt": "say a", "target": "a"})] * 8
    (scratch / "rows.jsonl").write_text("\n".join(rows))
    words = ("task=text_generation", "task.data.train=rows.jsonl", "task.decode.max_new_tokens=3")
    answer = call("train", "lora=qlora", "model=tiny-gpt2", *words, "train.max_steps=2", "device.threads=1")
    assert answer.code == 0, answer.err
    assert call("infer", "run=latest", "prompt=say a").code == 0


def test_a_comparison_takes_it_and_only_it_may_change_how_the_base_is_kept(films, call) -> None:
    words = (*(word for word in TINY if word != "lora.targets=[all-linear]"), *FILMS, "compare.train=false")
    answer = call("compare", *words, "compare.methods=[lora,qlora]", "hydra.run.dir=counted")
    assert answer.code == 0, answer.err
    plain, quantised = json.loads((films / "counted" / "compare.json").read_text())["rows"]
    assert quantised["weight_bytes"] < plain["weight_bytes"]
    assert quantised["base_bytes"] == plain["base_bytes"]


def test_a_method_that_names_another_model_is_not_compared(scratch: Path, refused) -> None:
    (scratch / "conf" / "lora").mkdir(parents=True)
    (scratch / "conf" / "lora" / "redropped.yaml").write_text("# @package _global_\nmodel: {dropout: 0.5}\n")
    line = refused("compare", "compare.methods=[qlora,redropped]", "model=tiny-bert")
    assert "compare.methods=redropped: its file sets another model.* than that of qlora" in line


def test_everything_cannot_train_on_a_quantised_base(refused) -> None:
    assert "none where everything trains" in refused("train", "lora=full", "model.quantization=nf4")


def test_a_wrong_name_is_one_line(refused) -> None:
    line = refused("train", "model.quantization=nf5")
    assert "Did you mean nf4?" in line


def test_an_adapter_that_says_nonsense_of_its_base_is_refused(at_home: Path, call, tmp_path: Path) -> None:
    shutil.copytree(at_home / "adapter", tmp_path / "a")
    file = tmp_path / "a" / "lora.json"
    facts = json.loads(file.read_text())
    facts["extra"]["quantization"] = ["\x1b[31m"]
    file.write_text(json.dumps(facts))
    answer = call(
        "merge", f"run={tmp_path / 'a'}", "task=support_intents", "model=tiny-bert", f"output={tmp_path / 'm'}"
    )
    assert answer.code == 2
    assert "\x1b" not in answer.err


@pytest.mark.slow
def test_minilm_learns_in_4_bits_on_one_thread(scratch: Path, call: Callable[..., object]) -> None:
    words = ("task=support_intents", "model=minilm", "train.batch_size=8", "train.lr=2e-3", "train.head_lr=1e-2")
    limits = ("task.data.train_limit=32", "task.data.validation_limit=8", "train.max_steps=24", "train.eval_every=24")
    answer = call("train", "lora=qlora", *words, *limits, "train.log_every=4", "device.threads=1", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    losses = [row["train/loss"] for row in read_jsonl(scratch / "run" / "metrics.jsonl") if "train/loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    size = json.loads((scratch / "run" / "run.json").read_text())["base"]["quantized"]
    assert size["layers"] == 37
    assert size["bytes"] < 0.14 * size["fp32_bytes"]
