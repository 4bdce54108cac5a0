"""Patches of volumes in a CUDA device's memory, cut by two Triton kernels; importing it needs Triton.

They are those of `resample.local_weights` and `resample.resample`, but for the order of sums: a voxel of a patch is the
weighted sum of the few stored voxels that it follows from, which nothing is made of beforehand.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64, Int16, Int64
from torch import Tensor

from ..transforms.triton_kernels import share

COLUMNS = tl.constexpr(11)
VOXELS = 512  # of a patch, which one program cuts
HALF_EVEN = tl.constexpr(1.5 * 2**52)  # added to a float64 and taken away again, rounds to whole numbers
EXACT = {"enable_fp_fusion": False}  # rounded as PyTorch's own operations are


def cut(
    voxels: Int16[Tensor, " n"],
    offset: Int64[Tensor, " volumes"],
    line: tuple[Float[Tensor, "volumes 1"], Float[Tensor, "volumes c"], Float[Tensor, "volumes c"]],
    whole: Int64[Tensor, "b 11"],
    exact: Float64[Tensor, "b 9"],
    most: int,
    image: Float[Tensor, "all c nx ny nz"],
    padding: Float[Tensor, " all"],
) -> None:
    """Write patches, and their shares outside of the volumes, into some rows of `image` and `padding`.

    voxels: the volumes, which begin at `offset`. An intensity is (voxel + lift) × gain + bias, clamped to [0, 1], of
        the numbers in `line`.
    whole: a patch's volume, three numbers that are not looked at, the volume's shape, the patch's row, and along each
        axis the `resample.taps`, of which `most` is the greatest.
    exact: a patch's centre and extent, and the volume's spacing, all in mm.
    """
    count, channels, box = len(whole), image.shape[1], image.shape[2:]
    width, most = triton.next_power_of_2(max(box)), triton.next_power_of_2(most)  # few kernels to compile
    first = torch.empty((count, 3, width), dtype=torch.int32, device=voxels.device)
    weight = torch.empty((count, 3, most, width), device=voxels.device)
    programs = count * channels * triton.cdiv(box.numel(), VOXELS)
    with torch.cuda.device_of(voxels):  # Triton launches on the current device
        _weigh[(count,)](whole, exact, first, weight, padding, most, width, *box, **EXACT)
        _gather[(programs,)](
            voxels, offset, *line, whole, first, weight, image, channels, most, width, *box, VOXELS, **EXACT
        )


@triton.jit
@no_type_check
def _weigh(
    whole, exact, first, weight, padding,
    MOST: tl.constexpr, WIDTH: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr,
):  # fmt: skip
    """Of each place along each axis of a patch, the first stored voxel and the weights of it and its successors."""
    sample = tl.program_id(0)
    whole += sample * COLUMNS
    exact += sample * 9
    place = tl.arange(0, WIDTH)
    within = 1.0
    for axis in tl.static_range(3):
        size = NX if axis == 0 else (NY if axis == 1 else NZ)
        centre, extent, spacing = tl.load(exact + axis), tl.load(exact + 3 + axis), tl.load(exact + 6 + axis)
        last = tl.load(whole + 4 + axis).to(tl.int32) - 1
        at = _rounded((centre + (place.to(tl.float64) - (size - 1) * 0.5) * (extent / size)) / spacing)
        step = tl.maximum(_rounded(extent / size / spacing), 1e-6)
        reach = tl.maximum(step, 1.0)
        begin = tl.floor(at - reach).to(tl.int32) + 1
        sums = tl.zeros_like(at)
        for tap in range(MOST):
            sums += _triangle(begin + tap, at, reach, last)
        low, high = tl.maximum(at - step * 0.5, -0.5), tl.minimum(at + step * 0.5, last.to(tl.float64) + 0.5)
        inside = tl.minimum(tl.maximum((high - low) / step, 0.0), 1.0)
        row = (sample * 3 + axis) * WIDTH + place
        tl.store(first + row, begin)
        total = tl.zeros_like(place).to(tl.float32)
        for tap in range(MOST):
            normal = _triangle(begin + tap, at, reach, last) / tl.maximum(sums, 1e-12) * inside
            tl.store(weight + ((sample * 3 + axis) * MOST + tap) * WIDTH + place, normal.to(tl.float32))
            total += normal.to(tl.float32)
        within *= tl.sum(tl.where(place < size, total, 0.0)) / size
    tl.store(padding + tl.load(whole + 7), tl.maximum(1.0 - within, 0.0))


@triton.jit
@no_type_check
def _gather(
    voxels, offset, lift, gain, bias, whole, first, weight, image, CHANNELS: tl.constexpr, MOST: tl.constexpr,
    WIDTH: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    row, voxel = share(NX * NY * NZ, VOXELS)
    sample, channel = row // CHANNELS, row % CHANNELS
    inside = voxel < NX * NY * NZ
    whole += sample * COLUMNS
    number = tl.load(whole)
    lift = tl.load(lift + number)
    gain, bias = tl.load(gain + number * CHANNELS + channel), tl.load(bias + number * CHANNELS + channel)
    x, y, z = voxel // (NY * NZ), voxel // NZ % NY, voxel % NZ
    first += sample * 3 * WIDTH
    first_x, first_y = tl.load(first + x, inside, 0), tl.load(first + WIDTH + y)
    first_z = tl.load(first + 2 * WIDTH + z)
    side_x, side_y = tl.load(whole + 4).to(tl.int32), tl.load(whole + 5).to(tl.int32)
    side_z = tl.load(whole + 6).to(tl.int32)
    taps_x, taps_y = tl.load(whole + 8).to(tl.int32), tl.load(whole + 9).to(tl.int32)
    taps_z = tl.load(whole + 10).to(tl.int32)
    voxels += tl.load(offset + number) + channel.to(tl.int64) * side_x * side_y * side_z
    weight_x = weight + sample * 3 * MOST * WIDTH + x
    weight_y = weight + (sample * 3 + 1) * MOST * WIDTH + y
    weight_z = weight + (sample * 3 + 2) * MOST * WIDTH + z
    total = tl.zeros_like(voxel).to(tl.float32)
    tap_x = 0
    while tap_x < taps_x:
        plane = tl.minimum(tl.maximum(first_x + tap_x, 0), side_x - 1) * side_y
        of_plane = tl.load(weight_x + tap_x * WIDTH, inside, 0.0)
        tap_y = 0
        while tap_y < taps_y:
            line = (plane + tl.minimum(tl.maximum(first_y + tap_y, 0), side_y - 1)) * side_z
            of_line = of_plane * tl.load(weight_y + tap_y * WIDTH)
            tap_z = 0
            while tap_z < taps_z:
                stored = tl.load(voxels + line + tl.minimum(tl.maximum(first_z + tap_z, 0), side_z - 1), inside, 0)
                value = (stored.to(tl.float32) + lift) * gain + bias
                value = tl.minimum(tl.maximum(value, 0.0), 1.0)
                total += of_line * tl.load(weight_z + tap_z * WIDTH) * value
                tap_z += 1
            tap_y += 1
        tap_x += 1
    at = (tl.load(whole + 7) * CHANNELS + channel) * (NX * NY * NZ)
    tl.store(image + at + voxel, total, inside)


@triton.jit
@no_type_check
def _triangle(voxel, at, reach, last):
    """The weight of voxels, as `resample.local_weights` before it is normalised."""
    weight = tl.maximum(1.0 - tl.abs(voxel.to(tl.float64) - at) / reach, 0.0)
    return tl.where((voxel >= 0) & (voxel <= last), weight, 0.0)


@triton.jit
@no_type_check
def _rounded(x):
    """To a millionth, as `round(decimals=6)`."""
    return (x * 1e6 + HALF_EVEN - HALF_EVEN) / 1e6
