"""Which samples feed a training: those that its method needs, streamed from the store or cut on the device."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, Subset

from .config import ViewMethodConfig
from .data.resident import ResidentPatches, ResidentVolumes, residence
from .data.samplers import HeldOutPatches, Patches, PseudoLabelPatches, RandomPatches, Sample, ValidationPatches
from .runs import Run

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def samples_of(run: Run, fabric: "Fabric") -> tuple[Dataset[Sample], Subset[Sample] | None]:
    """Training samples by an index without end, and a fixed choice of those of held-out patients, if there are any.

    Prints where they come from.
    """
    config = run.config
    train, held_out = _pseudo_labelled(run) if config.method.needs == "pseudo_labels" else _random(run)
    chosen = _evenly(len(held_out), config.train.validation_samples) if held_out else []
    used = sorted({str(volume) for patches in (train, held_out) if patches is not None for volume in patches.volumes})
    metas = [run.material.store[volume].meta for volume in used]
    stay, why = residence(metas, fabric.device, config.data.resident)
    fabric.print(why)
    if not stay:
        return train, Subset(held_out, chosen) if held_out else None
    volumes = ResidentVolumes(run.material.store, used, config.data.window_hu, fabric.device)
    judges = Subset(ResidentPatches(held_out, volumes), chosen) if held_out else None
    return ResidentPatches(train, volumes), judges


def _pseudo_labelled(run: Run) -> tuple[Patches, ValidationPatches | None]:
    material, table, discovery = run.material, run.material.table, run.config.discovery
    assert table is not None
    assert discovery is not None
    rows, how = table.select("val"), _how(run)
    train = PseudoLabelPatches(
        material.store, table.select("train"), multi_resolution=discovery.multi_resolution, **how
    )
    return train, ValidationPatches(material.store, rows, **how) if len(rows) else None


def _random(run: Run) -> tuple[Patches, HeldOutPatches | None]:
    store, count, how = run.material.store, run.config.train.validation_samples, _how(run)
    held_out = store.select("val")
    train = RandomPatches(store, store.select("train"), **how)
    return train, HeldOutPatches(store, held_out, length=count, **how) if held_out else None


def _how(run: Run) -> dict[str, Any]:
    size, method = run.config.data.patch_size, run.config.method
    return {
        "patch_size": method.views.region(size) if isinstance(method, ViewMethodConfig) else size,
        "spacing_mm": run.material.spacing_mm,
        "window_hu": run.config.data.window_hu,
        "seed": run.record["seed"],
    }


def _evenly(rows: int, count: int) -> list[int]:
    """At most `count` rows, spread evenly over all and so over the classes."""
    return np.linspace(0, rows - 1, min(count, rows)).round().astype(int).tolist()
