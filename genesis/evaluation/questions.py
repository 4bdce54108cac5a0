"""What labelled scans let one ask of frozen features: which target a scan has, which organ a patch shows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.labelled import Classes, body_box
from ..data.organs import OrganPatches
from ..data.patches import cut
from ..data.store import VolumeMeta, VolumeStore
from ..engine.batches import collated
from ..progress import progress
from ..weights import DataCard
from .cases import Splits, split_cases, with_label_maps, with_targets
from .embedding import FrozenEncoder, embed_volumes
from .readout import Items

PER_CLASS = 4  # patches of each organ in each case
PIXELS = 96  # per side of a picture of a scan
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Question(ABC):
    """Items of labelled cases, each with a class; `data` says how the encoder is to see them."""

    store: VolumeStore
    splits: Splits
    data: DataCard

    kind: ClassVar[str]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the classes."""

    @abstractmethod
    def labels(self, split: str) -> Int[Tensor, " n"]:
        """The class of each item of a split ("train", "validation" or "test")."""

    @abstractmethod
    def cases(self, split: str) -> Int[Tensor, " n"]:
        """The number of each item's case in the split."""

    @abstractmethod
    def features(self, encoder: FrozenEncoder, split: str, title: str) -> Float[Tensor, "n d"]:
        """What the encoder makes of each item."""

    @abstractmethod
    def image(self, split: str, item: int) -> Float[np.ndarray, "x y"]:
        """An axial slice of an item."""

    def items(self, encoder: FrozenEncoder, split: str, title: str) -> Items:
        return Items(self.features(encoder, split, title), self.labels(split))

    @property
    def all_cases(self) -> list[VolumeMeta]:
        return [meta for split in SPLITS for meta in self.metas(split)]

    def metas(self, split: str) -> tuple[VolumeMeta, ...]:
        return getattr(self.splits, split)


@dataclass(frozen=True)
class Targets(Question):
    """The target of a scan; an item is a case."""

    targets: tuple[int, ...]

    kind = "target of the scan"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(str, self.targets))

    def labels(self, split: str) -> Int[Tensor, " n"]:
        return torch.tensor([self.targets.index(meta.target) for meta in self.metas(split)], dtype=torch.int64)

    def cases(self, split: str) -> Int[Tensor, " n"]:
        return torch.arange(len(self.metas(split)))

    def features(self, encoder: FrozenEncoder, split: str, title: str) -> Float[Tensor, "n d"]:
        return embed_volumes(encoder, self.store, self.metas(split), title)

    def image(self, split: str, item: int) -> Float[np.ndarray, "x y"]:
        return axial_slice(self.store, self.metas(split)[item], self.data)


@dataclass(frozen=True)
class Organs(Question):
    """The organ at the centre of a patch; an item is a patch, of which each case has a few of every organ."""

    classes: Classes

    kind = "organ at the centre of a patch"

    @property
    def names(self) -> tuple[str, ...]:
        return self.classes.names

    def labels(self, split: str) -> Int[Tensor, " n"]:
        return torch.from_numpy(self._patches[split].labels)

    def cases(self, split: str) -> Int[Tensor, " n"]:
        return torch.from_numpy(self._patches[split].cases)

    def features(self, encoder: FrozenEncoder, split: str, title: str) -> Float[Tensor, "n d"]:
        patches, features = self._patches[split], []
        with progress(title, len(patches), "patches") as bar:
            for batch in DataLoader(patches, batch_size=encoder.together, collate_fn=collated):
                features.append(encoder.encode(batch["image"]))
                bar.advance(len(features[-1]))
        return torch.cat(features)

    def image(self, split: str, item: int) -> Float[np.ndarray, "x y"]:
        image = self._patches[split][item]["image"][0]
        return (image[..., image.shape[2] // 2] if image.ndim == 3 else image).numpy()

    @cached_property
    def _patches(self) -> dict[str, OrganPatches]:
        return {
            split: OrganPatches(
                self.store, self.metas(split), self.classes, patch_size=self.data.patch_size,
                spacing_mm=self.data.spacing_mm, window_hu=self.data.window_hu, seed=0, per_class=PER_CLASS,
            )
            for split in SPLITS
        }  # fmt: skip


def axial_slice(store: VolumeStore, meta: VolumeMeta, data: DataCard) -> Float[np.ndarray, "x y"]:
    """The one in the middle of the body, which it just holds."""
    box = body_box(meta, (1, 1), None)
    return cut(store[meta.volume], *box, (PIXELS, PIXELS), data.window_hu)[0].numpy()


def questions(store: VolumeStore, data: DataCard) -> list[Question]:
    """Those that a store's labels answer."""
    found: list[Question] = []
    targeted, mapped = with_targets(store), with_label_maps(store)
    targets = tuple(sorted({meta.target for meta in targeted if meta.target is not None}))
    if len(targets) > 1:
        found.append(Targets(store, split_cases(targeted), data, targets))
    if mapped and len((classes := Classes.of(store, mapped)).names) > 1:
        found.append(Organs(store, split_cases(mapped), data, classes))
    return found
