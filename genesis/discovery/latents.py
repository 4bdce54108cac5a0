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
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ..config import AutoencoderConfig
from ..data.samplers import Endless, Sample, WholeVolumes
from ..data.store import VolumeMeta, VolumeStore
from ..engine.method import Batch, Method, Output
from ..engine.optimizer import OptimizerSettings
from ..engine.ranks import from_first, gather, share
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
) -> Autoencoder:
    """Train on whole volumes, in 2D on `SLICES` slices of each; leaves `autoencoder.safetensors` in `folder`.

    The first process does that alone: shared among several, sums would be rounded in another order, and in thousands of
    steps that becomes other neighbours. Resized volumes and the training's own files are in `folder`/autoencoder, which
    `encode_cohort` removes.
    """
    torch.manual_seed(key(seed, "autoencoder"))
    method = Reconstruction(len(settings.shape), settings.channels, train[0].shape[0])
    levels = _heights([*train, *held_out], [(level + 0.5) / SLICES for level in range(SLICES)])

    def images(metas: Sequence[VolumeMeta], name: str) -> ConcatDataset[Sample]:
        place = folder / "autoencoder" / name
        return ConcatDataset(_shrunken(fabric, store, metas, settings.shape, window_hu, levels, place))

    seen, judges = images(train, "train"), images(held_out, "val") if held_out else None

    def learned() -> dict[str, Tensor]:
        fit(
            method,
            Endless(seen, seed),
            validation=judges,
            folder=folder / "autoencoder",
            seed=seed,
            device=fabric.device.type,
            steps=settings.steps,
            batch_size=settings.batch_size,
            optimizer=OptimizerSettings("adam", settings.learning_rate, schedule="cosine"),
            title="autoencoder",
            validate_every=max(1, settings.steps // 10),
            workers=0,
            alone=True,
        )
        weights = {name: tensor.cpu().contiguous() for name, tensor in method.autoencoder.state_dict().items()}
        save_file(weights, folder / "autoencoder.safetensors")
        return weights

    method.autoencoder.load_state_dict(from_first(fabric, learned))
    return method.autoencoder


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
    """Latents of this process's share of the volumes, memory-mapped; those of all are left in `folder`/latents.npy.

    Which volumes those are is in latents.txt. In 3D there is one position; in 2D there are those of the slices at
    `heights` in the body, from 0 to 1.
    """
    temporary = folder / "autoencoder"
    heights = _heights(metas, heights)
    parts = _shrunken(fabric, store, metas, settings.shape, window_hu, heights, temporary / "all")
    mine = share(len(metas), fabric)

    def save() -> None:
        latents = encode(autoencoder, parts[fabric.global_rank], fabric.device)
        np.save(temporary / f"latents.{fabric.global_rank}.npy", latents.reshape(len(mine), -1, latents.shape[1]))

    def join() -> None:
        files = [np.load(temporary / f"latents.{rank}.npy", mmap_mode="r") for rank in range(fabric.world_size)]
        everyones = _memory_mapped(folder / "latents.npy", np.float32, (len(metas), *files[0].shape[1:]))
        np.concatenate(files, out=everyones)
        everyones.flush()
        shutil.rmtree(temporary)
        (folder / "latents.txt").write_text("\n".join(meta.volume for meta in metas) + "\n", encoding="utf-8")

    gather(fabric, save)
    from_first(fabric, join)
    everyones: Float[np.ndarray, "volumes positions latent"] = np.load(folder / "latents.npy", mmap_mode="r")
    return everyones[mine.start : mine.stop]


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Shrunken, device: torch.device) -> Float[np.ndarray, "images latent"]:
    """Latents of whole volumes or slices, float32.

    One at a time, which takes no longer on a CPU: the last digits of a latent would depend on the others of its batch.
    """
    autoencoder.to(device).eval()
    latents: np.ndarray | None = None
    for index in range(len(images)):
        latent = autoencoder.encode(images[index]["image"].to(device)[None]).float().cpu().numpy()
        if latents is None:
            latents = np.empty((len(images), latent.shape[1]), np.float32)
        latents[index] = latent[0]
    assert latents is not None
    return latents


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
