"""CUDA graphs: thousands of small kernels are captured once and then launched together."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_copy_: many copies in one launch

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # calls before the capture, in which libraries choose their kernels and allocate their workspaces


class Capture(NamedTuple):
    """A captured graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any


def _kind(tensors: list[Tensor], tree: Any) -> tuple[Any, ...]:
    """The key of a capture: the structure of a tree of tensors, and their shapes and dtypes."""
    return (str(tree), *((t.shape, t.dtype) for t in tensors))


class Graphed:
    """A function from trees of CUDA tensors to trees of tensors, without gradient, captured at its first call with
    inputs of given shapes.

    The function must launch the same kernels at every call: no branching on values, no copies to the host. Parameters
    that it reads may change in place. The random stream continues from call to call. The next call overwrites the
    outputs.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.captured: dict[Any, Capture] = {}

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        tensors, tree = pytree.tree_flatten(args)
        key = _kind(tensors, tree)
        if key not in self.captured:
            self.captured[key] = self._capture(tensors, tree)
        captured = self.captured[key]
        torch._foreach_copy_(captured.inputs, tensors)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, tensors: list[Tensor], tree: Any) -> Capture:
        inputs = [t.clone() for t in tensors]
        args = pytree.tree_unflatten(inputs, tree)
        graph, outputs = capture(lambda: self.function(*args))
        return Capture(graph, inputs, outputs)


class GraphedUpdate:
    """As Graphed, for an update: it computes gradients and changes parameters, so there are no extra warm-up calls.

    The first WARM_UP calls with inputs of given shapes run normally. The next call is captured; it and all later ones
    replay the graph. Only the graph of the latest shapes is kept, since it holds the activations of an update."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.aside = torch.cuda.Stream()
        self.key: Any = None
        self.calls = 0
        self.captured: Capture | None = None

    def __call__(self, *args: Any) -> Any:
        tensors, tree = pytree.tree_flatten(args)
        key = _kind(tensors, tree)
        if key != self.key:
            self.key = key
            self.calls = 0
            self.captured = None
        self.calls += 1
        if self.calls <= WARM_UP:  # in the capture's stream: autograd's accumulators remember their stream
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                outputs = self.function(*args)
            torch.cuda.current_stream().wait_stream(self.aside)
            return outputs
        if self.captured is None:
            self.captured = self._capture(tensors, tree)
        torch._foreach_copy_(self.captured.inputs, tensors)
        self.captured.graph.replay()
        return self.captured.outputs

    def _capture(self, tensors: list[Tensor], tree: Any) -> Capture:
        inputs = [t.clone() for t in tensors]
        graph = torch.cuda.CUDAGraph()
        args = pytree.tree_unflatten(inputs, tree)
        # thread_local: other threads keep reading clips and copying them to the device
        with torch.cuda.graph(graph, stream=self.aside, capture_error_mode="thread_local"):
            outputs = self.function(*args)
        return Capture(graph, inputs, outputs)


class GraphedCall:
    """As Graphed, for a function without arguments, whose inputs and outputs are tensors at fixed addresses. A call
    launches its graph and does nothing else."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Any = None

    def __call__(self) -> Any:
        if self.graph is None:
            self.graph, self.outputs = capture(self.function)
        self.graph.replay()
        return self.outputs


@torch.no_grad()
def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a function, after WARM_UP calls. Returns the graph, and the outputs, which each replay overwrites."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's own thread, and those that read clips, may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph, outputs
