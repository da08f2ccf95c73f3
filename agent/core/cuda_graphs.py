"""CUDA graphs: what launches thousands of small kernels, recorded once and launched as one."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_copy_: many copies in one launch

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # calls before recording, so that libraries have chosen their kernels and made their workspaces


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any


def _kind(tensors: list[Tensor], tree: Any) -> tuple[Any, ...]:
    """What a recording is for: a tree of tensors of such shapes and types."""
    return (str(tree), *((t.shape, t.dtype) for t in tensors))


class Graphed:
    """A function from trees of CUDA tensors to trees of tensors, without gradient, recorded at its first call with
    inputs of given shapes.

    The function must do the same work at every call: no branching on values, nothing moved to the host. Parameters
    that it reads may change in place; random numbers go on from call to call. What a call returns is overwritten by
    the next.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.recorded: dict[Any, Recorded] = {}

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        tensors, tree = pytree.tree_flatten(args)
        key = _kind(tensors, tree)
        if key not in self.recorded:
            self.recorded[key] = self._record(tensors, tree)
        found = self.recorded[key]
        torch._foreach_copy_(found.inputs, tensors)
        found.graph.replay()
        return found.outputs

    def _record(self, tensors: list[Tensor], tree: Any) -> Recorded:
        inputs = [t.clone() for t in tensors]
        args = pytree.tree_unflatten(inputs, tree)
        graph, outputs = record(lambda: self.function(*args))
        return Recorded(graph, inputs, outputs)


class GraphedUpdate:
    """As Graphed, for a function that learns: with gradients, and changing what it owns, so that no call is made for
    practice. The first WARM_UP calls with inputs of given shapes just run; the next is recorded and, as all later ones,
    replayed. Of several shapes only the last are kept, since a recording of an update holds its activations."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.aside = torch.cuda.Stream()
        self.key: Any = None
        self.calls = 0
        self.recorded: Recorded | None = None

    def __call__(self, *args: Any) -> Any:
        tensors, tree = pytree.tree_flatten(args)
        key = _kind(tensors, tree)
        if key != self.key:
            self.key, self.calls, self.recorded = key, 0, None
        self.calls += 1
        if self.calls <= WARM_UP:  # beside the stream that recordings are replayed in: gradients remember theirs
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                found = self.function(*args)
            torch.cuda.current_stream().wait_stream(self.aside)
            return found
        if self.recorded is None:
            self.recorded = self._record(tensors, tree)
        torch._foreach_copy_(self.recorded.inputs, tensors)
        self.recorded.graph.replay()
        return self.recorded.outputs

    def _record(self, tensors: list[Tensor], tree: Any) -> Recorded:
        inputs, graph = [t.clone() for t in tensors], torch.cuda.CUDAGraph()
        args = pytree.tree_unflatten(inputs, tree)
        # other threads, which read clips and bring them to the device, go on meanwhile
        with torch.cuda.graph(graph, stream=self.aside, capture_error_mode="thread_local"):
            outputs = self.function(*args)
        return Recorded(graph, inputs, outputs)


class Replayed:
    """As Graphed, for a function without arguments: what it reads and writes are tensors that stay where they are. A
    call is the launch of its graph and nothing else."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Any = None

    def __call__(self) -> Any:
        if self.graph is None:
            self.graph, self.outputs = record(self.function)
        self.graph.replay()
        return self.outputs


@torch.no_grad()
def record(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what the function does, and what it returned: tensors that each replay writes anew. It is called a
    few times for it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs
