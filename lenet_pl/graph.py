"""The optimizer steps of a block as one CUDA graph.

A step of LeNet-5 is some 58 kernels. A GPU runs them in a quarter of a millisecond, but Python takes about eight times
as long to launch them one after the other. A CUDA graph launches those of a whole block at once. The kernels and their
order stay the same, and so do the weights, to the bit where torch is deterministic.

Measured on an NVIDIA H100 (torch 2.11) at batch 32: 233 µs a step, and 125 µs compiled. With max_autotune_gemm it would
be 94 µs, but then compiling takes 70 s instead of 18 s.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import Adam, adam

# Fused Adam gives 65,536 elements of a tensor to one processor of the GPU. Smaller pieces keep more processors busy.
PIECE = 4096


class BlockGraph:
    """Takes the steps of a block: of the first block of its shape as usual, and of later ones by replaying a graph.

    Args:
        optimizer: Fused Adam with one parameter group, which has taken a step before.
        forward: Returns the outputs ``[B, …]`` and the mean loss of a mini-batch of B samples.
        compiled: Whether torch.compile may fuse kernels and use TF32: faster, and equal within tolerance only.
    """

    def __init__(self, optimizer: Adam, forward: Callable[[Any], Any], compiled: bool) -> None:
        self.optimizer = optimizer
        self.forward, self.full_forward = forward, forward  # the second one is for mini-batches of the full size
        self.update: Callable[..., None] = adam
        self.fused = not compiled
        self.cut: Callable[[list[Tensor]], list[Tensor]] = list if compiled else _pieces
        if compiled:
            options: Any = {"combo_kernels": True}  # one kernel for many small tensors
            self.full_forward = torch.compile(forward, dynamic=False, options=options)
            self.update = torch.compile(adam, dynamic=False, options=options)
        self.parameters = optimizer.param_groups[0]["params"]
        states = [optimizer.state[parameter] for parameter in self.parameters]
        self.moments = [self.cut([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")]
        self.weights = self.cut([parameter.detach() for parameter in self.parameters])
        self.counts: list[Tensor] = []
        for state in states:  # each piece counts its steps; a checkpoint saves the count of a parameter's first piece
            counts = [state["step"].clone() for _ in self.cut([state["exp_avg"]])]
            state["step"] = counts[0]
            self.counts += counts
        self.settings: list[Any] = []
        # The graph, its inputs and its results for each shape of a block: its samples, and those of a mini-batch.
        # None: a block of that shape has run once, and the next one is recorded.
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]] | None] = {}

    def __call__(self, fields: list[Tensor], batch_size: int, rates: list[float]) -> list[Tensor]:
        """Takes a step on each mini-batch of a block with its learning rate; returns what ``blocks.run`` returns."""
        shape = (len(fields[0]), batch_size)
        settings = [self.optimizer.param_groups[0][name] for name in ("betas", "eps", "weight_decay")]
        if settings != self.settings:  # a recording holds them, and somebody has changed them
            self.graphs.clear()
            self.settings = settings
        inputs = [*fields, torch.tensor(rates, dtype=torch.float32).to(fields[0].device, non_blocking=True)]
        if shape not in self.graphs:  # readies cuDNN and compiles: neither may happen while a graph is recorded
            self.graphs[shape] = None
            return self._steps(batch_size, inputs)
        recorded = self.graphs[shape]
        if recorded is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records the kernels without running them
                results = self._steps(batch_size, inputs)
            recorded = self.graphs[shape] = (graph, inputs, results)
        graph, buffers, results = recorded
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        graph.replay()
        return [result.clone() for result in results]  # the next replay writes over them

    def _steps(self, batch_size: int, inputs: list[Tensor]) -> list[Tensor]:
        *fields, rates = inputs
        batches = zip(*(field.split(batch_size) for field in fields), strict=True)
        precision = torch.get_float32_matmul_precision()
        if not self.fused:  # products of matrices in TF32 take half the time; convolutions on a GPU always use it
            torch.set_float32_matmul_precision("high")
        try:
            results = [self._step(batch, rate, batch_size) for batch, rate in zip(batches, rates, strict=True)]
        finally:
            torch.set_float32_matmul_precision(precision)
        outputs, losses = zip(*results, strict=True)
        return [torch.cat(outputs), torch.cat(losses)]

    def _step(self, batch: Any, rate: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        torch.clear_autocast_cache()  # it holds bfloat16 copies of the weights as they were before the last step
        is_full = len(batch[0]) == batch_size  # the smaller last one of an epoch is not worth a compilation
        outputs, loss = (self.full_forward if is_full else self.forward)(batch)
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss, self.parameters)]
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        names = ("weight_decay", "eps", "amsgrad", "maximize", "decoupled_weight_decay")
        options = {name: group[name] for name in names} | {"beta1": beta1, "beta2": beta2, "lr": rate}
        options |= {"fused": self.fused, "foreach": not self.fused, "capturable": True}
        with torch.no_grad():
            self.update(self.weights, self.cut(gradients), *self.moments, [], self.counts, **options)
        return outputs.detach(), loss.detach().expand(len(outputs))


def _pieces(tensors: list[Tensor]) -> list[Tensor]:
    """Cuts large tensors into pieces that lie in the same memory."""
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += tensor.view(-1).split(PIECE) if tensor.numel() > PIECE else [tensor]
    return pieces
