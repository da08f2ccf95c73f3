from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longdream.controller.actor_critic import ActorCritic
from longdream.controller.config import ControllerConfig
from longdream.worldmodel.dream import Clip, Dream

CONFIG = ControllerConfig(hidden=32, layers=1, bins=81, gamma=0.9, entropy=1e-3, return_floor=0.1, target_ema=0.05)


def build(states: int, parts: tuple[int, ...] = (2,), actions: int = 2, **options) -> ActorCritic:
    return ActorCritic(replace(CONFIG, **options), states, parts, actions)


@torch.no_grad()
def dream(agent: ActorCritic, states: int, horizon: int, step, batch: int = 64) -> Dream:
    """Dreams of a world of numbered states, as one-hots: `step(state, action)` is reward, cont and the next state."""
    state = torch.randint(0, states, (batch,))
    feats = [F.one_hot(state, states).float()]
    actions = []
    rewards = []
    conts = []
    for _ in range(horizon):
        action = agent.act(feats[-1], greedy=False)
        reward, cont, state = step(state, action)
        feats.append(F.one_hot(state, states).float())
        actions.append(action)
        rewards.append(reward)
        conts.append(cont)
    feat, action, reward, cont = (torch.stack(v, 1) for v in (feats, actions, rewards, conts))
    return Dream(feat, action, reward, cont, torch.zeros(batch, horizon, 1, 1), torch.ones(batch))


def learn(agent: ActorCritic, make, updates: int, rate: float = 1e-2) -> None:
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], rate)
    for _ in range(updates):
        value = agent.loss(make()).value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        agent.after_update()


