"""An optimizer step as one CUDA graph.

A step of LeNet-5 is some 58 kernels. A GPU runs them in a quarter of a millisecond, but Python takes ten times as long
to launch them one after the other. A CUDA graph launches all of them at once. The kernels and their order stay the
same, and so do the weights, to the bit where torch is deterministic.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import Adam, adam

# Fused Adam gives each 65,536 elements of a tensor to one processor. Smaller pieces keep more of them busy.
PIECE = 4096


class StepGraph:
    """Takes optimizer steps, the first one as usual and later ones of the same shape by replaying a graph.

    Args:
        optimizer: Fused Adam with one parameter group, which has taken a step before.
        forward: Returns the outputs ``[B, …]`` and the mean loss of a mini-batch.
        compiled: Whether torch.compile may fuse kernels: faster, after half a minute, and equal within tolerance only.
    """

    def __init__(self, optimizer: Adam, forward: Callable[[Any], Any], compiled: bool) -> None:
        self.optimizer, self.forward = optimizer, forward
        self.fast_forward = forward
        self.update: Callable[..., None] = adam
        self.fused = not compiled
        if compiled:
            options: Any = {"combo_kernels": True}  # one kernel for many small tensors
            self.fast_forward = torch.compile(forward, dynamic=False, options=options)
            self.update = torch.compile(adam, dynamic=False, options=options)
        group = optimizer.param_groups[0]
        self.lr = torch.zeros((), device=group["params"][0].device)  # a graph reads it at each replay
        states = [optimizer.state[parameter] for parameter in group["params"]]
        self.parameters = group["params"]
        self.moments = [_pieces([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")]
        self.weights = _pieces([parameter.detach() for parameter in self.parameters])
        self.steps = [states[0]["step"].clone() for _ in self.weights]  # each piece counts by itself
        place = 0
        for state in states:  # what a checkpoint saves is the count of a parameter's first piece
            state["step"] = self.steps[place]
            place += len(_pieces([state["exp_avg"]]))
        self.batch: list[Tensor] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Takes a step on a mini-batch; returns its outputs and its loss, without gradients."""
        self.lr.fill_(self.optimizer.param_groups[0]["lr"])
        if self.batch is None:  # readies cuDNN and compiles: neither may happen while a graph is recorded
            self.batch = [tensor.clone() for tensor in batch]
            return self._step(batch, self.fast_forward)
        if any(tensor.shape != buffer.shape for tensor, buffer in zip(batch, self.batch, strict=True)):
            return self._step(batch, self.forward)  # the smaller last one of an epoch
        for buffer, tensor in zip(self.batch, batch, strict=True):
            buffer.copy_(tensor)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records the kernels without running them
                self.results = self._step(self.batch, self.fast_forward)
        self.graph.replay()
        outputs, loss = self.results
        return outputs.clone(), loss.clone()  # the next replay writes over them

    def _step(self, batch: Any, forward: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
        torch.clear_autocast_cache()  # it holds bfloat16 copies of the weights as they were before the last step
        outputs, loss = forward(batch)
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss, self.parameters)]
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        names = ("weight_decay", "eps", "amsgrad", "maximize", "decoupled_weight_decay")
        options = {name: group[name] for name in names} | {"beta1": beta1, "beta2": beta2, "lr": self.lr}
        options |= {"fused": self.fused, "foreach": not self.fused, "capturable": True}
        with torch.no_grad():
            self.update(self.weights, _pieces(gradients), *self.moments, [], self.steps, **options)
        return outputs.detach(), loss.detach()


def _pieces(tensors: list[Tensor]) -> list[Tensor]:
    """Cuts large tensors into pieces that lie in the same memory."""
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += tensor.view(-1).split(PIECE) if tensor.numel() > PIECE else [tensor]
    return pieces
