"""Turn a pretraining run into a weights package: the network as MONAI has it, with a card that says what it is.

The package is a folder in the workspace's weights/ with weights.safetensors, card.json and a README.md. It holds
encoder and decoder; loading it needs MONAI only. The newest run is taken unless --run names one.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import Config, ConVIRTConfig, GLoRIAConfig
from .engine.checkpoint import read_checkpoint
from .engine.monitor import read_metrics
from .errors import UserError
from .methods import image_text_method
from .network import configured_network
from .runs import read_config, read_run
from .sampling import TEXT
from .text.encoders import kept_text_model
from .weights import CohortCard, DataCard, PretrainingCard, TextSide, write_package
from .workspace import Workspace

_PREFIX = "backbone.network."  # of the exported weights in a method's state dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", help="the run to export (default: the newest)")
    parser.add_argument("--name", metavar="NAME", help="the package's name (default: the run's)")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="best by validation loss, or the last one (default: best)",
    )


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    folder = workspace.run(options.run, "train")
    name = options.name or folder.name
    if name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"--name {name}: a package's name has no slashes; it goes to {workspace.weights}.")
    record = read_run(folder)
    checkpoint = read_checkpoint(folder / "checkpoints" / f"{options.checkpoint}.pt")
    config = read_config(folder)
    backbone = configured_network(config, record["in_channels"])
    weights = {key: value for key, value in checkpoint["method"].items() if key.startswith(_PREFIX)}
    try:
        backbone.network.load_state_dict({key.removeprefix(_PREFIX): value for key, value in weights.items()})
    except RuntimeError:
        raise UserError(
            f"The checkpoint in {folder} does not hold the network of its config.yaml: one of the two was changed; "
            "restore it, or train anew."
        ) from None
    package = workspace.weights / name
    text = _text_side(folder, config, record, checkpoint["method"])
    card = write_package(
        package,
        backbone,
        data=_data_card(config, record),
        pretraining=PretrainingCard(
            method=record["method"],
            steps=checkpoint["step"],
            seed=record["seed"],
            metrics=_metrics(folder, checkpoint["step"]),
            cohort=CohortCard.model_validate(record["cohort"]),
        ),
        trained=tuple(record["trained"]),
        text=text,
    )
    size = sum(parameter.numel() for parameter in backbone.network.parameters())
    print(f"Exported {folder.name}, {options.checkpoint} checkpoint (step {checkpoint['step']}):")
    print(f"  {card.network.class_name} with {size:,} parameters; trained: {' and '.join(card.trained)}")
    if text is not None:
        print("  with its text encoder: genesis.load_image_text embeds images and texts")
    print("  read back: it loads strictly and computes the same")
    print(f'  in Python: import genesis; report = genesis.load_into(my_network, "{package}")')
    print(f"The weights are in {package}; next: {workspace.command(f'finetune --weights {shlex.quote(name)}')}")


def _text_side(folder: Path, config: Config, record: dict[str, Any], state: dict[str, Tensor]) -> TextSide | None:
    """The trained text encoder and projections of a run that learned from reports."""
    settings = config.method
    if not isinstance(settings, ConVIRTConfig | GLoRIAConfig):
        return None
    text = kept_text_model(folder / TEXT, settings.text.length)
    backbone = configured_network(config, record["in_channels"])
    method = image_text_method(settings, backbone, text, config.data.patch_size)
    method.load_state_dict(state)
    return TextSide(settings.model_dump(mode="json"), method)


def _data_card(config: Config, record: dict[str, Any]) -> DataCard:
    return DataCard(
        modality=record["modality"],
        window_hu=config.data.window_hu if "ct" in record["modality"] else None,
        spacing_mm=record["spacing_mm"],
        patch_size=config.data.patch_size,
    )


def _metrics(folder: Path, step: int) -> dict[str, float | None]:
    """Figures of the held-out patients at that step; none when training was interrupted there."""
    row = next((row for row in read_metrics(folder, "val") if row["step"] == step), {})
    return {name: value for name, value in row.items() if name not in ("step", "split")}


if __name__ == "__main__":
    import sys

    from .cli import main

    main(["export", *sys.argv[1:]])
