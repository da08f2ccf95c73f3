"""M's layers compiled, without a break in any graph: the same values and gradients. (By a backend that generates no
code: that is torch's own affair.)"""

import pytest
import torch

from longdream.worldmodel.config import DynamicsConfig, ForcingConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.objectives.flow import Flow


@pytest.mark.parametrize(
    ("mixer", "history", "num_starts"),
    [("hybrid", "noisy", 0), ("hybrid", "clean", 3), ("causal", "noisy", 0), ("rotary", "clean", 3)],
)
def test_a_compiled_clip_is_the_same(mixer: str, history: str, num_starts: int) -> None:
    torch.compiler.reset()
    config = DynamicsConfig(
        mixer, width=16, num_heads=2, state_size=8, blocks=(1, 2), window=3, tied_condition_keys=True
    )
    model = Dynamics(config, 2, 4, 3)
    objective = Flow(ForcingConfig(history=history), model)
    z = torch.rand(2, 10, 4, 4)
    action = torch.rand(2, 10, 3)
    first = torch.zeros(2, 10, dtype=torch.bool)
    first[1, 4] = True

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        out = objective.run(model, z, action, first, num_starts)
        grads = torch.autograd.grad(out.loss, [*model.parameters()], allow_unused=True)
        states: list[torch.Tensor] = []
        out.start_states.map(lambda t: states.append(t.float()) or t)
        return [out.loss.detach(), out.feat.detach(), *states, *(g for g in grads if g is not None)]

    plain = run()
    for layer in model.stack:
        layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for compiled, wanted in zip(run(), plain, strict=True):
        torch.testing.assert_close(compiled, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("attention", ["sdpa", "flex", "triton"])
def test_no_graph_breaks_on_cuda(attention: str) -> None:
    """There, kernels of our own and half precision have their say."""
    torch.compiler.reset()
    config = DynamicsConfig(width=32, num_heads=2, state_size=8, blocks=(1, 2), window=3, attention=attention)  # type: ignore[arg-type]
    model = Dynamics(config, 2, 4, 3).cuda()
    objective = Flow(ForcingConfig(), model)
    z = torch.rand(2, 10, 4, 4, device="cuda")
    action = torch.rand(2, 10, 3, device="cuda")
    for layer in model.stack:
        layer.compile(dynamic=False, fullgraph=True, backend="aot_eager" if attention != "flex" else "inductor")
    with torch.autocast("cuda", torch.bfloat16):
        loss = objective.run(model, z, action, torch.zeros(2, 10, dtype=torch.bool, device="cuda"), 3).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.cuda
def test_long_clips_of_turning_keys_compile() -> None:
    """Inductor fails on one long sum over time (torch 2.11), which the sums of angles are."""
    torch.compiler.reset()
    config = DynamicsConfig("rotary", layers=1, width=32, num_heads=2, state_size=8)
    model = Dynamics(config, 1, 4, 3).cuda()
    layer = model.stack[0]
    layer.compile(dynamic=False, fullgraph=True)
    z = torch.rand(2, 1024, 1, 4, device="cuda")
    first = torch.zeros(2, 1024, dtype=torch.bool, device="cuda")
    out = model(z, torch.rand(2, 1024, 3, device="cuda"), torch.ones(2, 1024, device="cuda"), first, model.initial(2))
    out.feat.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
