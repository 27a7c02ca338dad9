"""Structured inputs as one line, as in the files of microsoft/LoRA."""

from __future__ import annotations

import pytest

from lora_cli.errors import DataError
from lora_cli.tasks.text import WEBNLG_SEEN, linearise_dart, linearise_e2e, linearise_webnlg, webnlg_group


@pytest.mark.parametrize(
    ("meaning", "expected"),
    [
        (
            "name[Blue Spice], eatType[coffee shop], customer rating[5 out of 5], near[Crowne Plaza Hotel]",
            "name : Blue Spice | Type : coffee shop | customer rating : 5 out of 5 | near : Crowne Plaza Hotel",
        ),
        (
            "name[The Phoenix], food[Fast food], priceRange[£20-25], area[riverside], familyFriendly[yes]",
            "name : The Phoenix | food : Fast food | price : £20-25 | area : riverside | family friendly : yes",
        ),
        ("name[Inn, The],near[]", "name : Inn, The | near : "),
    ],
)
def test_e2e_meaning_is_one_line(meaning, expected):
    assert linearise_e2e(meaning) == expected


@pytest.mark.parametrize("meaning", ["name", "name[A] food[B]", "name[A], x", "[A]", "name[A"])
def test_a_line_that_is_no_e2e_meaning_is_refused(meaning):
    with pytest.raises(DataError, match=r"not a list of attribute\[value\]"):
        linearise_e2e(meaning)


@pytest.mark.mirror
def test_every_e2e_meaning_of_the_mirror_has_the_papers_attributes(e2e_test):
    lines = [linearise_e2e(meaning) for meaning in e2e_test]
    assert len(set(lines)) == 630
    names = {slot.split(" : ")[0] for line in lines for slot in line.split(" | ")}
    assert names == {"name", "Type", "food", "price", "customer rating", "area", "family friendly", "near"}


def test_triples_are_joined_by_bars():
    assert (
        linearise_webnlg(["Aarhus | leaderName | Jacob_Bundsgaard", "Aarhus | country | Denmark"])
        == "Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : country : Denmark"
    )


def test_relations_of_dart_are_in_lower_case():
    triples = [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "Mars Hill, North Carolina"]]
    assert (
        linearise_dart(triples)
        == "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina"
    )


def test_a_triple_of_two_parts_is_refused():
    with pytest.raises(DataError, match="not subject, relation and object: 'Aarhus"):
        linearise_webnlg(["Aarhus | leaderName"])
    with pytest.raises(DataError):
        linearise_dart([["Aarhus", "leaderName"]])


@pytest.mark.mirror
def test_every_webnlg_and_dart_row_of_the_mirror_is_one_line(mirror):
    import pyarrow.parquet as parquet

    webnlg = mirror / "datasets/webnlg-challenge/web_nlg/webnlg_challenge_2017/test-00000-of-00001.parquet"
    rows = parquet.read_table(webnlg).to_pylist()
    lines = [linearise_webnlg(row["modified_triple_sets"]["mtriple_set"][0]) for row in rows]
    assert [line.count(" | ") + 1 for line in lines] == [row["size"] for row in rows]
    groups = [webnlg_group(row["category"]) for row in rows]
    assert (groups.count("seen"), groups.count("unseen")) == (971, 891)
    dart = parquet.read_table(mirror / "datasets/Yale-LILY/dart/default/validation-00000-of-00001.parquet").to_pylist()
    assert all(linearise_dart(row["tripleset"]) for row in dart)


@pytest.mark.mirror
def test_seen_categories_are_those_of_the_training_rows(mirror):
    import pyarrow.parquet as parquet

    path = mirror / "datasets/webnlg-challenge/web_nlg/webnlg_challenge_2017/train-00000-of-00001.parquet"
    assert set(parquet.read_table(path, columns=["category"])["category"].to_pylist()) == WEBNLG_SEEN
