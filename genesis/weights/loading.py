"""Pretrained weights into a network of your own: `load_into(network, package)`, with a report."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models import wrap
from .package import Contents, open_package

NEEDED_SHARE = 0.9  # of the trained weights; with less, loading is refused


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did, weight by weight. Keys are those of the plain network, without a wrapper's `module.`.

    package: where the weights came from.
    matched: keys loaded as they are.
    adapted: key loaded with a change → which change.
    unexpected: trained key of the package that has no place in the network → why.
    missing: keys of the network for which the package has nothing: left as they were.
    output: what became of the output layer, which the other figures leave out.
    settings: in what the network is set otherwise than the package's; it may compute something else.
    share: loaded part of the package's trained weights, by number of values, in [0, 1].
    """

    package: str
    matched: tuple[str, ...]
    adapted: dict[str, str]
    unexpected: dict[str, str]
    missing: tuple[str, ...]
    output: str
    settings: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        count = len(self.matched) + len(self.adapted)
        percent = math.floor(1000 * self.share) / 10  # 100 only when all are
        return "\n".join(
            (
                f"Loaded {percent}% of the trained weights of {self.package} ({count} tensors).",
                *_some("adapted", (f"{key}: {change}" for key, change in self.adapted.items())),
                *_some("not loaded", (f"{key}: {why}" for key, why in self.unexpected.items())),
                *_some("not in the package, left as they were", self.missing),
                *_some("the network is set otherwise", self.settings),
                f"  output layer: {self.output}",
            )
        )


def load_into(network: nn.Module, package: Path | str, *, quiet: bool = False) -> LoadReport:
    """Load a package's trained weights into `network`, in place; return the report, and print it unless `quiet`.

    The network may be compiled or wrapped by (Distributed)DataParallel. With another number of output channels its
    output layer is left as it was. With another number of input channels the first weights are adapted: each input
    channel gets the mean over the package's, scaled such that equal channels give the response of before. `package` as
    in `load_pretrained`. Raises `UserError`, with the network unchanged, when less than 0.9 of the trained weights
    find a place.
    """
    contents = open_package(Path(package))
    own = network.state_dict()
    names = {_plain(name): name for name in own}
    loaded: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}
    unexpected: dict[str, str] = {}
    for key in contents.trained:
        weight, place = contents.state[key], own.get(names.get(key, ""))
        if place is None:
            unexpected[key] = "the network has no such weight"
        elif place.shape == weight.shape:
            loaded[key] = weight
        elif _is_input_layer(weight, place, contents):
            channels, wanted = weight.shape[1], place.shape[1]
            loaded[key] = weight.mean(1, keepdim=True).expand(place.shape) * (channels / wanted)
            adapted[key] = f"{channels} → {wanted} input channels"
        else:
            unexpected[key] = f"{list(weight.shape)} in the package, {list(place.shape)} in the network"
    sizes = {key: contents.state[key].numel() for key in contents.trained}
    share = sum(sizes[key] for key in loaded) / max(1, sum(sizes.values()))
    settings = _differing_settings(_unwrapped(network), contents)
    if share < NEEDED_SHARE:
        raise UserError(_refusal(package, _unwrapped(network), contents, share, settings, unexpected))

    matched = tuple(key for key in loaded if key not in adapted)
    missing = tuple(key for key in names if key not in loaded and key not in contents.output)
    blocked = [key for key in contents.output if key not in names or own[names[key]].shape != contents.state[key].shape]
    if not contents.output_trained:
        output = "left as it was, the package's is not trained"
    elif blocked:
        output = f"left as it was, the package's does not fit ({blocked[0]})"
    else:
        output = "loaded"
        loaded |= {key: contents.state[key] for key in contents.output}
    network.load_state_dict({names[key]: weight for key, weight in loaded.items()}, strict=False)
    report = LoadReport(str(package), matched, adapted, unexpected, missing, output, settings, share)
    if not quiet:
        print(report)
    return report


def _plain(name: str) -> str:
    """A key without the segments that torch.compile and (Distributed)DataParallel add."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _unwrapped(network: nn.Module) -> nn.Module:
    for wrapper in ("_orig_mod", "module"):
        if isinstance(inner := getattr(network, wrapper, None), nn.Module):
            return _unwrapped(inner)
    return network


def _is_input_layer(weight: Tensor, place: Tensor, contents: Contents) -> bool:
    """Whether two convolutions differ in nothing but the number of image channels they read."""
    return (
        weight.ndim == place.ndim > 2
        and weight.shape[1] == contents.network["kwargs"].get("in_channels")
        and weight.shape[:1] == place.shape[:1]
        and weight.shape[2:] == place.shape[2:]
    )


def _differing_settings(network: nn.Module, contents: Contents) -> tuple[str, ...]:
    """Settings other than the numbers of channels in and out, when the two are networks of one class."""
    try:
        described = wrap(network).describe()
    except ValueError:
        return ()
    if described["class"] != contents.network["class"]:
        return ()
    here, there = described["kwargs"], contents.network["kwargs"]
    names = sorted((here.keys() | there.keys()) - {"in_channels", "out_channels"})
    values: list[tuple[str, Any, Any]] = [
        (name, there.get(name, "default"), here.get(name, "default")) for name in names
    ]
    return tuple(f"{name}: {a} in the package, {b} in the network" for name, a, b in values if a != b)


def _refusal(
    package: Path | str,
    network: nn.Module,
    contents: Contents,
    share: float,
    settings: tuple[str, ...],
    unexpected: dict[str, str],
) -> str:
    name, kind = contents.network["class"], type(network).__name__
    plain = name.rpartition(".")[2]
    if not settings and kind != plain:
        return (
            f"{package} holds weights of a {name}, which do not fit a {kind}: "
            f"pass a {plain}, or take the network that genesis.load_pretrained makes."
        )
    reasons = settings or tuple(f"{key}: {why}" for key, why in unexpected.items())
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return (
        f"{package} does not fit this {kind}: only {share:.0%} of its trained weights find a place, {NEEDED_SHARE:.0%} "
        f"are needed. {'; '.join(reasons[:3])}{more}. Build the network as `network` in its card.json says."
    )


def _some(title: str, items: Iterable[str]) -> list[str]:
    entries = list(items)
    if not entries:
        return []
    more = f"; and {len(entries) - 3} more" if len(entries) > 3 else ""
    return [f"  {title}: {'; '.join(entries[:3])}{more}"]
