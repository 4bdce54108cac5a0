"""Contrast of images and texts: ConVIRT (Zhang et al., arXiv 2010.00747, eqs. 2-4), GLoRIA (Huang et al., ICCV 2021).

N pairs are compared with each other; M ≥ N of all processes, of which the N are some. `positive` (N, M) says which
belong together: a pair, and all pairs with the same report, which are no negatives of each other. All of it is computed
in float32 at least, also under autocast.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2**26  # values of word × region × image × text that are computed, and kept, at a time


def info_nce(logits: Float[Tensor, "n m"], positive: Bool[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Mean over rows of -mean over positives of log softmax(row); every row has a positive.

    With several positives the mean over them as in supervised contrast (Khosla et al., 2020, eq. 2).
    """
    share = positive / positive.sum(dim=1, keepdim=True)
    return -(share * logits.log_softmax(dim=1)).sum(dim=1).mean()


def bidirectional_info_nce(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    images: Float[Tensor, "m d"],
    texts: Float[Tensor, "m d"],
    positive: Bool[Tensor, "n m"],
    *,
    temperature: float,
    image_weight: float,
) -> Float[Tensor, ""]:
    """λ ℓ(image → texts) + (1 - λ) ℓ(text → images) of cosine similarities over τ; λ is `image_weight`.

    ConVIRT: τ 0.1, λ 0.75. GLoRIA's global loss is twice that with τ 1/10, λ 1/2.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, images, texts = map(_unit, (image, text, images, texts))
        to_text = info_nce(image @ texts.T / temperature, positive)
        to_image = info_nce(text @ images.T / temperature, positive)
        return image_weight * to_text + (1 - image_weight) * to_image


def word_region_attention(
    regions: Float[Tensor, "b d m"],
    words: Float[Tensor, "t w d"],
    present: Bool[Tensor, "t w"],
    *,
    scaled: bool,
    sharpness: float = 4.0,
) -> Float[Tensor, "b t w m"]:
    """a = softmax_m(4 · softmax_w(s)), s = ⟨word, region⟩: where in each image each word of each text looks.

    scaled: s / √d. Without, as published, softmax_w saturates for long vectors: of 768 random features its largest
    value is 0.96 in the mean.
    """
    similarity = torch.einsum("bdm,twd->btwm", regions, words)
    if scaled:
        similarity = similarity / math.sqrt(words.shape[2])
    absent = ~present[None, :, :, None]
    lowest = torch.finfo(similarity.dtype).min  # not -inf, of which a text without words would have nothing else
    among_words = similarity.masked_fill(absent, lowest).softmax(dim=2)
    return (sharpness * among_words).softmax(dim=3)


def local_similarity(
    regions: Float[Tensor, "b d m"],
    words: Float[Tensor, "t w d"],
    present: Bool[Tensor, "t w"],
    *,
    scaled: bool,
    sharpness: float = 4.0,
    word_scale: float = 5.0,
    at_once: int = AT_ONCE,
) -> Float[Tensor, "b t"]:
    """Z = log Σ_w exp(5 · cos(c_w, t_w)), c_w = Σ_m a_wm v_m, of every image with every text; 0 without words.

    b · t · w · m values: as many texts at a time as keep that below `at_once`, and in the backward pass again.
    """
    regions, words = _full(regions), _full(words)

    def some(regions: Tensor, words: Tensor, present: Tensor) -> Tensor:
        attention = word_region_attention(regions, words, present, scaled=scaled, sharpness=sharpness)
        context = torch.einsum("btwm,bdm->btwd", attention, regions)
        cosine = functional.cosine_similarity(context, words[None], dim=3)
        lowest = torch.finfo(cosine.dtype).min
        total = (word_scale * cosine).masked_fill(~present, lowest).logsumexp(dim=2)
        return torch.where(present.any(dim=1), total, torch.zeros_like(total))

    with torch.autocast(regions.device.type, enabled=False):
        step = max(1, at_once // (len(regions) * words.shape[1] * regions.shape[2]))
        chunks = zip(words.split(step), present.split(step), strict=True)
        parts = [checkpoint(some, regions, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts, dim=1)


def local_loss(
    similarity: Float[Tensor, "n n"], positive: Bool[Tensor, "n n"], *, scale: float = 10.0
) -> Float[Tensor, ""]:
    """GLoRIA's local loss, the sum of both directions of CE(10 · Z)."""
    logits = scale * _full(similarity)
    return info_nce(logits, positive) + info_nce(logits.T, positive.T)


def words_of(
    states: Float[Tensor, "t l d"], word: Int64[Tensor, "t l"]
) -> tuple[Float[Tensor, "t l d"], Bool[Tensor, "t l"]]:
    """Token states summed into words, and which of the L places have one; `word` (T, L) as `Encoder` gives it."""
    place = word.clamp(min=0)[..., None].expand_as(states)
    kept = states * (word >= 0)[..., None]
    present = word.amax(dim=1, keepdim=True) >= torch.arange(word.shape[1], device=word.device)
    return torch.zeros_like(states).scatter_add(1, place, kept), present


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _unit(tensor: Tensor) -> Tensor:
    return functional.normalize(_full(tensor), dim=1)
