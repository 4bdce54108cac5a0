"""Studies as samples: an image of the whole body beside what is shown of its report."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch.utils.data import Dataset

from ..data.labelled import body_image
from ..data.reports import Report
from ..data.samplers import Sample, shuffled
from ..data.store import VolumeMeta, VolumeStore
from ..errors import UserError
from ..seeding import generator, key
from .encoders import Encoder
from .reports import Shown, choose, sections, text_hash


@dataclass(frozen=True)
class Study:
    """A report, and the volumes that are reconstructions of what it tells of."""

    report: Report
    metas: tuple[VolumeMeta, ...]

    @property
    def text(self) -> str:
        return " ".join(sections(self.report).values())


def studies_of(metas: Iterable[VolumeMeta], reports: Mapping[str, Report]) -> list[Study]:
    """The studies of those volumes that have a report."""
    found: defaultdict[str, list[VolumeMeta]] = defaultdict(list)
    for meta in metas:
        if meta.volume in reports:
            found[reports[meta.volume].study].append(meta)
    return [Study(reports[found[study][0].volume], tuple(found[study])) for study in sorted(found)]


@dataclass(frozen=True, eq=False)
class StudySamples(Dataset[Sample]):
    """One study per sample: one of its volumes, and what is drawn of its report.

    With a `batch_size` these are training samples by an index without end: in every epoch each study comes at most
    once, as many as fill whole batches, so that no batch, of samples k · batch_size and following, has a study twice;
    extent, place and intensities of the image vary. Without, they are the studies in order, always the same.

    Items: image (C, *patch_size) in [0, 1]; tokens, mask, word (L,) as `Encoder` gives them; report and text, int64
    hashes of the whole report and of what is shown of it; key, int64.
    Raises `UserError` when there are fewer studies than a batch has.
    """

    store: VolumeStore
    studies: Sequence[Study]
    encoder: Encoder
    _: KW_ONLY
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    window_hu: tuple[float, float] | None
    shown: Shown
    seed: int
    batch_size: int | None

    def __post_init__(self) -> None:
        if self.batch_size is not None and len(self.studies) < self.batch_size:
            raise UserError(
                f"train.batch_size is {self.batch_size}, but {len(self.studies)} training studies have a report, and a "
                "batch shows each once: lower it."
            )

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> Sample:
        study, meta, drawn = self._draw(index)
        shown = choose(study.report, self.shown, drawn)
        vary = drawn if self.batch_size is not None else None
        coded = {name: rows[0] for name, rows in self.encoder([shown]).items()}
        return {
            "image": body_image(self.store, meta, self.patch_size, self.spacing_mm, self.window_hu, vary),
            **coded,
            "report": torch.tensor(text_hash(study.text)),
            "text": torch.tensor(text_hash(shown)),
            "key": torch.tensor(key(self.seed, self._purpose, index)),
        }

    def volumes_of(self, indices: Sequence[int]) -> list[str]:
        """The volume of each sample."""
        return [self._draw(index)[1].volume for index in indices]

    @property
    def _purpose(self) -> str:
        return "study" if self.batch_size is not None else "held-out study"

    def _draw(self, index: int) -> tuple[Study, VolumeMeta, torch.Generator]:
        """The study of a sample, which of its volumes, and the source of all further draws."""
        source = generator(self.seed, self._purpose, index)
        if self.batch_size is None:
            return self.studies[index], self.studies[index].metas[0], source
        count = len(self.studies)
        epoch, place = divmod(index, count - count % self.batch_size)
        study = self.studies[shuffled(epoch * count + place, count, self.seed)]
        return study, study.metas[int(torch.randint(len(study.metas), (), generator=source))], source
