from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from longdream.worldmodel import encoder as encoder_module
from longdream.worldmodel.config import EncoderConfig
from longdream.worldmodel.encoder import Digits, Encoder, RunningScale


class Spec(NamedTuple):
    kind: Literal["image", "vector", "discrete", "categories"]
    shape: tuple[int, ...] = ()
    n: int = 0


MIXED = {
    "view": Spec("image", (32, 24, 3)),
    "map": Spec("image", (16, 16, 1)),
    "speed": Spec("vector", (3,)),
    "room": Spec("discrete", n=4),
    "age": Spec("vector", (1,)),
    "grid": Spec("categories", (3, 2), 256),
    "bits": Spec("categories", (5,), 2),
}


def build(spec: dict[str, Spec], latent="continuous", **options) -> Encoder:
    small = {"channels": 16, "classes": 4, "depth": 4}
    return Encoder(EncoderConfig(**(small | options)), spec, latent)


def draw(spec: dict[str, Spec], *lead: int) -> dict[str, Tensor]:
    def one(s: Spec) -> Tensor:
        if s.kind == "image":
            return torch.randint(0, 256, (*lead, *s.shape), dtype=torch.uint8)
        return torch.randn(*lead, *s.shape) if s.kind == "vector" else torch.randint(0, s.n, (*lead, *s.shape))

    return {key: one(s) for key, s in spec.items()}


def check_round_trip(encoder: Encoder, spec: dict[str, Spec], *lead: int) -> Tensor:
    obs = draw(spec, *lead)
    z = encoder(obs)
    assert z.shape == (*lead, encoder.tokens, encoder.channels) and z.dtype == torch.float32
    back = encoder.decode(z.detach())
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in obs.items()}
    for key, s in spec.items():
        if s.n:
            assert (back[key] >= 0).all() and (back[key] < s.n).all()
    return z


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((16, 16, 3), 1),
        ((16, 16, 1), 2),
        ((32, 32, 4), 4),
        ((32, 32, 3), 16),
        ((37, 41, 3), 1),
        ((64, 64, 3), 8),
        ((96, 96, 3), 4),
        ((64, 64, 3), 16),
        ((210, 160, 3), 4),
        ((18, 90, 1), 2),
        ((40, 40, 3), 5),
    ],
)
@pytest.mark.parametrize("latent", ["continuous", "categorical"])
def test_images_of_any_size(shape: tuple[int, ...], grid: int, latent: str) -> None:
    spec = {"obs": Spec("image", shape)}
    encoder = build(spec, latent, grid=grid)
    assert encoder.tokens == grid**2
    check_round_trip(encoder, spec, 2)
    value, metrics = encoder.loss(draw(spec, 2))
    value.backward()
    assert value.isfinite() and set(metrics) == {"reconstruction/obs"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("latent", ["continuous", "categorical"])
@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize(
    "keys", [["view"], ["speed"], ["room"], ["age", "room", "speed"], ["map", "room"], ["view", "map"], sorted(MIXED)]
)
def test_any_mixture_of_keys(keys: list[str], grid: int, latent: str) -> None:
    spec = {key: MIXED[key] for key in keys}
    encoder = build(spec, latent, grid=grid)
    assert encoder.tokens == (
        grid**2 if {"view", "map"} & set(keys) else 1
    )  # without images there is nothing to divide
    for lead in ((3,), (2, 5)):
        check_round_trip(encoder, spec, *lead)
    value, metrics = encoder.loss(draw(spec, 4))
    value.backward()
    assert set(metrics) == {f"reconstruction/{key}" for key in keys}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_clip_is_its_frames_and_the_order_of_keys_is_nothing() -> None:
    encoder = build(MIXED, grid=2)
    obs = draw(MIXED, 2, 5)
    z = encoder(obs)
    alone = encoder({key: obs[key][1, 3:4] for key in reversed(list(obs))})
    torch.testing.assert_close(z[1, 3:4], alone)
    whole = encoder.decode(z.detach())
    part = encoder.decode(z.detach()[1, 3:4])
    for key, value in whole.items():
        torch.testing.assert_close(value[1, 3:4], part[key], rtol=1e-4, atol=1 if value.dtype == torch.uint8 else 1e-5)


def test_every_key_is_seen() -> None:
    encoder = build(MIXED, grid=2)
    obs = draw(MIXED, 6)
    z = encoder(obs)
    for key in MIXED:
        other = draw({key: MIXED[key]}, 6)
        assert (encoder(obs | other) - z).abs().amax() > 1e-4, key


def test_continuous_latents_are_bounded_and_spread() -> None:
    z = build({"obs": Spec("vector", (3,))})({"obs": torch.randn(200, 3) * 1e6})
    assert z.abs().amax() <= 1
    z = build({"obs": Spec("image", (16, 16, 3))})({"obs": torch.randint(0, 256, (200, 16, 16, 3), dtype=torch.uint8)})
    assert z.abs().amax() < 1
    assert z.square().mean((-2, -1)).min() > 0.2  # normed first: no picture is squeezed to nothing


def test_categorical_latents_are_one_hot_with_gradients_straight_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "UNIMIX", 0.2)
    spec = {"obs": Spec("vector", (3,))}
    encoder = build(spec, "categorical")
    obs = {"obs": torch.randn(4000, 3)}
    for drawn in (False, True):
        z = encoder(obs, draw=drawn)
        parts = z.unflatten(-1, (-1, 4))
        hot = parts.argmax(-1, keepdim=True)
        torch.testing.assert_close(parts, torch.zeros_like(parts).scatter(-1, hot, 1.0), rtol=0, atol=1e-6)
        weight = torch.randn_like(z)
        grads = torch.autograd.grad((z * weight).sum(), list(encoder.flat_in.parameters()))
        assert all(g.abs().amax() > 0 for g in grads)
    assert torch.equal(encoder(obs), encoder(obs))
    # one observation many times over: draws follow the probabilities, of which no class has less than its share
    many = {"obs": torch.randn(1, 3).expand(20_000, -1)}
    often = encoder(many, draw=True).detach().view(20_000, 4, 4).mean(0)
    assert (often > 0.2 / 4 - 0.006).all() and often.amax() < 1 - 0.2 * 3 / 4 + 0.006
    assert torch.equal(often.argmax(-1), encoder({"obs": many["obs"][:1]}).view(4, 4).argmax(-1))


