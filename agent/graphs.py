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
        key = (str(tree), *((t.shape, t.dtype) for t in tensors))
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
