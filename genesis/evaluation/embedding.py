"""What a frozen encoder makes of scans: one vector each."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..data.cohort import find_cases
from ..data.intake import in_memory
from ..data.labelled import body_box
from ..data.patches import cut
from ..data.scans import Quarantine, read_scan
from ..data.store import Modality, Volume, VolumeMeta, VolumeStore
from ..data.windows import BodyWindows
from ..engine.launch import launch
from ..errors import UserError
from ..files import write_aside
from ..models import Backbone, build_described, wrap
from ..models.heads import pool
from ..progress import progress
from ..seeding import key
from ..weights import Card, DataCard, has_text_side, load_pretrained, read_card

AT_ONCE = 2**20  # voxels that the encoder is given at once, which bounds its memory


@dataclass(frozen=True)
class FrozenEncoder:
    """A network's encoder that is asked, not trained; `data` says what patches it takes.

    whole: it was trained on whole bodies, shrunk until they fit a patch.
    """

    backbone: Backbone
    data: DataCard
    device: torch.device
    whole: bool = False

    @classmethod
    def of(cls, package: Path, device: torch.device) -> "FrozenEncoder":
        """That of a weights package. Raises `UserError` when it is damaged."""
        return cls._as(package, wrap(load_pretrained(package)), device)

    @classmethod
    def untrained(cls, package: Path, device: torch.device, seed: int) -> "FrozenEncoder":
        """One of the same network, with initial weights that depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "initial weights"))
            backbone = build_described(read_card(package).network.model_dump(by_alias=True))
        return cls._as(package, backbone, device)

    @classmethod
    def _as(cls, package: Path, backbone: Backbone, device: torch.device) -> "FrozenEncoder":
        return cls(backbone.to(device).eval(), read_card(package).data, device, has_text_side(package))

    @property
    def together(self) -> int:
        """Patches in a batch."""
        return max(1, AT_ONCE // int(np.prod(self.data.patch_size)))

    @torch.inference_mode()
    def encode(self, patches: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b d"]:
        """The bottleneck, averaged over each patch; float32, on the CPU."""
        return pool(self.backbone.encode(patches.to(self.device))[-1]).float().cpu()

    def embed(self, volume: Volume) -> Float[Tensor, " d"]:
        """The mean over the patches that cover the body, or the whole of it."""
        if (channels := volume.meta.shape[0]) != self.backbone.in_channels:
            raise UserError(
                f"Volume {volume.meta.volume} has {channels} channels, the weights take {self.backbone.in_channels}; "
                "choose them with --channels."
            )
        data = self.data
        if self.whole:
            box = body_box(volume.meta, data.patch_size, data.spacing_mm)
            return self.encode(cut(volume, *box, data.patch_size, data.window_hu)[None])[0]
        windows = BodyWindows(volume, data.patch_size, data.spacing_mm, data.window_hu)
        firsts = range(0, len(windows), self.together)
        return torch.cat([self.encode(windows.patches(first, first + self.together)) for first in firsts]).mean(0)


def embed_volumes(
    encoder: FrozenEncoder, store: VolumeStore, metas: Sequence[VolumeMeta], title: str = "embedding"
) -> Float[Tensor, "n d"]:
    """A vector of each volume."""
    vectors = []
    with progress(title, len(metas), "volumes") as bar:
        for meta in metas:
            vectors.append(encoder.embed(store[meta.volume]))
            bar.advance()
    return torch.stack(vectors)


def embed(
    package: Path | str,
    scans: Path | str | Iterable[Path | str],
    *,
    modality: Modality | None = None,
    channels: str | None = None,
    device: str = "auto",
) -> dict[str, np.ndarray]:
    """Vectors (d,) float32 of scans by their paths, from the encoder of a weights package; nothing is written.

    `scans`: a scan, a folder, a CSV or a dataset.json, or several of them. `modality`: of scans for which no table says
    it, where the weights have seen several. `channels` as --channels. A scan that cannot be read is named on the
    terminal and left out. Raises `UserError` when none can, or the package is damaged.
    """
    card = read_card(package)
    encoder = FrozenEncoder.of(Path(package), launch(device).device)
    places = [scans] if isinstance(scans, str | Path) else list(scans)
    vectors: dict[str, np.ndarray] = {}
    for path, volume in _read(places, card, modality, channels):
        vectors[path] = encoder.embed(volume).numpy()
    if not vectors:
        raise UserError(f"None of the scans at {', '.join(map(str, places))} could be used; the reasons are above.")
    return vectors


def _read(
    places: Iterable[Path | str], card: Card, modality: Modality | None, channels: str | None
) -> Iterator[tuple[str, Volume]]:
    for place in places:
        cohort = find_cases(Path(place))
        chosen = cohort.channels(channels)
        with progress("embedding", len(cohort.cases), "scans") as bar:
            for case in cohort.cases:
                try:
                    kind = case.modality or modality or card.data.only_modality
                    volume = in_memory(read_scan(case.images, chosen), case, kind)
                except Quarantine as fault:
                    print(f"Left out: {case.name}: {fault}.")
                else:
                    yield case.path, volume
                bar.advance()


def write_vectors(path: Path, metas: Sequence[VolumeMeta], vectors: Float[Tensor, "n d"]) -> None:
    """As CSV: volume, patient, split, target (empty where there is none), v0, v1, …; numbers read back exactly."""
    with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["volume", "patient", "split", "target", *(f"v{i}" for i in range(vectors.shape[1]))])
        for meta, vector in zip(metas, vectors.tolist(), strict=True):
            about = (meta.volume, meta.patient, meta.split, "" if meta.target is None else meta.target)
            writer.writerow([*about, *(f"{value:.9g}" for value in vector)])
