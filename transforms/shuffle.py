"""Local pixel shuffling: Models Genesis (Zhou et al., MICCAI 2019), after context restoration (Chen et al., 2019)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.nn.functional import pad

from .base import Transform
from .fused import kernels
from .random import BatchGenerator

COVERAGE = 1.87  # voxels of all windows / voxels of the image
TURNS, ROUNDS_PER_TURN = 3, 3
ROUNDS = TURNS * ROUNDS_PER_TURN  # in 2^-9 of all cases two voxels of a window stay as they were to each other
SPREAD = 0x2C1B3C6D  # odd: a word times it is another word, whose upper bits depend on all bits of the first


@dataclass(frozen=True)
class LocalShuffle(Transform[Tensor]):
    """Permutes the voxels of many small windows; a voxel shows the last window that covers it.

    10,000 windows for 64×64×32 voxels, otherwise as many as give the same coverage. Sides are uniform in 1 to
    max(1, dim // 10), places uniform. Every window reads the original and is pasted over what earlier windows left, so
    a value may get lost or appear several times. About 79 % of the voxels change.

    Parameters: (B, *spatial) int64, the flat index of the voxel that each voxel shows.
    """

    def sample(self, shape: Sequence[int], generator: BatchGenerator) -> Int64[Tensor, "b *spatial"]:
        batch, _, *spatial = shape
        forms = forms_of(tuple(spatial), generator.device)
        fused = kernels(generator.device)
        if fused is not None:
            return fused.sources(*generator.take(forms.numbers), forms).view(batch, *spatial)
        # Off the CPU no number may depend on the draws: the host would have to wait for the device.
        slots = None if generator.device.type == "cpu" else forms.slots(batch)
        source = _sources(_draw(forms, generator, slots), forms).view(batch, forms.voxels)
        first = torch.arange(0, source.numel(), source.shape[1], device=source.device)
        return source.long().sub_(first.unsqueeze(1)).view(batch, *spatial)

    def apply(
        self, x: Float[Tensor, "b c *spatial"], params: Int64[Tensor, "b *spatial"]
    ) -> Float[Tensor, "b c *spatial"]:
        source = params.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        return x.flatten(2).gather(2, source).view(x.shape)


class Forms(NamedTuple):
    """The forms of windows, that is, combinations of sides, for images of one shape."""

    spatial: tuple[int, ...]
    longest: tuple[int, ...]  # side along each axis
    dtype: torch.dtype  # integers that hold twice the largest volume
    starts: Int32[Tensor, "forms"]  # of each form in the offsets
    offsets: Int32[Tensor, "offsets"]  # flat indices of the voxels of each form relative to its corner, and a last 0

    @property
    def voxels(self) -> int:
        return math.prod(self.spatial)

    @property
    def largest(self) -> int:
        """Voxels of the largest window."""
        return math.prod(self.longest)

    @property
    def mean(self) -> float:
        """Voxels of a window."""
        return math.prod((1 + side) / 2 for side in self.longest)

    @property
    def windows(self) -> int:
        """Per image."""
        return 10_000 if self.spatial == (64, 64, 32) else round(COVERAGE * self.voxels / self.mean)

    @property
    def spare_bits(self) -> int:
        """The bits of an int32 that integers of `dtype` lack."""
        return 32 - torch.iinfo(self.dtype).bits

    @property
    def numbers(self) -> int:
        """Random numbers per image: of each window one per axis, for side and place, and one for its permutation."""
        return (len(self.spatial) + 1) * self.windows

    def slots(self, batch: int) -> int:
        """The voxels of all windows of a batch, an upper bound: the mean and eight standard deviations."""
        variance = math.prod((1 + side) * (1 + 2 * side) / 6 for side in self.longest) - self.mean**2
        windows = batch * self.windows
        return math.ceil(windows * self.mean + 8 * math.sqrt(windows * variance))


class _Windows(NamedTuple):
    """The windows of a batch in the order of pasting.

    A slot is one voxel of one window. Slots are numbered window by window, so a voxel shows its greatest slot.
    """

    images: int
    slots: int
    volumes: Int32[Tensor, "windows"]
    first_slots: Int32[Tensor, "windows"]
    starts: Int32[Tensor, "windows"]  # of the window's form in the forms' offsets
    corners: Int32[Tensor, "windows"]  # flat indices in the batch
    words: Int32[Tensor, "windows"]  # random, for the permutations


@lru_cache(maxsize=32)
def forms_of(spatial: tuple[int, ...], device: torch.device) -> Forms:
    if max(spatial) > 2**15:
        raise ValueError(f"Images of at most {2**15:,} voxels along each axis can be shuffled, not of {spatial}.")
    longest = tuple(max(1, dim // 10) for dim in spatial)
    index = torch.arange(math.prod(spatial), dtype=torch.int32).view(spatial)
    sides = product(*(range(1, side + 1) for side in longest))
    offsets = [index[tuple(slice(side) for side in form)].flatten() for form in sides]
    volumes = torch.tensor([len(form) for form in offsets])
    return Forms(
        spatial,
        longest,
        torch.int16 if math.prod(longest) < 2**14 else torch.int32,
        (volumes.cumsum(0) - volumes).int().to(device),
        torch.cat((*offsets, offsets[0])).to(device),
    )


def _draw(forms: Forms, generator: BatchGenerator, slots: int | None) -> _Windows:
    """Random windows; with `slots`, so many in all: what goes beyond is cut off, what is left a last window takes.

    That one is outside of all images.
    """
    *draws, words = generator.bits(1 + len(forms.spatial), forms.windows).unbind(1)
    volume, form = torch.ones_like(words), torch.zeros_like(words)
    corner = torch.arange(len(words), dtype=torch.int32, device=words.device)  # of the image so far, among images
    corner = corner.unsqueeze(1).repeat(1, forms.windows)
    # 16 bits tell a side and 16 a place: of 512 places some are more likely than others by 1 %.
    for draw, dim, longest in zip(draws, forms.spatial, forms.longest, strict=True):
        beyond = (draw & 0xFFFF).mul_(longest) >> 16  # the voxels of a side after its first
        place = ((draw >> 16) & 0xFFFF).mul_(dim - beyond) >> 16
        volume.addcmul_(volume, beyond)
        form.mul_(longest).add_(beyond)
        corner.mul_(dim).add_(place)
    volumes, form, corners, words = (numbers.flatten() for numbers in (volume, form, corner, words))
    starts = forms.starts.index_select(0, form)
    ends = volumes.cumsum(0, dtype=torch.int32)
    if slots is None:
        return _Windows(len(generator), int(volumes.sum()), volumes, ends - volumes, starts, corners, words)
    first_slots = pad(ends.clamp_(max=slots), (1, 0))
    return _Windows(
        len(generator),
        slots,
        pad(ends, (0, 1), value=slots) - first_slots,
        first_slots,
        pad(starts, (0, 1), value=len(forms.offsets)),
        pad(corners, (0, 1), value=len(generator) * forms.voxels),
        pad(words, (0, 1)),
    )


def _sources(windows: _Windows, forms: Forms) -> Int32[Tensor, "voxels"]:
    """The voxel that each voxel of the batch shows, as flat indices in the batch."""
    window = torch.repeat_interleave(windows.volumes, output_size=windows.slots)
    slot = torch.arange(windows.slots, dtype=torch.int32, device=window.device)
    offset = (windows.starts - windows.first_slots).index_select(0, window).add_(slot)
    offset.clamp_(max=len(forms.offsets) - 1)
    voxel = forms.offsets.index_select(0, offset).add_(windows.corners.index_select(0, window))
    own = torch.arange(windows.images * forms.voxels, dtype=torch.int32, device=window.device)
    shown = torch.full((len(own) + 1,), -1, dtype=torch.int32, device=window.device)
    shown = shown.scatter_reduce_(0, voxel.long(), slot, "amax")[:-1]
    slot = shown.clamp(min=0)
    window = window.index_select(0, slot)
    first_slot = windows.first_slots.index_select(0, window)
    position = _permute(slot.sub_(first_slot), window, windows.volumes, windows.words, forms.dtype)
    source = voxel.index_select(0, position.add_(first_slot))
    return torch.where(shown < 0, own, source)  # where no window covers it, a voxel shows itself


def _permute(
    position: Int32[Tensor, "n"],
    window: Int32[Tensor, "n"],
    volumes: Int32[Tensor, "windows"],
    words: Int32[Tensor, "windows"],
    dtype: torch.dtype,
) -> Int32[Tensor, "n"]:
    """Maps each position, 0 to volume - 1, of each window by a random permutation, which the window's word tells.

    The swap-or-not shuffle (Hoang, Morris, Rogaway, CRYPTO 2012), which needs no other positions than those asked for:
    each round turns all positions by a random amount, then swaps p with its opposite, volume - 1 - p, or not, by a
    random bit that depends on the pair. `dtype` holds twice the largest volume; the smaller, the faster.
    """
    sign = torch.iinfo(dtype).bits - 1
    key = words.to(torch.int16).to(dtype).index_select(0, window)
    share, volumes = volumes * 2.0**-31, volumes.to(dtype)
    volume = volumes.index_select(0, window)
    position, last = position.to(dtype), volume - 1
    for number in range(ROUNDS):
        if number % ROUNDS_PER_TURN == 0:
            turns = (words & 0x7FFFFFFF).float().mul_(share).to(dtype).sub_(volumes)  # -volume to 0
            turn = turns.index_select(0, window)
            words = words * SPREAD
        else:
            turn >>= 1  # mixes as well as a fresh one, which would cost as much as the rest of the round
        position += turn
        position += (position >> sign).bitwise_and_(volume)
        opposite = last - position
        bit = (opposite * position).add_(key * (2 * number + 12345)).mul_(31153)
        bit ^= bit >> 7
        bit = bit.mul_(-21267).bitwise_right_shift_(sign)  # 0 or -1: none or all of the bits
        position ^= opposite.bitwise_xor_(position).bitwise_and_(bit)
    return position.int()
