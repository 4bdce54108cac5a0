"""Random numbers and the local shuffle as Triton kernels: to the bit what their plain forms beside them return.

Importing it needs Triton. Random numbers are hashed where they are needed, which is faster than to read them.
"""

from typing import Any, no_type_check  # Triton reads the source of its functions: nothing may wrap them

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from . import random, shuffle

WEYL, FIRST, SECOND = tl.constexpr(random.WEYL), tl.constexpr(random.FIRST), tl.constexpr(random.SECOND)
TURNS, ROUNDS_PER_TURN = tl.constexpr(shuffle.TURNS), tl.constexpr(shuffle.ROUNDS_PER_TURN)
OF_INT16, OF_FRACTION = tl.constexpr(2**-16), tl.constexpr(2**-24)
# What one program does:
NUMBERS = 1024
POSITIONS, ITEMS = 32, 1024  # so many voxels of a window at a time; items are these, of all windows
VOXELS = 512


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
    shown = torch.full((images, voxels), -1, dtype=torch.int32, device=words.device)
    source = torch.empty((images, voxels), dtype=torch.int64, device=words.device)
    tables = forms.volumes, forms.places, forms.strides, forms.starts, forms.offsets
    sizes = forms.windows, len(forms.volumes), voxels, len(forms.spatial), forms.largest
    spare = 32 - torch.iinfo(forms.dtype).bits
    with torch.cuda.device_of(words):  # Triton launches on the current device
        _cover[(images * triton.cdiv(forms.windows * POSITIONS, ITEMS),)](
            words, first, *tables, shown, *sizes, POSITIONS, ITEMS
        )
        _shuffle[(images * triton.cdiv(voxels, VOXELS),)](words, first, *tables, shown, source, *sizes, spare, VOXELS)
    return source


def _numbers(kernel: Any, dtype: torch.dtype, words: Tensor, first: int, count: int) -> Tensor:
    numbers = torch.empty((len(words), count), dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        kernel[(len(words) * triton.cdiv(count, NUMBERS),)](words, first, numbers, count, NUMBERS)
    return numbers


@triton.jit(do_not_specialize=["first", "count"])
@no_type_check
def _bits(words, first, numbers, count, NUMBERS: tl.constexpr):
    image, number = _share(count, NUMBERS)
    low, high = _stream(words, image)
    tl.store(numbers + image.to(tl.int64) * count + number, _hash(low, high, first + number), number < count)


@triton.jit(do_not_specialize=["first", "count"])
@no_type_check
def _uniform(words, first, numbers, count, NUMBERS: tl.constexpr):
    image, number = _share(count, NUMBERS)
    low, high = _stream(words, image)
    tl.store(numbers + image.to(tl.int64) * count + number, _fraction(low, high, first + number), number < count)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _cover(
    words, first, volumes, places, strides, starts, offsets, shown,
    windows, forms, voxels, AXES: tl.constexpr, LARGEST: tl.constexpr, POSITIONS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """shown: for each voxel, its last window and its position there, window * LARGEST + position."""
    image, item = _share(windows * POSITIONS, ITEMS)
    window = item // POSITIONS
    low, high = _stream(words, image)
    form, corner = _place(low, high, first, window, places, strides, windows, forms, AXES)
    volume = tl.where(window < windows, tl.load(volumes + form), 0)
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
    words, first, volumes, places, strides, starts, offsets, shown, source,
    windows, forms, voxels, AXES: tl.constexpr, LARGEST: tl.constexpr, SPARE: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    image, voxel = _share(voxels, VOXELS)
    low, high = _stream(words, image)
    at = image.to(tl.int64) * voxels + voxel
    last = tl.load(shown + at, voxel < voxels, -1)
    window, position = tl.maximum(last, 0) // LARGEST, tl.maximum(last, 0) % LARGEST
    form, corner = _place(low, high, first, window, places, strides, windows, forms, AXES)
    first += (1 + AXES) * windows
    position = _permute(position, tl.load(volumes + form), low, high, first, window, windows, SPARE)
    moved = corner + tl.load(offsets + tl.load(starts + form) + position)
    tl.store(source + at, tl.where(last < 0, voxel, moved).to(tl.int64), voxel < voxels)


@triton.jit
@no_type_check
def _permute(position, volume, low, high, first, window, windows, SPARE: tl.constexpr):
    """`shuffle._permute`, whose integers have SPARE bits less: these are cut off where they would matter."""
    key = _word(low, high, first, window)
    for number in tl.static_range(TURNS):
        word = _word(low, high, first, (1 + number) * windows + window)
        turn = ((word.to(tl.float32) + 32768.0) * (volume.to(tl.float32) * OF_INT16)).to(tl.int32) - volume
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
def _place(low, high, first, window, places, strides, windows, forms, AXES: tl.constexpr):
    """Form and corner of windows, as `shuffle._draw`."""
    form = (_fraction(low, high, first + window) * forms).to(tl.int32)
    corner = tl.zeros_like(window)
    for axis in tl.static_range(AXES):
        fraction = _fraction(low, high, first + (1 + axis) * windows + window)
        corner += (fraction * tl.load(places + axis * forms + form)).to(tl.int32) * tl.load(strides + axis)
    return form, corner


@triton.jit
@no_type_check
def _word(low, high, first, index):
    """The numbers from `first` on as pairs of int16, lower half first: the one at `index`."""
    return (_hash(low, high, first + (index >> 1)) << (16 - 16 * (index & 1))) >> 16


@triton.jit
@no_type_check
def _fraction(low, high, number):
    return ((_hash(low, high, number) >> 8) & 0xFFFFFF).to(tl.float32) * OF_FRACTION


@triton.jit
@no_type_check
def _hash(low, high, number):
    """The numbers of a stream at these positions."""
    word = low + number * WEYL
    word = (word ^ ((word >> 16) & 0xFFFF)) * FIRST + high
    word = (word ^ ((word >> 15) & 0x1FFFF)) * SECOND
    return word ^ ((word >> 16) & 0xFFFF)


@triton.jit
@no_type_check
def _stream(words, image):
    return tl.load(words + 2 * image), tl.load(words + 2 * image + 1)


@triton.jit
@no_type_check
def _share(count, SHARE: tl.constexpr):
    """What this program does: an image, and `SHARE` of `count` items of it."""
    programs = tl.cdiv(count, SHARE)
    program = tl.program_id(0)
    return program // programs, (program % programs) * SHARE + tl.arange(0, SHARE)