def fit(encoder: Encoder, obs: dict[str, Tensor], updates: int) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        encoder.loss(obs).value.backward()
        optimizer.step()
    with torch.no_grad():
        return encoder.decode(encoder(obs))


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * ((a.float() - b.float()) / 255).square().mean().log10().item()


@pytest.mark.parametrize(
    ("latent", "grid"), [("continuous", 1), ("continuous", 4), ("categorical", 1), ("categorical", 2)]
)
def test_one_batch_of_images_is_learned(latent: str, grid: int) -> None:
    """Boxes of a colour on a dark ground: to the eye they come back, where the mean image is a blur."""
    images = torch.full((12, 32, 32, 3), 20, dtype=torch.uint8)
    for i in range(12):
        y = 8 * (i % 4)
        x = 8 * (i // 4)
        images[i, y : y + 8, x : x + 10] = torch.randint(100, 256, (3,), dtype=torch.uint8)
    encoder = build({"obs": Spec("image", (32, 32, 3))}, latent, grid=grid, channels=32, classes=8, depth=8)
    back = fit(encoder, {"obs": images}, 200)["obs"]
    blur = psnr(images.float().mean(0).expand_as(images), images)
    assert psnr(back, images) > max(22, blur + 4)


@pytest.mark.parametrize("latent", ["continuous", "categorical"])
def test_one_batch_of_mixed_keys_is_learned(latent: str) -> None:
    """Vectors far from unit scale, discrete values and a small image."""
    spec = {"map": Spec("image", (16, 16, 1)), "pos": Spec("vector", (2,)), "room": Spec("discrete", n=5)}
    obs = draw(spec, 10)
    obs["map"] = (torch.arange(10)[:, None, None, None] * 25).expand(-1, 16, 16, 1).to(torch.uint8)
    obs["pos"] = obs["pos"] * torch.tensor([1000.0, 0.01]) + torch.tensor([-500.0, 3.0])
    encoder = build(spec, latent, channels=32)
    back = fit(encoder, obs, 250)
    assert torch.equal(back["room"], obs["room"])
    error = (back["pos"] - obs["pos"]).square().mean(0) / obs["pos"].var(0)
    assert (error < 0.1).all()
    assert psnr(back["map"], obs["map"]) > 22


@pytest.mark.parametrize("latent", ["continuous", "categorical"])
def test_one_batch_of_grids_is_learned(latent: str) -> None:
    """Cells of bytes, most of them the same, with a few things of kinds and colours in other places."""
    grid = torch.ones(8, 5, 5, 2, dtype=torch.int16)
    for i in range(8):
        grid[i, i % 5, 3 * i % 5] = torch.tensor([10, 200 + i], dtype=torch.int16)
    spec = {"grid": Spec("categories", (5, 5, 2), 256), "bits": Spec("categories", (3,), 2)}
    obs = {"grid": grid, "bits": torch.tensor([[i >> b & 1 for b in range(3)] for i in range(8)])}
    encoder = build(spec, latent, channels=32, classes=8)
    back = fit(encoder, obs, 150)
    assert torch.equal(back["grid"], grid.long()) and torch.equal(back["bits"], obs["bits"])


@pytest.mark.parametrize(("channels", "parts"), [(32, 4), (16, 2), (6, 1)])
def test_variables_are_of_parts_of_the_image(channels: int, parts: int) -> None:
    """A change in one corner changes the variables of parts near it alone; drawn again from latents, likewise."""
    spec = {"image": Spec("image", (64, 64, 3))}
    encoder = build(spec, "categorical", channels=channels, classes=2, shaped_by="observation")
    obs = draw(spec, 3)
    other = {"image": obs["image"].clone()}
    other["image"][:, :8, :8] = 255 - other["image"][:, :8, :8]
    each = [encoder._encode(o)[:, 0].unflatten(-1, (parts, parts, -1)) for o in (obs, other)]
    changed = (each[0] != each[1]).any(-1)
    assert changed[:, 0, 0].all() and changed[:, -1, -1].all() == (parts == 1)
    z = encoder(obs)
    turned = z.unflatten(-1, (parts, parts, -1, 2)).clone()
    turned[:, :, 0, 0] = turned[:, :, 0, 0].flip(-1)
    pictures = [encoder.decode(latent)["image"] for latent in (z, turned.flatten(-4))]
    differs = (pictures[0] != pictures[1]).any(-1)
    assert differs[:, :16, :16].any() and differs[:, -8:, -8:].any() == (parts == 1)


def test_learning_through_m_sums_over_categories() -> None:
    spec = {"grid": Spec("categories", (3, 2), 40), "bits": Spec("categories", (5,), 2)}
    encoder = build(spec, "categorical")
    encoder.learn_through_model(6)
    obs = draw(spec, 7)
    encoder.update_scales(obs)
    z, feat = encoder(obs), torch.randn(7, 6)
    loss = encoder.reconstruction(z, feat, obs)
    means = loss.metrics["reconstruction/grid"], loss.metrics["reconstruction/bits"]
    torch.testing.assert_close(loss.value, 6 * means[0] + 5 * means[1])
    assert 0.7 * 2 * np.log(16) < means[0] < 1.3 * 2 * np.log(16) and 0.7 * np.log(2) < means[1] < 1.3 * np.log(2)


def test_learning_through_m_weighs_vectors_by_how_well_they_are_known() -> None:
    """The gradient of an error of few numbers does not vanish with the error, down to the least variance."""
    spec = {"speed": Spec("vector", (3,))}
    encoder = build(spec, "categorical")
    encoder.learn_through_model(0)
    obs = draw(spec, 50)
    encoder.update_scales(obs)
    error = torch.tensor(0.0, requires_grad=True)
    values = []
    known = encoder._scaled("speed", obs["speed"])
    for scale in (1.0, 0.5, 0.01):
        wrong = {"speed": known + scale * (1 + error)}
        encoder._decode = lambda z, exact, wrong=wrong: wrong  # type: ignore[method-assign]
        loss = encoder.reconstruction(encoder(obs), torch.zeros(50, 0), obs)
        assert loss.metrics["reconstruction/speed"].item() == pytest.approx(scale**2, rel=1e-4)
        gradient = torch.autograd.grad(loss.value, error)[0].item()
        values.append((loss.value.item(), gradient))
    at = [3 * scale**2 / (scale**2 + 0.02) for scale in (1.0, 0.5, 0.01)]
    assert [value for value, _ in values] == pytest.approx(at, rel=1e-4)
    assert [gradient for _, gradient in values] == pytest.approx([2 * value for value in at], rel=1e-4)


@pytest.mark.parametrize(("n", "count", "base"), [(1, 1, 1), (2, 1, 2), (32, 1, 32), (33, 2, 16), (256, 2, 16)])
def test_categories_are_digits(n: int, count: int, base: int) -> None:
    digits = Digits(n)
    values = torch.arange(n)[:, None]
    assert (digits.count, digits.base, digits.size) == (count, base, count * base)
    ones = digits.one_hots(values)
    assert ones.shape == (n, digits.size) and (ones.sum(1) == count).all() and len(ones.unique(dim=0)) == n
    assert torch.equal(digits.likeliest(ones), values)
    assert (digits.likeliest(torch.ones(1, digits.size).cumsum(1)) == n - 1).all()  # no value that there is not
    logits = torch.randn(n, digits.size)
    each = [torch.nn.functional.log_softmax(part, -1) for part in logits.split(base, -1)]
    by_hand = [-sum(part[v, v // base**i % base] for i, part in enumerate(each)) for v in range(n)]
    torch.testing.assert_close(digits.loss(logits, values)[:, 0], torch.stack(by_hand))


def test_running_scale_against_numpy() -> None:
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(400, 64, 3)) * [1e3, 1e-2, 5.0] + [1e4, 0.0, -7.0]).astype(np.float32)
    scale = RunningScale(3)
    for batch in data:
        scale.update(torch.from_numpy(batch))
    mean = data.reshape(-1, 3).mean(0)
    deviation = data.reshape(-1, 3).std(0)
    assert np.allclose(scale.mean.numpy(), mean, atol=0.06 * deviation)
    # entries of any size are told apart alike: by deviations from the mean, to both sides of zero, and in order
    steps = scale(torch.from_numpy((mean + np.arange(-3, 4)[:, None] * deviation).astype(np.float32))).numpy()
    assert np.ptp(steps, axis=1).max() < 0.25 and np.abs(steps + steps[::-1]).max() < 0.25
    assert (np.diff(steps, axis=0) > 0.2).all() and 0.6 < steps[4].mean() < 1.1
    x = torch.from_numpy(data[0])
    torch.testing.assert_close(scale.undo(scale(x)), x, rtol=1e-4, atol=1e-4)
    far = scale(torch.tensor([[1e9] * 3, [-1e9] * 3])).numpy()
    assert (np.abs(far) < 130).all() and (far[0] > steps[-1]).all() and (far[1] < steps[0]).all()


def test_running_scale_follows_what_changes_and_stands_what_does_not() -> None:
    scale = RunningScale(2)
    for _ in range(50):
        scale.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert scale.mean.tolist() == [2.0, 5.0]
    assert scale(torch.tensor([[3.0, 5.0]]))[0, 1] == 0  # a constant is not divided by its own deviation
    for _ in range(5000):
        scale.update(torch.tensor([[11.0, 5.0], [13.0, 5.0]]))
    assert abs(scale.mean[0].item() - 12) < 0.2


def test_keys_may_be_any_words() -> None:
    spec = {key: Spec("vector", (2,)) for key in ("robot.pos", "keys", "", "a b")} | {
        "eye.left": Spec("image", (16, 16, 1))
    }
    check_round_trip(build(spec), spec, 3)


def test_only_the_loss_moves_the_scale() -> None:
    encoder = build({"obs": Spec("vector", (2,))})
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.decode(encoder({"obs": torch.randn(5, 2)}))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    encoder.loss({"obs": torch.randn(5, 2) + 3})
    assert any(not torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (Spec("image", (5, 64, 3)), {"grid": 1}, r"image of 5 x 64.*grid = 1 needs 8 x 8"),
        (Spec("image", (16, 16, 3)), {"grid": 16}, r"image of 16 x 16.*grid = 16 needs 32 x 32"),
        (Spec("image", (64, 64, 3)), {"grid": 3}, r"encoder\.grid = 3.*1, 2 or 4"),
        (Spec("vector", (3,)), {"latent": "categorical", "classes": 5}, r"channels = 16.*classes = 5"),
    ],
)
def test_what_does_not_fit_is_named(spec: Spec, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"obs": spec}, **options)


def learn(encoder: Encoder, obs: Tensor, updates: int) -> None:
    optimizer = torch.optim.AdamW(encoder.parameters(), 3e-3)
    for i in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - i / updates)
        loss = encoder.loss({"obs": obs[torch.randint(0, len(obs), (256,))]}).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_vectors_go_on_beyond_what_was_seen() -> None:
    """A cart that was only ever seen near home: far out it must still look further out, not like home."""
    torch.manual_seed(0)
    encoder = build({"obs": Spec("vector", (3,))})
    learn(encoder, torch.rand(4000, 3) * 2 - 1, 600)
    places = torch.tensor([0.5, 1.0, 1.5, 2.0])
    obs = torch.zeros(4, 3)
    obs[:, 0] = places
    back = encoder.decode(encoder({"obs": obs}))["obs"][:, 0]
    assert (back.diff() > 0.15).all()
    assert (back - places).abs()[:2].max() < 0.05 and (back - places).abs()[2:].max() < 0.5
