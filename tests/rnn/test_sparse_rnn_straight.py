"""Calls of nets without masks that go straight to torch's own RNN: whatever changes in between, the next call must
notice."""
import pytest
import torch
from torch import nn

import moduli_kernels as mk


@pytest.fixture
def net():
    torch.manual_seed(0)
    return mk.SparseRNN(3, 8, path="dense", dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch):
    """How often nn.RNN.forward was taken."""
    found = []
    forward = nn.RNN.forward

    def counted(self, *arguments):
        found.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(nn.RNN, "forward", counted)
    return found


X = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected(net):
    """By plain torch.nn.RNN with 0 where a weight is masked."""
    return net.to_rnn()(X)[0]


def keep(net, name="weight_hh_l0"):
    mask = torch.rand(8, getattr(net, name).shape[1], generator=torch.Generator().manual_seed(2)) < 0.5
    net.set_mask(name, mask)
    return mask


def test_the_second_call_goes_straight(net, calls):
    first = net(X)[0]
    assert not calls
    assert torch.equal(net(X)[0], first) and calls == [net]


def test_a_mask_that_is_set_later_counts(net):
    net(X), net(X)
    keep(net)
    torch.testing.assert_close(net(X)[0], expected(net))
    net(X)[0].sum().backward()
    assert (net.weight_hh_l0.grad[~net.weight_hh_l0_mask] == 0).all()


@pytest.mark.parametrize("change", ["mask", "weight", "copy"])
def test_with_a_mask_no_call_goes_straight(net, calls, change):
    mask = keep(net)
    with torch.no_grad():
        net(X), net(X)
        assert not calls
        if change == "mask":
            net.weight_hh_l0_mask.logical_not_()
        elif change == "weight":
            net.weight_hh_l0.masked_fill_(~mask, float("nan"))
        else:
            net.weight_hh_l0.copy_(torch.ones(8, 8))
        result = net(X)[0]
        torch.testing.assert_close(result, expected(net))


def test_a_weight_that_is_replaced_counts(net):
    net(X), net(X)
    net.weight_hh_l0 = nn.Parameter(torch.ones(8, 8, dtype=torch.float64))
    torch.testing.assert_close(net(X)[0], expected(net))


def test_path_backend_and_leak_count(net, calls):
    wanted = expected(net)
    net(X), net(X)
    taken = len(calls)
    net.path = "sparse"
    torch.testing.assert_close(net(X)[0], wanted)
    net.path = "auto"
    with mk.backend("reference"):
        torch.testing.assert_close(net(X)[0], wanted)
    net.leak = 0.5
    assert not torch.allclose(net(X)[0], wanted)
    assert len(calls) == taken


def test_another_shape_is_looked_at_anew(net):
    net(X), net(X)
    with pytest.raises((RuntimeError, ValueError)):
        net(X[..., :2])
    assert net(X[:, :1])[0].shape == (4, 1, 8)
    assert net(X[0])[0].shape == (2, 8)  # without a batch
