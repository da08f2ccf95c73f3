"""The prior: both directions of the KL against their definition, what is predicted and what is not, V through M."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.categorical import kl_divergence, uniform_mixture
from longdream.worldmodel.config import DynamicsConfig, EncoderConfig, ForcingConfig, HeadsConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.objectives import prior
from longdream.worldmodel.objectives.prior import AHEAD, LAG_FREQUENCIES, Prior, frames_before, lag_embedding
from longdream.worldmodel.types import Batch, Loss

CLASSES = 3
ACTIONS = 2


class Pixels:
    """An image key as V sees it."""

    kind = "image"
    shape = (16, 16, 3)
    n = 0


def model(
    objective: str = "prior",
    free_nats: float = 1.0,
    shaped_by: Literal["model", "observation"] = "model",
    residual: bool = False,
) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(
        {"image": Pixels()},
        ACTIONS,
        EncoderConfig(channels=4 * CLASSES, classes=CLASSES, depth=4, shaped_by=shaped_by),
        DynamicsConfig(width=16, num_heads=2, layers=1, state_size=4, window=2, predict_residual=residual),
        ForcingConfig(objective=objective, free_nats=free_nats),
        HeadsConfig(hidden=16, bins=11),
    )


def batch(clips: int = 3, rows: int = 13, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(clips, rows, dtype=torch.bool)
    first[1, 6] = True
    no = torch.zeros(clips, rows, dtype=torch.bool)
    return Batch(
        obs={"image": torch.randint(0, 256, (clips, rows, 16, 16, 3), generator=generator, dtype=torch.uint8)},
        action=torch.nn.functional.one_hot(torch.randint(0, ACTIONS, (clips, rows), generator=generator)).float(),
        reward=torch.rand(clips, rows, generator=generator),
        is_first=first,
        terminated=no,
        truncated=no.clone(),
        surprise=torch.zeros(clips, rows),
    )


def objective_of(made: WorldModel) -> Prior:
    assert isinstance(made.objective, Prior)
    return made.objective


def test_kl_is_that_of_torch() -> None:
    p, q = (uniform_mixture(torch.randn(5, 2, 4 * CLASSES), CLASSES, 0.01).log() for _ in range(2))
    groups = [torch.distributions.Categorical(logits=v.unflatten(-1, (-1, CLASSES))) for v in (p, q)]
    wanted = torch.distributions.kl_divergence(*groups).sum((-2, -1))
    torch.testing.assert_close(kl_divergence(p, q), wanted)


@pytest.mark.parametrize("free", [0.0, 1e6])
def test_the_loss_is_its_definition(free: float) -> None:
    """Frame by frame, by a loop; with free nats beyond all KLs it has no gradient but that of the prediction ahead."""
    made = model(free_nats=free)
    rows = batch()
    z, posterior = made.encoder.posterior(rows.obs)
    first = rows.clip_first()
    out = objective_of(made).run(made.dynamics, z, rows.prev_action(), first, 2, posterior=posterior)
    head = objective_of(made).head
    terms = []
    for clip in range(3):
        for t in range(12):
            if first[clip, t + 1]:
                continue
            logits = head(torch.cat([out.feat[clip, t], rows.action[clip, t]])).view(1, -1)
            log_probs = uniform_mixture(logits, CLASSES, prior.UNIMIX).log()
            nats = kl_divergence(posterior[clip, t + 1], log_probs)
            terms.append(1.1 * nats.clamp(min=free))  # 1 one way and 0.1 the other, of the same value
    ahead = prior.AHEAD_WEIGHT * out.metrics["ahead"]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean() + ahead)
    if free:
        grads = torch.autograd.grad(out.loss, list(head.parameters()), allow_unused=True)
        assert all(grad is None or not grad.any() for grad in grads)


def test_the_prior_and_the_posterior_move_at_their_own_rates() -> None:
    """Gradients of the KL: the head's is that of the full KL, V's a tenth of its own."""
    p = torch.randn(4, 1, 2 * CLASSES, requires_grad=True)
    q = torch.randn(4, 1, 2 * CLASSES, requires_grad=True)

    def log_probs(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, CLASSES)).log_softmax(-1).flatten(-2)

    whole = torch.autograd.grad(kl_divergence(log_probs(p), log_probs(q)).mean(), (p, q))
    to_posterior = kl_divergence(log_probs(p).detach(), log_probs(q)).mean()
    to_prior = kl_divergence(log_probs(p), log_probs(q).detach()).mean()
    balanced = torch.autograd.grad(to_posterior + prior.POSTERIOR_WEIGHT * to_prior, (p, q))
    torch.testing.assert_close(balanced[0], 0.1 * whole[0])
    torch.testing.assert_close(balanced[1], whole[1])


def test_prediction_ahead_stays_within_episodes() -> None:
    """Frames after the start of an episode are not predicted from before it."""
    made = model()
    rows = batch()
    z, _ = made.encoder.posterior(rows.obs)
    z = z.detach()
    first = rows.clip_first()
    feat = torch.randn(3, 13, made.feature_size)
    loss = objective_of(made)._ahead_loss(feat, rows.prev_action(), first, z)
    terms = []
    for clip in range(3):
        for t in range(13 - AHEAD):
            if first[clip, t + 1 : t + AHEAD + 1].any():
                continue
            actions = rows.action[clip, t : t + AHEAD].flatten()
            logits = objective_of(made).ahead(torch.cat([feat[clip, t], actions])).view(1, -1)
            log_probs = uniform_mixture(logits, CLASSES, prior.UNIMIX).log()
            terms.append(-(z[clip, t + AHEAD] * log_probs).sum())
    assert 0 < len(terms) < 3 * (13 - AHEAD)
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("objective", ["prior", "teacher"])
def test_v_learns_through_m_where_the_objective_says_so(objective: str) -> None:
    """Also from rewards alone, once the reward's head has learned to read anything."""
    made = model(objective)
    with torch.no_grad():
        for parameter in made.reward_continue.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss, _, _ = made.loss(batch(), 2)
    encoder = [p for name, p in made.encoder.named_parameters() if ".down." in name]
    grads = torch.autograd.grad(loss.value, encoder, allow_unused=True)
    assert encoder and made.trains_encoder == (objective == "prior")
    assert all((grad is not None and bool(grad.any())) == made.trains_encoder for grad in grads)
    assert any(key.startswith("reconstruction/") for key in loss.metrics) == made.trains_encoder


