"""The whole corruption compiled for the CPU: what `Corruption` does step by step, for the same random numbers.

Flips, shuffle and painting are the same to the bit, intensities up to rounding. An image is done at a time, by one of
as many threads as PyTorch has, so that most of it stays in the cache, and what is painted over is not shuffled.
"""

import inspect
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from . import flip, nonlinear, paint, random, shuffle
from .corruption import CHANCES, FLIP, NONLINEAR, NUMBERS, PAINT, SHUFFLE
from .random import BatchGenerator

if TYPE_CHECKING:
    from .corruption import Corruption

FLIPS, BOXES, MORE, MARGIN = flip.DRAWS, paint.BOXES, np.float32(paint.MORE), np.float32(paint.MARGIN)
POINTS, KNOTS = nonlinear.POINTS, nonlinear.KNOTS
TURNS, ROUNDS_PER_TURN = shuffle.TURNS, shuffle.ROUNDS_PER_TURN
WEYL, FIRST, SECOND, SPREAD = (
    np.uint32(number % 2**32) for number in (random.WEYL, random.FIRST, random.SECOND, shuffle.SPREAD)
)
CONSTANTS = (
    FLIPS, BOXES, MORE, MARGIN, POINTS, KNOTS, TURNS, ROUNDS_PER_TURN, WEYL, FIRST, SECOND, SPREAD,
    CHANCES, FLIP, NONLINEAR, PAINT, SHUFFLE,
)  # fmt: skip
OF_FRACTION, OF_INT31 = np.float32(2**-24), np.float32(2**-31)
PARTS = 4  # of a batch for each thread, since images take more or less time
ITEMS = 4096  # voxels that are permuted at once, which stay in the cache


def _compiled(function: Callable, *, kept: bool = False) -> Callable:
    """By Numba, when it is first called, or `kept` by an earlier process where there is a place to keep it."""
    function = inspect.unwrap(function)  # jaxtyping's import hook before 0.3.11 wraps all functions
    try:
        return njit(function, nogil=True, error_model="numpy", cache=kept)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return njit(function, nogil=True, error_model="numpy")


def corrupt(
    corruption: "Corruption", x: Float[Tensor, "b c *spatial"], generator: BatchGenerator
) -> tuple[Float[Tensor, "b c *spatial"], Float[Tensor, "b c *spatial"]]:
    """What `corruption` makes of images in 2D or 3D, which get no gradient."""
    exact = x.contiguous()
    if x.dtype not in (torch.float32, torch.float64):
        exact = exact.float()
    images, _, *spatial = x.shape
    words, first = generator.take(NUMBERS)
    rates = corruption.flip, corruption.shuffle, corruption.nonlinear, corruption.paint, corruption.outpaint
    rounded = np.array(rates, np.float32)  # as PyTorch compares them
    flipping = rounded[0] > 0
    corrupted = torch.empty_like(exact)
    target = torch.empty_like(exact) if flipping else exact
    flat = (image.flatten(2).numpy() for image in (exact, corrupted, target))
    basis, knots = nonlinear.grids(x.device)
    forms = shuffle.forms_of(tuple(spatial) if corruption.shuffle > 0 else (1,), x.device)  # read by the shuffle alone
    arguments = (
        *flat, words.numpy().view(np.uint32), np.uint32(first % 2**32), rounded,
        corruption.paint_fill == "constant", np.array((*spatial, 1)[:3]), len(spatial),
        paint.sides(tuple(spatial), x.device).numpy(), basis.numpy(), knots.numpy(),
        forms.starts.numpy(), forms.offsets.numpy(), np.array(forms.longest), forms.windows,
        np.int32(forms.spare_bits),
    )  # fmt: skip
    with suppress(OSError):  # of keeping it, where there is no room; this process has it nevertheless
        _some(0, 0, *arguments)  # compiled, before several threads ask for it
    threads = torch.get_num_threads()
    ends = np.linspace(0, images, min(images, PARTS * threads) + 1).astype(int).tolist()
    if threads == 1:
        _some(0, images, *arguments)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(_some, *part, *arguments) for part in pairwise(ends)]:
                done.result()
    return corrupted.to(x.dtype), target.to(x.dtype) if flipping else x


