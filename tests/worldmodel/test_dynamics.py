import pytest
import torch
from torch import Tensor

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.dynamics import Dynamics, Output, State
from longdream.worldmodel.mixers import ssm

BATCH = 3
FRAMES = 13
CHANNELS = 5
ACTIONS = 3
# Mixer, token grid, scan blocks: every arrangement of tokens into scans, and none; sizes are odd where they may be.
KINDS = [
    ("hybrid", 1, (1,)),
    ("hybrid", 2, (1,)),
    ("hybrid", 2, (2,)),
    ("hybrid", 4, (1, 4)),
    ("hybrid", 4, (2,)),
    ("window", 1, (1,)),
    ("window", 2, (1,)),
    ("hybrid, residual", 4, (1, 4)),
    ("window, residual", 1, (1,)),
    ("ssm", 2, (1,)),
    ("ssm+local, residual", 2, (1,)),
    ("rotary", 1, (1,)),
    ("rotary+local", 2, (1,)),
    ("gru", 2, (1,)),
    ("causal", 2, (1,)),
    ("hybrid, tied", 2, (1, 2)),
]


def build(mixer="hybrid", grid=1, blocks=(1,), dtype=torch.float64, **options) -> Dynamics:
    """An M whose weights are all random: freshly made, its AdaLN does nothing."""
    shape = {"layers": 2, "width": 21, "num_heads": 3, "state_size": 5, "window": 3}
    mixer, _, variant = mixer.partition(", ")
    if variant == "residual":
        options = {"predict_residual": True, "frame_mlp_width": 7, "feature_skip": True} | options
    if variant == "tied":
        options = {"tied_condition_keys": True} | options
    config = DynamicsConfig(mixer=mixer, blocks=blocks, **(shape | options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssm, "SCAN_CHUNK", 5)  # a clip has several chunks
        model = Dynamics(config, grid, CHANNELS, ACTIONS).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


class Clip:
    """Random inputs of a clip: z, action, is_first of the clean stream; zq, levels of the query stream."""

    def __init__(self, model: Dynamics, frames: int = FRAMES, resets: bool = True):
        like = model.place
        self.z, self.zq = (like.new_empty(BATCH, frames, model.tokens, CHANNELS).normal_() for _ in range(2))
        self.action = like.new_empty(BATCH, frames, ACTIONS).normal_()
        self.level, self.level_q = (like.new_empty(BATCH, frames).uniform_() for _ in range(2))
        self.first = torch.zeros(BATCH, frames, dtype=torch.bool)
        if resets:
            self.first[1, 0] = self.first[1, frames // 2] = True
            self.first[2] = torch.rand(frames) < 0.25
            self.first[2, frames // 3] = True  # at least one

    def cut(self, begin: int, end: int) -> "Clip":
        other = object.__new__(Clip)
        other.__dict__ = {k: v[:, begin:end] for k, v in self.__dict__.items()}
        return other

    def run(self, model: Dynamics, state: State, query: bool = True, at: Tensor | None = None) -> Output:
        pair = (self.zq, self.level_q) if query else None
        return model(self.z, self.action, self.level, self.first, state, pair, at)


def lived(model: Dynamics, frames: int = 4) -> State:
    """The state of sequences that have seen something, one of them less than the others."""
    past = Clip(model, frames, resets=False)
    past.first[0, -2] = True
    with torch.no_grad():
        return past.run(model, start(model), query=False).state


def start(model: Dynamics, batch: int = BATCH) -> State:
    return model.initial(batch).map(lambda t: t.to(model.place.dtype) if t.is_floating_point() else t)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def same_future(model: Dynamics, a: State, b: State) -> None:
    """Two states are one if nothing that M does from them differs; slots that are not valid may."""
    future = Clip(model, 5, resets=False)
    out_a = future.run(model, a)
    out_b = future.run(model, b)
    close(out_a.feat, out_b.feat)
    close(out_a.pred, out_b.pred)


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_parallel_is_streamed(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    """forward's clean stream is commit after commit, its query stream is predict at every frame."""
    model = build(mixer, grid, blocks)
    clip = Clip(model)
    state = lived(model)
    out = clip.run(model, state)
    assert out.feat.shape == (BATCH, FRAMES, model.feature_size)
    assert out.pred.shape == clip.z.shape
    begun = 0
    for t in range(FRAMES):
        first = clip.first[:, t]
        # predict is never asked for the first frame of an episode: its action is masked, as forward's query masks it
        action = clip.action[:, t]
        pred = model.predict(state.reset(first), clip.zq[:, t], action, clip.level_q[:, t])
        close(pred[~first], out.pred[~first, t])
        begun += int(first.sum())
        feat, state = model.commit(state, clip.z[:, t], action, first, clip.level[:, t])
        close(feat, out.feat[:, t])
    assert begun > 2
    for a, b in zip(state.mixers, out.state.mixers, strict=True):
        close(a, b)
    assert torch.equal(state.age, out.state.age)
    same_future(model, state, out.state)


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_a_frame_that_begins_nothing_need_not_be_marked(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    model = build(mixer, grid, blocks)
    clip = Clip(model)
    state = lived(model)
    kept, (z, action) = state.map(torch.clone), (clip.z[:, 0], clip.action[:, 0])
    feat, after = model.commit(state, z, action, None)
    expected, same = model.commit(state, z, action, torch.zeros(BATCH, dtype=torch.bool))
    assert torch.equal(feat, expected)
    for ours, theirs in zip((after, state), (same, kept), strict=True):
        flat = [(*s.mixers, *s.k, *s.v, s.last, s.age) for s in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    assert not torch.allclose(feat, model.commit(state, z, action, torch.ones(BATCH, dtype=torch.bool))[0])


def test_a_clean_level_is_the_default_of_commit() -> None:
    model = build()
    clip = Clip(model, resets=False)
    state = lived(model)
    args = state, clip.z[:, 0], clip.action[:, 0], clip.first[:, 0]
    feat, _ = model.commit(*args)
    assert torch.equal(feat, model.commit(*args, torch.ones(BATCH, dtype=torch.float64))[0])
    assert not torch.allclose(feat, model.commit(*args, torch.full((BATCH,), 0.7, dtype=torch.float64))[0])


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_without_queries_the_clean_stream_predicts_itself(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    model = build(mixer, grid, blocks)
    clip = Clip(model)
    state = lived(model)
    one = clip.run(model, state, query=False)
    two = clip.run(model, state)
    close(one.feat, two.feat, 1e-12)
    # a query frame that is the clean frame sees what the clean one sees
    clip.zq = clip.z
    clip.level_q = clip.level
    close(one.pred, clip.run(model, state).pred)


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
@pytest.mark.parametrize("cut", [1, 6, 12])
def test_chunked_is_one_pass(mixer: str, grid: int, blocks: tuple[int, ...], cut: int) -> None:
    model = build(mixer, grid, blocks)
    clip = Clip(model)
    state = lived(model)
    whole = clip.run(model, state)
    head = clip.cut(0, cut).run(model, state)
    tail = clip.cut(cut, FRAMES).run(model, head.state)
    close(torch.cat([head.feat, tail.feat], 1), whole.feat)
    close(torch.cat([head.pred, tail.pred], 1), whole.pred)
    same_future(model, tail.state, whole.state)


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_a_reset_inside_a_clip_makes_separate_clips(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    model = build(mixer, grid, blocks)
    cut = 6
    clip = Clip(model, resets=False)
    clip.first[:, cut] = True
    whole = clip.run(model, lived(model))
    alone = clip.cut(cut, FRAMES).run(model, start(model))
    close(whole.feat[:, cut:], alone.feat)
    close(whole.pred[:, cut:], alone.pred)
    same_future(model, whole.state, alone.state)
    _, streamed = model.commit(lived(model), clip.z[:, cut], clip.action[:, cut], clip.first[:, cut])
    _, fresh = model.commit(start(model), clip.z[:, cut], clip.action[:, cut], clip.first[:, cut])
    same_future(model, streamed, fresh)


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_what_each_input_reaches(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    """By gradients: nothing leaks backwards, out of an episode, or out of a query frame, and the rest does arrive.

    A clean frame t reaches the clean stream from t on and the query stream after t; a query frame reaches itself alone;
    the action that leads to t reaches both streams from t on, unless an episode begins there. All within t's episode.
    """
    model = build(mixer, grid, blocks)
    t = 6
    horizon = 2 * 2 if "window" in mixer else FRAMES  # two layers, each of which looks two frames back
    clip = Clip(model, resets=False)
    clip.first[1, t] = clip.first[2, t + 2] = True
    inputs = [clip.z, clip.level, clip.action, clip.zq, clip.level_q]
    for v in inputs:
        v.requires_grad_()
    out = clip.run(model, lived(model))
    for s in range(FRAMES):
        for is_query, stream in enumerate((out.feat, out.pred)):
            total = stream[:, s].square().sum()
            grads = torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)
            if s < t:
                assert not any(g[:, t].any() for g in grads)
                continue
            # decays are differences of cumulative sums: across a reset they leave a rounding error and no more
            z, level, action, zq, level_q = (g[:, t].reshape(BATCH, -1).abs().amax(1) > 1e-11 for g in grads)
            episode = torch.tensor([True, True, s < t + 2]) & (s - t <= horizon)
            assert torch.equal(z, episode & (not is_query or s > t))
            assert torch.equal(level, z)
            assert torch.equal(action, episode & torch.tensor([True, False, True]))
            assert zq.tolist() == level_q.tolist() == [is_query and s == t] * BATCH
            for g in grads[3:]:
                assert not torch.cat([g[:, :s], g[:, s + 1 :]], 1).any()


@pytest.mark.parametrize("mixer", ["hybrid", "window"])
def test_the_action_before_an_episode_has_no_influence(mixer: str) -> None:
    model = build(mixer, 2)
    clip = Clip(model)
    other = Clip(model)
    other.__dict__.update(clip.__dict__)
    other.action = torch.where(clip.first[..., None], 1e3, clip.action)
    state = lived(model)
    a = clip.run(model, state)
    b = other.run(model, state)
    assert torch.equal(a.feat, b.feat) and torch.equal(a.pred, b.pred)
    for t in range(FRAMES):
        first = clip.first[:, t]
        feats = [model.commit(start(model), c.z[:, t], c.action[:, t], first)[0] for c in (clip, other)]
        assert torch.equal(*feats)


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_predict_changes_nothing(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    """Neither the state nor M: it may be asked any number of times, and commit does not touch the state it is given."""
    model = build(mixer, grid, blocks)
    clip = Clip(model)
    state = lived(model)
    kept = state.map(torch.clone)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    question = clip.zq[:, 0], clip.action[:, 0], clip.level_q[:, 0]
    once = model.predict(state, *question)
    model.predict(state, clip.zq[:, 1], clip.action[:, 1], clip.level_q[:, 1])
    model.commit(state, clip.z[:, 0], clip.action[:, 0], torch.tensor([True, False, False]))
    clip.run(model, state)
    assert torch.equal(once, model.predict(state, *question))
    for a, b in zip(
        (*state.mixers, *state.k, *state.v, state.age), (*kept.mixers, *kept.k, *kept.v, kept.age), strict=True
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_states_at_frames_of_a_clip_go_on_like_streams(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    model = build(mixer, grid, blocks)
    clip = Clip(model)
    state = lived(model)
    at = torch.stack([torch.randperm(FRAMES)[:4] for _ in range(BATCH)])
    at[:, 0] = 0
    at[:, 1] = FRAMES - 1
    out = clip.run(model, state, at=at)
    assert out.states_at is not None
    assert not any(t.requires_grad for t in (*out.states_at.mixers, *out.states_at.k, *out.states_at.v))
    plain = clip.run(model, state)
    assert torch.equal(plain.feat, out.feat) and torch.equal(plain.pred, out.pred)
    streamed = []
    for t in range(FRAMES):
        _, state = model.commit(state, clip.z[:, t], clip.action[:, t], clip.first[:, t], clip.level[:, t])
        streamed.append(state)
    for i in range(at.shape[1]):
        asked = out.states_at.map(lambda v, i=i: v.unflatten(0, at.shape)[:, i])
        for row in range(BATCH):
            one, other = (
                s.map(lambda v, row=row: v[row].expand(BATCH, *v.shape[1:])) for s in (asked, streamed[at[row, i]])
            )
            assert torch.equal(one.age, other.age)
            same_future(model, one, other)


def test_states_select_reset_and_forget() -> None:
    model = build("hybrid", 2, (1, 2))
    state = lived(model)
    parts = [*state.mixers, *state.k, *state.v, state.age]
    rows = torch.tensor([2, 0, 2, 1])
    taken = state.map(lambda t: t[rows])
    for a, b in zip([*taken.mixers, *taken.k, *taken.v, taken.age], parts, strict=True):
        assert torch.equal(a, b[rows])
    cleared = state.reset(torch.tensor([False, True, False]))
    for a, b in zip([*cleared.mixers, *cleared.k, *cleared.v, cleared.age], parts, strict=True):
        assert torch.equal(a[::2], b[::2]) and not a[1].any()
        assert b[1].any() and a.dtype == b.dtype
    broken = state.map(lambda t: t * torch.nan if t.is_floating_point() else t).reset(torch.ones(3, dtype=torch.bool))
    assert not any(t.any() for t in (*broken.mixers, *broken.k, *broken.v))
    short = state.without_long_memory()
    assert not any(s.any() for s in short.mixers)
    assert all(torch.equal(a, b) for a, b in zip(short.k + short.v, state.k + state.v, strict=True))
    assert torch.equal(short.age, state.age)


def test_only_the_scan_remembers_beyond_the_window() -> None:
    """A cue beyond the window: hybrid M knows it, unless its long memory is cut at every frame; window M never does."""
    for mixer in ("hybrid", "window"):
        model = build(mixer, 2, layers=1)
        clip = Clip(build(mixer, 2), 8, resets=False)

        def live(cue: float, cut: bool, model=model, clip=clip) -> State:
            state = start(model)
            for t in range(8):
                state = state.without_long_memory() if cut else state
                z = torch.full_like(clip.z[:, 0], cue) if t == 0 else clip.z[:, t]
                _, state = model.commit(state, z, clip.action[:, t], clip.first[:, t])
            return state.without_long_memory() if cut else state

        same_future(model, live(-1.0, cut=True), live(1.0, cut=True))
        future = Clip(model, 5, resets=False)
        feats = [future.run(model, live(cue, cut=False)).feat for cue in (-1.0, 1.0)]
        assert ((feats[0] - feats[1]).abs().amax() > 1e-3) == (mixer == "hybrid")


@pytest.mark.parametrize(("mixer", "grid", "blocks"), [KINDS[3], KINDS[5]])
def test_a_state_stays_as_large_as_it_is(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    model = build(mixer, grid, blocks, dtype=torch.float32)

    def held(state: State) -> int:
        """Bytes of memory behind the tensors, seen by them or not."""
        return sum(t.untyped_storage().nbytes() for t in (*state.mixers, *state.k, *state.v, state.age))

    with torch.no_grad():
        state = start(model)
        clip = Clip(model, resets=False)
        sizes = set()
        for t in range(150):
            i = t % FRAMES
            _, state = model.commit(state, clip.z[:, i], clip.action[:, i], clip.first[:, i])
            sizes.add(held(state))
    assert len(sizes) == 1
    assert all(t.isfinite().all() for t in (*state.mixers, *state.k, *state.v))
    assert state.age.tolist() == [model.config.window - 1] * BATCH


@pytest.mark.parametrize(("mixer", "grid", "blocks"), KINDS)
def test_single_and_half_precision(mixer: str, grid: int, blocks: tuple[int, ...]) -> None:
    """float32 is near float64; bfloat16 autocast runs, forwards, backwards and streamed, and is not far."""
    exact = build(mixer, grid, blocks)
    model = build(mixer, grid, blocks, dtype=torch.float32)
    model.load_state_dict(exact.state_dict())
    clip = Clip(exact, 40)
    single = Clip(exact, 40)
    at = torch.tensor([[5, 17]] * BATCH)
    single.__dict__ = {k: v.float() if v.is_floating_point() else v for k, v in clip.__dict__.items()}
    wanted = clip.run(exact, start(exact)).feat
    got = single.run(model, start(model), at=at)
    assert (got.feat - wanted).norm() < 1e-4 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        half = single.run(model, start(model), at=at)
        assert half.states_at is not None
        state = half.states_at.map(lambda t: t)
        rows = [t.repeat_interleave(2, 0) for t in (single.zq[:, 0], single.action[:, 0], single.level_q[:, 0])]
        pred = model.predict(state, *rows)
        feat, state = model.commit(state, rows[0], rows[1], torch.zeros(2 * BATCH, dtype=torch.bool))
    assert all(t.dtype == torch.float32 for t in half.state.mixers + state.mixers)  # sums over thousands of frames
    assert (half.feat.float() - wanted).norm() < 0.1 * wanted.norm()
    assert pred.isfinite().all() and feat.isfinite().all()
    (half.feat.float().square().mean() + half.pred.float().square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_weight_learns() -> None:
    model = build("hybrid", 4, (1, 4))
    out = Clip(model).run(model, start(model))
    (out.feat.square().mean() + out.pred.square().mean()).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_a_fine_grid_is_pooled_into_features() -> None:
    model = build("hybrid", 8, (2,))
    assert model.feature_size == 16 * model.config.width
    assert Clip(model, 2).run(model, start(model)).feat.shape == (BATCH, 2, model.feature_size)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"worldmodel\.blocks.*3.*4"):
        build("hybrid", 4, (3,))
    assert [layer.mixer.block for layer in build("hybrid", 2, (4, 1), layers=3).stack] == [2, 1, 2]


def test_how_frames_move_is_learned_by_the_frame_mlp() -> None:
    """Each action shuffles the numbers of a frame in a way of its own. With `frame_mlp_width` M foresees most of it
    after updates in which layers alone get no further than a frame's mean, which errs half as much as the frame
    before."""
    left = {}
    channels = 4
    actions = 3
    for frame_mlp_width in (0, 128):
        torch.manual_seed(0)
        model = Dynamics(
            DynamicsConfig(width=32, num_heads=2, predict_residual=True, frame_mlp_width=frame_mlp_width),
            3,
            channels,
            actions,
        )
        ways = torch.stack([torch.randperm(9 * channels) for _ in range(actions)])
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for _ in range(80):
            frame = torch.randn(16, 9 * channels).tanh()
            choice = torch.randint(actions, (16, 5))
            frames = [frame]
            for t in range(5):
                frames.append(frames[-1].gather(1, ways[choice[:, t]]))
            z = torch.stack(frames, 1).unflatten(-1, (9, channels))
            action = torch.nn.functional.one_hot(torch.cat([choice[:, :1], choice], 1), actions).float()
            ones = torch.ones(16, 6)
            first = torch.zeros(16, 6, dtype=torch.bool)
            query = torch.zeros_like(z), torch.zeros_like(ones)
            pred = model(z, action, ones, first, model.initial(16), query).pred
            error = (pred - z)[:, 1:].square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        left[frame_mlp_width] = float(error.detach() / (z[:, 1:] - z[:, :-1]).square().mean())
    assert left[128] < 0.3 < 0.45 < left[0]


@pytest.mark.parametrize("frame_mlp_width", [0, 9])
def test_what_changes_is_predicted_from_the_frame_before(frame_mlp_width: int) -> None:
    """Freshly made, M expects the next frame to be the one it saw; after a reset, nothing."""
    config = DynamicsConfig(
        layers=1, width=16, num_heads=2, predict_residual=True, frame_mlp_width=frame_mlp_width, feature_skip=True
    )
    model = Dynamics(config, 2, CHANNELS, ACTIONS)
    clip = Clip(model)
    out = model(clip.z, clip.action, torch.ones_like(clip.level), clip.first, model.initial(BATCH))
    before = torch.cat([torch.zeros_like(clip.z[:, :1]), clip.z[:, :-1]], 1)
    assert torch.equal(out.pred, before * ~clip.first[..., None, None])
    assert torch.equal(out.state.last, clip.z[:, -1])
    assert out.feat.shape[-1] == model.feature_size == 4 * (16 + CHANNELS)
    tokens = out.feat.unflatten(-1, (4, -1))
    assert torch.equal(tokens[..., 16:], clip.z)