def test_observations_are_decoded_from_latents_and_feature() -> None:
    made = model()
    z = made.encoder(batch().obs)
    feat = torch.randn(3, 13, made.feature_size)
    alone = made.encoder.decode(z)["image"]
    both = made.encoder.decode(z, feat)["image"]
    assert both.shape == alone.shape == (3, 13, 16, 16, 3)
    assert not torch.equal(alone, both)


def test_some_rows_are_reconstructed() -> None:
    made = model()
    few, _, _ = made.loss(batch(), 2, decoded=5)
    every, _, _ = made.loss(batch(), 2)
    few_error, error = (float(loss.metrics["reconstruction/image"]) for loss in (few, every))
    assert few_error == pytest.approx(error, rel=0.3) and few_error != error


def test_dreams_are_drawn_from_the_prior() -> None:
    """Of each variable, as often as it says; at a low temperature the likeliest class."""
    made = model()
    feat = torch.randn(1, made.feature_size)
    action = torch.tensor([[1.0, 0.0]])
    like = torch.empty(1, 1, 4 * CLASSES)
    probs = objective_of(made)._prior(feat, action, torch.zeros_like(like)).exp()
    many = (feat.expand(4000, -1), made.dynamics.initial(4000), action.expand(4000, -1))
    drawn = made.objective.sample(made.dynamics, *many, 1)
    torch.testing.assert_close(drawn.mean(0), probs[0], atol=0.04, rtol=0)
    cold = made.objective.sample(made.dynamics, *many, 1, temperature=0.001)
    best = probs[0].unflatten(-1, (-1, CLASSES)).argmax(-1)
    assert (cold.unflatten(-1, (-1, CLASSES)).argmax(-1) == best).float().mean() > 0.99


