import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longdream.controller import returns
from longdream.controller.returns import ReturnScale, lambda_returns

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def draw(batch: int, horizon: int, seed: int):
    """reward, discount (some of it zero) and value, float64."""
    make = torch.Generator().manual_seed(seed)
    reward, value = (torch.randn(batch, n, generator=make, dtype=torch.float64) for n in (horizon, horizon + 1))
    discount = torch.rand(batch, horizon, generator=make, dtype=torch.float64)
    return reward, discount * (torch.rand(batch, horizon, generator=make) > 0.2), value


def n_step(reward, discount, value, t: int, n: int):
    """Rewards of n steps from t on, then the value of where they lead."""
    total = torch.zeros_like(reward[:, 0])
    scale = torch.ones_like(reward[:, 0])
    for i in range(t, t + n):
        total = total + scale * reward[:, i]
        scale = scale * discount[:, i]
    return total + scale * value[:, t + n]


def test_by_hand() -> None:
    """R_2 = 4 + .5 * 10 = 9; R_1 = 2 + .8 (.5 * 6 + .5 * 9) = 8; R_0 = 1 + .9 (.5 * 4 + .5 * 8) = 6.4."""
    reward = torch.tensor([[1.0, 2.0, 4.0]])
    discount = torch.tensor([[0.9, 0.8, 0.5]])
    value = torch.tensor([[100.0, 4.0, 6.0, 10.0]])
    assert lambda_returns(reward, discount, value, 0.5)[0].tolist() == pytest.approx([6.4, 8.0, 9.0])


@given(sizes, sizes, st.floats(0, 1), seeds)
def test_they_are_the_mixture_of_n_step_returns(batch: int, horizon: int, lam: float, seed: int) -> None:
    """(1 - lam) sum of lam^(n-1) G_n, and the weight that is left on the longest (Sutton and Barto 2018, eq. 12.3)."""
    reward, discount, value = draw(batch, horizon, seed)
    got = lambda_returns(reward, discount, value, lam)
    assert got.shape == (batch, horizon)
    for t in range(horizon):
        longest = horizon - t
        wanted = lam ** (longest - 1) * n_step(reward, discount, value, t, longest)
        for n in range(1, longest):
            wanted = wanted + (1 - lam) * lam ** (n - 1) * n_step(reward, discount, value, t, n)
        torch.testing.assert_close(got[:, t], wanted)


@given(sizes, sizes, seeds)
def test_limits_of_lambda(batch: int, horizon: int, seed: int) -> None:
    reward, discount, value = draw(batch, horizon, seed)
    torch.testing.assert_close(lambda_returns(reward, discount, value, 0.0), reward + discount * value[:, 1:])
    whole = lambda_returns(reward, discount, value, 1.0)
    for t in range(horizon):
        torch.testing.assert_close(whole[:, t], n_step(reward, discount, value, t, horizon - t))


@pytest.mark.parametrize("horizon", [1, 2, 3, 7, 64, 129])
def test_doubling_is_the_same_as_one_after_another(horizon: int) -> None:
    for seed in range(5):
        reward, discount, value = draw(3, horizon, seed)
        follows = torch.rand(3, horizon, generator=torch.Generator().manual_seed(seed)) > 0.2
        for cut in (None, follows):
            fast = returns._by_doubling(reward, discount, value, 0.9, cut)
            torch.testing.assert_close(fast, lambda_returns(reward, discount, value, 0.9, cut))


def test_long_pieces_are_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, discount, value = draw(2, returns.LONG + 3, 0)
    long = lambda_returns(reward, discount, value, 0.95)
    monkeypatch.setattr(returns, "LONG", returns.LONG + 3)
    torch.testing.assert_close(long, lambda_returns(reward, discount, value, 0.95))


@given(st.integers(2, 12), st.floats(0, 1), seeds)
def test_pieces_that_do_not_follow_from_each_other_are_apart(horizon: int, lam: float, seed: int) -> None:
    reward, discount, value = draw(3, horizon, seed)
    cut = 1 + seed % (horizon - 1)
    follows = torch.ones(3, horizon, dtype=torch.bool)
    whole = lambda_returns(reward, discount, value, lam)
    torch.testing.assert_close(lambda_returns(reward, discount, value, lam, follows), whole)
    follows[:, cut] = False
    got = lambda_returns(reward, discount, value, lam, follows)
    for rows, states in ((slice(cut), slice(cut + 1)), (slice(cut, None), slice(cut, None))):
        wanted = lambda_returns(reward[:, rows], discount[:, rows], value[:, states], lam)
        torch.testing.assert_close(got[:, rows], wanted)


@given(st.integers(2, 12), st.floats(0, 1), seeds)
def test_nothing_comes_from_behind_an_end(horizon: int, lam: float, seed: int) -> None:
    reward, discount, value = draw(2, horizon, seed)
    end = seed % (horizon - 1)
    discount[:, end] = 0
    before = lambda_returns(reward, discount, value, lam)
    reward[:, end + 1 :] += 1e6
    value[:, end + 1 :] -= 1e6
    after = lambda_returns(reward, discount, value, lam)
    assert torch.equal(before[:, : end + 1], after[:, : end + 1])
    torch.testing.assert_close(before[:, end], reward[:, end])


def test_the_scale_is_the_spread_but_not_less_than_the_floor() -> None:
    scale = ReturnScale(0.5)
    assert scale.update(torch.linspace(0, 100, 101).view(1, 101)).item() == pytest.approx(90)  # at once, not from zero
    for _ in range(2000):
        last = scale.update(torch.linspace(0, 10, 101))
    assert last.item() == pytest.approx(9, rel=1e-3)
    assert ReturnScale(0.5).update(torch.ones(3, 4)).item() == 0.5
    far = ReturnScale(0.5)
    far.update(torch.cat([torch.zeros(98), torch.tensor([1e6, -1e6])]))
    assert far.high == far.low == 0  # outliers beyond the percentiles have no say


def test_the_scale_moves_at_its_rate_and_is_saved() -> None:
    scale = ReturnScale(0.1, rate=0.25)
    scale.update(torch.full((8,), 4.0))
    scale.update(torch.full((8,), 8.0))
    assert scale.low.item() == scale.high.item() == pytest.approx(5)
    other = ReturnScale(0.1, rate=0.25)
    other.load_state_dict(scale.state_dict())
    spread = torch.linspace(0, 1, 50)
    assert other.update(spread) == scale.update(spread)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_the_scale_survives_returns_that_are_not_finite(broken: float) -> None:
    scale = ReturnScale(0.1)
    spread = torch.linspace(0, 10, 101)
    scale.update(torch.full((4,), broken))
    assert scale.update(spread).item() == pytest.approx(9)  # the first that is finite counts as the first
    scale.update(torch.cat([spread[:50], torch.full((20,), broken)]))
    assert scale.update(spread).item() == pytest.approx(9)
