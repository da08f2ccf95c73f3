import math

import pytest
import torch
from torch import distributions as reference

from longdream.controller.distributions import BoundedNormal, Categoricals, distribution, outputs

PARTS = [(2,), (5,), (3, 2), (2, 4, 3)]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.3])
def test_factors_against_torch(parts: tuple[int, ...], unimix: float) -> None:
    logits = 2 * torch.randn(6, 4, sum(parts), requires_grad=True)
    ours = Categoricals(logits, parts, unimix)
    theirs = [
        reference.Categorical(probs=(1 - unimix) * part.softmax(-1) + unimix / part.shape[-1])
        for part in logits.split(parts, -1)
    ]
    action = ours.sample()
    assert action.shape == logits.shape and action.dtype == torch.float32
    index = [part.argmax(-1) for part in action.split(parts, -1)]
    assert all((part.sum(-1) == 1).all() and set(part.unique().tolist()) == {0, 1} for part in action.split(parts, -1))
    wanted = (
        sum(d.log_prob(i) for d, i in zip(theirs, index, strict=True)),
        sum(d.entropy() for d in theirs),
    )
    for got, want in zip((ours.log_prob(action), ours.entropy()), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        ga, gb = (torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (got, want))
        torch.testing.assert_close(ga, gb, rtol=1e-4, atol=1e-5)
    modes = [part.argmax(-1) for part in ours.mode().split(parts, -1)]
    assert all(torch.equal(m, d.probs.argmax(-1)) for m, d in zip(modes, theirs, strict=True))


@pytest.mark.parametrize("parts", [(4,), (3, 2)])
def test_samples_are_as_frequent_as_they_should_be(parts: tuple[int, ...]) -> None:
    logits = torch.randn(sum(parts))
    n = 40_000
    draws = Categoricals(logits.expand(n, -1), parts, 0.1)
    often = draws.sample()
    wanted = torch.cat([p[0] for p in draws.probs])
    assert ((often.mean(0) - wanted).abs() < 5 * (wanted * (1 - wanted) / n).sqrt()).all()
    if len(parts) > 1:  # and factors are independent
        a, b = often.split(parts, -1)
        joint = a.T @ b / n
        assert (joint - wanted[:3, None] * wanted[3:]).abs().max() < 0.015


def test_unimix_is_a_floor() -> None:
    policy = Categoricals(torch.tensor([[1e4, 0.0, 0.0, -1e4, 1e4]]), (3, 2), 0.3)
    assert [p.min().item() for p in policy.probs] == pytest.approx([0.1, 0.15])
    assert all(p.sum().item() == pytest.approx(1) for p in policy.probs)


@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_a_policy_that_is_certain_stays_finite(unimix: float) -> None:
    """Softmax underflows to zero at logits that a long training reaches."""
    logits = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    policy = Categoricals(logits, (3,), unimix)
    log_prob = policy.log_prob(torch.tensor([[1.0, 0.0, 0.0]]))
    entropy = policy.entropy()
    assert log_prob.item() == pytest.approx(math.log(1 - unimix * 2 / 3), abs=1e-5)
    assert entropy.item() == pytest.approx(0, abs=0.1)
    assert torch.autograd.grad((log_prob + entropy).sum(), logits)[0].isfinite().all()
    never = policy.log_prob(torch.tensor([[0.0, 0.0, 1.0]]))
    assert never.isfinite().all() and never < -5


def test_boxes_against_torch() -> None:
    raw = torch.randn(6, 4, 6, requires_grad=True)
    ours = BoundedNormal(raw)
    theirs = reference.Independent(reference.Normal(ours.mean, ours.deviation), 1)
    action = ours.sample().detach()
    assert action.shape == (6, 4, 3)
    for got, want in ((ours.log_prob(action), theirs.log_prob(action)), (ours.entropy(), theirs.entropy())):
        torch.testing.assert_close(got, want)
        ga, gb = (torch.autograd.grad(v.sum(), raw, retain_graph=True)[0] for v in (got, want))
        torch.testing.assert_close(ga, gb)
    assert torch.equal(ours.mode(), theirs.mean)


def test_boxes_stay_within_their_bounds() -> None:
    for value in (-1e4, 0.0, 1e4):
        policy = BoundedNormal(torch.full((1, 4), value))
        assert policy.mode().abs().max() <= 1
        assert policy.deviation.min().item() >= 0.1 and policy.deviation.max().item() <= 1 + 1e-6
    draws = BoundedNormal(torch.tensor([0.3, -2.0, 0.5, -3.0]).expand(40_000, -1))
    sample = draws.sample()
    assert (sample.mean(0) - draws.mean[0]).abs().max() < 0.02
    assert (sample.std(0) - draws.deviation[0]).abs().max() < 0.02


def test_what_a_policy_puts_out() -> None:
    assert [outputs(parts, 9) for parts in PARTS] == [2, 5, 5, 9] and outputs((), 3) == 6
    assert isinstance(distribution(torch.zeros(2, 5), (3, 2), 0.0), Categoricals)
    box = distribution(torch.zeros(2, 6), (), 0.0)
    assert isinstance(box, BoundedNormal) and box.sample().shape == (2, 3)


def test_a_good_action_is_learned_however_unlikely() -> None:
    """Logits that once learned the wrong of three actions, so surely that only the uniform part draws another."""
    logits = torch.tensor([0.0, -10.0, 8.0], requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(400):
        policy = Categoricals(logits.expand(64, -1), (3,), 0.1)
        action = policy.sample()
        reward = action[:, 1]
        value = policy.probs[0][:, 1].detach()
        optimizer.zero_grad()
        (-policy.gain(action, reward - value)).mean().backward()
        optimizer.step()
    torch.set_rng_state(generator_state)
    assert Categoricals(logits.detach(), (3,), 0.1).probs[0][1] > 0.9


@pytest.mark.parametrize("unimix", [0.0, 0.2])
def test_what_a_policy_gradient_climbs(unimix: float) -> None:
    """Its value is that of the log-probability; its gradient that of the mixture where an action was bad, and of the
    softmax where it was good."""
    logits = torch.randn(50, 5, dtype=torch.float64, requires_grad=True)
    policy = Categoricals(logits, (3, 2), unimix)
    action = policy.sample()
    advantage = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(policy.gain(action, advantage), advantage * policy.log_prob(action))
    (got,) = torch.autograd.grad(policy.gain(action, advantage).sum(), logits, retain_graph=True)
    (mixture,) = torch.autograd.grad((advantage * policy.log_prob(action)).sum(), logits)
    softmax = advantage[:, None] * (action - torch.cat([p.softmax(-1) for p in logits.split([3, 2], -1)], -1))
    torch.testing.assert_close(got, torch.where(advantage[:, None] > 0, softmax, mixture).detach())
    normal = distribution(torch.randn(7, 4), (), unimix)
    draws = normal.sample()
    torch.testing.assert_close(
        normal.gain(draws, advantage[:7].float()), advantage[:7].float() * normal.log_prob(draws)
    )
