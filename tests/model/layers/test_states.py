"""Packed states against what was written: no group of numbers loses more than a half level."""

import pytest
import torch

from model.layers.states import LEVELS, States, state_bytes


def draw(slots: int, size: int) -> torch.Tensor:
    """Groups of very different sizes, and one of zeros."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(slots, 2, size, size, generator=generator)
    state *= 10 ** torch.linspace(-20, 20, size)[:, None]
    state[0, 1, 3] = 0
    return state


@pytest.mark.parametrize("size", [16, 64, 128])
def test_a_packed_state_is_exact_to_half_a_level_of_its_group(size):
    state, states = draw(3, size), States.empty(5, 2, size, "cpu", packed=True)
    states.write([4, 0, 2], state)
    read = states.read([4, 0, 2])
    groups = state.unflatten(3, (-1, min(size, 64)))
    most = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(3)
    assert ((read - state).abs() <= most / LEVELS * 0.51).all()
    assert (read[0, 1, 3] == 0).all()
    assert (states.read([1, 3]) == 0).all()


def test_writing_what_was_read_changes_no_bit():
    states = States.empty(2, 2, 128, "cpu", packed=True)
    states.write([0], draw(1, 128))
    for _ in range(3):
        states.write([1], states.read([0]))
        assert torch.equal(states.data_SHKV[0], states.data_SHKV[1])


def test_what_is_not_finite_does_not_come_back_as_a_number():
    state, states = draw(2, 64), States.empty(2, 2, 64, "cpu", packed=True)
    state[0, 0, 5, 6], state[1, 1, 2, 3] = float("nan"), float("inf")
    states.write([0, 1], state)
    assert not states.read([0])[0, 0, 5, 6].isfinite()
    assert not states.read([1])[0, 1, 2, 3].isfinite()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_bytes_announced_are_those_of_a_slot(size, packed):
    states = States.empty(3, 4, size, "cpu", packed=packed)
    assert sum(pool.nbytes for pool in states.tensors) == 3 * state_bytes(4, size, packed=packed)
