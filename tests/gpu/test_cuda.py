"""What only a GPU can show: make test-gpu. Every figure that is held to is a bound, told in docs/gpu.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.conftest import FILMS, TINY, read_jsonl, write_films
from commands.test_writing import SMALL, write_things
from conftest import Completed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
# A GPU draws other dropout than a CPU does.
EXACT = ("device.precision=fp32", "lora.dropout=0", "model.dropout=0", "train.max_steps=8", "train.log_every=1")
CLASSIFIER = (*TINY, *FILMS, *EXACT)
WRITER = ("model=tiny-llama", *SMALL, *EXACT)
WIDE = "{hidden_size:512,intermediate_size:1024,num_hidden_layers:8,max_position_embeddings:1024}"
LONG = (
    *("task=language_modeling", "task.data.train=long.jsonl", "task.data.validation=short.jsonl"),
    *("task.max_length=512", "model=tiny-llama", f"model.random={WIDE}", "lora.targets=[all-linear]"),
    *("train.batch_size=8", *EXACT, "train.max_steps=2"),
)
"""A training whose activations outweigh its weights."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    path: Path

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says."""
        return json.loads((self.path / "run.json").read_text())

    @property
    def peak_mib(self) -> float:
        """Most bytes that it had on the GPU."""
        return self.facts["cost"]["peak_memory_mib"]

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [row["train/loss"] for row in read_jsonl(self.path / "metrics.jsonl") if "train/loss" in row]


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data for all the trainings."""
    home = tmp_path_factory.mktemp("gpu")
    write_films(home)
    write_things(home)
    text = "One word follows another until the row is full. " * 99
    (home / "long.jsonl").write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(16)))
    (home / "short.jsonl").write_text(json.dumps({"text": "A short one."}) + "\n")
    return home


@pytest.fixture(scope="module")
def train(home: Path, lora: Callable[..., Completed]) -> Train:
    """Train in a process of its own, so that its peak is nobody else's; the same words give the same run."""
    known: dict[tuple[str, ...], Trained] = {}

    def run(*words: str) -> Trained:
        if words not in known:
            name = f"run-{len(known)}"
            process = lora("train", *words, f"hydra.run.dir={name}", cwd=home)
            assert process.returncode == 0, process.stderr
            known[words] = Trained(home / name)
        return known[words]

    return run


@pytest.mark.parametrize("words", [CLASSIFIER, WRITER], ids=["classifier", "writer"])
def test_a_gpu_learns_what_a_cpu_learns(train: Train, words: tuple[str, ...]) -> None:
    here, there = train(*words, "device=cpu"), train(*words, "device=cuda")
    assert there.losses == pytest.approx(here.losses, rel=1e-3)
    assert there.facts["metrics"]["validation"]["loss"] == pytest.approx(
        here.facts["metrics"]["validation"]["loss"], rel=1e-2
    )


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 1e-2), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_fewer_digits_change_losses_little(train: Train, precision: str, bound: float) -> None:
    if precision != "fp16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip(f"this GPU is too old for {precision}")
    words = (*CLASSIFIER, "device=cuda")
    whole, rounded = train(*words), train(*words, f"device.precision={precision}")
    # An fp16 step whose gradients overflow is skipped while the loss scale finds its size.
    steps = 1 if precision == "fp16" else 8
    assert rounded.losses[:steps] == pytest.approx(whole.losses[:steps], rel=bound)
    assert rounded.losses != whole.losses


def test_a_base_in_4_bits_trains_on_a_gpu(train: Train) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quant' is not installed")
    words = ("lora=qlora", *CLASSIFIER)
    here, there = train(*words, "device=cpu"), train(*words, "device=cuda")
    assert there.facts["base"]["quantized"] == here.facts["base"]["quantized"]
    assert there.losses == pytest.approx(here.losses, rel=5e-2)


@pytest.mark.parametrize("key", ["train.checkpointing", "device.offload_activations", "device.offload_base"])
def test_what_saves_memory_lowers_the_peak_and_changes_no_loss(train: Train, key: str) -> None:
    plain, thrifty = train(*LONG, "device=cuda"), train(*LONG, "device=cuda", f"{key}=true")
    assert thrifty.peak_mib < 0.8 * plain.peak_mib
    assert thrifty.losses == pytest.approx(plain.losses, rel=1e-4)


def test_a_base_that_waits_on_the_host_takes_less_than_layers_computed_again_alone(train: Train) -> None:
    words = (*LONG, "device=cuda")
    again, waiting = train(*words, "train.checkpointing=true"), train(*words, "device.offload_base=true")
    assert waiting.peak_mib < again.peak_mib


def test_compiled_kernels_compute_the_same(train: Train) -> None:
    pytest.importorskip("triton", reason="without Triton nothing is compiled for CUDA")
    words = (*CLASSIFIER, "device=cuda", "lora.dropout=0", "model.dropout=0")
    plain, ours = train(*words), train(*words, "device.compile=true")
    assert ours.losses == pytest.approx(plain.losses, rel=1e-3)


def test_a_gpu_writes_what_a_cpu_writes(train: Train, lora: Callable[..., Completed]) -> None:
    run = train(*WRITER, "device=cuda").path
    words = ("infer", f"run={run}", "input=validation.jsonl", "device.precision=fp32")
    answers = [lora(*words, f"device={device}", cwd=run.parent) for device in ("cpu", "cuda")]
    assert [answer.returncode for answer in answers] == [0, 0], answers
    assert answers[0].stdout == answers[1].stdout != ""


def test_trainings_in_one_batch_are_those_that_each_would_be_alone(
    train: Train, lora: Callable[..., Completed], home: Path
) -> None:
    words = (*CLASSIFIER, "device=cuda")
    fused = ("hydra/launcher=fused", "hydra.launcher.mixed=true", "hydra.sweep.dir=fused")
    process = lora("train", "-m", *words, "lora.r=2,4", *fused, cwd=home)
    assert process.returncode == 0, process.stderr
    for number, rank in enumerate((2, 4)):
        together, alone = Trained(home / "fused" / str(number)), train(*words, f"lora.r={rank}")
        assert together.facts["fused"] == 2
        assert together.losses == pytest.approx(alone.losses, rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices here")
@pytest.mark.parametrize("device", ["ddp", "fsdp"])
def test_two_gpus_learn_what_one_learns(train: Train, device: str) -> None:
    words = (*CLASSIFIER, "train.accumulation=2")
    one, two = train(*words, "device=cuda"), train(*words, f"device={device}", "device.name=cuda", "device.nproc=2")
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
