"""The hints of training: where a head is told to look."""

import torch

from model.nano.batches import Asked
from model.nano.losses import _following


def test_what_follows_is_sought_one_token_early_where_that_token_stands_nowhere():
    """A quote or a break of lines before it; but nothing beyond the answer."""
    #       suffix  key   "   a   b   "  end pad
    places = [[-1, -1, -1, 10, 11, -1, -1, -1]]
    is_answer = [[True, True, True, True, True, True, False, False]]
    asked = Asked(torch.zeros(1, 8).long(), torch.tensor(is_answer), torch.tensor(places), ["read"])
    assert _following(asked).tolist() == [[-1, 10, 10, 11, -1, -1, -1, -1]]


def test_a_place_of_the_next_row_is_not_looked_for():
    """What is rolled beyond the end comes back at the start: it must not count."""
    places = torch.tensor([[5, 6, 7, 8]])
    asked = Asked(
        torch.zeros(1, 4).long(), torch.tensor([[False, True, True, False]]), places, [""]
    )
    assert _following(asked).tolist() == [[-1, 7, 8, -1]]
