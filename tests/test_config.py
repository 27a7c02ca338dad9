"""From words to a checked spec: every shipped file, words of any kind, literals, sweeps, saved runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_cli import config
from lora_cli.errors import ConfigError, RunError, UnknownName, UserError
from lora_cli.options import conf_dir
from lora_cli.spec import VERBS, TrainRun

CONF = conf_dir()
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in ("base", "recipe")
)


@pytest.fixture
def compose(call, scratch):
    """The jobs that words make of a verb, with their specs checked: compose("train", "lora.r=4")."""

    def launch(verb: str, *words: str, saved=None) -> list[tuple[object, config.Job]]:
        found: list[tuple[object, config.Job]] = []
        config.launch(verb, list(words), lambda job: found.append((job.spec(), job)), saved=saved)
        return found

    return launch


def one(jobs):
    ((spec, _),) = jobs
    return spec


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids="=".join)
def test_every_shipped_file_composes(group: str, name: str, compose) -> None:
    spec = one(compose("train", f"{group}={name}"))
    assert isinstance(spec, TrainRun)
    if group in ("task", "model", "device", "tracker"):
        assert getattr(spec, group).name == ("auto" if name in ("ddp", "fsdp") else name)


def test_every_group_is_a_field_and_every_primary_a_verb() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"base"}
    assert groups <= set(vars(TrainRun()))
    assert {path.stem for path in CONF.glob("*.yaml")} == set(VERBS)


def test_the_defaults_are_the_specs(compose) -> None:
    spec = one(compose("train", "task=sst2", "model=roberta-base"))
    assert spec.train == TrainRun().train
    assert spec.lora == TrainRun().lora


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    "words",
    [
        ("model.random={hidden_size:64}",),
        ("model.random.hidden_size=64",),
        ("model.random=null", "model.random={hidden_size:64}"),
    ],
)
def test_a_table_that_is_null_takes_keys(verb: str, words: tuple[str, ...], compose) -> None:
    assert one(compose(verb, "task=sst2", "model=llama-2-70b")).model.random is None
    assert one(compose(verb, "task=sst2", "model=llama-2-70b", *words)).model.random == {"hidden_size": 64}


@pytest.mark.parametrize("flags", [["-m"], ["--multirun"]])
def test_a_sweep_is_every_combination_in_order(flags, compose) -> None:
    jobs = compose("train", "lora.r=4,8", *flags, "seed=1,2")
    assert [(spec.lora.r, spec.seed) for spec, _ in jobs] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert [job.sweep_number for _, job in jobs] == [0, 1, 2, 3]
    assert {job.directory.name for _, job in jobs} == {"0", "1", "2", "3"}
    assert jobs[0][1].overrides == ("lora.r=4", "seed=1")


def test_a_folder_of_ones_own_is_handed_on(compose) -> None:
    (alone,) = compose("train")
    assert alone[1].directory is None
    (chosen,) = compose("train", "hydra.run.dir=my runs/é, r=${lora.r}")
    assert chosen[1].directory == Path("my runs/é, r=8")


LITERALS = ["???", "${x}", "a=b,c", "${oc.env:HOME}", "null", "[a", "'", '"', "\\", "", " ", "a\nb", "--help", "~x"]


@pytest.mark.parametrize("text", LITERALS, ids=repr)
def test_a_text_is_not_parsed(text: str, compose) -> None:
    saved = {"task": {"kind": "classification", "name": "x"}, "model": {"name": "x"}}
    assert one(compose("infer", "run=x", f"text={text}", f"text_pair={text}", saved=saved)).text == text


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
def test_no_text_is_parsed(text: str, compose) -> None:
    saved = {"task": {"kind": "classification", "name": "x"}, "model": {"name": "x"}}
    assert one(compose("infer", "run=x", f"text={text}", saved=saved)).text == text


PATHS = ["a b.csv", "a,b.csv", "a=b.csv", "a(1).csv", "it's.csv", "ü.csv", "a{b}.csv", "a:b.csv", "a\\b.csv", "[x].csv"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_taken_as_it_stands(path: str, compose) -> None:
    assert one(compose("train", "task=text_classification", f"task.data.train={path}")).task.data.train == path


def test_a_home_is_found_behind_an_equals_sign(compose, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert one(compose("train", "task.data.train=~/a b.csv")).task.data.train == "/home/somebody/a b.csv"


def test_a_table_takes_keys_of_ones_own(compose) -> None:
    words = ["lora.rank_pattern={attention.self.query:4}", "lora.alpha_pattern.value=2", "task.data.splits={train:a}"]
    spec = one(compose("train", *words, "model=tiny-bert", "model.random={hidden_size:64}"))
    assert spec.lora.rank_pattern == {"attention.self.query": 4}
    assert spec.lora.alpha_pattern == {"value": 2.0}
    assert spec.task.data.splits == {"train": "a"}
    assert spec.model.random["hidden_size"] == 64
    assert spec.model.random["num_hidden_layers"] == 2


def test_an_interpolation_the_user_typed_is_resolved(compose) -> None:
    ((spec, job),) = compose("train", "seed=${lora.r}", "lora.r=5")
    assert spec.seed == 5
    assert job.overrides[0] == "seed=${lora.r}"


KEYS = ["lora.r", "train.lr", "seed", "task", "model", "task.text", "device.name", "lora", "nope", "", "hydra.run.dir"]
VALUES = st.one_of(st.text(st.characters(codec="ascii"), max_size=8), st.integers().map(str), st.floats().map(str))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=st.sampled_from(["", "+", "++", "~"]), key=st.sampled_from(KEYS), value=VALUES)
def test_any_word_makes_a_spec_or_a_one_line_refusal(prefix: str, key: str, value: str, compose) -> None:
    refusal = ""
    try:
        jobs = compose("train", f"{prefix}{key}={value}")
    except UserError as error:
        jobs, refusal = [], str(error)
    assert all(isinstance(spec, TrainRun) for spec, _ in jobs)
    assert jobs or refusal
    assert len(refusal.splitlines()) <= 1, refusal
    assert len(refusal) <= 300, refusal


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=12))
def test_any_word_at_all_is_answered(word: str, call) -> None:
    answer = call("train", f"x{word}")
    assert answer.code == 2
    assert "internal error" not in answer.err
    assert len(answer.err.splitlines()) == 1


SAVED = {"task": {"kind": "classification", "name": "mine", "text": ["a"]}, "model": {"name": "m", "hub": "x/y"}}


def test_a_saved_run_gives_task_and_model_and_the_user_changes_them(compose) -> None:
    spec = one(compose("eval", "run=x", "task.split=test", saved=SAVED))
    assert (spec.task.name, spec.task.split, spec.model.hub) == ("mine", "test", "x/y")
    spec = one(compose("eval", "run=x", "task=sst2", saved=SAVED))
    assert (spec.task.name, spec.task.text, spec.model.hub) == ("sst2", ["sentence"], "x/y")


@pytest.mark.parametrize(
    ("group", "values", "says"),
    [
        ("task", {"kind": "nope"}, "task.kind=nope is none of classification"),
        ("task", {}, "task.kind=None"),
        ("task", {"kind": "classification", "surprise": 1}, "task.surprise"),
        ("task", {"kind": "classification", "max_length": "many"}, "task.max_length"),
        ("task", {"kind": "classification", "data": {"train": ["a"]}}, "task.data.train"),
        ("model", {"name": "m", "_target_": "os.system"}, "model._target_"),
        ("model", {"name": {"a": 1}}, "model.name"),
        ("model", {"trust_remote_code": "${oc.env:HOME}x"}, "model"),
    ],
)
def test_a_hostile_saved_config_is_refused(group, values, says, compose) -> None:
    with pytest.raises(UserError, match=says.replace(".", r"\.")) as caught:
        compose("eval", "run=x", saved={**SAVED, group: values})
    assert isinstance(caught.value, RunError) or "model" in str(caught.value)


@pytest.mark.parametrize("group", ["task", "model"])
def test_a_saved_group_that_is_no_mapping_is_refused(group, scratch, call) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text('{"format": 1}')
    for value in ("3", "[1]", "null", "text"):
        Path("run/config.yaml").write_text(f"{group}: {value}\n")
        answer = call("eval", "run=run")
        assert answer.code == 2, answer
        assert "internal" not in answer.err


NUMBERS = itertools.count()
CLASSIFICATION = "defaults: [/schema/task/classification@_here_, _self_]"


def own_task(folder: Path, *lines: str) -> str:
    """Write a task file and return its name, new each time: Hydra remembers a process's search paths."""
    name = f"mine{next(NUMBERS)}"
    (folder / "task").mkdir(parents=True)
    (folder / "task" / f"{name}.yaml").write_text("\n".join([*lines, f"name: {name}"]))
    return name


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("lable: x", "no such key task.lable. Did you mean task.label?"),
        ("data: {trian: x}", "no such key task.data.trian. Did you mean task.data.train?"),
        ("max_length: many", "task.max_length: a whole number"),
    ],
)
def test_a_mistake_in_ones_own_file_is_told_with_file_and_key(line: str, says: str, compose) -> None:
    name = own_task(Path("conf"), CLASSIFICATION, line)
    with pytest.raises(UserError) as caught:
        compose("train", f"task={name}")
    assert str(caught.value) == f"conf/task/{name}.yaml: {says}"


