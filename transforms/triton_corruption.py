"""The whole corruption as a few Triton kernels: what `Corruption` does step by step, for the same random numbers.

Flips, shuffle and painting are the same to the bit, intensities up to rounding. Importing it needs Triton.
"""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from . import corruption as plain
from . import flip, nonlinear, paint, shuffle
from .random import BatchGenerator
from .triton_kernels import cover, fraction, hashed, in_3d, share, source_of, stream

if TYPE_CHECKING:
    from .corruption import Corruption

FLIPS, BOXES = tl.constexpr(flip.DRAWS), tl.constexpr(paint.BOXES)
MORE, MARGIN = tl.constexpr(paint.MORE), tl.constexpr(paint.MARGIN)
POINTS, KNOTS = tl.constexpr(nonlinear.POINTS), tl.constexpr(nonlinear.KNOTS)
HALVINGS = tl.constexpr(nonlinear.POINTS.bit_length() - 1)
FLIP, SHUFFLE, NONLINEAR = (tl.constexpr(number) for number in (plain.FLIP, plain.SHUFFLE, plain.NONLINEAR))
PAINT, CHANCES = tl.constexpr(plain.PAINT), tl.constexpr(plain.CHANCES)
# The rows of a plan, whose columns are the samples: a bit for each axis that is flipped; whether a sample is shuffled,
# and its intensities changed; 1 for what is in-painted and 2 for out-painted; then start and end of each box and axis.
FLIPPED, SHUFFLED, CURVED, PAINTED, BOUNDS = (tl.constexpr(row) for row in range(5))
ROWS = 4 + paint.BOXES * 3 * 2
INSIDE, OUTSIDE = tl.constexpr(1), tl.constexpr(2)
# What one program does:
COMPARED = 8  # with all points of a curve
TABULATED, VOXELS = 1024, 512
EXACT = {"enable_fp_fusion": False}  # rounded as PyTorch's own operations are


def corrupt(
    corruption: "Corruption", x: Float[Tensor, "b c *spatial"], generator: BatchGenerator
) -> tuple[Float[Tensor, "b c *spatial"], Float[Tensor, "b c *spatial"]]:
    """What `corruption` makes of images of at most 2^27 voxels, which get no gradient."""
    x = x.contiguous()
    images, channels, *spatial = x.shape
    voxels, axes = x[0, 0].numel(), len(spatial)
    words, first = generator.take(plain.NUMBERS)
    plan = torch.empty((ROWS, images), dtype=torch.int32, device=x.device)
    streams, points, curves = torch.empty_like(words), x.new_empty(0), x.new_empty(0)
    basis, knots = nonlinear.grids(x.device)
    if corruption.nonlinear > 0:
        points, curves = (basis.new_empty(images, count) for count in (nonlinear.POINTS, nonlinear.KNOTS))
    corrupted, target = torch.empty_like(x), torch.empty_like(x) if corruption.flip > 0 else x
    rates = corruption.flip, corruption.shuffle, corruption.nonlinear, corruption.paint, corruption.outpaint
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _plan[(images,)](
            words, first, basis, paint.sides(tuple(spatial), x.device), plan, streams, points, images,
            *map(float, rates), axes, corruption.nonlinear > 0, COMPARED, num_warps=8, **EXACT,
        )  # fmt: skip
        if corruption.nonlinear > 0:
            tabulated = images * triton.cdiv(nonlinear.KNOTS, TABULATED)
            _curves[(tabulated,)](words, first, basis, knots, points, curves, TABULATED, **EXACT)
        shown, starts, offsets, sizes = plan, plan, plan, (0, 1, 0)  # without the shuffle nobody reads them
        if corruption.shuffle > 0:
            forms = shuffle.forms_of(tuple(spatial), x.device)
            shown = cover(streams, 0, forms, plan[SHUFFLED.value])
            starts, offsets = forms.starts, forms.offsets
            sizes = forms.windows, forms.largest, forms.spare_bits
        which = corruption.flip > 0, corruption.shuffle > 0, corruption.nonlinear > 0, corruption.paint > 0
        _corrupt[(images * triton.cdiv(voxels, VOXELS),)](
            x, corrupted, target, words, first, plan, streams, curves, shown, starts, offsets,
            images, voxels, *sizes, axes, channels, *in_3d(spatial),
            *which, corruption.paint_fill == "constant", VOXELS, **EXACT,
        )  # fmt: skip
    return corrupted, target


