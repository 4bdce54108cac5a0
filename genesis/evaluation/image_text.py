"""What an image encoder and a text encoder that were trained together know: search by report, classes by prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from jaxtyping import Bool, Float
from torch import Tensor

from ..data.labelled import body_image
from ..data.reports import read_reports
from ..data.store import VolumeMeta, VolumeStore
from ..errors import UserError
from ..methods.supervised import auc_per_class, by_class
from ..progress import progress
from ..text.reports import sections, text_hash
from ..text.studies import Study, studies_of
from ..viewing.attention import Look
from ..weights import ImageText
from .questions import Targets
from .retrieval import retrieval

OWN = "its own report"
TOGETHER = 4  # whole bodies in a batch
SHARPNESS = 10.0  # of the softmax over classes, by which cosines become probabilities


@dataclass(frozen=True)
class Pair:
    """Both encoders, and the store of which they are shown whole bodies."""

    encoders: ImageText
    store: VolumeStore

    def similarity(
        self, metas: Sequence[VolumeMeta], texts: Sequence[Sequence[str]], title: str
    ) -> Float[Tensor, "images groups"]:
        """Of each volume with each group of texts, the mean over the group.

        Of cosines that is, but for its length, the cosine with the mean of the texts' unit vectors.
        """
        flat = [text for group in texts for text in group]
        member = torch.tensor([number for number, group in enumerate(texts) for _ in group])
        shares = torch.nn.functional.one_hot(member).float()
        shares, rows, data = shares / shares.sum(0), [], self.encoders.data
        with progress(title, len(metas), "volumes") as bar:
            for first in range(0, len(metas), TOGETHER):
                images = [
                    body_image(self.store, meta, data.patch_size, data.spacing_mm, data.window_hu, None)
                    for meta in metas[first : first + TOGETHER]
                ]
                rows.append(self.encoders.similarity(torch.stack(images), flat).float().cpu() @ shares)
                bar.advance(len(images))
        return torch.cat(rows)

    def looks(self, meta: VolumeMeta, text: str) -> list[Look]:
        """Where in a volume the words of a text look, each in the slice in which it looks most."""
        data = self.encoders.data
        image = body_image(self.store, meta, data.patch_size, data.spacing_mm, data.window_hu, None)
        return [
            Look(word, *(_slice(volume, attention).numpy() for volume in (image[0], attention)))
            for word, attention in self.encoders.attention(image[None], text)
        ]


def reported(store: VolumeStore) -> list[Study]:
    """The test studies of a store with a report."""
    return studies_of(store.select("test"), read_reports(store.folder))


def search_by_report(
    pair: Pair, studies: Sequence[Study]
) -> tuple[Float[Tensor, "images reports"], dict[str, Bool[Tensor, "images reports"]]]:
    """How similar each study's image is to each study's report, whose sections count alike; and what is relevant.

    By name: its own report (or an equal one), and where all studies have a target, that of a study of the same target.
    """
    metas = [study.metas[0] for study in studies]
    texts = [list(sections(study.report).values()) for study in studies]
    similarity = pair.similarity(metas, texts, "images and reports")
    relevant = {OWN: _same([text_hash(study.text) for study in studies])}
    targets = [meta.target for meta in metas if meta.target is not None]
    if len(targets) == len(metas) and len(set(targets)) > 1:
        relevant["a report of the same target"] = _same(targets)
    return similarity, relevant


def both_ways(
    similarity: Float[Tensor, "images reports"], relevant: Bool[Tensor, "images reports"]
) -> dict[str, dict[str, float]]:
    """Precision and recall by direction."""
    return {
        "text to image": retrieval(similarity.T, relevant.T),
        "image to text": retrieval(similarity, relevant),
    }


def zero_shot(pair: Pair, question: Targets, prompts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy and AUC on the test cases of the class whose prompts are the most similar, one group per target."""
    similarity = pair.similarity(question.metas("test"), prompts, "images and prompts")
    labels = question.labels("test")
    auc = by_class(question.names, auc_per_class((SHARPNESS * similarity).softmax(1), labels))
    values = {"AUC": auc.pop("mean")} if auc else {}
    values |= {f"AUC/{name}": value for name, value in auc.items()}
    return {**values, "accuracy": float((similarity.argmax(1) == labels).double().mean())}


def read_prompts(path: Path, targets: Sequence[int]) -> list[list[str]]:
    """The prompts of each target from a YAML or JSON file, a mapping of targets to lists of texts.

    Raises `UserError` when it is none, lacks a target, or names one that no scan has.
    """
    expected = "expected a mapping of targets to lists of texts, for instance 1: [Lesion in the liver.]"
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"--prompts {path} does not exist; {expected}.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--prompts {path} cannot be read as YAML or JSON ({reason[:200]}); {expected}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"--prompts {path}: {expected}.")
    found = {str(target): texts for target, texts in tree.items()}
    for target, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"--prompts {path}: target {target} has no list of texts; {expected}.")
    if unlike := sorted(found.keys() ^ {str(target) for target in targets}):
        listed = ", ".join(map(str, targets))
        what = "has no prompts" if unlike[0] not in found else "is no target of these scans"
        raise UserError(f"--prompts {path}: {unlike[0]} {what}; the targets are {listed}.")
    return [found[str(target)] for target in targets]


def _slice(volume: Float[Tensor, "x y *z"], where: Float[Tensor, "x y *z"]) -> Float[Tensor, "x y"]:
    """The axial slice in which `where` is largest."""
    return volume if volume.ndim == 2 else volume[..., int(where.amax((0, 1)).argmax())]


def _same(values: Sequence[int]) -> Bool[Tensor, "n n"]:
    row = torch.tensor(values)
    return row[:, None] == row
