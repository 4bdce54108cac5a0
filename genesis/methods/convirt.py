"""ConVIRT (Zhang et al., arXiv 2010.00747): images and sentences of their reports learn to find each other."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..engine.method import Batch, Output
from ..engine.ranks import gathered
from ..losses.image_text import bidirectional_info_nce
from ..models import Backbone
from ..models.heads import pool
from ..text.encoders import TextModel
from .image_text import Images, ImageTextMethod, Texts, embedded, same


class ConVIRT(ImageTextMethod):
    """L = mean over pairs of λ ℓ(image → texts) + (1 - λ) ℓ(text → images).

    Both sides end in Linear, ReLU, Linear: the image from the pooled bottleneck, the text from the maximum of each
    feature over its tokens. The decoder stays as it was initialised.

    Args:
        backbone, text: the encoders.
        temperature: τ, fixed; published 0.1.
        image_weight: λ; published 0.75.
        projection: length of the embeddings; published 512.
    """

    def __init__(
        self, backbone: Backbone, text: TextModel, *, temperature: float, image_weight: float, projection: int
    ) -> None:
        super().__init__()
        backbone.train_encoder_only()
        self.backbone, self.text = backbone, text
        self.temperature, self.image_weight = temperature, image_weight
        self.image_head = _head(backbone.feature_channels[-1], projection)
        self.text_head = _head(text.width, projection)

    def forward(self, batch: Batch) -> Output:
        images, texts = embedded(self, batch)
        hashes = torch.stack([batch["report"], batch["text"]], dim=1)
        # The first process alone validates, so then nothing is gathered.
        spread = gathered if self.training else lambda rows: rows
        loss = bidirectional_info_nce(
            images.whole,
            texts.whole,
            spread(images.whole),
            spread(texts.whole),
            same(hashes, spread(hashes)),
            temperature=self.temperature,
            image_weight=self.image_weight,
        )
        cosine = functional.cosine_similarity(images.whole.float(), texts.whole.float()).mean()
        return Output({"contrast": loss}, {"cosine": cosine.detach()})

    def images(self, image: Float[Tensor, "b c *spatial"]) -> Images:
        return Images(self.image_head(pool(self.backbone.encode(image)[-1])))

    def texts(self, tokens: Tensor, mask: Tensor, word: Tensor) -> Texts:
        states = self.text(tokens, mask)[-1]
        strongest = states.masked_fill(~mask[..., None], torch.finfo(states.dtype).min).amax(dim=1)
        return Texts(self.text_head(strongest))

    def similarity(self, images: Images, texts: Texts) -> Float[Tensor, "b t"]:
        image, text = (functional.normalize(side.whole.float(), dim=1) for side in (images, texts))
        return image @ text.T


def _head(width: int, projection: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, projection), nn.ReLU(), nn.Linear(projection, projection))
