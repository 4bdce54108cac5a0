"""Latents: an autoencoder of whole volumes, so that patients who look alike have latents that lie close together."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ..config import AutoencoderConfig
from ..data.samplers import Endless, Sample, WholeVolumes
from ..data.store import VolumeMeta, VolumeStore
from ..engine.method import Batch, Method, Output
from ..engine.optimizer import OptimizerSettings
from ..engine.ranks import gather, share
from ..engine.trainer import fit
from ..models import Autoencoder
from ..progress import progress
from ..seeding import key

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SLICES = 16  # axial slices per volume on which the 2D autoencoder is trained


class Shrunken(Dataset[Sample]):
    """Whole volumes, or slices, resized once into a memory-mapped file (float16), not anew at every step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __len__(self) -> int:
        return len(np.load(self.file, mmap_mode="r"))

    def __getitem__(self, index: int) -> Sample:
        image = np.load(self.file, mmap_mode="r")[index].astype(np.float32)
        return {"image": torch.from_numpy(image), "key": torch.tensor(index)}


def shrink(volumes: WholeVolumes, file: Path, advance: Callable[[], None]) -> Shrunken:
    """Resize volumes or slices, at least one, into a file; `advance` is called after each."""
    first = volumes[0]["image"]
    images = _memory_mapped(file, np.float16, (len(volumes), *first.shape))
    for index in range(len(volumes)):
        images[index] = volumes[index]["image"].numpy()
        advance()
    images.flush()
    return Shrunken(file)


class Reconstruction(Method):
    """Mean squared error of the autoencoder's reconstruction of whole volumes, or axial slices, in [0, 1]."""

    def __init__(self, spatial_dims: int, channels: Sequence[int], in_channels: int) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(spatial_dims, channels, in_channels)

    def forward(self, batch: Batch) -> Output:
        error = torch.nn.functional.mse_loss(self.autoencoder(batch["image"]), batch["image"])
        return Output({"reconstruction": error})


def train_autoencoder(
    fabric: "Fabric",
    store: VolumeStore,
    train: Sequence[VolumeMeta],
    held_out: Sequence[VolumeMeta],
    settings: AutoencoderConfig,
    *,
    window_hu: tuple[float, float] | None,
    folder: Path,
    seed: int,
) -> Reconstruction:
    """Train on whole volumes, in 2D on `SLICES` slices of each; leaves `autoencoder.safetensors` in `folder`.

    Resized volumes and the training's own files are in `folder`/autoencoder, which `encode_cohort` removes.
    """
    torch.manual_seed(key(seed, "autoencoder"))
    method = Reconstruction(len(settings.shape), settings.channels, train[0].shape[0])
    levels = _heights([*train, *held_out], [(level + 0.5) / SLICES for level in range(SLICES)])

    def images(metas: Sequence[VolumeMeta], name: str) -> ConcatDataset[Sample]:
        place = folder / "autoencoder" / name
        return ConcatDataset(_shrunken(fabric, store, metas, settings.shape, window_hu, levels, place))

    seen = images(train, "train")
    fit(
        method,
        Endless(seen, seed),
        validation=images(held_out, "val") if held_out else None,
        folder=folder / "autoencoder",
        seed=seed,
        device=fabric.device.type,
        steps=settings.steps,
        batch_size=settings.batch_size,
        optimizer=OptimizerSettings("adam", settings.learning_rate, schedule="cosine"),
        title="autoencoder",
        validate_every=max(1, settings.steps // 10),
        workers=0,
    )
    if fabric.is_global_zero:
        weights = {name: tensor.contiguous() for name, tensor in method.autoencoder.state_dict().items()}
        save_file(weights, folder / "autoencoder.safetensors")
    return method


def encode_cohort(
    fabric: "Fabric",
    autoencoder: Autoencoder,
    store: VolumeStore,
    metas: Sequence[VolumeMeta],
    settings: AutoencoderConfig,
    *,
    window_hu: tuple[float, float] | None,
    heights: Sequence[float],
    folder: Path,
) -> Float[np.ndarray, "share positions latent"]:
    """Latents of this process's share of the volumes; those of all are left in `folder`/latents.npy and latents.txt.

    In 3D there is one position; in 2D there are those of the slices at `heights` in the body, from 0 to 1.
    """
    temporary = folder / "autoencoder"
    heights = _heights(metas, heights)
    parts = _shrunken(fabric, store, metas, settings.shape, window_hu, heights, temporary / "all")
    flat = encode(autoencoder, parts[fabric.global_rank], fabric.device, settings.batch_size)
    latents = flat.reshape(len(share(len(metas), fabric)), -1, flat.shape[1])
    gather(fabric, lambda: np.save(temporary / f"latents.{fabric.global_rank}.npy", latents))
    if fabric.is_global_zero:
        files = [np.load(temporary / f"latents.{rank}.npy", mmap_mode="r") for rank in range(fabric.world_size)]
        everyones = _memory_mapped(folder / "latents.npy", np.float32, (len(metas), *latents.shape[1:]))
        np.concatenate(files, out=everyones)
        everyones.flush()
        shutil.rmtree(temporary)
        (folder / "latents.txt").write_text("\n".join(meta.volume for meta in metas) + "\n", encoding="utf-8")
    return latents


@torch.no_grad()
def encode(
    autoencoder: Autoencoder, images: Shrunken, device: torch.device, batch_size: int
) -> Float[np.ndarray, "images latent"]:
    """Latents of whole volumes or slices, float32."""
    autoencoder.eval()
    latents = [
        autoencoder.encode(batch["image"].to(device)).float().cpu()
        for batch in DataLoader(images, batch_size=batch_size)
    ]
    return torch.cat(latents).numpy()


def _memory_mapped(file: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new array on the disk, whose room is taken at once: where it is lacking later, the system ends the process."""
    array = np.lib.format.open_memmap(file, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not everywhere
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return array


def _heights(metas: Sequence[VolumeMeta], heights: Sequence[float]) -> Sequence[float]:
    """At which slices are taken: of images there is but one."""
    return heights if any(meta.shape[3] > 1 for meta in metas) else (0.5,)


def _shrunken(
    fabric: "Fabric",
    store: VolumeStore,
    metas: Sequence[VolumeMeta],
    shape: tuple[int, ...],
    window_hu: tuple[float, float] | None,
    heights: Sequence[float],
    folder: Path,
) -> list[Shrunken]:
    """The volumes, or slices, in order: a file of each process that has a share of them."""
    mine = share(len(metas), fabric)

    def work() -> Shrunken | None:
        if not mine:
            return None
        own = metas[mine.start : mine.stop]
        volumes = WholeVolumes(store, own, shape=shape, window_hu=window_hu, positions=heights)
        folder.mkdir(parents=True, exist_ok=True)
        what = "volumes" if len(shape) == 3 else "slices"
        with progress("resizing", len(volumes), what, shown=fabric.is_global_zero) as bar:
            return shrink(volumes, folder / f"{fabric.global_rank}.npy", bar.advance)

    return [images for images in gather(fabric, work) if images is not None]
