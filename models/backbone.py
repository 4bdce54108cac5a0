"""What pretraining asks of a network: an encoding and a decoding half, and which of its weights belong to which."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Backbone(nn.Module):
    """A plain network, unchanged, with its two halves in reach: `decode(encode(x))` is `network(x)`, bit for bit.

    The halves share the network's modules and are not registered a second time, so the state dict of a backbone is
    the network's own under `network.`.

    network: the network itself, for instance a `monai.networks.nets.UNet`.
    encoder: its encoding half alone, x (B, C, *spatial) → features from finest to coarsest; no decoder parameters.
    feature_channels: channels of each feature map; the last is the bottleneck's.
    stride: every side of an input must be a multiple of it, in voxels.
    blocks: the modules that do the work, one after another.
    """

    def __init__(
        self,
        network: nn.Module,
        encoder: nn.Module,
        output: nn.Module,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        feature_channels: Iterable[int],
        stride: int,
        blocks: Iterable[nn.Module],
    ) -> None:
        super().__init__()
        self.network = network
        self._halves = (encoder, output)  # in a tuple, which nn.Module does not register
        self.blocks = tuple(blocks)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.feature_channels = list(feature_channels)
        self.stride = stride

    @property
    def encoder(self) -> nn.Module:
        return self._halves[0]

    def encode(self, x: Float[Tensor, "b c *spatial"]) -> list[Tensor]:
        """Feature maps (B, feature_channels[i], *spatial / strides), finest first; the last is the bottleneck."""
        return self.encoder(x)

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b o *spatial"]:
        """The network's output for the features of `encode`."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b o *spatial"]:
        return self.decode(self.encode(x))

    def train_encoder_only(self) -> None:
        """From now on the decoder stays as it is."""
        self.network.requires_grad_(False)
        self.encoder.requires_grad_(True)

    def recompute_activations(self) -> None:
        """From now on keep only what passes between blocks for the backward pass, and compute the rest a second time.

        Saves most of the memory of training for about a third more time. Output, gradients and state are the same.
        """
        for block in self.blocks:
            norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
            contexts: dict[str, Any] = (
                {"context_fn": partial(_second_time, norms)} if norms else {}
            )  # torch.compile takes none
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)

    def describe(self) -> dict:
        """`{"class": dotted name, "kwargs": …}` of the plain network, in JSON types."""
        raise NotImplementedError

    @property
    def encoder_keys(self) -> list[str]:
        """Keys of `network.state_dict()` that `encode` uses."""
        return self._keys_of(self._halves[0])

    @property
    def output_keys(self) -> list[str]:
        """Keys of the last layer: the part that a downstream task replaces."""
        return self._keys_of(self._halves[1])

    @property
    def decoder_keys(self) -> list[str]:
        """All other keys: the decoder without its last layer."""
        others = {*self.encoder_keys, *self.output_keys}
        return [key for key in self.network.state_dict() if key not in others]

    def _keys_of(self, part: nn.Module) -> list[str]:
        tensors = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
        return [key for key, tensor in self.network.state_dict(keep_vars=True).items() if id(tensor) in tensors]


class Stages(nn.ModuleList):
    """Modules applied one after another; returns the output of each."""

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> list[Tensor]:
        features = []
        for stage in self:
            x = stage(x)
            features.append(x)
        return features


def _second_time(norms: list[_BatchNorm]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the first pass and of the second."""
    return nullcontext(), _uncounted(norms)


@contextmanager
def _uncounted(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norm whose running statistics stay as they are: the first pass has counted the batch."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
