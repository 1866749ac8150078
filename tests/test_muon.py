"""muon.py: its steps against torch's own, and what it makes of a matrix."""

import pytest
import torch

from adapter import load

muon = load("muon")


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(muon, "fast_bf16", lambda device: False)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_directions_stay_and_all_become_about_equally_strong(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=generator)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s[:, -1] = s[:, 0] / 30                 # one direction is weak
    found = muon.orthogonalise(u * s[:, None] @ v)
    strengths = torch.einsum("nak,nab,nkb->nk", u, found, v)
    assert 0.6 < strengths.min() and strengths.max() < 1.25
    torch.testing.assert_close(u * strengths[:, None] @ v, found, atol=1e-4, rtol=1e-4)
    assert muon.orthogonalise(torch.zeros(1, *shape)).eq(0).all()


def walk(make, shapes):
    """The weights after six steps on random gradients; the third one has none at first."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape) / 4) for shape in shapes]
    first = [p.detach().clone() for p in weights]
    optimizer = make(weights)
    for step in range(6):
        for number, p in enumerate(weights):
            p.grad = None if number == 2 and step < 3 else torch.randn_like(p)
        optimizer.step()
        if step == 2:                       # without a gradient not even weight decay
            assert torch.equal(weights[2], first[2])
    assert all((p - x).abs().max() > 0.04 for p, x in zip(weights, first))
    return weights


def test_its_steps_are_those_of_torch_and_a_convolution_is_a_matrix():
    options = {"lr": 0.1, "weight_decay": 0.3}
    found = walk(lambda weights: muon.Muon(weights, **options),
                 [(12, 8), (8, 3, 2, 2), (12, 8), (8, 8)])
    expected = walk(lambda weights: torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw",
                                                     **options),
                    [(12, 8), (8, 12), (12, 8), (8, 8)])
    for one, other in zip(found, expected):         # torch computes directions in bf16
        torch.testing.assert_close(one.flatten(1), other, atol=5e-3, rtol=0)
