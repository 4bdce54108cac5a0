"""Volumes that stay in a device's memory, and patches cut from them there, a whole batch at once.

The patches are those of `patches.cut_padded`: the same places, the same interpolation, up to the order of sums.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..progress import progress
from ..transforms.fused import kernels
from .host_memory import host_memory
from .patches import window_line
from .resample import box_weights, local_range, resample, taps
from .samplers import Patches, Sample
from .store import Volume, VolumeMeta, VolumeStore
from .workers import available_cores, in_processes

# Of a device's memory. On a GPU the network and its activations need the rest; what a CPU's has the processes share.
AUTO_SHARE = {"cpu": 0.03, "cuda": 0.5}
# Voxels read, and weights made, at once, which bounds the memory beside the volumes: some 30 bytes each. They are to
# fit a CPU's cache: 2^20 is measured to cut a batch of the sample in 3/4 of the time of 2^19, and far faster than 2^25.
AT_ONCE = {"cpu": 2**20, "cuda": 2**25}
# Stored voxels of which one of a patch may be made when all are looked up for each anew, as on CUDA; to make it axis by
# axis, which takes some launches more, is faster from about there on.
MOST_TAPS = 6**3
READ_PER_PROCESS = 2**30  # stored bytes for which another process pays


def residence(
    metas: Sequence[VolumeMeta], device: torch.device, resident: Literal["auto"] | float, processes: int = 1
) -> tuple[bool, str]:
    """Whether these volumes shall stay in the device's memory, and why, as a line to print.

    `resident` is the share of the device's memory that they may take, 0 for none; "auto" keeps them where they take at
    most half of a GPU's, or, in all `processes` of a training together, 3 % of a CPU's. Raises `UserError` when they
    need more than the share, or than what is free.
    """
    if resident == 0:
        return False, "Patches stream from the store (data.resident is off)."
    sizes = torch.tensor([meta.shape for meta in metas]).prod(1) * 2
    need = int(sizes.sum())
    free, whole = _memory(device)
    room = min(free, whole * (AUTO_SHARE[device.type] if resident == "auto" else resident))
    if resident == "auto" and device.type == "cpu":
        room /= processes
    told = f"{len(metas)} volumes take {_gb(need)}"
    if need <= room:
        return True, f"Patches are cut on {device}: the {told} of its {_gb(whole)} and stay there."
    if resident == "auto":
        return False, f"Patches stream from the store: the {told}, {device} has {_gb(room)} for them."
    fit = int((sizes.sort().values.cumsum(0) <= room).sum())
    larger = -(-100 * need // whole) / 100
    mend = f"data.resident={larger:g}" if need <= free and larger <= 1 else "data.resident=auto, which streams them"
    raise UserError(
        f"data.resident={resident:g}: the {told}, but {device} has {_gb(room)} of its {_gb(whole)} for them, "
        f"enough for {fit}; use {mend}."
    )


class ResidentVolumes:
    """The stored integers of some volumes of a store, in one piece of a device's memory.

    All have the same number of channels. Reading them takes several processes when it is much, and shows its progress.
    """

    def __init__(
        self, store: VolumeStore, ids: Sequence[str], window_hu: tuple[float, float] | None, device: torch.device
    ) -> None:
        self.ids, self.device = np.array(sorted(set(ids))), device
        volumes = [store[str(volume)] for volume in self.ids]
        metas = [volume.meta for volume in volumes]
        shape = torch.tensor([meta.shape for meta in metas])
        (self.channels,) = set(shape[:, 0].tolist())
        self._shape, sizes = shape[:, 1:], shape.prod(1)
        self._spacing = torch.tensor([meta.spacing_mm for meta in metas], dtype=torch.float64)
        self._offset = (sizes.cumsum(0) - sizes).to(device)
        lines = [window_line(meta, window_hu) for meta in metas]
        self._gain, self._bias = (torch.stack(values).to(device) for values in zip(*lines, strict=True))
        lift = torch.zeros(len(volumes), 1)  # uint16 is kept as the int16 that is smaller by 2^15
        # A run of voxels along z may go on behind the end of the last volume: what is there has no weight.
        self._voxels = torch.zeros(int(sizes.sum() + self._shape[:, 2].max()), dtype=torch.int16, device=device)
        places = self._voxels[: int(sizes.sum())].split(sizes.tolist())
        processes = min(available_cores(), self._voxels.nbytes // READ_PER_PROCESS)
        with progress("reading", len(volumes), "volumes") as bar:
            for number, array in enumerate(in_processes(Volume.read, volumes, processes, _crashed)):
                if array.dtype == np.uint16:
                    array, lift[number] = (array ^ 0x8000).view(np.int16), 2**15
                places[number].copy_(torch.from_numpy(array).flatten())
                bar.advance()
        self._lift = lift.to(device)

    def cut(
        self,
        volume: Int[np.ndarray, " b"],
        centre_mm: Float64[np.ndarray, "b 3"],
        extent_mm: Float64[np.ndarray, "b dims"],
        size: Sequence[int],
    ) -> tuple[Float[Tensor, "b c ..."], Float[Tensor, " b"]]:
        """`cut_padded` of volumes by their number in `ids`: patches (B, C, *size) and the shares outside, both here.

        Nothing waits for the device. Patches of about the same number of voxels are read together, for each is read
        as far as the widest of them needs. On CUDA most are cut by kernels of our own, where those work.
        """
        box = (*size, 1)[:3]
        number, centre = torch.from_numpy(volume), torch.from_numpy(centre_mm)
        extent = torch.nn.functional.pad(torch.from_numpy(extent_mm), (0, 3 - len(size)))
        sides, spacing, shape = torch.tensor(box).expand_as(centre), self._spacing[number], self._shape[number]
        start, stop = local_range(sides, centre, extent, spacing, shape)
        widths, reach = stop - start, taps(sides, extent, spacing)
        looked_up = (reach.prod(1) <= MOST_TAPS) & (kernels(self.device) is not None)
        order = torch.where(looked_up, 0, widths.prod(1)).argsort(descending=True, stable=True)
        widths = widths[order]
        whole = torch.column_stack([number, start, shape, torch.arange(len(number)), reach])[order]
        exact = torch.cat([centre, extent, spacing], dim=1)[order]
        whole, exact = _to_device(whole, self.device), _to_device(exact, self.device)

        image = torch.empty(len(volume), self.channels, *box, device=self.device)
        padding = torch.empty(len(volume), device=self.device)
        end = len(volume) - int(looked_up.sum())
        weights = int((widths[:end] * torch.tensor(box)).sum(1).max()) if end else 1
        together = max(1, AT_ONCE[self.device.type] // weights)
        for first in range(0, end, together):
            part = slice(first, min(end, first + together))
            self._cut(whole[part], exact[part], widths[part], image, padding)
        if end < len(volume):
            from .triton_cut import cut

            line = self._lift, self._gain, self._bias
            most = int(reach[looked_up].max())
            cut(self._voxels, self._offset, line, whole[end:], exact[end:], most, image, padding)
        return image.squeeze(4) if len(size) == 2 else image, padding

    def _cut(
        self,
        whole: Int[Tensor, "b 11"],
        exact: Float64[Tensor, "b 9"],
        widths: Int[Tensor, "b 3"],
        image: Float[Tensor, "n c nx ny nz"],
        padding: Float[Tensor, " n"],
    ) -> None:
        """Some patches, the largest first, into their places; their weights are made at once, those of all axes."""
        centre, extent, spacing = exact.split(3, 1)
        count = widths.amax(0).tolist()
        weights, outside = box_weights(image.shape[2:], centre, extent, spacing, whole[:, 4:7], whole[:, 1:4], count)
        padding[whole[:, 7]] = outside
        first = 0
        while first < len(whole):
            widest = widths[first:].cummax(0).values
            voxels = widest.prod(1) * torch.arange(1, len(widest) + 1) * self.channels
            together = max(1, int((voxels <= AT_ONCE[self.device.type]).sum()))
            part, count = slice(first, first + together), widest[together - 1].tolist()
            along = (weight[part, :, :most] for weight, most in zip(weights, count, strict=True))
            image[whole[part, 7]] = resample(self._read(whole[part], count), *along)
            first += together

    def _read(self, whole: Int[Tensor, "b 11"], count: list[int]) -> Float[Tensor, "b c x y z"]:
        """`count` windowed voxels from each patch's start on."""
        number, start, shape = whole[:, 0], whole[:, 1:4], whole[:, 4:7]
        voxels = (start[:, axis, None] + torch.arange(count[axis], device=self.device) for axis in range(2))
        x, y = (torch.minimum(along, shape[:, axis, None] - 1) for axis, along in enumerate(voxels))
        plane = torch.arange(self.channels, device=self.device)[:, None] * shape[:, 0, None, None] + x[:, None]
        runs = plane[..., None] * shape[:, 1, None, None, None] + y[:, None, None]
        runs = runs * shape[:, 2, None, None, None] + (self._offset[number] + start[:, 2])[:, None, None, None]
        # By a flat index, rows are copied: on a CPU in a quarter of the time of indexing by `runs` as they are.
        stored = self._voxels.unfold(0, count[2], 1).index_select(0, runs.flatten()).view(*runs.shape, count[2])
        lift, gain, bias = (values[number, :, None, None, None] for values in (self._lift, self._gain, self._bias))
        return stored.float().add_(lift).mul_(gain).add_(bias).clamp_(0, 1)


