"""Tiny labelled volumes: a bright ball and a less bright one in noise."""

from pathlib import Path

import numpy as np

from genesis.data.store import VolumeMeta, VolumeStore, write_volume
from genesis.files import write_json

NAMES = {0: "background", 2: "bright", 5: "grey"}  # values with gaps, as real label maps have
SPLITS = ("train", "train", "train", "val", "test", "test")


def blobs(seed: int, shape: tuple[int, int, int] = (20, 18, 16)) -> tuple[np.ndarray, np.ndarray]:
    """HU int16 (x, y, z) and label values uint8."""
    rng = np.random.default_rng(seed)
    image = rng.normal(-600, 60, shape)
    labels = np.zeros(shape, np.uint8)
    where = np.indices(shape)
    for value, hu, third in ((2, 500, 0.3), (5, 0, 0.7)):
        centre = [n * third + rng.uniform(-1.5, 1.5) for n in shape]
        centre[2] = shape[2] * 0.5
        ball = sum((w - c) ** 2 for w, c in zip(where, centre, strict=True)) < rng.uniform(3.5, 4.5) ** 2
        image[ball], labels[ball] = hu + rng.normal(0, 60, ball.sum()), value
    return image.round().astype(np.int16), labels


def write_store(
    folder: Path, splits: tuple[str, ...] = SPLITS, *, depth: int = 16, names: dict[int, str] = NAMES
) -> VolumeStore:
    """A store of one volume per split named; targets alternate."""
    for number, split in enumerate(splits):
        shape = (20 + number % 3, 18, depth)
        image, labels = blobs(number, shape)
        if depth == 1:
            image, labels = (whole[:, :, 8:9] for whole in blobs(number, (*shape[:2], 16)))
        meta = VolumeMeta(
            volume=f"v{number:02}",
            patient=f"p{number:02}",
            source=f"v{number:02}source",
            modality="ct",
            shape=(1, *shape),
            spacing_mm=(2.0, 2.0, 3.0),
            affine=((2.0, 0, 0, 0), (0, 2.0, 0, 0), (0, 0, 3.0, 0), (0, 0, 0, 1.0)),
            scale=(1.0,),
            offset=(0.0,),
            clipped_share=0.0,
            percentiles=((-700.0, 600.0),),
            foreground_box=((0, shape[0]), (0, shape[1]), (0, shape[2])),
            split=split,
            labelled=True,
            target=number % 2,
            values=(float(image.min()), float(image.max())),
        )
        write_volume(folder, image[None], meta, labels)
    labelled = {str(value): name for value, name in names.items()}
    write_json(folder / "audit.json", {"label_names": labelled, "sample": False})
    return VolumeStore(folder)
