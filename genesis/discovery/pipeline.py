"""The whole of self-discovery, from stored volumes to pseudo-labels, by all processes of a fabric."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import Config
from ..data.store import VolumeMeta, VolumeStore
from ..engine.ranks import from_first, gather, share
from ..evaluation.probes import effective_rank
from ..files import sha256, write_json
from ..progress import progress
from ..viewing.discovery import draw_anchors, draw_classes, draw_neighbours
from .anatomy import carried_anatomy
from .anchors import find_anchors
from .body import coarse_step_mm
from .classes import make_classes, match, pairs_of
from .latents import encode_cohort, train_autoencoder
from .neighbours import find_neighbours
from .quality import coverage, similarity

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def discover(
    fabric: "Fabric",
    store: VolumeStore,
    train: Sequence[VolumeMeta],
    held_out: Sequence[VolumeMeta],
    config: Config,
    spacing_mm: tuple[float, ...] | None,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Write everything but the checksums into `folder`; the first process does, and returns discovery.json."""
    assert config.discovery is not None
    settings, metas = config.discovery, [*train, *held_out]
    box: dict[str, Any] = {"patch_size": config.data.patch_size, "spacing_mm": spacing_mm}
    window: dict[str, Any] = {"window_hu": config.data.window_hu}
    step: dict[str, Any] = {"step_mm": coarse_step_mm(train)}
    autoencoder = train_autoencoder(
        fabric, store, train, held_out, settings.autoencoder, **window, folder=folder, seed=seed
    )
    places: dict[str, Any] = {"classes": settings.classes, "references": settings.references, **box, **step}
    anchors = from_first(
        fabric, lambda: find_anchors(store, train, **places, min_tissue=settings.min_tissue, seed=seed)
    )
    heights = [anchor.body[2] for anchor in anchors]
    latents = encode_cohort(
        fabric, autoencoder, store, metas, settings.autoencoder, **window, heights=heights, folder=folder
    )
    neighbours = find_neighbours(
        fabric, metas, anchors, latents, train=settings.neighbours, held_out=settings.validation_neighbours
    )
    pairs = pairs_of(anchors, neighbours)
    mine = share(len(pairs), fabric)
    with progress("matching anchors", len(mine), "pairs", shown=fabric.is_global_zero) as bar:
        carried = gather(
            fabric,
            lambda: match(
                store, anchors, pairs[mine.start : mine.stop], space=settings.anchor_space, advance=bar.advance, **step
            ),
        )
    classes = make_classes(store, [one for part in carried for one in part], min_score=settings.min_score, **box)
    if not fabric.is_global_zero:
        return {}
    table = classes.table
    table.write(folder / "pseudo_labels.csv")
    (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
    (folder / "figures").mkdir()
    draw_classes(store, table, folder / "figures" / "classes.png", **box, **window)
    draw_neighbours(store, table, folder / "figures" / "neighbours.png", **step)
    draw_anchors(store, table, folder / "figures" / "anchors.png", **box, **step)
    body = torch.tensor([anchor.body for anchor in anchors])
    everyones = np.load(folder / "latents.npy", mmap_mode="r")
    of_volume = dict(zip((meta.volume for meta in metas), everyones.mean(1), strict=True))
    quality = {
        "similarity": similarity(store, table, **box, **window),
        **coverage(store, table, **box, **step),
        "matches": classes.matches(),
        "anatomy": carried_anatomy(store, of_volume, body, min_score=settings.min_score, seed=seed, **box, **step),
        "latents": {"effective_rank": effective_rank(torch.from_numpy(everyones[: len(train), 0].copy()))},
    }
    write_json(folder / "quality.json", quality)
    record = {
        "schema": 1,
        "dim": f"{config.spatial_dims}d",
        "seed": seed,
        "modality": train[0].modality,
        "in_channels": train[0].shape[0],
        "spacing_mm": spacing_mm,
        "data": config.data.model_dump(mode="json", exclude={"resident"}),
        "discovery": settings.model_dump(mode="json"),
        "classes": table.classes,
        "rows": len(table),
        "patients": len(set(table.patient.tolist())),
        "pseudo_labels_sha256": sha256(folder / "pseudo_labels.csv"),
    }
    write_json(folder / "discovery.json", record)
    return record