def test_surprise_is_the_prior_s_cross_entropy() -> None:
    made = model()
    feat = torch.randn(3, made.feature_size)
    action = torch.tensor([[1.0, 0.0]]).expand(3, -1)
    z = made.encoder(batch().obs)[:, 0].detach()
    log_probs = objective_of(made)._prior(feat, action, z)
    wanted = -(z * log_probs).sum((-2, -1)) / 4
    surprise = made.objective.surprise(made.dynamics, feat, made.dynamics.initial(3), action, z)
    torch.testing.assert_close(surprise, wanted)


def test_m_learns_what_follows() -> None:
    """A clip of two alternating images: the KL falls to what is free, and the next frame is dreamt."""
    made = model()
    rows = batch(4, 12)
    images = torch.stack([torch.full((16, 16, 3), 40), torch.full((16, 16, 3), 210)]).to(torch.uint8)
    order = torch.arange(12) % 2
    rows.obs["image"] = images[order].expand(4, -1, -1, -1, -1).contiguous()
    rows.is_first = torch.zeros(4, 12, dtype=torch.bool)
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    for _ in range(150):
        loss, starts, _ = made.loss(rows, 3)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert loss.metrics["kl"] < 1.2 and loss.metrics["reconstruction/image"] < 0.01
    z, feat, _ = made.dream_step(starts.feat, starts.state, rows.action[:, 0].repeat_interleave(3, 0))
    dreamt = made.encoder.decode(z, feat)["image"].float().mean((1, 2, 3))
    assert ((dreamt - 40).abs().minimum((dreamt - 210).abs()) < 25).float().mean() > 0.8