@triton.jit(do_not_specialize=["first", "images"])
@no_type_check
def _plan(
    words, first, basis, sides, plan, streams, points, images,
    flip, shuffle, nonlinear, paint, outpaint, AXES: tl.constexpr, CURVES: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """What is drawn for a sample, and with CURVES the points of its curve, by x."""
    image = tl.program_id(0)
    low, high = stream(words, image)
    plan += image

    own_low, own_high = _child(low, high, first + FLIP)
    flipped, again = 0, 1
    for draw in tl.static_range(FLIPS):
        again &= (fraction(own_low, own_high, draw) < flip).to(tl.int32)
        flipped ^= again << (fraction(own_low, own_high, FLIPS + draw) * AXES).to(tl.int32)
    tl.store(plan + FLIPPED * images, flipped)

    own_low, own_high = _child(low, high, first + SHUFFLE)
    tl.store(streams + 2 * image, own_low)
    tl.store(streams + 2 * image + 1, own_high)
    tl.store(plan + SHUFFLED * images, (fraction(low, high, first + CHANCES) < shuffle).to(tl.int32))
    tl.store(plan + CURVED * images, (fraction(low, high, first + CHANCES + 1) < nonlinear).to(tl.int32))

    own_low, own_high = _child(low, high, first + PAINT)
    outside = (fraction(own_low, own_high, 0) < outpaint).to(tl.int32)
    painted = (fraction(low, high, first + CHANCES + 2) < paint).to(tl.int32)
    tl.store(plan + PAINTED * images, painted * tl.where(outside == 1, OUTSIDE, INSIDE))
    exists = 1
    for box in tl.static_range(BOXES):
        more = (fraction(own_low, own_high, BOXES + box) < MORE).to(tl.int32)
        exists &= more | outside if box == 0 else more
        for axis in tl.static_range(3):
            start, end = 0, 1
            if axis < AXES:
                about = sides + outside * 3 * AXES + axis
                dim = tl.load(about + 2 * AXES)
                side = fraction(own_low, own_high, (2 + 2 * axis) * BOXES + box) * tl.load(about + AXES)
                side = tl.load(about) + tl.floor(side)
                margin = tl.minimum(tl.floor((dim - side) * 0.5), MARGIN)
                room = dim - side - 2 * margin + 1
                start = margin + tl.floor(fraction(own_low, own_high, (3 + 2 * axis) * BOXES + box) * room)
                start, end = start.to(tl.int32), (start + side).to(tl.int32) * exists
            bound = plan + (BOUNDS + 2 * (3 * box + axis)) * images
            tl.store(bound, start)
            tl.store(bound + images, end)

    if CURVES:  # of whose points rounding may have put some into wrong order
        own_low, own_high = _child(low, high, first + NONLINEAR)
        index = tl.arange(0, POINTS)
        x = _point(own_low, own_high, 0, basis, index)
        place = tl.zeros_like(index)
        for begin in range(0, POINTS, COMPARED):
            other_index = begin + tl.arange(0, COMPARED)
            other = _point(own_low, own_high, 0, basis, other_index)[None, :]
            before = (other < x[:, None]) | ((other == x[:, None]) & (other_index[None, :] < index[:, None]))
            place += tl.sum(before.to(tl.int32), 1)
        tl.store(points + image * POINTS + place, x)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _curves(words, first, basis, knots, points, curves, TABULATED: tl.constexpr):
    """y at the knots, as `nonlinear._table`."""
    image, knot = share(KNOTS, TABULATED)
    low, high = stream(words, image)
    low, high = _child(low, high, first + NONLINEAR)
    points += image * POINTS
    at = tl.load(knots + knot, knot < KNOTS, 0)
    right = tl.zeros_like(knot)  # so many points are left of the knot
    for halving in tl.static_range(HALVINGS):
        step = POINTS >> (1 + halving)
        right += tl.where(tl.load(points + right + step - 1) < at, step, 0)
    right = tl.maximum(right, 1)
    x0, x1 = tl.load(points + right - 1), tl.load(points + right)
    decreasing = fraction(low, high, 4) < 0.5
    y0 = _point(low, high, 1, basis, tl.where(decreasing, POINTS - right, right - 1))
    y1 = _point(low, high, 1, basis, tl.where(decreasing, POINTS - 1 - right, right))
    part = tl.minimum(tl.maximum((at - x0) / tl.maximum(x1 - x0, 1e-12), 0.0), 1.0)
    y = tl.where(part < 0.5, y0 + part * (y1 - y0), y1 - (1.0 - part) * (y1 - y0))  # within y0 and y1
    tl.store(curves + image * KNOTS + knot, y, knot < KNOTS)


@triton.jit(do_not_specialize=["first", "images"])
@no_type_check
def _corrupt(
    x, corrupted, target, words, first, plan, streams, curves, shown, starts, offsets,
    images, voxels, windows, LARGEST: tl.constexpr, SPARE: tl.constexpr,
    AXES: tl.constexpr, CHANNELS: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr,
    FLIPPING: tl.constexpr, SHUFFLING: tl.constexpr, CURVING: tl.constexpr, PAINTING: tl.constexpr,
    CONSTANT: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    image, voxel = share(voxels, VOXELS)
    inside = voxel < voxels
    low, high = stream(words, image)
    plan += image
    flipped = tl.load(plan + FLIPPED * images)
    source = voxel
    if SHUFFLING:  # noqa: SIM102  Triton may look at both sides of an "and"
        if tl.load(plan + SHUFFLED * images) == 1:
            own_low, own_high = stream(streams, image)
            last = tl.load(shown + image.to(tl.int64) * voxels + voxel, inside, -1)
            source = source_of(
                voxel, last, own_low, own_high, 0, starts, offsets, windows, LARGEST, SPARE, AXES, NX, NY, NZ
            )
    curved = tl.load(plan + CURVED * images) == 1
    covering = _covering(voxel, plan, images, NY, NZ) if PAINTING else voxel
    painted = tl.load(plan + PAINTED * images)
    painted = ((painted == INSIDE) & (covering > 0)) | ((painted == OUTSIDE) & (covering == 0))
    own_low, own_high = _child(low, high, first + PAINT)
    own_source, source = _mirrored(voxel, flipped, NX, NY, NZ), _mirrored(source, flipped, NX, NY, NZ)
    for channel in range(CHANNELS):
        at = (image.to(tl.int64) * CHANNELS + channel) * voxels
        value = tl.load(x + at + source, inside)
        if FLIPPING:
            tl.store(target + at + voxel, tl.load(x + at + own_source, inside), inside)
        if CURVING:
            value = tl.where(curved, _curve(value, curves + image * KNOTS), value)
        if PAINTING:
            number = channel * BOXES + _latest(covering) if CONSTANT else channel * voxels + voxel
            fill = fraction(own_low, own_high, (2 + 2 * AXES) * BOXES + number)
            value = tl.where(painted, fill.to(value.dtype), value)
        tl.store(corrupted + at + voxel, value, inside)


@triton.jit
@no_type_check
def _child(low, high, number):
    """The stream that `BatchGenerator.split` makes of two numbers of a stream."""
    return hashed(low, high, number), hashed(low, high, number + 1)


@triton.jit
@no_type_check
def _point(low, high, axis, basis, index):
    """x (axis 0) or y (axis 1) of points of the Bézier curve of a stream."""
    first, second = fraction(low, high, axis), fraction(low, high, 2 + axis)
    value = first * tl.load(basis + index) + second * tl.load(basis + POINTS + index)
    return value + tl.load(basis + 2 * POINTS + index)


@triton.jit
@no_type_check
def _curve(value, curve):
    """As `nonlinear.BezierNonlinearity.apply`; what is not a number stays so."""
    scaled = value.to(tl.float32) * (KNOTS - 1)
    place = tl.where(scaled > 0, scaled, tl.where(scaled <= 0, 0.0, scaled))
    place = tl.where(place > KNOTS - 1, KNOTS - 1.0, place)
    knot = tl.minimum(tl.maximum(place.to(tl.int32), 0), KNOTS - 1)  # again: NaN must not become an index
    y = tl.load(curve + knot)
    step = tl.load(curve + tl.minimum(knot + 1, KNOTS - 1)) - y
    return (y + (place - knot.to(tl.float32)) * step).to(value.dtype)


@triton.jit
@no_type_check
def _mirrored(voxel, flipped, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr):
    x, y, z = voxel // (NY * NZ), voxel // NZ % NY, voxel % NZ
    x = tl.where(flipped & 1 != 0, NX - 1 - x, x)
    y = tl.where(flipped & 2 != 0, NY - 1 - y, y)
    z = tl.where(flipped & 4 != 0, NZ - 1 - z, z)
    return (x * NY + y) * NZ + z


@triton.jit
@no_type_check
def _covering(voxel, plan, images, NY: tl.constexpr, NZ: tl.constexpr):
    """The boxes that cover voxels, as a sum of 2^box."""
    covering = tl.zeros_like(voxel)
    for box in tl.static_range(BOXES):
        covered = voxel >= 0
        for axis in tl.static_range(3):
            place = voxel // (NY * NZ) if axis == 0 else (voxel // NZ % NY if axis == 1 else voxel % NZ)
            bound = plan + (BOUNDS + 2 * (3 * box + axis)) * images
            covered &= (place >= tl.load(bound)) & (place < tl.load(bound + images))
        covering += covered.to(tl.int32) << box
    return covering


@triton.jit
@no_type_check
def _latest(covering):
    """The last of the boxes; the first where there is none."""
    latest = tl.zeros_like(covering)
    for box in tl.static_range(BOXES):
        latest = tl.where(covering >> box > 0, box, latest)
    return latest
