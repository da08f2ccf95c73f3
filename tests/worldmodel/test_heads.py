import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longdream.worldmodel.heads import RewardContinueHead, TwoHot
from longdream.worldmodel.networks import GatedLayer, mlp, symexp, symlog

numbers = st.floats(-(2.0**23), 2.0**23, width=32)


def two_hot(head: TwoHot, x: torch.Tensor) -> torch.Tensor:
    """Numbers `(...)` to vectors `(..., bins)` of the bins' weights."""
    above, share = head.encode(x)
    bins = torch.arange(len(head.bins))
    share = share[..., None]
    return (bins == above[..., None]) * share + (bins == above[..., None] - 1) * (1 - share)


@given(st.floats(-1e8, 1e8))
def test_symexp_undoes_symlog(value: float) -> None:
    x = torch.tensor(value, dtype=torch.float64)
    assert symlog(x).item() == pytest.approx(math.copysign(math.log1p(abs(value)), value), rel=1e-12)
    assert symexp(symlog(x)).item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert symlog(-x) == -symlog(x)


@given(numbers)
def test_a_number_survives_the_two_bins(value: float) -> None:
    head = TwoHot()
    weights = two_hot(head, torch.tensor([value]))[0]
    assert weights.sum().item() == pytest.approx(1) and (weights >= 0).all()
    used = weights.nonzero().flatten()
    assert len(used) <= 2 and used[-1] - used[0] <= 1
    assert head.mean(weights.log()).item() == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("count", "limit"), [(255, 20.0), (41, 20.0), (63, 5.0), (3, 1.0)])
def test_bins_are_symmetric_and_even_in_symlog(count: int, limit: float) -> None:
    bins = TwoHot(count, limit).bins
    assert len(bins) == count and bins[count // 2] == 0
    assert torch.equal(bins, -bins.flip(0))
    torch.testing.assert_close(
        symlog(bins.double()), torch.linspace(-limit, limit, count).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("count", [41, 255])
def test_even_weights_mean_exactly_nothing(count: int) -> None:
    """The outermost bins stand for hundreds of millions: they must cancel without a remainder."""
    head = TwoHot(count)
    half = torch.randn(50, count // 2)
    logits = torch.cat([half, torch.randn(50, 1), half.flip(-1)], -1)
    assert (head.mean(torch.zeros(3, 4, count)) == 0).all()
    assert (head.mean(logits) == 0).all()
    assert (head.mean(logits + torch.linspace(0, 0.01, count)) > 0).all()


def test_numbers_beyond_the_bins_are_clipped() -> None:
    head = TwoHot(63, 5.0)
    top = math.expm1(5)
    assert two_hot(head, torch.tensor([1e9, math.inf, -1e9])).argmax(-1).tolist() == [62, 62, 0]
    means = head.mean(two_hot(head, torch.tensor([1e9, -1e9, top])).log())
    assert means.tolist() == pytest.approx([top, -top, top], rel=1e-5)


@given(numbers)
def test_no_logits_cost_less_than_the_two_hot_ones(value: float) -> None:
    """The loss is a cross-entropy: at the target itself it is the target's entropy, and its gradient is zero."""
    head = TwoHot()
    x = torch.tensor([value])
    target = two_hot(head, x)
    logits = target.clamp(min=1e-12).log().requires_grad_()
    best = head.loss(logits, x)
    torch.testing.assert_close(best, torch.special.entr(target).sum(-1), rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(best.sum(), logits)[0].abs().amax() < 1e-5
    others = torch.randn(20, 255) * 5
    assert (head.loss(others, x.expand(20)) >= best - 1e-5).all()


def test_the_loss_finds_the_mean_of_what_it_sees() -> None:
    """Half zeros and half ones, on a shared row of logits; a head that predicted modes or medians would not say 0.5."""
    head = TwoHot(41)
    logits = torch.zeros(41, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.2)
    targets = torch.tensor([0.0, 1.0])
    for _ in range(200):
        loss = head.loss(logits.expand(2, -1), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert head.mean(logits).item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("lead", [(7,), (3, 5), (2, 3, 4)])
def test_consequences(lead: tuple[int, ...]) -> None:
    heads = RewardContinueHead(features=6, actions=2, hidden=8, bins=41)
    feat = torch.randn(*lead, 6)
    action = torch.randn(*lead, 2)
    reward_logits, cont_logit = heads(feat, action)
    assert reward_logits.shape == (*lead, 41) and cont_logit.shape == lead
    reward, cont = heads.expect(feat, action)
    assert reward.shape == cont.shape == lead
    assert (reward == 0).all()  # nothing is promised before anything was seen
    assert ((cont > 0) & (cont < 1)).all()
    with torch.no_grad():
        for weight in heads.parameters():
            weight += torch.randn_like(weight)
    for read in (0, 1):  # both depend on both
        other = [feat, action]
        other[read] = torch.randn_like(other[read])
        for old, new in zip(heads.expect(feat, action), heads.expect(*other), strict=True):
            assert (old != new).any()


def test_half_precision_features_give_single_precision_numbers() -> None:
    heads = RewardContinueHead(6, 2, 8, 41)
    with torch.autocast("cpu", torch.bfloat16):
        reward, cont = heads.expect(torch.randn(4, 6), torch.randn(4, 2))
        loss = heads.two_hot.loss(heads(torch.randn(4, 6), torch.randn(4, 2))[0], torch.ones(4))
    assert reward.dtype == cont.dtype == loss.dtype == torch.float32
    assert (reward == 0).all()


def test_mlp_depth_and_zero_start() -> None:
    x = torch.randn(5, 3)
    for layers in (1, 2, 4):
        net = mlp(3, 8, 2, layers)
        assert sum(isinstance(part, GatedLayer) for part in net) == layers and isinstance(net[-1], torch.nn.Linear)
        assert net(x).shape == (5, 2) and net(x).any()
        zero = mlp(3, 8, 2, layers, zero=True)
        assert not zero(x).any()
        zero(x).square().sub(1).abs().sum().backward()
        assert zero[-1].weight.grad is not None
