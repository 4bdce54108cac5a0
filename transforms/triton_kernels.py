"""Random numbers and the local shuffle as Triton kernels: to the bit what their plain forms beside them return.

Importing it needs Triton. Random numbers are hashed where they are needed, which is faster than to read them.
"""

from collections.abc import Sequence
from typing import Any, no_type_check  # Triton reads the source of its functions: nothing may wrap them

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from . import random, shuffle

WEYL, FIRST, SECOND = tl.constexpr(random.WEYL), tl.constexpr(random.FIRST), tl.constexpr(random.SECOND)
TURNS, ROUNDS_PER_TURN = tl.constexpr(shuffle.TURNS), tl.constexpr(shuffle.ROUNDS_PER_TURN)
SPREAD = tl.constexpr(shuffle.SPREAD)
OF_INT31, OF_FRACTION = tl.constexpr(2**-31), tl.constexpr(2**-24)
# What one program does:
NUMBERS = 1024
POSITIONS, ITEMS = 32, 1024  # so many voxels of a window at a time; items are these, of all windows
VOXELS = 512


def words(keys: Int64[Tensor, "b"]) -> Int32[Tensor, "b 2"]:
    """The words of the stream of each key, as `BatchGenerator`."""
    made = torch.empty((len(keys), 2), dtype=torch.int32, device=keys.device)
    with torch.cuda.device_of(keys):  # Triton launches on the current device
        _words[(triton.cdiv(len(keys), NUMBERS),)](keys.contiguous(), made, len(keys), NUMBERS)
    return made


def bits(words: Int32[Tensor, "b 2"], first: int, count: int) -> Int32[Tensor, "b n"]:
    """Numbers `first` (an int32) to `first` + `count` - 1 of each stream, as `BatchGenerator.bits`."""
    return _numbers(_bits, torch.int32, words, first, count)


def uniform(words: Int32[Tensor, "b 2"], first: int, count: int) -> Float[Tensor, "b n"]:
    """The same as `BatchGenerator.uniform`."""
    return _numbers(_uniform, torch.float32, words, first, count)


def sources(words: Int32[Tensor, "b 2"], first: int, forms: shuffle.Forms) -> Int64[Tensor, "b voxels"]:
    """The voxel of its image that each voxel shows, as `LocalShuffle.sample`; images of at most 2^27 voxels.

    The windows are made of the numbers from `first` (an int32) on.
    """
    images, voxels = len(words), forms.voxels
    shown = cover(words, first, forms)
    source = torch.empty((images, voxels), dtype=torch.int64, device=words.device)
    with torch.cuda.device_of(words):
        _shuffle[(images * triton.cdiv(voxels, VOXELS),)](
            words, first, forms.starts, forms.offsets, shown, source, forms.windows, voxels,
            forms.largest, forms.spare_bits, len(forms.spatial), *in_3d(forms.spatial), VOXELS,
        )  # fmt: skip
    return source


def cover(
    words: Int32[Tensor, "b 2"], first: int, forms: shuffle.Forms, drawn: Int32[Tensor, "b"] | None = None
) -> Int32[Tensor, "b voxels"]:
    """For each voxel, its last window and its position there, window * largest volume + position; -1 without a window.

    Where an image is not `drawn`, its voxels have none.
    """
    images, voxels = len(words), forms.voxels
    shown = torch.full((images, voxels), -1, dtype=torch.int32, device=words.device)
    with torch.cuda.device_of(words):
        _cover[(images * triton.cdiv(forms.windows * POSITIONS, ITEMS),)](
            words, first, forms.starts, forms.offsets, shown, drawn, forms.windows, voxels,
            forms.largest, len(forms.spatial), *in_3d(forms.spatial), POSITIONS, ITEMS,
        )  # fmt: skip
    return shown


def in_3d(spatial: Sequence[int]) -> tuple[int, ...]:
    """Sides in 3D of images in 2D or 3D."""
    return (*spatial, 1)[:3]


def _numbers(kernel: Any, dtype: torch.dtype, words: Tensor, first: int, count: int) -> Tensor:
    numbers = torch.empty((len(words), count), dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        kernel[(len(words) * triton.cdiv(count, NUMBERS),)](words, first, numbers, count, NUMBERS)
    return numbers


@triton.jit(do_not_specialize=["count"])
@no_type_check
def _words(keys, made, count, NUMBERS: tl.constexpr):
    number = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    key = tl.load(keys + number, number < count, 0)
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32)
    high ^= hashed(low, 0, 1)
    low ^= hashed(high, 0, 0)
    tl.store(made + 2 * number, low, number < count)
    tl.store(made + 2 * number + 1, high, number < count)


@triton.jit(do_not_specialize=["first", "count"])
@no_type_check
def _bits(words, first, numbers, count, NUMBERS: tl.constexpr):
    image, number = share(count, NUMBERS)
    low, high = stream(words, image)
    tl.store(numbers + image.to(tl.int64) * count + number, hashed(low, high, first + number), number < count)


