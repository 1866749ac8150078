"""RoPE stands in both hosts, since each file is read alone; both are put under the same oracles."""

import pytest
import torch

import small

hosts = pytest.mark.parametrize("host", [small.chameleon, small.transfusion],
                                ids=["chameleon", "transfusion"])


@hosts
@pytest.mark.parametrize("theta", [10_000.0, 50.0])
@pytest.mark.parametrize("positions", [[[0, 1, 2, 3]], [[7, 8, 9, 10], [90, 3, 3, 0]]],
                         ids=["one row for all", "a row each"])
def test_rotary_and_rotate_against_a_loop_over_pairs(host, theta, positions):
    x, positions = torch.randn(2, 4, 3, 10), torch.tensor(positions)
    rope = host.rotary(positions, 10, theta)
    assert [part.shape for part in rope] == [(len(positions), 4, 1, 5)] * 2
    found = host.rotate(x, rope)
    for b in range(2):
        for head in range(3):
            expected = small.turned(x[b, :, head], positions.expand(2, 4)[b], theta)
            torch.testing.assert_close(found[b, :, head].double(), expected, rtol=0, atol=2e-5)


@hosts
def test_rotate_keeps_norms_and_products_depend_on_the_distance_alone(host):
    q, k = torch.randn(2, 1, 1, 3, 16).expand(2, 1, 9, 3, 16)

    def product(start_q, start_k):
        turned = [host.rotate(x, host.rotary(start + torch.arange(9)[None], 16, 1e4))
                  for x, start in ((q, start_q), (k, start_k))]
        torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))
        return (turned[0] * turned[1]).sum(-1)

    near = product(0, 5)
    torch.testing.assert_close(near, near[:, :1].expand_as(near), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(near, product(70, 75), rtol=1e-4, atol=1e-4)
    assert (near - product(0, 6)).abs().min() > 1e-2
    torch.testing.assert_close(product(0, 0), (q * k).sum(-1))
