"""The pictures of docs/memory.md, computed by the code that they show: python docs/images/memory.py [FOLDER]."""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from longdream.agent.evaluation.curves import COLOURS, STYLE
from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.dynamics import Dynamics

FRAMES = 200
WINDOW = 8


def dynamics(mixer: str) -> Dynamics:
    torch.manual_seed(0)
    config = DynamicsConfig(mixer=mixer, layers=1, width=64, num_heads=8, state_size=16, window=WINDOW)
    return Dynamics(config, grid=1, channels=8, actions=2)


@torch.no_grad()
def influence(mixer: str, long_memory: bool = True) -> np.ndarray:
    """How much M's feature after frame t depends on frame 0, `(FRAMES,)`: the norm of the difference that another first
    frame makes, relative to that at frame 0."""
    model = dynamics(mixer)
    z = torch.tanh(torch.randn(1, FRAMES, 1, 8))
    pair = torch.cat([z, z])
    pair[1, 0] = -pair[1, 0]
    state = model.initial(2)
    differences = []
    for t in range(FRAMES):
        if not long_memory:
            state = state.without_long_memory()
        feat, state = model.commit(state, pair[:, t], torch.zeros(2, 2), torch.full((2,), t == 0))
        differences.append(float((feat[1] - feat[0]).norm()))
    return np.array(differences) / differences[0]


def scan(folder: Path) -> None:
    """What is left of an input of the scan, head by head, as the decays are initialised."""
    figure = Figure(figsize=(5.5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    tau = torch.logspace(np.log10(4), 3, 8).numpy()
    t = np.arange(400)
    for i, constant in enumerate(tau):
        axes.plot(t, np.exp(-t / constant), color=COLOURS[i], label=f"head {i + 1}: τ = {constant:.0f}")
    axes.set_xlabel("frames ago")
    axes.set_ylabel("share that is left")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(folder / "memory-scan.png", dpi=160)


def layers(folder: Path) -> None:
    """How far back the feature of an untrained M reaches, by mixer."""
    figure = Figure(figsize=(5.5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    curves = {
        "hybrid: scan and attention": influence("hybrid"),
        "window: attention alone": influence("window"),
        "hybrid, its scan states erased at every step": influence("hybrid", long_memory=False),
    }
    for i, (label, values) in enumerate(curves.items()):
        axes.plot(np.arange(FRAMES), np.maximum(values, 1e-5), "-" if i != 2 else "--", color=COLOURS[i], label=label)
    axes.axvline(WINDOW, color="#999999", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel(f"frames since the one that was changed (the attention sees {WINDOW})")
    axes.set_ylabel("difference in the feature")
    axes.legend(fontsize=7)
    figure.savefig(folder / "memory-layers.png", dpi=160)


def forcing(folder: Path) -> None:
    """Noise levels of a batch as diffusion forcing draws them (Forcing.run), of a clean prefix, and when M acts."""
    rng = torch.Generator().manual_seed(1)
    level = torch.rand(6, 16, generator=rng) * (torch.rand(6, 16, generator=rng) >= 0.3)
    prefix = torch.randint(8, 16, (6, 1), generator=rng)
    noisy_history = torch.where(torch.arange(16) < prefix, 1.0, level)
    acting = torch.ones(1, 16)
    acting[0, -1] = 0
    figure = Figure(figsize=(5.5, 2.8), layout="constrained")
    panels = {"every frame its own level": level, "after a clean prefix": noisy_history, "when M dreams": acting}
    for i, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(3, 1, i + 1)
        axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(title, fontsize=8, loc="left")
        axes.set_yticks([])
        axes.set_xticks([] if i < 2 else range(0, 16, 5))
        axes.grid(False)
    figure.get_axes()[-1].set_xlabel("frame; yellow is clean, blue is noise")
    figure.savefig(folder / "memory-forcing.png", dpi=160)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    with rc_context(STYLE):
        for draw in (scan, layers, forcing):
            draw(target)