@triton.jit(do_not_specialize=["first", "count"])
@no_type_check
def _uniform(words, first, numbers, count, NUMBERS: tl.constexpr):
    image, number = share(count, NUMBERS)
    low, high = stream(words, image)
    tl.store(numbers + image.to(tl.int64) * count + number, fraction(low, high, first + number), number < count)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _cover(
    words, first, starts, offsets, shown, drawn, windows, voxels, LARGEST: tl.constexpr,
    AXES: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    image, item = share(windows * POSITIONS, ITEMS)
    if drawn is not None:  # noqa: SIM102  Triton may look at both sides of an "and"
        if tl.load(drawn + image) == 0:
            return
    window = item // POSITIONS
    low, high = stream(words, image)
    volume, form, corner = _place(low, high, first, window, windows, AXES, NX, NY, NZ)
    volume = tl.where(window < windows, volume, 0)
    start = tl.load(starts + form)
    shown += image.to(tl.int64) * voxels
    for begin in range(0, LARGEST, POSITIONS):
        position = begin + item % POSITIONS
        inside = position < volume
        voxel = corner + tl.load(offsets + start + position, inside, 0)
        tl.atomic_max(shown + voxel, window * LARGEST + position, inside, sem="relaxed")


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _shuffle(
    words, first, starts, offsets, shown, source, windows, voxels, LARGEST: tl.constexpr, SPARE: tl.constexpr,
    AXES: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    image, voxel = share(voxels, VOXELS)
    low, high = stream(words, image)
    at = image.to(tl.int64) * voxels + voxel
    last = tl.load(shown + at, voxel < voxels, -1)
    moved = source_of(voxel, last, low, high, first, starts, offsets, windows, LARGEST, SPARE, AXES, NX, NY, NZ)
    tl.store(source + at, moved.to(tl.int64), voxel < voxels)


@triton.jit
@no_type_check
def source_of(
    voxel, last, low, high, first, starts, offsets, windows, LARGEST: tl.constexpr, SPARE: tl.constexpr,
    AXES: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr,
):  # fmt: skip
    """The voxel that a voxel shows, where `last` is what `cover` has of it."""
    window, position = tl.maximum(last, 0) // LARGEST, tl.maximum(last, 0) % LARGEST
    volume, form, corner = _place(low, high, first, window, windows, AXES, NX, NY, NZ)
    position = _permute(position, volume, hashed(low, high, first + AXES * windows + window), SPARE)
    return tl.where(last < 0, voxel, corner + tl.load(offsets + tl.load(starts + form) + position))


@triton.jit
@no_type_check
def _permute(position, volume, word, SPARE: tl.constexpr):
    """`shuffle._permute`, whose integers have SPARE bits less: these are cut off where they would matter."""
    key = (word << 16) >> 16
    for number in tl.static_range(TURNS):
        turn = ((word & 0x7FFFFFFF).to(tl.float32) * (volume.to(tl.float32) * OF_INT31)).to(tl.int32) - volume
        word *= SPREAD
        for again in tl.static_range(ROUNDS_PER_TURN):
            position += turn
            position += (position >> 31) & volume
            opposite = volume - 1 - position
            bit = (opposite * position + key * (2 * (ROUNDS_PER_TURN * number + again) + 12345)) * 31153
            bit = (bit << SPARE) >> SPARE
            bit ^= bit >> 7
            bit = ((bit * -21267) << SPARE) >> 31
            position ^= (opposite ^ position) & bit
            turn >>= 1
    return position


@triton.jit
@no_type_check
def _place(
    low, high, first, window, windows,
    AXES: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr,
):  # fmt: skip
    """Volume, form and corner of windows, as `shuffle._draw`."""
    volume, form, corner = tl.zeros_like(window) + 1, tl.zeros_like(window), tl.zeros_like(window)
    for axis in tl.static_range(AXES):
        dim = NX if axis == 0 else (NY if axis == 1 else NZ)
        longest = dim // 10 if dim >= 10 else 1
        word = hashed(low, high, first + axis * windows + window)
        beyond = ((word & 0xFFFF) * longest) >> 16
        place = (((word >> 16) & 0xFFFF) * (dim - beyond)) >> 16
        volume += volume * beyond
        form = form * longest + beyond
        corner = corner * dim + place
    return volume, form, corner


@triton.jit
@no_type_check
def fraction(low, high, number):
    return ((hashed(low, high, number) >> 8) & 0xFFFFFF).to(tl.float32) * OF_FRACTION


@triton.jit
@no_type_check
def hashed(low, high, number):
    """The numbers of a stream at these positions."""
    word = low + tl.cast(number, tl.int32) * WEYL  # a constant's product would not wrap
    word = (word ^ ((word >> 16) & 0xFFFF)) * FIRST + high
    word = (word ^ ((word >> 15) & 0x1FFFF)) * SECOND
    return word ^ ((word >> 16) & 0xFFFF)


@triton.jit
@no_type_check
def stream(words, image):
    return tl.load(words + 2 * image), tl.load(words + 2 * image + 1)


@triton.jit
@no_type_check
def share(count, SHARE: tl.constexpr):
    """What this program does: an image, and `SHARE` of `count` items of it."""
    programs = tl.cdiv(count, SHARE)
    program = tl.program_id(0)
    return program // programs, (program % programs) * SHARE + tl.arange(0, SHARE)