def test_frames_before_are_those_of_the_same_episode() -> None:
    """Against a loop, at odd sizes."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, 11, 2, 5, generator=generator)
    first = torch.rand(3, 11, generator=generator) < 0.2
    lag = torch.randint(1, 11, (3, 11), generator=generator)
    frames, known = frames_before(z, first, lag)
    for clip in range(3):
        for t in range(11):
            at = t - int(lag[clip, t])
            there = at >= 0 and not first[clip, at + 1 : t + 1].any()
            assert bool(known[clip, t]) == there
            if there:
                assert torch.equal(frames[clip, t], z[clip, at])
    assert 0 < known.sum() < 33


def test_lags_are_told_apart() -> None:
    told = lag_embedding(torch.arange(1, 100), 100)
    assert told.shape == (99, 2 * LAG_FREQUENCIES)
    assert torch.cdist(told, told).fill_diagonal_(9).min() > 0.05


@pytest.mark.parametrize("shaped_by", ["model", "observation"])
def test_where_v_and_m_meet(shaped_by: Literal["model", "observation"]) -> None:
    """In all losses, or in the KL alone: which gradients reach V's latents, and M's features."""
    made = model(shaped_by=shaped_by)
    rows = batch()
    exchanged = shaped_by == "model"
    feat = torch.randn(3, 13, made.feature_size, requires_grad=True)
    z, _ = made.encoder.posterior(rows.obs)
    error = made._reconstruction(rows, z, feat, None).value
    to_feat, to_z = torch.autograd.grad(error, (feat, z), allow_unused=True)
    assert to_z.abs().sum() > 0 and (to_feat is not None) == exchanged
    assert torch.equal(made.encoder.decode(z)["image"], made.encoder.decode(z, feat)["image"]) != exchanged

    # without reconstruction (no rows) and with all of the KL free, only what M predicts is left
    made.objective.free_nats = 1e6
    made._reconstruction = lambda *_: Loss(torch.zeros(()), {})  # type: ignore[method-assign]
    encoder = list(made.encoder.parameters())
    for free, reached in ((1e6, exchanged), (0.0, True)):
        made.objective.free_nats = free
        grads = torch.autograd.grad(made.loss(rows, 2)[0].value, encoder, allow_unused=True)
        assert any(grad is not None and bool(grad.any()) for grad in grads) == reached


def test_the_frame_before_is_where_the_prior_begins() -> None:
    """With residual predictions an untrained prior expects it, in losses, dreams and surprise alike."""
    made = model(residual=True)
    rows = batch()
    z, posterior = made.encoder.posterior(rows.obs)
    first = rows.clip_first()
    feat = torch.zeros(3, 13, made.feature_size)
    of_frames = objective_of(made)._prior(feat[:, :-1], rows.action[:, :-1], z[:, :-1]).exp()
    assert (of_frames * z[:, :-1]).sum(-1).mean() / 4 > 0.9
    state = made.dynamics.initial(3)._replace(last=z[:, 4].detach())
    nats = made.objective.surprise(made.dynamics, feat[:, 4], state, rows.action[:, 4], z[:, 5])
    torch.testing.assert_close(nats, -(z[:, 5] * of_frames[:, 4].log()).sum((-2, -1)) / 4)
    drawn = made.objective.sample(made.dynamics, feat[:, 4], state, rows.action[:, 4], 1, temperature=0.01)
    torch.testing.assert_close(drawn, state.last)
    _, metrics = objective_of(made).losses(feat, rows.prev_action(), first, z, posterior)
    kl = kl_divergence(posterior[:, 1:], of_frames.log())[~first[:, 1:]].mean()
    torch.testing.assert_close(metrics["kl"], kl.detach())


@pytest.mark.parametrize(("past", "remembered"), [(1.0, True), (0.0, False)])
def test_told_of_the_past_m_remembers_what_nothing_asks_for(past: float, remembered: bool) -> None:
    """A cue in the first frame, which no later frame shows or depends on: is it in the feature 27 frames later?"""
    torch.manual_seed(0)
    classes = 6
    config = DynamicsConfig(width=32, num_heads=2, layers=1, state_size=8, window=2)
    dynamics = Dynamics(config, 1, 2 * classes, ACTIONS)
    objective = Prior(ForcingConfig(objective="prior", past=past), dynamics, classes, ACTIONS)
    optimizer = torch.optim.Adam([*dynamics.parameters(), *objective.parameters()], 3e-3)

    def clips(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cue = torch.randint(0, 2, (count,))
        frames = torch.randint(2, classes, (count, 28, 2))
        frames[:, 0] = cue[:, None]
        z = torch.nn.functional.one_hot(frames, classes).float().flatten(-2)[:, :, None]
        first = torch.zeros(count, 28, dtype=torch.bool)
        first[:, 0] = True
        return cue, z, torch.zeros(count, 28, ACTIONS), first

    for _ in range(250):
        _, z, actions, first = clips(32)
        optimizer.zero_grad()
        objective.run(dynamics, z, actions, first, 1).loss.backward()
        optimizer.step()
    with torch.no_grad():
        cue, z, actions, first = clips(768)
        feat = objective.run(dynamics, z, actions, first, 1).feat[:, -1]
    told = torch.cat([(feat - feat.mean(0)) / (feat.std(0) + 1e-4), torch.ones(768, 1)], 1)
    answer = 2.0 * cue - 1
    ridge = told[:512].T @ told[:512] + 10 * torch.eye(told.shape[1])
    weights = torch.linalg.solve(ridge, told[:512].T @ answer[:512])
    right = ((told[512:] @ weights).sign() == answer[512:]).float().mean()
    assert right > 0.95 if remembered else right < 0.75, right
