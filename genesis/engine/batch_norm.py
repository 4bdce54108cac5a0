"""Batch norm over the samples of all processes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .gathering import summed


class JointBatchNorm(_BatchNorm):
    """Batch norm over the samples of all processes, with the gradient of one process, in any number of dimensions.

    `torch.nn.SyncBatchNorm` is that on CUDA alone. Statistics are float32. In eval mode plain batch norm.
    """

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        return self._jointly(x) if self.training else super().forward(x)

    @torch.compiler.disable
    def _jointly(self, x: Tensor) -> Tensor:
        axes, shape = [0, *range(2, x.ndim)], (-1, *(1,) * (x.ndim - 2))
        with torch.autocast(x.device.type, enabled=False):
            whole = x.float()
            count = x[:, 0].numel() * torch.distributed.get_world_size()
            mean = summed(whole.sum(dim=axes)) / count
            centred = whole - mean.view(shape)
            variance = summed(centred.square().sum(dim=axes)) / count
            with torch.no_grad():
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.momentum is not None
                if self.num_batches_tracked is not None:  # not when activations are computed a second time
                    self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = torch.rsqrt(variance + self.eps) * self.weight
            return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        pass


def join_batch_norms(network: nn.Module) -> None:
    """From now on the batch norms of a network, in training, are over the samples of all processes."""
    for part in network.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = JointBatchNorm
