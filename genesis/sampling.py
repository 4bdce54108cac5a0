"""Which samples feed a training: those that its method needs, streamed from the store or cut on the device."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, Subset

from .config import ConVIRTConfig, GLoRIAConfig, ViewMethodConfig
from .data.resident import ResidentPatches, ResidentVolumes, residence
from .data.samplers import HeldOutPatches, Patches, PseudoLabelPatches, RandomPatches, Sample, ValidationPatches
from .errors import UserError
from .runs import Run
from .text.encoders import TextModel, kept_text_model, own_text_model, read_text_model
from .text.reports import sections
from .text.studies import StudySamples, studies_of

if TYPE_CHECKING:
    from lightning.fabric import Fabric


UNKNOWN = 0.5  # of the tokens of reports, from which on a text model is of another language
TEXT = "text"  # of a run: its text encoder as it was before training


def text_model_of(run: Run) -> TextModel | None:
    """The text encoder with which a training begins, for methods that learn from reports; the run's, if it began."""
    settings = run.config.method
    if not isinstance(settings, ConVIRTConfig | GLoRIAConfig):
        return None
    text = settings.text
    if (run.folder / TEXT).is_dir():
        return kept_text_model(run.folder / TEXT, text.length)
    by_patient: defaultdict[str, list[str]] = defaultdict(list)
    for study in studies_of(run.material.store.select("train"), run.material.reports):
        by_patient[study.metas[0].patient] += sections(study.report).values()
    if text.model is not None:
        model = read_text_model(text.model, text.revision, text.length)
    else:
        model = own_text_model(by_patient, length=text.length, seed=run.record["seed"])
    missing = model.encode.unknown([part for parts in by_patient.values() for part in parts])
    if missing > UNKNOWN:
        raise UserError(
            f"The vocabulary of {text.model or 'our text model'} does not fit these reports: it lacks {missing:.0%} "
            "of their words; set method.text.model to a text model of their language."
        )
    return model


def samples_of(
    run: Run, fabric: "Fabric", text: TextModel | None = None
) -> tuple[Dataset[Sample], Subset[Sample] | None]:
    """Training samples by an index without end, and a fixed choice of those of held-out patients, if there are any.

    Prints where they come from. `text` is the text encoder of methods that learn from reports.
    """
    config = run.config
    if text is not None:
        fabric.print("Whole bodies stream from the store, each beside what is drawn of its report.")
        return _studies(run, text)
    train, held_out = _pseudo_labelled(run) if config.method.needs == "pseudo_labels" else _random(run)
    chosen = _evenly(len(held_out), config.train.validation_samples) if held_out else []
    used = sorted({str(volume) for patches in (train, held_out) if patches is not None for volume in patches.volumes})
    metas = [run.material.store[volume].meta for volume in used]
    stay, why = residence(metas, fabric.device, config.data.resident, fabric.world_size)
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


def _studies(run: Run, text: TextModel) -> tuple[StudySamples, Subset[Sample] | None]:
    material, settings = run.material, run.config.method
    assert isinstance(settings, ConVIRTConfig | GLoRIAConfig)
    training, held_out = (studies_of(material.store.select(split), material.reports) for split in ("train", "val"))
    how = {**_how(run), "shown": settings.text.shown}
    train = StudySamples(material.store, training, text.encode, batch_size=run.config.train.batch_size, **how)
    judges = StudySamples(material.store, held_out, text.encode, batch_size=None, **how)
    chosen = _evenly(len(held_out), run.config.train.validation_samples)
    return train, Subset(judges, chosen) if held_out else None


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
