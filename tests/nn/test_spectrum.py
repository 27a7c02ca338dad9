"""Spectra from the factors are those of the dense update."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.nn.spectrum import Spectrum, singular_values, spectra, suggested_ranks

from .adapters import stored


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_singular_values_are_those_of_the_dense_product(r: int, inputs: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator).double() for shape in ((r, inputs), (outputs, r)))
    dense = torch.linalg.svdvals(B @ A)[:r]
    found = singular_values(A, B)
    assert len(found) == r
    torch.testing.assert_close(found[: len(dense)], dense, rtol=1e-9, atol=1e-9)
    assert not found[len(dense) :].any()


@pytest.mark.parametrize("spec", [{}, {"scaling": "alpha/sqrt(r)"}, {"variant": "dora"}, {"targets": ["embed_tokens"]}])
def test_norm_is_that_of_the_update_and_layers_come_largest_first(spec: dict[str, Any], tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", **spec)
    found = spectra(adapter)
    for spectrum in found:
        assert spectrum.norm == pytest.approx(float(adapter.layers[spectrum.layer].delta().norm()), rel=1e-9)
    assert [spectrum.norm for spectrum in found] == sorted((spectrum.norm for spectrum in found), reverse=True)


def test_each_part_of_a_fused_projection_has_its_own_spectrum(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "a", family="gpt2", targets=["c_attn:q+v"], r=3)
    name = "transformer.h.0.attn.c_attn"
    query, _, value = adapter.layers[name].delta().chunk(3)
    found = {spectrum.name: spectrum for spectrum in spectra(adapter)}
    assert found[f"{name}:q"].norm == pytest.approx(float(query.norm()))
    assert found[f"{name}:v"].norm == pytest.approx(float(value.norm()))
    assert found[f"{name}:q"].r == 3


def test_equal_values_use_every_rank_and_one_value_uses_one() -> None:
    flat, single = Spectrum("a", "", (2.0, 2.0, 2.0, 2.0)), Spectrum("b", "", (3.0, 0.0, 0.0, 0.0))
    assert flat.effective_rank == pytest.approx(4)
    assert single.effective_rank == pytest.approx(1)
    assert flat.energy == pytest.approx((0.25, 0.5, 0.75, 1))
    assert (flat.rank_at(0.5), flat.rank_at(0.51), flat.rank_at(1.0)) == (2, 3, 4)
    assert single.rank_at(1.0) == 1


def test_entropy_is_natural_and_of_the_values_themselves() -> None:
    shares = (0.5, 0.3, 0.2)
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert Spectrum("a", "", tuple(7 * share for share in shares)).effective_rank == pytest.approx(expected)


def test_an_untrained_update_has_no_effective_rank() -> None:
    zero = Spectrum("a", "", (0.0, 0.0))
    assert (zero.norm, zero.effective_rank, zero.rank_at(0.9)) == (0, 0, 1)


def test_parts_of_a_layer_are_suggested_one_rank() -> None:
    found = [Spectrum("a", "q", (1.0, 0.1)), Spectrum("a", "v", (1.0, 1.0)), Spectrum("b", "", (1.0, 0.0))]
    assert suggested_ranks(found, 0.9) == {"a": 2, "b": 1}