def chain(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Five places in a row. Action 0 takes 0.2 and ends; action 1 walks on, and from the last place pays 1 and ends."""
    walk = action[:, 1] > 0.5
    last = state == 4
    reward = torch.where(walk, last.float(), 0.2)
    return reward, (walk & ~last).float(), (state + walk.long()).clamp(max=4)


@pytest.mark.parametrize("horizon", [2, 6])
def test_a_late_reward_beats_an_early_one(horizon: int) -> None:
    """Four steps away it is worth .9^4 = .66; dreams of two steps must trust the critic for it."""
    agent = build(5)
    learn(agent, lambda: dream(agent, 5, horizon, chain), 200)
    places = torch.eye(5)
    assert agent.act(places, greedy=True)[:, 1].tolist() == [1.0] * 5
    assert agent.policy(places).probs[0][:, 1].min() > 0.9
    assert agent.value(places).tolist() == pytest.approx([0.9**n for n in (4, 3, 2, 1, 0)], abs=0.1)


def test_an_early_reward_beats_one_that_is_too_late() -> None:
    """The same world with gamma .5: from the first three places .5^n is less than what can be had at once."""
    agent = build(5, gamma=0.5)
    learn(agent, lambda: dream(agent, 5, 6, chain), 150)
    assert agent.act(torch.eye(5), greedy=True)[:, 1].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert agent.value(torch.eye(5)).tolist() == pytest.approx([0.2, 0.2, 0.25, 0.5, 1.0], abs=0.08)


def walks(batch: int = 16, length: int = 15) -> Clip:
    """Real clips of walking on all the way: episodes of rows 0, 1, 2, 3, 4 and the last, 5, cut anywhere."""
    place = (torch.arange(length) + torch.randint(0, 6, (batch, 1))) % 6
    after = place[:, 1:]
    ended = (after == 5).float()
    return Clip(F.one_hot(place, 6).float(), ended, 1 - ended, after != 0)


def test_values_are_learned_from_what_really_came() -> None:
    agent = build(6)
    optimizer = torch.optim.Adam(agent.critic.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        agent.replay_loss(walks()).value.backward()
        optimizer.step()
        agent.after_update()
    assert agent.value(torch.eye(6)[:5]).tolist() == pytest.approx([0.9**n for n in (4, 3, 2, 1, 0)], abs=0.1)
    assert all(p.grad is None for p in agent.actor.parameters())


def test_what_really_came_holds_dreams_back() -> None:
    """Dreams in which the walk never ends and pays all the time; in reality it pays once."""
    heaven = lambda state, action: (torch.ones(len(state)), torch.ones(len(state)), state)  # noqa: E731
    values = []
    for share in (0.0, 1.0):
        torch.manual_seed(1)
        agent = build(6)
        optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], 1e-2)
        for _ in range(150):
            loss = agent.loss(dream(agent, 6, 4, heaven)).value + share * agent.replay_loss(walks()).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            agent.after_update()
        values.append(agent.value(torch.eye(6)[:5]).mean().item())
    assert values[0] > 6 and values[1] < 0.8 * values[0]


def test_a_box_finds_the_target_of_each_state() -> None:
    target = torch.tensor([[-0.6, 0.4], [0.5, 0.0]])

    def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reward = -(action.clamp(-1, 1) - target[state]).square().sum(-1)
        return reward, torch.ones_like(reward), torch.randint(0, 2, state.shape)

    agent = build(2, (), 2, gamma=0.5)
    before = agent.policy(torch.eye(2)).deviation.mean()
    learn(agent, lambda: dream(agent, 2, 4, step), 200)
    assert (agent.act(torch.eye(2), greedy=True) - target).abs().max() < 0.15
    assert agent.policy(torch.eye(2)).deviation.mean() < 0.7 * before  # what costs is given up


def test_factors_learn_apart() -> None:
    """Two factors, each paid by a rule of its own."""

    def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = action[:, :2].argmax(-1)
        second = action[:, 2:].argmax(-1)
        reward = (first == state).float() + (second == 2 - state).float()
        return reward, torch.zeros_like(reward), state

    agent = build(2, (2, 3), 5)
    learn(agent, lambda: dream(agent, 2, 1, step), 120)
    greedy = agent.act(torch.eye(2), greedy=True)
    assert greedy.tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]]


def test_the_critic_finds_known_values() -> None:
    """A ring of three that pays 1 on the way from the last to the first, and may end: v = r + gamma c v'. Dreams are
    too short to go round, so values must travel."""
    cont = torch.tensor([1.0, 0.5, 0.8])

    def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (state == 2).float(), cont[state], (state + 1) % 3

    agent = build(3)
    learn(agent, lambda: dream(agent, 3, 2, step), 300)
    move = torch.zeros(3, 3)
    for s in range(3):
        move[s, (s + 1) % 3] = 0.9 * cont[s]
    wanted = torch.linalg.solve(torch.eye(3) - move, torch.tensor([0.0, 0.0, 1.0]))
    assert agent.value(torch.eye(3)).tolist() == pytest.approx(wanted.tolist(), abs=0.05)
    target = agent.two_hot.mean(agent.target(torch.eye(3)))
    assert target.tolist() == pytest.approx(wanted.tolist(), abs=0.1)


@pytest.mark.parametrize("parts", [(3,), ()])
def test_without_rewards_entropy_makes_a_policy_random(parts: tuple[int, ...]) -> None:
    def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(len(state)), torch.ones(len(state)), state

    def entropies(bonus: float) -> tuple[float, float]:
        torch.manual_seed(0)
        agent = build(2, parts, 3, entropy=bonus)
        with torch.no_grad():
            agent.actor[-1].bias += torch.tensor([3.0, 0.0, 0.0] if parts else [0.0, 0.0, 0.0, -3.0, -3.0, -3.0])
        before = agent.policy(torch.eye(2)).entropy().mean().item()
        learn(agent, lambda: dream(agent, 2, 3, step), 100)
        return before, agent.policy(torch.eye(2)).entropy().mean().item()

    before, after = entropies(1e-2)
    most = torch.tensor(3.0).log().item() if parts else 3 * 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e)).item()
    assert before < 0.7 * most and after > 0.95 * most
    before, after = entropies(0.0)
    assert after < 0.8 * most


# -- the loss itself --------------------------------------------------------------------------------------------------


def random_dream(batch: int = 5, horizon: int = 4) -> Dream:
    action = F.one_hot(torch.randint(0, 2, (batch, horizon)), 2).float()
    reward = torch.randn(batch, horizon)
    cont = torch.rand(batch, horizon)
    feat = torch.randn(batch, horizon + 1, 6)
    return Dream(feat, action, reward, cont, torch.zeros(batch, horizon, 1, 1), torch.ones(batch))


def gradient(agent: ActorCritic, dreams: Dream) -> Tensor:
    agent.zero_grad()
    agent.loss(dreams).value.backward()
    return torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])


def trained_a_little() -> ActorCritic:
    torch.manual_seed(1)
    agent = build(6)
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.3 * torch.randn_like(weight)
        for critic in (agent.critic, agent.target):  # sure enough that values are of order one
            critic[-1].bias -= 0.1 * torch.arange(-40.0, 41.0).square()
    return agent


def test_a_dream_from_an_end_teaches_nothing() -> None:
    dreams = random_dream()
    without = dreams._replace(weight=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    other = without._replace(feat=torch.cat([dreams.feat[:3], torch.randn(2, 5, 6)]), action=dreams.action.clone())
    other.action[3:] = 1 - other.action[3:]
    # the spread of returns is that of all dreams: a floor above it leaves what the weights do
    agents = [trained_a_little() for _ in range(2)]
    for agent in agents:
        agent.scale.floor = 100.0
    torch.testing.assert_close(gradient(agents[0], without), gradient(agents[1], other))
    nothing = gradient(trained_a_little(), dreams._replace(weight=torch.zeros(5)))
    assert nothing.isfinite().all() and not nothing.any()


def test_what_comes_after_an_end_teaches_nothing() -> None:
    dreams = random_dream()
    dreams.cont[:, 1] = 0
    other = dreams._replace(
        feat=torch.cat([dreams.feat[:, :2], torch.randn(5, 3, 6)], 1),
        reward=torch.cat([dreams.reward[:, :2], torch.randn(5, 2)], 1),
    )
    agents = [trained_a_little() for _ in range(2)]
    for agent in agents:
        agent.scale.floor = 100.0
    torch.testing.assert_close(gradient(agents[0], dreams), gradient(agents[1], other))


def test_a_better_action_gets_likelier_and_the_scale_of_rewards_is_nothing() -> None:
    """One state, one step: the gradient is the advantage times that of log p, in units of the spread of returns."""
    feat = torch.ones(40, 2, 6)
    action = F.one_hot(torch.arange(40) % 2, 2).float()[:, None]
    grads = []
    for size in (1.0, 1000.0):
        agent = build(6, return_floor=1e-3, entropy=0.0)
        dreams = Dream(
            feat, action, size * action[..., 0], torch.zeros(40, 1), torch.zeros(40, 1, 1, 1), torch.ones(40)
        )
        agent.loss(dreams).value.backward()
        grads.append(agent.actor[-1].bias.grad.clone())
    # half of the actions have advantage 1: d/d logit of 1/2 log p at p = 1/2 is 1/4, but for unimix
    assert grads[0].tolist() == pytest.approx([-0.25, 0.25], rel=0.02)
    torch.testing.assert_close(grads[0], grads[1])


def test_what_all_actions_earn_alike_counts_for_nothing_where_advantages_are_centred() -> None:
    """Returns of 1 more for every action, before values know of it: the actor's gradient is the same."""

    def gradient(center_advantages: bool, more: float) -> Tensor:
        torch.manual_seed(0)
        agent = build(3, (4,), 4, center_advantages=center_advantages)
        torch.manual_seed(1)
        torch.nn.init.normal_(agent.actor[-1].weight, std=0.5)

        def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return action[:, 0] + more, torch.zeros(len(state)), state

        value = agent.loss(dream(agent, 3, 1, step)).value
        (grad,) = torch.autograd.grad(value, [agent.actor[-1].weight])
        return grad

    torch.testing.assert_close(gradient(True, 1.0), gradient(True, 0.0))
    assert (gradient(False, 1.0) - gradient(False, 0.0)).abs().max() > 1e-2


def test_actor_and_critic_learn_from_their_own_parts() -> None:
    """The target critic has no gradient; which actions were taken concerns the actor alone."""
    agent = trained_a_little()
    dreams = random_dream()
    value, metrics = agent.loss(dreams)
    assert not any(v.requires_grad for v in metrics.values()) and all(v.ndim == 0 for v in metrics.values())
    torch.testing.assert_close(value.detach(), metrics["actor"] + metrics["critic"])
    value.backward()
    before = {name: p.grad for name, p in agent.named_parameters()}
    assert all((grad is None) == name.startswith("target") for name, grad in before.items())
    gradient(agent, dreams._replace(action=1 - dreams.action))
    for name, p in agent.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, before[name]) == name.startswith("critic"), name


def test_the_target_critic_follows_at_its_rate() -> None:
    agent = build(6, target_ema=0.25)
    for target, fast in zip(agent.target.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(target, fast) and not target.requires_grad
    with torch.no_grad():
        for weight in agent.critic.parameters():
            weight += torch.randn_like(weight)
    before = [p.clone() for p in agent.target.parameters()]
    kept = [p.clone() for p in agent.critic.parameters()]
    agent.after_update()
    for old, new, fast, same in zip(before, agent.target.parameters(), agent.critic.parameters(), kept, strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * fast)
        assert torch.equal(fast, same)
    assert any("target" in name for name in agent.state_dict())


def test_a_new_controller_is_undecided() -> None:
    agent = build(6, (2, 3), 5)
    feat = torch.randn(4, 6)
    assert (agent.value(feat) == 0).all()
    probs = agent.policy(feat).probs
    assert [p.tolist() for p in probs] == [[pytest.approx([1 / n] * n)] * 4 for n in (2, 3)]
    for greedy in (False, True):
        assert agent.act(feat, greedy).shape == (4, 5)
    box = build(6, (), 3)
    assert (box.act(feat, True) == 0).all() and box.act(feat, False).shape == (4, 3)
