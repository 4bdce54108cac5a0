"""What the methods that learn from images and their reports have in common."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from ..engine.method import Batch, Method
from ..evaluation.probes import effective_rank
from ..models import Backbone
from ..text.encoders import TextModel


class Images(NamedTuple):
    """Embedded images: `whole` (B, D); `regions` (B, D, M), where the method has them."""

    whole: Tensor
    regions: Tensor | None = None


class Texts(NamedTuple):
    """Embedded texts: `whole` (T, D); `words` (T, W, D) and which there are, `present` (T, W), where there are any."""

    whole: Tensor
    words: Tensor | None = None
    present: Tensor | None = None


class ImageTextMethod(Method):
    """An image encoder, the backbone's encoding half, and a text encoder, `text`, that learn to find each other.

    A batch has image (B, C, *spatial) in [0, 1]; tokens, mask, word (B, L) as `genesis.text.encoders.Encoder` gives
    them; report and text (B,) int64, hashes of the whole report and of what is shown of it: samples that agree in one
    of them are no negatives of each other.
    """

    backbone: Backbone
    text: TextModel

    def images(self, image: Float[Tensor, "b c *spatial"]) -> Images:
        raise NotImplementedError

    def texts(self, tokens: Tensor, mask: Tensor, word: Tensor) -> Texts:
        raise NotImplementedError

    def similarity(self, images: Images, texts: Texts) -> Float[Tensor, "b t"]:
        """Of each image with each text, in [-1, 1]; what retrieval and zero-shot classification sort by."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Losses within batches, and how well texts and images of all held-out studies find each other.

        text_to_image, image_to_text: share of texts (images) that have an image (text) of the same report among the
        five most similar; chance: what sorting at random gives. alignment: mean cosine similarity of pairs;
        uniformity: log mean exp(-2 d²) of the images' embeddings (Wang & Isola, 2020; 0 when they have collapsed);
        effective_rank of both sides' embeddings.
        """
        sums: defaultdict[str, float] = defaultdict(float)
        images, texts, hashes = [], [], []
        for batch in batches:
            output = self(batch)
            terms = {**output.losses, **output.metrics, "loss": torch.stack(list(output.losses.values())).sum()}
            for name, value in terms.items():
                sums[name] += float(value) * len(batch["image"])
            images.append(functional.normalize(self.images(batch["image"]).whole.float(), dim=1))
            texts.append(functional.normalize(self.texts(*_text(batch)).whole.float(), dim=1))
            hashes.append(torch.stack([batch["report"], batch["text"]], dim=1))
        image, text = torch.cat(images), torch.cat(texts)
        positive = same(torch.cat(hashes), torch.cat(hashes))
        with torch.autocast(image.device.type, enabled=False):
            cosine = image @ text.T
        return {
            **{name: value / len(image) for name, value in sums.items()},
            "text_to_image": _found(cosine.T, positive),
            "image_to_text": _found(cosine, positive),
            "chance": _chance(positive),
            "alignment": float(cosine.diagonal().mean()),
            "uniformity": _uniformity(image),
            "effective_rank": effective_rank(image),
            "text_effective_rank": effective_rank(text),
        }

    def collapsed(self, figures: dict[str, float]) -> list[str]:
        found = []
        for name, what in (("effective_rank", "images"), ("text_effective_rank", "texts")):
            if figures[name] < 1.5:
                found.append(f"the embeddings of all {what} lie on one line")
        return found

    def told(self, figures: dict[str, float]) -> list[str]:
        return [
            f"among the five images nearest to a held-out text is its own in {figures['text_to_image']:.1%}, the other "
            f"way round in {figures['image_to_text']:.1%}; chance is {figures['chance']:.1%}"
        ]


def embedded(method: ImageTextMethod, batch: Batch) -> tuple[Images, Texts]:
    """Both sides of a batch."""
    return method.images(batch["image"]), method.texts(*_text(batch))


def same(rows: Tensor, others: Tensor) -> Bool[Tensor, "n m"]:
    """Which rows agree with which others in any of their numbers, (N, k) and (M, k)."""
    return (rows[:, None] == others[None]).any(dim=2)


def _text(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch["tokens"], batch["mask"], batch["word"]


def _found(similarity: Tensor, positive: Tensor, among: int = 5) -> float:
    """Share of rows with a positive among the most similar."""
    nearest = similarity.topk(min(among, similarity.shape[1]), dim=1).indices
    return float(positive.gather(1, nearest).any(dim=1).float().mean())


def _chance(positive: Tensor, among: int = 5) -> float:
    """`_found` expected of a random order: one less the chance that none of those drawn is a positive."""
    total, right = positive.shape[1], positive.sum(dim=1).double()
    drawn = torch.arange(min(among, total), device=positive.device)
    missed = ((total - right[:, None] - drawn).clamp(min=0) / (total - drawn)).prod(dim=1)
    return float(1 - missed.mean())


def _uniformity(unit: Tensor) -> float:
    if len(unit) < 2:
        return 0.0
    return float(torch.pdist(unit).square().mul(-2).exp().mean().log())