@_compiled
@no_type_check
def _corrupt(
    begin, end, x, corrupted, target, words, first, rates, constant, dims, axes,
    sides, basis, knots, starts, offsets, longest, windows, spare,
):  # fmt: skip
    """Some of the images."""
    flipping, shuffling, curving, painting, outpainting = rates
    channels, voxels = x.shape[1:]
    box_of = np.empty(voxels, np.int8)  # the last box that covers a voxel, or -1
    painted = np.empty(voxels, np.bool_)
    mirror, source = np.empty(voxels, np.int32), np.empty(voxels, np.int32)
    curve = np.empty(KNOTS, np.float32)
    for image in range(begin, end):
        low, high = words[image]
        flips = _flips(*_child(low, high, first + FLIP), flipping, axes)
        if flips:
            _mirror(mirror, flips, dims)
        painted[:] = False
        paint_low, paint_high = _child(low, high, first + PAINT)
        fill = (2 + 2 * axes) * BOXES  # where the numbers begin that paint
        hiding = _fraction(low, high, first + CHANCES + 2) < painting
        if hiding:
            outside = _boxes(box_of, paint_low, paint_high, outpainting, sides, dims, axes)
            for voxel in range(voxels):
                painted[voxel] = (box_of[voxel] < 0) == outside
        shuffled = _fraction(low, high, first + CHANCES) < shuffling
        if shuffled:
            shuffle_low, shuffle_high = _child(low, high, first + SHUFFLE)
            _shuffle(source, painted, shuffle_low, shuffle_high, dims, axes, starts, offsets, longest, windows, spare)
        curved = _fraction(low, high, first + CHANCES + 1) < curving
        if curved:
            _curve(curve, *_child(low, high, first + NONLINEAR), basis, knots)
        for channel in range(channels):
            own, flipped, result = x[image, channel], target[image, channel], corrupted[image, channel]
            if flips:
                for voxel in range(voxels):
                    flipped[voxel] = own[mirror[voxel]]
            elif flipping > 0:
                flipped[:] = own
            if shuffled:
                for voxel in range(voxels):
                    result[voxel] = flipped[source[voxel]]
            else:
                result[:] = flipped
            if curved:
                for voxel in range(voxels):
                    result[voxel] = _on_curve(result[voxel], curve)
            if hiding and constant:
                for voxel in range(voxels):
                    if painted[voxel]:
                        number = fill + channel * BOXES + max(0, box_of[voxel])
                        result[voxel] = _fraction(paint_low, paint_high, number)
            elif hiding:
                for voxel in range(voxels):
                    value = _fraction(paint_low, paint_high, fill + channel * voxels + voxel)
                    result[voxel] = value if painted[voxel] else result[voxel]


def _kept(constants: int) -> Callable:
    """`_corrupt`, kept for later processes.

    Compiled code has values of other files in it, of whose changes Numba does not know, but it does of what a function
    has from around it.
    """

    @no_type_check
    def some(begin, end, *arguments):
        _corrupt(begin, end, *arguments)
        return constants

    return _compiled(some, kept=True)


_some = _kept(zlib.crc32(repr(CONSTANTS).encode()))


@_compiled
@no_type_check
def _flips(low, high, rate, axes):
    """A bit for each axis that is flipped, as `Flip`."""
    flips = 0
    for draw in range(FLIPS):
        if not _fraction(low, high, draw) < rate:
            break
        flips ^= 1 << int(_fraction(low, high, FLIPS + draw) * np.float32(axes))
    return flips


@_compiled
@no_type_check
def _mirror(mirror, flips, dims):
    nx, ny, nz = dims
    for x in range(nx):
        from_x = nx - 1 - x if flips & 1 else x
        for y in range(ny):
            from_y = ny - 1 - y if flips & 2 else y
            row, from_row = (x * ny + y) * nz, (from_x * ny + from_y) * nz
            for z in range(nz):
                mirror[row + z] = from_row + (nz - 1 - z if flips & 4 else z)


@_compiled
@no_type_check
def _boxes(box_of, low, high, outpainting, sides, dims, axes):
    """Writes which box covers each voxel; returns whether the outside is painted. As `paint._boxes`."""
    outside = _fraction(low, high, 0) < outpainting
    box_of[:] = -1
    inside = box_of.reshape((dims[0], dims[1], dims[2]))
    start, end = np.zeros(3, np.int64), np.ones(3, np.int64)
    for box in range(BOXES):
        if not (_fraction(low, high, BOXES + box) < MORE or (box == 0 and outside)):
            break
        for axis in range(axes):
            smallest, choices, dim = sides[int(outside), :, axis]
            side = smallest + np.floor(_fraction(low, high, (2 + 2 * axis) * BOXES + box) * choices)
            margin = min(np.floor((dim - side) / np.float32(2)), MARGIN)
            room = dim - side - np.float32(2) * margin + np.float32(1)
            first = margin + np.floor(_fraction(low, high, (3 + 2 * axis) * BOXES + box) * room)
            start[axis], end[axis] = int(first), int(first + side)
        inside[start[0] : end[0], start[1] : end[1], start[2] : end[2]] = box
    return outside


