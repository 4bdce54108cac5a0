"""The head between features and the space in which views are compared."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class ProjectionHead(nn.Module):
    """Pooled features (B, in_channels) → unit vectors (B, dim), float32: linear, batch norm, ReLU, linear.

    Without the norm all embeddings start out alike, codes are uniform, and training stays there: what tells samples
    apart must be larger than what they share. So the norm is of the batch, not of each sample.
    """

    def __init__(self, in_channels: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_channels, hidden)
        self.norm = JointBatchNorm(hidden)
        self.last = nn.Linear(hidden, dim)

    def forward(self, features: Float[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        projected = self.last(torch.relu(self.norm(self.first(features))))
        with torch.autocast(features.device.type, enabled=False):
            return functional.normalize(projected.float(), dim=1)


class JointBatchNorm(nn.BatchNorm1d):
    """Batch norm (B, C) over the samples of all processes, with the gradient of one process; in float32.

    `torch.nn.SyncBatchNorm` is that on CUDA alone. In eval mode, and in a single process, plain batch norm.
    """

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        with torch.autocast(x.device.type, enabled=False):
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            if self.training and ready and torch.distributed.get_world_size() > 1:
                return self._jointly(x.float())
            return super().forward(x.float())

    @torch.compiler.disable
    def _jointly(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        count = len(x) * torch.distributed.get_world_size()
        mean = all_reduce(x.sum(dim=0)) / count
        variance = all_reduce((x - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
