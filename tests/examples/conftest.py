"""The examples' modules, and a mirror of a few rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

TRIPLES = {"mtriple_set": [["Aarhus_Airport | location | Tirstrup"]]}
LEX = {"text": ["Aarhus Airport is in Tirstrup.", "Tirstrup has an airport."]}
DART = {
    "tripleset": [["Mars Hill", "JOINED", "1973"]],
    "annotations": {
        "source": ["WikiSQL_lily", "e2e", "webnlg"],
        "text": ["Mars Hill joined in 1973.", "A cheap pub.", "Mars Hill was founded."],
    },
}
SPLITS = {
    "nyu-mll/glue/sst2/train": [{"sentence": "a fine film "}, {"sentence": "such a fine film "}, {"sentence": "film "}],
    "nyu-mll/glue/cola/train": [{"sentence": "They slept.", "label": 1}, {"sentence": "Slept they the.", "label": 0}],
    "aps/super_glue/copa/train": [
        {"premise": f"Day {day} was wet.", "choice1": f"It rained {day} times.", "choice2": f"All {day} pumps ran."}
        for day in range(300)
    ],
    "webnlg-challenge/web_nlg/webnlg_challenge_2017/train": [{"modified_triple_sets": TRIPLES, "lex": LEX}],
    "Yale-LILY/dart/default/validation": [DART],
    "tuetschek/e2e_nlg/default/train": [{"meaning_representation": "name[Aromi]", "human_reference": "Aromi."}],
    "knkarthick/samsum/default/train": [
        {"dialogue": f"Ann: Is train {n} late?\nBob: Yes, train {n} is late\nAnn: ok", "summary": f"Train {n} is late."}
        for n in range(40)
    ],
    "knkarthick/samsum/default/test": [
        {"dialogue": "Ann: Is train 7 late?\nBob: Yes, train 7 is late\nAnn: ok", "summary": "Late."}
    ],
}


@pytest.fixture(scope="session")
def toy_mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror whose data sets have a few rows each."""
    root = tmp_path_factory.mktemp("mirror")
    for split, rows in SPLITS.items():
        folder, _, name = split.rpartition("/")
        (root / "datasets" / folder).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "datasets" / folder / f"{name}-00000-of-00001.parquet")
    return root