@_compiled
@no_type_check
def _shuffle(source, painted, low, high, dims, axes, starts, offsets, longest, windows, spare):
    """Writes the voxel that each voxel shows, as `LocalShuffle`; what is painted shows itself."""
    volume, form, corner = np.ones(windows, np.int32), np.zeros(windows, np.int32), np.zeros(windows, np.int32)
    for axis in range(axes):
        dim, most = dims[axis], longest[axis]
        for window in range(windows):
            word = _hashed(low, high, axis * windows + window)
            beyond = np.int32(((word & np.uint32(0xFFFF)) * most) >> 16)
            place = np.int32(((word >> np.uint32(16)) * (dim - beyond)) >> 16)
            volume[window] += volume[window] * beyond
            form[window] = form[window] * most + beyond
            corner[window] = corner[window] * dim + place
    # A voxel shows the last window that covers it: from the last one on, the first that comes to it.
    done = painted.copy()
    voxels, owners, positions = np.empty((3, source.size + 1), np.int32)
    count = 0
    for window in range(windows - 1, -1, -1):
        start, first = starts[form[window]], corner[window]
        for position in range(volume[window]):
            voxel = first + offsets[start + position]
            voxels[count], owners[count], positions[count] = voxel, window, position
            count += not done[voxel]
            done[voxel] = True
    for voxel in range(source.size):
        source[voxel] = voxel
    for begin in range(0, count, ITEMS):
        end = min(begin + ITEMS, count)
        owner, position = owners[begin:end], positions[begin:end].copy()  # of which LLVM sees that it is no other array
        word = np.empty(end - begin, np.uint32)
        for item in range(end - begin):
            word[item] = _hashed(low, high, axes * windows + owner[item])
        _permute(position, volume[owner], word, spare)
        for item in range(end - begin):
            window = owner[item]
            source[voxels[begin + item]] = corner[window] + offsets[starts[form[window]] + position[item]]


@_compiled
@no_type_check
def _permute(position, volume, word, spare):
    """`shuffle._permute` in place, whose integers have `spare` bits less: these are cut off where they would matter.

    Round by round, for of these LLVM makes vector instructions; item by item it would take five times as long.
    """
    key, turn = np.empty_like(position), np.empty_like(position)
    for item in range(position.size):
        key[item] = np.int32(word[item] << np.uint32(16)) >> 16
    for number in range(TURNS * ROUNDS_PER_TURN):
        if number % ROUNDS_PER_TURN:
            for item in range(position.size):
                turn[item] = turn[item] >> 1
        else:
            for item in range(position.size):
                share = np.float32(volume[item]) * OF_INT31
                turn[item] = np.int32(np.float32(np.int32(word[item] & np.uint32(0x7FFFFFFF))) * share) - volume[item]
                word[item] = word[item] * SPREAD
        factor = np.int32(2 * number + 12345)
        for item in range(position.size):
            moved = np.int32(position[item] + turn[item])
            moved = np.int32(moved + (np.int32(moved >> 31) & volume[item]))
            opposite = np.int32(volume[item] - 1 - moved)
            bit = np.int32(np.int32(np.int32(opposite * moved) + np.int32(key[item] * factor)) * np.int32(31153))
            bit = np.int32(np.int32(bit << spare) >> spare)
            bit = np.int32(bit ^ np.int32(bit >> 7))
            bit = np.int32(np.int32(np.int32(bit * np.int32(-21267)) << spare) >> 31)
            position[item] = moved ^ ((opposite ^ moved) & bit)


@_compiled
@no_type_check
def _curve(curve, low, high, basis, knots):
    """y at the knots, as `nonlinear._table`."""
    r1, r2, r3, r4 = (
        _fraction(low, high, 0), _fraction(low, high, 1), _fraction(low, high, 2), _fraction(low, high, 3)
    )  # fmt: skip
    decreasing = _fraction(low, high, 4) < np.float32(0.5)
    x = r1 * basis[0] + r3 * basis[1] + basis[2]
    y = r2 * basis[0] + r4 * basis[1] + basis[2]
    x.sort()
    if decreasing:
        y = y[::-1].copy()
    right = 0  # so many points are left of the knot
    for knot in range(KNOTS):
        while right < POINTS and int(x[right] * np.float32(KNOTS - 1)) < knot:
            right += 1
        last = min(max(right, 1), POINTS - 1)
        x0, x1, y0, y1 = x[last - 1], x[last], y[last - 1], y[last]
        part = min(max((knots[knot] - x0) / max(x1 - x0, np.float32(1e-12)), np.float32(0)), np.float32(1))
        step = y1 - y0
        curve[knot] = y0 + part * step if part < np.float32(0.5) else y1 - step * (np.float32(1) - part)


@_compiled
@no_type_check
def _on_curve(value, curve):
    """As `BezierNonlinearity.apply`; what is not a number stays so."""
    place = np.float32(value) * np.float32(KNOTS - 1)
    place = np.float32(0) if place < 0 else place
    place = np.float32(KNOTS - 1) if place > KNOTS - 1 else place
    knot = int(place) if place > 0 else 0  # NaN must not become an index
    y = curve[knot]
    return y + (place - np.float32(knot)) * (curve[min(knot + 1, KNOTS - 1)] - y)


@_compiled
@no_type_check
def _child(low, high, number):
    """The stream that `BatchGenerator.split` makes of two numbers of a stream."""
    return _hashed(low, high, number), _hashed(low, high, number + 1)


@_compiled
@no_type_check
def _fraction(low, high, number):
    return np.float32(_hashed(low, high, number) >> np.uint32(8)) * OF_FRACTION


@_compiled
@no_type_check
def _hashed(low, high, number):
    """A number of a stream, as `BatchGenerator.bits`."""
    word = np.uint32(low + np.uint32(np.uint32(number) * WEYL))
    word = np.uint32(np.uint32((word ^ (word >> np.uint32(16))) * FIRST) + high)
    word = np.uint32((word ^ (word >> np.uint32(15))) * SECOND)
    return np.uint32(word ^ (word >> np.uint32(16)))
