"""The text side of a weights package: images and texts embedded so that they can be compared, offline.

text/config.json, model.safetensors, tokenizer.json, tokenizer_config.json    the text encoder, for `transformers`
text/heads.safetensors                                                        projections of both sides
text/image_text.json                                                          the method and its settings
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..files import check_schema, read_json, verify_folder, write_json
from ..models import wrap
from .card import DataCard, read_card
from .package import load_pretrained

if TYPE_CHECKING:
    from ..methods.image_text import Images, ImageTextMethod, Texts

SCHEMA = 1
FOLDER = "text"


@dataclass(frozen=True)
class ImageText:
    """An image encoder and a text encoder with one space of embeddings, in eval mode, on the CPU until `to`.

    data: which images it expects: those that `genesis.data.labelled.body_image` makes of a stored volume with
    `data.patch_size`, `data.spacing_mm` and `data.window_hu`, whole bodies in [0, 1].

        pair = load_image_text(package)
        images, texts = pair.embed_images(x), pair.embed_texts(["No pleural effusion."])   # unit vectors (B, D), (T, D)
        pair.similarity(x, ["lesion in the liver", "no lesion"])                           # (B, T), what to sort by

    `similarity` is the cosine of the embeddings for ConVIRT, and for GLoRIA the mean of that and of words and regions.
    """

    method: "ImageTextMethod"
    data: DataCard

    @property
    def device(self) -> torch.device:
        return next(self.method.parameters()).device

    def to(self, device: torch.device | str) -> "ImageText":
        """The same, moved."""
        self.method.to(device)
        return self

    def embed_images(self, images: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b d"]:
        """Unit vectors of images in [0, 1]."""
        return torch.nn.functional.normalize(self._images(images).whole.float(), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "t d"]:
        """Unit vectors of texts; raises `UserError` for one without words."""
        return torch.nn.functional.normalize(self._texts(texts).whole.float(), dim=1)

    @torch.inference_mode()
    def similarity(self, images: Float[Tensor, "b c *spatial"], texts: Sequence[str]) -> Float[Tensor, "b t"]:
        """Of each image with each text, in [-1, 1]."""
        return self.method.similarity(self._images(images), self._texts(texts))

    @torch.inference_mode()
    def attention(self, image: Float[Tensor, "1 c *spatial"], text: str) -> list[tuple[str, Float[Tensor, "*spatial"]]]:
        """The words of a text, and where in an image each looks, in [0, 1]; of GLoRIA alone, else `UserError`."""
        from ..methods.gloria import GLoRIA

        if not isinstance(self.method, GLoRIA):
            raise UserError("Where words look is known of gloria alone.")
        coded = {name: rows.to(self.device) for name, rows in self.method.text.encode([text]).items()}
        maps = self.method.attention(image.to(self.device), coded)[0].float().cpu()
        return list(zip(self.method.text.encode.words(text), maps, strict=False))

    @torch.inference_mode()
    def _images(self, images: Tensor) -> "Images":
        return self.method.images(images.to(self.device))

    @torch.inference_mode()
    def _texts(self, texts: Sequence[str]) -> "Texts":
        for text in texts:
            if not any(map(str.isalnum, text)):
                raise UserError(f"The text {text!r} has no words.")
        coded = self.method.text.encode(texts)
        return self.method.texts(*(coded[name].to(self.device) for name in ("tokens", "mask", "word")))


@dataclass(frozen=True)
class TextSide:
    """What a package has beside its network: the method's settings, as the config has them, and its trained state."""

    settings: Mapping[str, Any]
    method: "ImageTextMethod"

    def write(self, folder: Path) -> None:
        """The files that the module names, into `folder`/text."""
        place = folder / FOLDER
        place.mkdir()
        self.method.text.write(place)
        save_file(_heads(self.method), place / "heads.safetensors")
        write_json(place / "image_text.json", {"schema": SCHEMA, "method": dict(self.settings)})


def has_text_side(package: Path) -> bool:
    return (package / FOLDER / "image_text.json").is_file()


def load_image_text(package: Path | str) -> ImageText:
    """Both encoders of a package that `convirt` or `gloria` made.

    Raises `UserError` when the package is damaged, or has no text side: other methods learn from images alone.
    """
    from ..config import image_text_settings
    from ..methods import image_text_method
    from ..text.encoders import read_text_model

    path = Path(package)
    card = read_card(path)
    folder = path / FOLDER
    if not has_text_side(path):
        raise UserError(
            f"{path} has no text encoder (method {card.pretraining.method}); texts need weights of convirt or gloria."
        )
    verify_folder(path)
    record = read_json(folder / "image_text.json")
    check_schema(folder / "image_text.json", record.get("schema"), SCHEMA)
    settings = image_text_settings(record["method"])
    text = read_text_model(str(folder), None, settings.text.length)
    method = image_text_method(settings, wrap(load_pretrained(path)), text, card.data.patch_size)
    try:
        method.load_state_dict({**method.state_dict(), **load_file(folder / "heads.safetensors")})
    except (RuntimeError, SafetensorError, OSError):
        raise UserError(f"{folder / 'heads.safetensors'} does not fit its package; export it anew.") from None
    return ImageText(method.eval(), card.data)


def _heads(method: "ImageTextMethod") -> dict[str, Tensor]:
    """The state beside the two encoders."""
    state = method.state_dict()
    return {
        name: tensor.cpu().contiguous() for name, tensor in state.items() if not name.startswith(("backbone.", "text."))
    }