def test_ones_own_task_without_a_kind_is_told_how_to_begin(compose) -> None:
    name = own_task(Path("conf"), "label: x")
    with pytest.raises(UserError, match=r"\.yaml: task.label .* begin with defaults: \[/schema/task/"):
        compose("train", f"task={name}")


@pytest.mark.parametrize("flag", [["--config-dir", "own"], ["--config-dir=own"]], ids=len)
def test_options_of_a_config_dir_are_in_hints_and_help(flag: list[str], compose, call) -> None:
    name = own_task(Path("own"), CLASSIFICATION)
    assert one(compose("train", f"task={name}", *flag)).task.name == name
    assert f"Did you mean {name}?" in call("train", f"task={name}x", *flag).err
    assert f" {name}," in call("train", "--help", *flag).out


def test_a_sweep_that_does_not_compose_leaves_nothing(compose) -> None:
    with pytest.raises(UserError):
        compose("train", "-m", "lora.r=4,x")
    with pytest.raises(UserError):
        compose("train", "-m", "lora.r=4,x", "hydra.sweep.dir=mine")
    assert list(Path().iterdir()) == []


def test_a_sweep_leaves_what_was_there_before(compose) -> None:
    Path("runs/ranks").mkdir(parents=True)
    Path("runs/ranks/note.txt").touch()
    with pytest.raises(UserError):
        compose("train", "-m", "lora.r=4,x", "hydra.sweep.dir=runs/ranks")
    assert Path("runs/ranks/note.txt").exists()


@pytest.mark.parametrize("value", ["${oc.env:HF_TOKEN}", "a/${oc.env:HOME}/b", "${oc.decode:${oc.env:HF_TOKEN}}"])
def test_the_environment_is_not_read_into_a_config(value: str, compose, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    with pytest.raises(ConfigError, match=r"model\.path.*environment") as caught:
        compose("train", f"model.path='{value}'")
    assert "hf_planted" not in str(caught.value)


def test_options_of_one_folder_are_none_of_another(compose, tmp_path, monkeypatch) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "conf" / "task").mkdir(parents=True)
    text = "defaults: [/schema/task/classification@_here_, _self_]\nname: here\n"
    (tmp_path / "one" / "conf" / "task" / "here.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "one")
    assert one(compose("train", "task=here")).task.name == "here"
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UnknownName):
        compose("train", "task=here")
