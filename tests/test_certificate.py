"""What is said of two models' logits."""

from __future__ import annotations

import torch

from lora_cli.certificate import difference, in_words


def test_gaps_are_counted_over_all_batches() -> None:
    before = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0]])]
    after = [torch.tensor([[0.0, 1.0], [0.5, 1.0]]), torch.tensor([[2.0, 0.0]])]
    found = difference(before, after)
    assert found == {"largest_difference": 1.0, "mean_difference": 0.25, "changed": 1, "predictions": 3}
    assert in_words(found) == "1 of 3 predictions change; logits differ by 1.0e+00 at most, 2.5e-01 on average"


def test_a_number_that_is_predicted_has_no_label_to_change() -> None:
    assert difference([torch.zeros(2, 1)], [torch.ones(2, 1)])["changed"] == 0
