"""Self-restoration: how far a restored patch is from the patch before it was corrupted."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def restoration_loss(
    restored: Float[Tensor, "b c *spatial"], original: Float[Tensor, "b c *spatial"]
) -> Float[Tensor, ""]:
    """Mean squared error over all voxels, in float32; intensities in [0, 1] (Zhou et al., MICCAI 2019, section 2)."""
    return functional.mse_loss(restored.float(), original.float())