class ResidentPatches(Dataset[Sample]):
    """The samples of `patches`, cut from `volumes` where those are. A loader gets them as whole batches."""

    def __init__(self, patches: Patches, volumes: ResidentVolumes) -> None:
        self.patches, self.volumes = patches, volumes
        self._volume = np.searchsorted(volumes.ids, patches.volumes)

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        boxes = self.patches.boxes(indices)
        image, padding = self.volumes.cut(
            self._volume[boxes.volume], boxes.centre_mm, boxes.extent_mm, self.patches.patch_size
        )
        numbers = _to_device(torch.from_numpy(np.stack([*boxes.about.values(), boxes.key])), self.volumes.device)
        return {"image": image, **dict(zip((*boxes.about, "key"), numbers, strict=True)), "padding": padding}

    def volumes_of(self, indices: Sequence[int]) -> list[str]:
        return self.patches.volumes_of(indices)

    def __getitem__(self, index: int) -> Sample:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copied without waiting for what the device is doing, for which the source must be pinned."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a device's memory: free, and all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return host_memory()


def _gb(count: int | float) -> str:
    return f"{count / 1e9:.3g} GB"


def _crashed(volume: Volume) -> np.ndarray:
    raise UserError(
        f"Reading volume {volume.meta.volume} ended its process: is there enough memory? Try data.resident=0."
    )
