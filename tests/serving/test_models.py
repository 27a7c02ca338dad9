"""Saved runs as Python objects: what they take, and one line about everything else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora_cli import load, load_many
from lora_cli.errors import ConfigError
from lora_cli.serving.models import Models

from .conftest import TEXTS


@pytest.fixture(scope="module")
def many(films: Path) -> Models:
    return load_many([str(films)], device="cpu", threads=1)


@pytest.mark.parametrize(
    ("texts", "model", "said"),
    [
        (
            "my card is broken",
            None,
            r"^texts='my card is broken': a list of texts is needed, for one too: \[\"a text\"\]$",
        ),
        ({"text": "a"}, None, r"^texts={'text': 'a'}: a list"),
        (None, None, "^texts=None: a list"),
        ([None], None, "^input=None: a text is needed, or one for each of the columns$"),
        ([1], None, "^input=1: a text is needed"),
        ([b"aa"], None, "^input=b'aa': a text is needed"),
        (["aa"], 3, "^model=3: an adapter's name is needed, or one for each text$"),
    ],
    ids=str,
)
def test_what_are_no_texts_is_refused_in_one_line(texts: Any, model: Any, said: str, many: Models) -> None:
    with pytest.raises(ConfigError, match=said):
        many.predict(texts, model)


def test_texts_may_come_one_by_one(many: Models) -> None:
    assert many.predict(text for text in TEXTS) == many.predict(TEXTS)


def test_threads_may_share_the_python_object(many: Models) -> None:
    wanted = [row["label"] for row in many.predict(TEXTS)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(many.predict, [TEXTS] * 20))
    assert [[row["label"] for row in rows] for rows in found] == [wanted] * 20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_tokens": 4}, "^generate=max_tokens: no such setting. Did you mean max_new_tokens?"),
        ({"max_new_tokens": "4"}, "^max_new_tokens='4': a whole number is needed$"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: a whole number, 1 or more"),
        ({"stop": "end"}, "^stop='end': a list of texts is needed$"),
        ({"stop": [1]}, "^stop=.1.: a list of texts is needed$"),
        ({"top_k": 0.5, "sample": True}, "^top_k=0.5: a whole number, or None, is needed$"),
        ({"temperature": "hot", "sample": True}, "^temperature='hot': a number is needed$"),
    ],
    ids=str,
)
def test_a_wrong_setting_of_what_is_written_is_refused_in_one_line(
    settings: dict[str, Any], said: str, talks: Path
) -> None:
    written = load(talks / "x", device="cpu", threads=1)
    with pytest.raises(ConfigError, match=said):
        written.generate(["hi"], **settings)
    with pytest.raises(ConfigError, match=r"^texts='hi': a list of texts"):
        written.generate("hi")
    assert written.generate(["hi"], max_new_tokens=2, sample=True, temperature=1, top_k=None, stop=["b"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_tokens": 0}, "^batch_tokens=0: a whole number is needed, 1 or more$"),
        ({"batch_tokens": -5}, "^batch_tokens=-5: a whole"),
        ({"max_adapters": 0}, "^max_adapters=0: a whole"),
        ({"max_adapters": "2"}, "^max_adapters='2': a whole"),
        ({"max_bytes": 0}, "^max_bytes=0: a whole"),
        ({"threads": "2"}, "^threads='2': a whole"),
        ({"watch": True}, "^load=watch: no such setting. .*There are: batch_tokens, device, force_base, max_adapters"),
        ({"task": "support_intents"}, "^task='support_intents': a TaskSpec of lora_cli.spec is needed"),
        ({"model": "tiny-bert"}, "^model='tiny-bert': a ModelSpec of lora_cli.spec is needed"),
        ({"run": ""}, "^run='': the name or the folder of a run is needed$"),
        ({"run": None}, "^run=None: the name"),
    ],
    ids=str,
)
def test_a_wrong_setting_of_what_is_loaded_is_refused_in_one_line(settings: dict[str, Any], said: str, films: Path):
    with pytest.raises(ConfigError, match=said):
        load(**{"run": str(films / "a"), **settings})


def test_one_name_is_no_list_of_runs() -> None:
    with pytest.raises(
        ConfigError, match=r"^runs='cls/intents': a list of runs and adapters is needed; load.. takes one$"
    ):
        load_many("cls/intents")
