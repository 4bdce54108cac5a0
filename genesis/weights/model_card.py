"""The README of a weights package: what it is, how to load it, what it was made of."""

from .card import Card


def model_card(name: str, card: Card, stride: int, *, text: bool = False) -> str:
    """Markdown.

    `stride`: what the sides of an input must be multiples of, in voxels. `text`: the package has a text encoder.
    """
    run, data, network = card.pretraining, card.data, card.network
    plain = network.class_name.rpartition(".")[2]
    cohort = f"{len(run.cohort.volumes)} volumes of {len(run.cohort.patients)} patients"
    return f"""# {name}

A `{network.class_name}`, pretrained with {run.method} for {run.steps:,} steps (seed {run.seed}). {_task(card)}
Trained parts: {", ".join(card.trained)}. Seen in all: {cohort}.

## Load

```python
import genesis

network = genesis.load_pretrained("{name}")  # the {plain} itself
genesis.load_into(my_network, "{name}")  # your own {plain}: other numbers of channels in and out are fine
```
{_without_genesis(card)}{_with_texts(name) if text else ""}
## Input

| | |
|---|---|
| modality | {data.modality if isinstance(data.modality, str) else ", ".join(data.modality)} |
| intensity | {_intensity(card)} |
| orientation | RAS+ |
| voxel size | {_numbers(data.spacing_mm) + " mm" if data.spacing_mm else "each scan's own"} |
| patch | {_numbers(data.patch_size)} voxels; sides must be multiples of {stride} |

## Pretraining's figures on held-out patients

{_metrics(card)}
## Files

- `weights.safetensors`: the network's state dict.
- `card.json`: all of the above for programs; which keys are encoder, decoder and output layer; hashes of the patients
  seen, to check for leakage; a fingerprint of the output.
- `SHA256SUMS`: check with `sha256sum -c SHA256SUMS`.

Written by genesis {card.genesis_version}.
"""


def _with_texts(name: str) -> str:
    """How images and texts are compared."""
    return f"""
```python
pair = genesis.load_image_text("{name}")
pair.similarity(images, ["lesion in the liver", "no lesion"])  # (images, texts), the larger the more alike
```
`text/` has the text encoder, as `transformers` has it, and the projections. Words that several patients' reports have
are in its vocabulary, so a name would be that many reports have.
"""


def _task(card: Card) -> str:
    if card.task is None:
        return (
            "Its output layer gives features for a new layer, not a restored patch: that needs the method's own parts."
        )
    return (
        f"Then fine-tuned for a {card.task.type} of "
        + ", ".join(f"{name} ({value})" for value, name in card.task.labels.items())
        + "."
    )


def _without_genesis(card: Card) -> str:
    module, _, plain = card.network.class_name.rpartition(".")
    if not module.startswith("monai."):
        return ""
    return f"""
Without genesis, in the package's folder:

```python
import json
from {module} import {plain}
from safetensors.torch import load_file

network = {plain}(**json.load(open("card.json"))["network"]["kwargs"])
network.load_state_dict(load_file("weights.safetensors"))
```
"""


def _intensity(card: Card) -> str:
    low, high = card.data.intensity_range
    if card.data.window_hu is None:
        return f"the foreground's percentiles 0.5 to 99.5 mapped to [{low:g}, {high:g}], clipped"
    return f"{card.data.window_hu[0]:g} to {card.data.window_hu[1]:g} HU mapped to [{low:g}, {high:g}], clipped"


def _numbers(values: tuple[float, ...]) -> str:
    return " × ".join(f"{value:.4g}" for value in values)


def _metrics(card: Card) -> str:
    rows = [f"| {name} | {'not finite' if value is None else f'{value:.4g}'} |\n"
            for name, value in card.pretraining.metrics.items()]  # fmt: skip
    return "| figure | value |\n|---|---|\n" + "".join(rows) if rows else "None recorded.\n"
