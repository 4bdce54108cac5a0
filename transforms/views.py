"""Views of a region for contrastive and clustering methods: crops at one or two scales, with random intensities."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from .crop import AXES, Axis, Crop, Crops
from .intensity import Intensities, IntensityJitter, IntensityRange
from .random import BatchGenerator


class Views(NamedTuple):
    """Parameters of the views of one size; intensities are of the views one after another, sample by sample."""

    crops: Crops
    intensities: Intensities


@dataclass(frozen=True)
class MultiCrop:
    """Views of regions (B, C, *region) in [0, 1]: a few global ones, and local ones, smaller, that see less.

    size, local_size: voxels per side of a view. global_views, local_views: how many of each.
    global_scale, local_scale: limits of a view's share of the region's volume.
    min_overlap: share of the smaller that every global view has in common with the first; local ones lie anywhere.
    aspect, rotation_degrees, flip: as of `Crop`; each view is turned and mirrored on its own.
    intensity: how far intensities change, by the number of the modality.

    Pure like a `Transform`: a batch equals its samples done alone, and only `sample` draws.
    Raises ValueError for local views without size and scale, and for a flip along an axis that there is not.
    """

    size: tuple[int, ...]
    _: KW_ONLY
    local_size: tuple[int, ...] | None = None
    global_views: int = 2
    local_views: int = 0
    global_scale: tuple[float, float] = (0.2, 1.0)
    local_scale: tuple[float, float] | None = None
    min_overlap: float = 0.25
    aspect: float = 4 / 3
    rotation_degrees: float = 15.0
    flip: tuple[Axis, ...] = ("x",)
    intensity: tuple[IntensityRange, ...] = (IntensityRange(),)

    def __post_init__(self) -> None:
        if self.local_views and (self.local_scale is None or len(self.local_size or ()) != len(self.size)):
            raise ValueError(f"local views need a local_scale and a local_size with as many sides as {self.size}")
        if not set(self.flip) <= set(AXES[: len(self.size)]):
            raise ValueError(
                f"flip {self.flip}: views of {len(self.size)} sides have the axes {AXES[: len(self.size)]}"
            )

    def sample(self, shape: Sequence[int], modality: Int64[Tensor, "b"], generator: BatchGenerator) -> list[Views]:
        """Parameters for regions of `shape` (B, C, *region): of the global views, then of the local ones."""
        batch, channels, *_ = shape
        jitter = IntensityJitter(self.intensity)
        views = []
        for crop, stream in zip(self._crops, generator.split(2), strict=False):  # local views change no global one
            place, look = stream.split(2)
            intensities = jitter.sample(
                (batch * crop.views, channels, *crop.size),
                modality.repeat_interleave(crop.views),
                look.divide(crop.views),
            )
            views.append(Views(crop.sample(place), intensities))
        return views

    def apply(self, x: Float[Tensor, "b c *region"], params: list[Views]) -> list[Tensor]:
        """Views (B, C, *size), the global ones first."""
        jitter = IntensityJitter(self.intensity)
        views: list[Tensor] = []
        for crop, (crops, intensities) in zip(self._crops, params, strict=True):
            cut = crop.apply(x, crops)
            views += jitter.apply(cut.flatten(0, 1), intensities).view(cut.shape).unbind(1)
        return views

    def __call__(
        self, x: Float[Tensor, "b c *region"], modality: Int64[Tensor, "b"], generator: BatchGenerator
    ) -> list[Tensor]:
        return self.apply(x, self.sample(x.shape, modality, generator))

    @property
    def _crops(self) -> list[Crop]:
        how = {"aspect": self.aspect, "rotation_degrees": self.rotation_degrees, "flip": self.flip}
        crops = [Crop(self.size, self.global_views, self.global_scale, min_overlap=self.min_overlap, **how)]  # type: ignore[arg-type]
        if self.local_views:
            assert self.local_size is not None
            assert self.local_scale is not None
            crops.append(Crop(self.local_size, self.local_views, self.local_scale, **how))  # type: ignore[arg-type]
        return crops
