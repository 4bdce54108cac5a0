"""Reports of phantoms: what is in a scan, as a radiologist might word it. Made from its tissues, so that it is true."""

from typing import NamedTuple

import numpy as np
import torch

from .anatomy import ID, LABELS
from .phantom import Phantom

# ml below which an organ is small and above which it is large: about the quarters of the phantoms
SIZES = {"liver": (1100, 1450), "spleen": (110, 160), "heart": (320, 440)}
SLIM, OBESE = 0.27, 0.34  # shares of fat in the body, about the thirds
FAINT, STRONG = 0.3, 0.65  # doses of contrast agent, of 1
SEEN_ML = 0.3  # of a lesion; less is noise at the resolution of these scans
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


class Lesion(NamedTuple):
    """organ: "left lung", "right lung" or "liver". place: "upper" or "lower" part of it. diameter_mm: of its ball."""

    organ: str
    place: str
    diameter_mm: float


def lesions_of(scan: Phantom) -> list[Lesion]:
    """Those in the field of view, the largest first."""
    from scipy import ndimage

    millilitres = float(np.prod(scan.spacing_mm)) / 1000
    found = []
    for kind in ("lung lesion", "liver lesion"):
        components, count = ndimage.label(scan.tissue == ID[kind])
        for number in range(1, count + 1):
            voxels = np.argwhere(components == number)
            if (volume := len(voxels) * millilitres) < SEEN_ML:
                continue
            x, _, z = voxels.mean(axis=0)
            side = "right" if x > _middle(scan, "spine")[0] else "left"
            organ = "liver" if kind == "liver lesion" else f"{side} lung"
            place = "upper" if z > _middle(scan, organ)[2] else "lower"
            found.append(Lesion(organ, place, 10 * (6 * volume / np.pi) ** (1 / 3)))
    return sorted(found, key=lambda lesion: -lesion.diameter_mm)


def report_of_phantom(scan: Phantom, source: torch.Generator) -> dict[str, str]:
    """{"findings": …, "impression": …}; `source` decides about the wording alone."""

    def one_of(*wordings: str) -> str:
        return wordings[int(torch.randint(len(wordings), (), generator=source))]

    lesions = lesions_of(scan)
    if scan.contrast < FAINT:
        agent = one_of("without contrast agent", "unenhanced, no contrast agent given")
    elif scan.contrast < STRONG:
        agent = one_of("with faint enhancement by contrast agent", "contrast agent given, faint enhancement")
    else:
        agent = one_of("with strong enhancement by contrast agent", "contrast agent given, strong enhancement")
    fat = (scan.tissue == ID["fat"]).sum() / (scan.tissue != ID["air"]).sum()
    habitus = "slim" if fat < SLIM else "obese" if fat > OBESE else "normal"
    build = {
        "slim": one_of("Slim patient with thin subcutaneous fat.", "Thin subcutaneous fat."),
        "normal": one_of("Patient of normal build.", "Subcutaneous fat of normal thickness."),
        "obese": one_of("Obese patient with thick subcutaneous fat.", "Thick subcutaneous fat."),
    }[habitus]
    cut = np.isin(scan.labels[..., 0], [LABELS["left kidney"], LABELS["right kidney"]]).any()
    kidneys = "The kidneys are cut off at the lower end." if cut else "Both kidneys are in view."
    findings = [one_of(f"CT of the thorax and abdomen, {agent}.", f"Thorax and abdomen, {agent}."), build, kidneys]
    for organ, (small, large) in SIZES.items():
        volume = float((scan.labels == LABELS[organ]).sum() * np.prod(scan.spacing_mm) / 1000)
        size = "small" if volume < small else one_of("large", "enlarged") if volume > large else "of normal size"
        findings.append(one_of(f"The {organ} is {size}.", f"{organ.capitalize()} {size}."))
    for organ in ("right lung", "left lung", "liver"):
        here = [lesion for lesion in lesions if lesion.organ == organ]
        if not here:
            findings.append(one_of(f"No lesion in the {organ}.", f"The {organ} shows no focal lesion."))
            continue
        largest = f"{here[0].diameter_mm:.0f} mm"
        if len(here) == 1:
            lesion = f"lesion of {largest} in the {here[0].place} part of the {organ}."
            findings.append(one_of(f"One {lesion}", f"There is a {lesion}"))
        else:
            number = NUMBERS[min(len(here), 6)]
            findings.append(
                one_of(
                    f"{number.capitalize()} lesions in the {organ}, the largest {largest} in its {here[0].place} part.",
                    f"There are {number} lesions in the {organ}, up to {largest}, that in its {here[0].place} part.",
                )
            )
    organs = list(dict.fromkeys(lesion.organ for lesion in sorted(lesions)))
    if organs:
        *others, last = (f"the {organ}" for organ in organs)
        places = f"{', '.join(others)} and {last}" if others else last
        verdict = one_of(f"Lesions in {places}.", f"Focal lesions in {places}.")
    else:
        verdict = one_of("No focal lesion.", "No lesion in lungs or liver.")
    return {"findings": " ".join(findings), "impression": f"CT, {habitus} build, {agent}. {verdict}"}


def _middle(scan: Phantom, organ: str) -> np.ndarray:
    """Mean voxel of an organ; of the scan, where the organ is out of view."""
    voxels = np.argwhere(scan.labels == LABELS[organ])
    return voxels.mean(axis=0) if len(voxels) else np.array(scan.labels.shape) / 2
