"""What the layers of M are made of: how scans are laid over the token grid and how long they remember when nothing is
learned yet; mixers of one size; a mixer of one's own; chunks of frames; fine grids."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.mixers import ssm
from longdream.worldmodel.mixers.base import MIXERS
from longdream.worldmodel.mixers.ssm import ScanMixer

GRIDS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (6, 3)]


@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_a_token_reaches_its_own_block_and_no_other(grid: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own frame the tokens that come after it, row by row; later all of the block."""
    monkeypatch.setattr(ssm, "SCAN_CHUNK", 2)
    mixer = ScanMixer(DynamicsConfig(width=8, num_heads=2, state_size=3), grid, block).double()
    tokens = grid * grid
    h = torch.randn(1, 3, tokens, 8, dtype=torch.float64, requires_grad=True)
    state = mixer.initial(1, "cpu").double()
    assert state.shape == (1, (grid // block) ** 2, 2, 3, 4)
    y, _, end, _ = mixer(h, torch.zeros(1, 3, dtype=torch.bool), state, None, None)
    assert end.shape == state.shape
    for to in range(tokens):
        grad = torch.autograd.grad(y[0, 1, to].sum(), h, retain_graph=True)[0][0].abs().sum(-1) > 1e-12
        for frame in range(3):
            for since in range(tokens):
                (r, c), (r0, c0) = divmod(to, grid), divmod(since, grid)
                same = (r // block, c // block) == (r0 // block, c0 // block)
                wanted = same and (frame == 0 or (frame == 1 and since <= to))
                assert bool(grad[frame, since]) == wanted


@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_memory_begins_with_time_constants_from_4_to_1000_frames(grid: int, block: int) -> None:
    """Frames, not tokens: however many tokens a block has."""
    mixer = ScanMixer(DynamicsConfig(width=60, num_heads=5, state_size=3), grid, block)
    h = torch.randn(1, 1, grid * grid, 60)
    empty = mixer.initial(1, "cpu")
    with torch.no_grad():
        kept = mixer.step(h, torch.ones_like(empty))[1] - mixer.step(h, empty)[1]
    frames = -1 / kept.log().mean((0, 1, 3, 4))
    wanted = torch.tensor([4.0, 15.9, 63.2, 251.5, 1000.0])
    assert ((frames / wanted).log().abs() < 0.2).all()


def test_writing_is_gated_and_keys_are_of_unit_size() -> None:
    """However large its input, what a frame writes stays of the size of its values."""
    mixer = ScanMixer(DynamicsConfig(width=60, num_heads=5, state_size=16), 1, 1)
    with torch.no_grad():
        mixer.inp.weight[120:152] *= 1e4  # both keys
        state = mixer.step(torch.randn(64, 1, 1, 60), mixer.initial(64, "cpu"))[1]
        values = mixer.inp(torch.randn(64, 60))[:, 60:120].unflatten(-1, (5, 12))
    assert state.square().sum(-2).mean().sqrt() < values.square().mean().sqrt()


# -- size -------------------------------------------------------------------------------------------------------------


def parameters(mixer: str, **options) -> int:
    model = Dynamics(DynamicsConfig(mixer, matched=True, blocks=(1, 2, 4), **options), 4, 16, 6)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "size", [{"layers": 3, "width": 64}, {"layers": 8, "width": 192, "num_heads": 6, "state_size": 32}]
)
def test_mixers_match_in_size(size: dict) -> None:
    counts = {mixer: parameters(mixer, **size) for mixer in MIXERS}
    assert max(counts.values()) < 1.05 * min(counts.values())
    plain = Dynamics(DynamicsConfig(blocks=(1, 2, 4), **size), 4, 16, 6)
    assert counts["hybrid"] == sum(p.numel() for p in plain.parameters())  # the others are made to match it
    window = Dynamics(DynamicsConfig("window", **size), 4, 16, 6)
    assert sum(p.numel() for p in window.parameters()) < 0.9 * counts["window"]


def test_which_mixers_grow() -> None:
    """Those whose state grows with the frames seen; a layer says so of its parts, and M of its layers."""
    assert [mixer for mixer in MIXERS if Dynamics(DynamicsConfig(mixer), 1, 5, 3).grows] == ["causal"]


# -- a clip, streamed -------------------------------------------------------------------------------------------------


def shaken(config: DynamicsConfig, grid: int) -> Dynamics:
    """An M whose weights are all random: freshly made, its AdaLN does nothing."""
    model = Dynamics(config, grid, 5, 3).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


def empty(model: Dynamics, batch: int = 2) -> State:
    return model.initial(batch).map(lambda t: t.double() if t.is_floating_point() else t)


class Clip:
    """Random inputs of the clean and the query stream."""

    def __init__(self, model: Dynamics, frames: int):
        like = model.place
        self.z, self.zq = (like.new_empty(2, frames, model.tokens, 5).normal_() for _ in range(2))
        self.action = like.new_empty(2, frames, 3).normal_()
        self.level, self.level_q = (like.new_empty(2, frames).uniform_() for _ in range(2))
        self.first = torch.zeros(2, frames, dtype=torch.bool)

    def part(self, begin: int, end: int) -> "Clip":
        other = object.__new__(Clip)
        other.__dict__ = {k: v[:, begin:end] for k, v in self.__dict__.items()}
        return other

    def run(self, model: Dynamics, state: State, at: Tensor | None = None):
        return model(self.z, self.action, self.level, self.first, state, (self.zq, self.level_q), at)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def check_streaming(model: Dynamics, frames: int) -> None:
    """A clip at once is the same as frame after frame, states on the way included."""
    clip = Clip(model, frames)
    state = empty(model)
    clip.first[1, frames // 2] = True
    at = torch.tensor([[0, frames - 1, frames // 2]] * 2)
    out = clip.run(model, state, at)
    states = []
    for t in range(frames):
        first = clip.first[:, t]
        if not first.any():
            close(model.predict(state, clip.zq[:, t], clip.action[:, t], clip.level_q[:, t]), out.pred[:, t])
        feat, state = model.commit(state, clip.z[:, t], clip.action[:, t], first, clip.level[:, t])
        close(feat, out.feat[:, t])
        states.append(state)
    future = Clip(model, 2)
    wanted = future.run(model, state).feat
    close(future.run(model, out.state).feat, wanted)
    assert out.states_at is not None
    for i, t in enumerate(at[0].tolist()):
        asked = out.states_at.map(lambda v, i=i: v.unflatten(0, at.shape)[:, i])
        close(future.run(model, asked).feat, future.run(model, states[t]).feat)


@pytest.mark.parametrize("mixer", ["hybrid", "causal"])
def test_memory_by_key_streams_too(mixer: str) -> None:
    check_streaming(
        shaken(
            DynamicsConfig(
                mixer, width=8, num_heads=2, state_size=5, window=3, blocks=(1, 2), tied_condition_keys=True
            ),
            2,
        ),
        9,
    )


@pytest.mark.parametrize("blocks", [(1, 16), (2, 4, 8)])
def test_sixteen_by_sixteen_tokens_a_frame(blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks up to the whole frame, of more tokens than a chunk of the scan is to have."""
    monkeypatch.setattr(ssm, "SCAN_CHUNK", 32)
    config = DynamicsConfig(layers=len(blocks), width=6, num_heads=1, state_size=3, window=2, blocks=blocks)
    model = shaken(config, 16)
    assert model.tokens == 256 and [layer.mixer.block for layer in model.stack] == list(blocks)
    check_streaming(model, 5)


class Fading(nn.Module):
    """A mixer of one's own: each token's running mean, one frame after another."""

    local = False

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        self.shape = (grid * grid, config.width)
        self.out = nn.Linear(config.width, config.width)

    def initial(self, batch: int, device: torch.device | str) -> Tensor:
        return torch.zeros(batch, *self.shape, device=device)

    def forward(self, h: Tensor, first: Tensor, state: Tensor, hq: Tensor | None, at: Tensor | None):
        ys = []
        yqs = []
        states = []
        for t in range(h.shape[1]):
            state = torch.where(first[:, t, None, None], 0.0, state)
            if hq is not None:
                yqs.append(self.peek(hq[:, t : t + 1], state))
            y, state = self.step(h[:, t : t + 1], state)
            ys.append(y)
            states.append(state)
        y = torch.cat(ys, 1)
        after = torch.stack(states, 1)
        asked = after if at is None else after[torch.arange(len(h))[:, None], at].flatten(0, 1).detach()
        return y, torch.cat(yqs, 1) if yqs else None, state, asked

    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = 0.9 * state + h[:, 0]
        return self.out(state)[:, None], state

    def peek(self, h: Tensor, state: Tensor) -> Tensor:
        return self.step(h, state)[0]


class FadingBeforeAttention(Fading):
    local = True


@pytest.mark.parametrize("kind", [Fading, FadingBeforeAttention])
def test_a_mixer_of_ones_own(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_package", SimpleNamespace(Mine=kind))
    config = DynamicsConfig("my_package:Mine", layers=2, width=8, num_heads=2, window=3)
    model = shaken(config, 2)
    assert all((layer.attention is not None) == kind.local for layer in model.stack)
    check_streaming(model, 7)
    state = Clip(model, 2).run(model, empty(model)).state
    assert all(s.any() for s in state.mixers) and not any(s.any() for s in state.without_long_memory().mixers)
    assert parameters("my_package:Mine", layers=2) / parameters("hybrid", layers=2) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["hybird", "no_such_package:Mixer", "math:Mixer"])
def test_a_mixer_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=rf"worldmodel\.mixer = {name}"):
        Dynamics(DynamicsConfig(name), 1, 5, 3)


# -- chunks of frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["hybrid, residual", "ssm", "causal", "window"])
@torch.no_grad()
def test_chunk_after_chunk_is_the_clip(mixer: str) -> None:
    """The clean stream's chunks go into the state one by one; the query stream's are what M makes of a noised chunk in
    its place."""
    mixer, _, residual = mixer.partition(", ")
    config = DynamicsConfig(mixer, width=8, num_heads=2, state_size=3, blocks=(1, 2), window=5, chunk_frames=3)
    model = shaken(DynamicsConfig(**{**config.__dict__, "predict_residual": bool(residual)}), 2)
    clip = Clip(model, 12)
    state = empty(model)
    clip.first[1, 3] = clip.first[0, 7] = True
    whole = clip.run(model, state)
    for begin in range(0, 12, 3):
        chunk = clip.part(begin, begin + 3)
        asked = model(chunk.zq, chunk.action, chunk.level_q, chunk.first, state)
        close(asked.pred, whole.pred[:, begin : begin + 3])
        out = chunk.run(model, state)
        close(out.feat, whole.feat[:, begin : begin + 3])
        state = out.state
    longer = Clip(model, 3)
    close(longer.run(model, state).feat, longer.run(model, whole.state).feat)


@torch.no_grad()
def test_within_a_chunk_attention_looks_ahead() -> None:
    model = shaken(DynamicsConfig("window", layers=1, width=8, num_heads=2, window=4, chunk_frames=2), 1)
    clip = Clip(model, 6)
    before = clip.run(model, empty(model)).feat
    clip.z[:, 3] += 1
    changed = (clip.run(model, empty(model)).feat != before).flatten(2).any(2)
    assert changed.tolist() == [[False, False, True, True, True, True]] * 2


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_an_agent_cannot_ask_for_frames_of_a_chunk() -> None:
    model = shaken(DynamicsConfig(width=8, num_heads=2, chunk_frames=2), 1)
    clip = Clip(model, 4)
    state = empty(model)
    frame = clip.z[:, 0], clip.action[:, 0]
    for ask in (
        lambda: model.predict(state, *frame, clip.level[:, 0]),
        lambda: model.commit(state, *frame, clip.first[:, 0]),
        lambda: clip.run(model, state, torch.zeros(2, 1, dtype=torch.long)),
    ):
        with pytest.raises(ValueError, match=r"worldmodel\.chunk_frames = 2.*set it to 1"):
            ask()
    with pytest.raises(ValueError, match="3 frames is not whole chunks"):
        clip.part(0, 3).run(model, state)
    with pytest.raises(ValueError, match=r"chunk_frames = 5 is more than worldmodel\.window"):
        Dynamics(DynamicsConfig(chunk_frames=5), 1, 5, 3)


OTHERS = [{"mixer": "ssm"}, {"mixer": "causal"}, {"layers": 3}, {"width": 16}, {"window": 5}, {"state_size": 7}]


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_configuration(other: dict) -> None:
    plain = {"width": 8, "num_heads": 2, "layers": 2}
    model = shaken(DynamicsConfig(**plain), 2)
    stranger = shaken(DynamicsConfig(**(plain | other)), 2)
    clip = Clip(model, 3)
    state = empty(stranger)
    for ask in (
        lambda: clip.run(model, state),
        lambda: model.predict(state, clip.z[:, 0], clip.action[:, 0], clip.level[:, 0]),
        lambda: model.commit(state, clip.z[:, 0], clip.action[:, 0], clip.first[:, 0]),
    ):
        with pytest.raises(ValueError, match="a state of another configuration"):
            ask()


def test_frames_and_actions_of_another_size() -> None:
    model = shaken(DynamicsConfig(width=8, num_heads=2), 2)
    clip = Clip(model, 3)
    state = empty(model)
    with pytest.raises(ValueError, match=r"4 tokens \(encoder\.grid\) of 5 channels"):
        model(clip.z[:, :, :3], clip.action, clip.level, clip.first, state)
    with pytest.raises(ValueError, match="one of length 3 per frame"):
        model(clip.z, clip.action[:, :2], clip.level, clip.first, state)
    with pytest.raises(ValueError, match="one of length 3 per frame"):
        model.commit(state, clip.z[:, 0], clip.action[:, 0, :2], clip.first[:, 0])
    with pytest.raises(ValueError, match="a state of 5 sequences beside latents of 2"):
        model(clip.z, clip.action, clip.level, clip.first, empty(model, 5))
