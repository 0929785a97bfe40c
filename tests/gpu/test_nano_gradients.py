"""Recorded steps of training against the same steps as they are."""

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from model.nano.batches import Plan
from model.nano.gradients import Gradients
from model.nano.sizes import NANO
from model.nano.train import Settings, Training

pytestmark = pytest.mark.gpu
SIZE = replace(NANO, layers=8, vision_layers=1)


@pytest.fixture
def training(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # the tint of the paper
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield Training(Settings(tmp_path, 1, workers=0, tokens=2600, size=SIZE))


@pytest.mark.parametrize("plan", [Plan(2600, easy=0), Plan(easy=0, vision=4)])
def test_a_replayed_batch_gives_what_the_batch_itself_gives(training, plan):
    parameters = list(training.parameters())
    plain, recorded = (
        Gradients(training.losses, parameters, compiled=False, recorded=recorded)
        for recorded in (False, True)
    )
    batches, seen = iter(training.batches(plan)), {}
    while max((len(b) for b in seen.values()), default=0) < 4:
        batch = next(batches)
        seen.setdefault(batch.layout, []).append(batch)
    for batch in max(seen.values(), key=len):
        found = recorded(batch)
        losses = {name: float(value) for name, value in found.items()}
        gradients = take_gradients(parameters)
        expected = {name: float(value) for name, value in plain(batch).items()}
        assert losses == pytest.approx(expected, rel=1e-3)
        for gradient, slow in zip(gradients, take_gradients(parameters), strict=True):
            assert (gradient is None) == (slow is None)
            if slow is not None and slow.norm() > 0:
                assert (gradient - slow).norm() / slow.norm() < 2e-2  # sums in any order, in bf16
    assert recorded._records


def take_gradients(parameters):
    taken = [None if p.grad is None else p.grad.float().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def test_every_weight_that_answers_depend_on_is_told_how_to_change(training):
    """Kernels have no derivative: once one stood in for the last norm, and no layer learnt."""
    batch = next(iter(training.batches(Plan(2600, easy=0))))
    found = training.losses(False)(batch.to("cuda"))
    found["answer"].backward()
    hints = {n for n, _ in training.heads.named_parameters(prefix="heads")}
    without = {n for n, p in training._named() if p.grad is None or not p.grad.any()} - hints
    assert not without
