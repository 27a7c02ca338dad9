from __future__ import annotations

import socket
import sys
import threading
import time

import pytest
from huggingface_hub import constants, errors
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli import hub
from lora_cli.errors import ModelError, UserError


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    (tmp_path / "models" / "owner" / "name").mkdir(parents=True)
    (tmp_path / "datasets" / "owner" / "set" / "cfg").mkdir(parents=True)
    (tmp_path / "datasets" / "owner" / "set" / "cfg" / "train-00000-of-00001.parquet").touch()
    (tmp_path / "datasets" / "owner" / "set" / "empty").mkdir()
    monkeypatch.setenv("LORA_HUB_ROOT", str(tmp_path))
    return tmp_path


def refuse(*args, **kwargs):
    raise OSError("no route")


def test_mirror_gives_what_it_holds_and_none_for_the_rest(mirror):
    assert hub.mirror_model("owner/name") == mirror / "models" / "owner" / "name"
    assert hub.mirror_model("owner/other") is None
    assert hub.mirror_dataset("owner/set", "cfg") == mirror / "datasets" / "owner" / "set" / "cfg"
    assert hub.mirror_dataset("owner/set", "empty") is None
    assert hub.mirror_dataset("owner/set", "other") is None


@pytest.mark.parametrize("config", ["..", "../cfg", ".", "", "a/../cfg"])
def test_a_configuration_cannot_leave_its_data_set(mirror, config):
    assert hub.mirror_dataset("owner/set", config) is None


def test_no_mirror_without_the_variable(monkeypatch):
    monkeypatch.delenv("LORA_HUB_ROOT", raising=False)
    assert hub.mirror_model("owner/name") is None
    assert hub.mirror_dataset("owner/set", "cfg") is None


def test_a_mirror_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_HUB_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"LORA_HUB_ROOT=.*nowhere: no such folder"):
        hub.mirror_model("owner/name")


@pytest.mark.parametrize("hub_id", ["FacebookAI/roberta-base", "gpt2", "answerdotai/ModernBERT-base", "a/b.c_d-e"])
def test_real_hub_ids_are_accepted(hub_id):
    assert hub.check_hub_id(hub_id) == hub_id


@pytest.mark.parametrize("hub_id", ["", "../x", "a/../b", "a/b/c", "/a", "a/", "a b", "a\n", "a--b", "~/x", "a" * 200])
def test_what_is_no_hub_id_is_refused(hub_id):
    with pytest.raises(UserError, match="neither a folder that exists nor a hub id"):
        hub.check_hub_id(hub_id)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="a./\\~-_\0 é", max_size=12))
def test_an_accepted_id_stays_inside_the_mirror(hub_id):
    try:
        hub.check_hub_id(hub_id)
    except UserError:
        return
    assert ".." not in hub_id
    assert not hub_id.startswith("/")
    assert hub_id.count("/") <= 1


def test_offline_switch_refuses_at_once_and_says_so(no_proxy, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("dialled out"))
    with pytest.raises(UserError, match=r"data x is not on this machine, and HF_HUB_OFFLINE .*; run lora fetch"):
        hub.require_network("data x", "run lora fetch")


def test_no_connection_is_told_in_under_three_seconds_even_if_the_resolver_hangs(no_proxy, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: released.wait(20) and refuse())
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"no connection to huggingface\.co; get it elsewhere"):
        hub.require_network("model x", "get it elsewhere")
    assert time.perf_counter() - begin < 3
    released.set()


def test_a_refused_connection_is_told_at_once(no_proxy, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", refuse)
    begin = time.perf_counter()
    with pytest.raises(UserError, match="no connection"):
        hub.require_network("model x", "hint")
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "https_proxy"])
def test_nothing_is_probed_behind_a_proxy_or_another_endpoint(no_proxy, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://somewhere:3128")
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("dialled out"))
    hub.require_network("model x", "hint")


def test_a_model_that_is_nowhere_is_one_line_with_the_way_out(no_proxy, empty_cache, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(
        UserError, match=r"model owner/name \(v1\) is not on this machine.*model\.path=FOLDER"
    ) as caught:
        hub.fetch_model("owner/name", "v1")
    assert len(str(caught.value)) <= 300


def cached_snapshot(cache, *, files):
    """What the hub's library leaves in its cache."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


def test_a_cached_model_needs_no_network(no_proxy, empty_cache, monkeypatch):
    snapshot = cached_snapshot(empty_cache, files=["config.json", "model.safetensors"])
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert hub.fetch_model("owner/name") == snapshot


def test_a_cached_config_alone_is_no_model(no_proxy, empty_cache, monkeypatch):
    cached_snapshot(empty_cache, files=["config.json"])
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match="not on this machine"):
        hub.fetch_model("owner/name")


def test_a_cached_config_will_do_where_no_weights_are_wanted(no_proxy, empty_cache, monkeypatch):
    snapshot = cached_snapshot(empty_cache, files=["config.json"])
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert hub.fetch_model("owner/name", weights=False) == snapshot


@pytest.fixture
def fake_hub(tmp_path, no_proxy, empty_cache, monkeypatch):
    """A hub whose one model has no safetensors. Returns the patterns that were asked for."""
    asked = {}

    def snapshot_download(hub_id, *, local_files_only=False, **options):
        if local_files_only:
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("no")
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_files", lambda self, hub_id, revision: ["config.json", "pytorch_model.bin"]
    )
    monkeypatch.setattr(hub, "_answers", lambda host: True)
    return asked


def test_pickled_weights_are_never_loaded_and_the_error_names_the_way_out(fake_hub):
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*never loaded.*model\.revision.*model\.path") as caught:
        hub.fetch_model("microsoft/deberta-v2-xxlarge")
    assert len(str(caught.value)) <= 300


def test_downloads_name_neither_pickles_nor_code_nor_other_frameworks(fake_hub):
    from fnmatch import fnmatch

    with pytest.raises(ModelError):
        hub.fetch_model("owner/name")
    unwanted = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "modeling.py", "training_args.bin", "x.pkl"]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spm.model", "spiece.model"]
    taken = [name for name in [*unwanted, *wanted] if any(fnmatch(name, p) for p in fake_hub["allow_patterns"])]
    assert taken == wanted


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        ("RepositoryNotFoundError", "owner/name: the hub has no such model, or it is private"),
        ("GatedRepoError", "owner/name: access must be granted"),
        ("RevisionNotFoundError", "owner/name: the hub has no revision v9 of it"),
        ("HfHubHTTPError", "owner/name: the download failed: 500 for you"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(fake_hub, monkeypatch, error, complaint):
    kind = getattr(errors, error)

    def refuse(*args, **kwargs):
        raise kind.__new__(kind, "500 for you")

    monkeypatch.setattr(hub, "_cached", lambda *args, **wanted: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(kind, "__str__", lambda self: "500 for you", raising=False)
    with pytest.raises(ModelError, match=complaint):
        hub.fetch_model("owner/name", "v9")


def test_offline_is_felt_by_the_hub_library_and_can_be_undone(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.offline():
        assert constants.is_offline_mode()
        with hub.offline():
            pass
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()


def test_offline_is_felt_by_datasets_if_it_was_imported_before(monkeypatch):
    class Config:
        HF_HUB_OFFLINE = False

    monkeypatch.setitem(sys.modules, "datasets.config", Config)
    with hub.offline():
        assert Config.HF_HUB_OFFLINE
    assert not Config.HF_HUB_OFFLINE
