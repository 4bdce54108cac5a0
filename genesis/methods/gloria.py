"""GLoRIA (Huang et al., ICCV 2021): images and reports find each other, and words find their regions."""

import copy
from typing import Literal

import torch
from jaxtyping import Float
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn import functional

from ..engine.method import Batch, Output
from ..losses.image_text import (
    bidirectional_info_nce,
    local_loss,
    local_similarity,
    word_region_attention,
    words_of,
)
from ..models import Backbone
from ..models.heads import pool
from ..text.encoders import TextModel
from .image_text import Images, ImageTextMethod, Texts, embedded, same

GLOBAL_SCALE = 10.0  # the published 10, 4, 5, 10 all multiply
SHARPNESS = 4.0
WORD_SCALE = 5.0
LOCAL_SCALE = 10.0
SUMMED_LAYERS = 4  # the last ones of the text encoder
WORDS_PICTURED = 4


class GLoRIA(ImageTextMethod):
    """L = global + local contrast, each the sum of both directions.

    Global: the pooled bottleneck, Linear to the text encoder's width D, against the mean of the text's words. Local:
    the finest feature map of the encoder with at most `regions` places, 1×1×1 convolution to D, against the words: the
    sum of the last four layers' token states, word-pieces summed. Texts have no projection. Negatives of the local
    loss are those of the same process. The decoder stays as it was initialised.

    Args:
        backbone, text: the encoders.
        patch_size: voxels per side of an image.
        attention: "exact" as published, or "scaled", see `genesis.losses.image_text.word_region_attention`.
        regions: most places of the feature map.

    Raises ValueError when every feature map has more.
    """

    def __init__(
        self,
        backbone: Backbone,
        text: TextModel,
        *,
        patch_size: tuple[int, ...],
        attention: Literal["exact", "scaled"],
        regions: int,
    ) -> None:
        super().__init__()
        backbone.train_encoder_only()
        self.backbone, self.text = backbone, text
        self.scaled = attention == "scaled"
        self.level = _level(backbone, patch_size, regions)
        self.image_head = nn.Linear(backbone.feature_channels[-1], text.width)
        self.region_head = Conv[Conv.CONV, backbone.spatial_dims](backbone.feature_channels[self.level], text.width, 1)

    def forward(self, batch: Batch) -> Output:
        images, texts = embedded(self, batch)
        hashes = torch.stack([batch["report"], batch["text"]], dim=1)
        contrast = bidirectional_info_nce(
            images.whole,
            texts.whole,
            self.of_all(images.whole),
            self.of_all(texts.whole),
            same(hashes, self.of_all(hashes)),
            temperature=1 / GLOBAL_SCALE,
            image_weight=0.5,
        )
        local = local_loss(self._local(images, texts), same(hashes, hashes), scale=LOCAL_SCALE)
        cosine = functional.cosine_similarity(images.whole.float(), texts.whole.float()).mean()
        return Output({"global": 2 * contrast, "local": local}, {"cosine": cosine.detach()})

    def images(self, image: Float[Tensor, "b c *spatial"]) -> Images:
        features = self.backbone.encode(image)
        return Images(self.image_head(pool(features[-1])), self.region_head(features[self.level]).flatten(2))

    def texts(self, tokens: Tensor, mask: Tensor, word: Tensor) -> Texts:
        states = torch.stack([layer.float() for layer in self.text(tokens, mask)[-SUMMED_LAYERS:]]).sum(dim=0)
        words, present = words_of(states, word)
        return Texts(words.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1), words, present)

    def similarity(self, images: Images, texts: Texts) -> Float[Tensor, "b t"]:
        """Mean of global and local similarity; Z as the logarithm of a mean over words, divided by its 5.

        Published: of both as they come, which Z, beyond 5 and larger for longer texts, decides alone.
        """
        assert texts.present is not None
        count = texts.present.sum(dim=1).clamp(min=1)
        local = (self._local(images, texts) - count.log()) / WORD_SCALE
        image, text = (functional.normalize(side.whole.float(), dim=1) for side in (images, texts))
        return (image @ text.T + local) / 2

    @torch.no_grad()
    def attention(self, image: Float[Tensor, "b c *spatial"], batch: Batch) -> Float[Tensor, "b w *spatial"]:
        """Where in its image each word of each text of a batch looks; every map from 0 to its largest value, 1."""
        features = self.backbone.encode(image)[self.level]
        regions, texts = (
            self.region_head(features).flatten(2),
            self.texts(batch["tokens"], batch["mask"], batch["word"]),
        )
        assert texts.words is not None
        assert texts.present is not None
        maps = torch.stack(
            [
                word_region_attention(one[None].float(), words[None], there[None], scaled=self.scaled)[0, 0]
                for one, words, there in zip(regions, texts.words, texts.present, strict=True)
            ]
        )
        maps = maps.unflatten(2, features.shape[2:])
        mode = "trilinear" if features.ndim == 5 else "bilinear"
        maps = functional.interpolate(maps, size=image.shape[2:], mode=mode)
        low, high = maps.flatten(2).aminmax(dim=2)
        shape = (*low.shape, *(1,) * (image.ndim - 2))
        return (maps - low.view(shape)) / (high - low).clamp(min=1e-12).view(shape)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Where the first words of each text look; which they are is not told, for reports are written nowhere."""
        maps = self.attention(batch["image"], batch)
        columns = {"image": batch["image"]}
        for number in range(min(WORDS_PICTURED, maps.shape[1])):
            columns[f"word {number + 1}"] = maps[:, number, None]
        return {"attention": columns}

    def _local(self, images: Images, texts: Texts) -> Tensor:
        assert images.regions is not None
        assert texts.words is not None
        assert texts.present is not None
        return local_similarity(
            images.regions,
            texts.words,
            texts.present,
            scaled=self.scaled,
            sharpness=SHARPNESS,
            word_scale=WORD_SCALE,
        )


def _level(backbone: Backbone, patch_size: tuple[int, ...], regions: int) -> int:
    """The finest feature map with at most so many places."""
    empty = copy.deepcopy(backbone).to("meta")
    with torch.no_grad():
        features = empty.encode(torch.empty(2, backbone.in_channels, *patch_size, device="meta"))
    for level, feature in enumerate(features):
        if feature[0, 0].numel() <= regions:
            return level
    raise ValueError(f"method.regions is {regions}, but the coarsest feature map has {features[-1][0, 0].numel()}")
