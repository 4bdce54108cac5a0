"""A weights package on disk: writing one, finding one, and making its network."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..files import verify_folder, write_aside, write_folder_aside, write_json
from ..models import Backbone, PublishedUNet, build_described, wrap
from ..workspace import Workspace
from .card import Card, DataCard, FingerprintCard, KeysCard, NetworkCard, PretrainingCard, TaskCard, read_card
from .model_card import model_card
from .published import read_published

if TYPE_CHECKING:
    from .image_text import TextSide


def load_pretrained(package: Path | str) -> nn.Module:
    """The network of a weights package with its weights, in eval mode, on the CPU.

    It is the plain network that the card names, for instance a `monai.networks.nets.UNet`. `package` is the package's
    folder, or a published checkpoint such as Genesis_Chest_CT.pt (then it is a `genesis.models.PublishedUNet`). Raises
    `UserError` when the package is damaged, newer than this genesis, or computes another output than when written.
    """
    path = Path(package)
    return _build(open_package(path), path)


@dataclass(frozen=True)
class Contents:
    """What a package, or a published checkpoint, holds."""

    network: dict[str, Any]  # class and kwargs, as `Backbone.describe` gives them
    state: dict[str, Tensor]
    trained: tuple[str, ...]  # keys of the trained weights, without the output layer
    output: tuple[str, ...]  # keys of the output layer
    output_trained: bool
    fingerprint: FingerprintCard | None


def open_package(path: Path) -> Contents:
    """Read and check a package's folder, or a published checkpoint. Raises `UserError`."""
    if path.is_file():
        with torch.device("meta"):  # its keys are wanted, not its weights
            backbone = wrap(PublishedUNet())
        trained = (*backbone.encoder_keys, *backbone.decoder_keys)
        return Contents(backbone.describe(), read_published(path), trained, tuple(backbone.output_keys), True, None)
    card = read_card(path)
    verify_folder(path, "weights.safetensors")
    return _contents(path, card)


def write_package(
    folder: Path,
    backbone: Backbone,
    *,
    data: DataCard,
    pretraining: PretrainingCard,
    trained: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder"),
    task: TaskCard | None = None,
    head: Mapping[str, Tensor] | None = None,
    text: "TextSide | None" = None,
) -> Card:
    """Write `weights.safetensors`, `card.json`, `README.md` and `SHA256SUMS`; an older package there is replaced.

    `head`: state of a layer that is not part of the network, a classifier's, saved as `head.safetensors`. `text`: the
    text encoder and projections of a method that learns from reports, saved in `text/`.
    The new one is loaded, strictly and with its fingerprint, before it takes the old one's place. Raises `UserError`
    when the network's outputs are not finite.
    """
    network = copy.deepcopy(backbone.network).float().cpu()
    side = 2 * backbone.stride  # the bottleneck then has two voxels per side, the least that instance norm can take
    shape = (1, backbone.in_channels, *(side,) * backbone.spatial_dims)
    values = _respond(network, shape)
    if not all(map(math.isfinite, values)):
        raise UserError(f"The weights for {folder} give outputs that are not finite: the training has diverged.")
    card = Card(
        network=NetworkCard.model_validate(backbone.describe()),
        trained=trained,
        keys=KeysCard(
            encoder=tuple(backbone.encoder_keys),
            decoder=tuple(backbone.decoder_keys),
            output=tuple(backbone.output_keys),
        ),
        data=data,
        pretraining=pretraining,
        task=task,
        fingerprint=FingerprintCard(input=_INPUT, shape=shape, values=tuple(values)),
    )
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    with write_folder_aside(folder) as aside:
        with write_aside(aside / "weights.safetensors") as file:
            save_file(state, file, metadata={"format": "pt"})
        if head is not None:
            with write_aside(aside / "head.safetensors") as file:
                save_file({key: tensor.cpu().contiguous() for key, tensor in head.items()}, file)
        if text is not None:
            text.write(aside)
        write_json(aside / "card.json", card.model_dump(mode="json", by_alias=True))
        (aside / "README.md").write_text(
            model_card(folder.name, card, backbone.stride, text=text is not None), encoding="utf-8"
        )
        _build(_contents(aside, read_card(aside)), aside)
    return card


def read_head(package: Path) -> dict[str, Tensor]:
    """The `head` that the package was written with. Raises `UserError` when it is missing or damaged."""
    verify_folder(package, "head.safetensors")
    return load_file(package / "head.safetensors")


def find_package(name: str, workspace: Workspace) -> Path:
    """The package in the folder `name`, or of that name in the workspace's `weights/`."""
    for path in (Path(name), workspace.weights / name):
        if (path / "card.json").is_file():
            return path
    known = ", ".join(sorted(path.parent.name for path in workspace.weights.glob("[!.]*/card.json"))) or "none"
    raise UserError(
        f"There is no weights package {name!r}, neither as a folder nor in {workspace.weights} (there: {known})."
    )


def _contents(folder: Path, card: Card) -> Contents:
    file = folder / "weights.safetensors"
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if state.keys() != {*card.keys.encoder, *card.keys.decoder, *card.keys.output}:
        raise UserError(f"{folder / 'card.json'} names other weights than {file.name} holds; export the package anew.")
    parts = {"encoder": card.keys.encoder, "decoder": card.keys.decoder}
    return Contents(
        network=card.network.model_dump(by_alias=True),
        state=state,
        trained=tuple(key for part in card.trained for key in parts[part]),
        output=card.keys.output,
        output_trained="decoder" in card.trained,
        fingerprint=card.fingerprint,
    )


def _build(contents: Contents, path: Path) -> nn.Module:
    try:
        network = build_described(contents.network).network
        network.load_state_dict(contents.state)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The network of {path} cannot be built as its card says: {reason[:300]}") from None
    if (written := contents.fingerprint) is not None:
        here = torch.tensor(_respond(network, written.shape))
        there = torch.tensor(written.values)
        tolerance = 1e-4 * float(there.abs().max())  # so that an output near zero may be off by what a large one may
        if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-4, atol=tolerance):
            raise UserError(
                f"The network of {path} gives other outputs here than when it was written: its card was changed, or "
                "this version of MONAI builds another network; export the package anew, or use the version of then."
            )
    return network.eval()


_INPUT = "x[0, c, i, j, ...] = 0.5 + 0.5 sin(c + 0.3 i + 0.2 j + 0.1 k); output.flatten() at n * arange(64) // 64"


def _respond(network: nn.Module, shape: tuple[int, ...]) -> list[float]:
    """The output, at 64 evenly spaced places, for the input that `_INPUT` describes."""
    phase = torch.zeros(shape, dtype=torch.float64)
    for axis, factor in enumerate((1.0, 0.3, 0.2, 0.1)[: len(shape) - 1], start=1):
        steps = torch.arange(shape[axis], dtype=torch.float64) * factor
        phase += steps.view(-1, *(1,) * (len(shape) - axis - 1))
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        output = network.eval()((0.5 + 0.5 * phase.sin()).float()).flatten()
    return output[len(output) * torch.arange(64) // 64].tolist()
