"""Procedurally made CTs of thorax and abdomen with organ labels and lesions: the embedded sample cohort.

Not anatomy, but what a pipeline needs of it: organs of plausible size, place, density and texture, that vary from
patient to patient, seen in scans that vary in pose, field of view, voxel size and noise.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import write_folder_aside
from ..progress import progress
from ..seeding import generator

ORGANS = {
    1: "liver",
    2: "spleen",
    3: "left kidney",
    4: "right kidney",
    5: "heart",
    6: "aorta",
    7: "left lung",
    8: "right lung",
    9: "spine",
    10: "lesion",
}
_LABEL = {name: label for label, name in ORGANS.items()}

# HU without contrast agent, HU that a full dose of it adds, HU of texture, label
_TISSUES = {
    "air": (-1000, 0, 0, 0),
    "fat": (-100, 0, 12, 0),
    "muscle": (50, 10, 14, 0),
    "rib": (420, 0, 60, 0),
    "bowel": (20, 25, 20, 0),
    "bowel gas": (-750, 0, 90, 0),
    "left lung": (-860, 0, 35, _LABEL["left lung"]),
    "right lung": (-860, 0, 35, _LABEL["right lung"]),
    "left lung vessel": (20, 60, 20, _LABEL["left lung"]),
    "right lung vessel": (20, 60, 20, _LABEL["right lung"]),
    "mediastinum": (10, 20, 30, 0),
    "airway": (-980, 0, 0, 0),
    "liver": (58, 45, 10, _LABEL["liver"]),
    "liver vessel": (45, 110, 8, _LABEL["liver"]),
    "gallbladder": (8, 0, 4, 0),
    "stomach": (25, 10, 25, 0),
    "stomach gas": (-950, 0, 15, 0),
    "spleen": (50, 65, 8, _LABEL["spleen"]),
    "left kidney": (34, 130, 14, _LABEL["left kidney"]),
    "right kidney": (34, 130, 14, _LABEL["right kidney"]),
    "left renal sinus": (-60, 20, 20, _LABEL["left kidney"]),
    "right renal sinus": (-60, 20, 20, _LABEL["right kidney"]),
    "heart muscle": (48, 55, 8, _LABEL["heart"]),
    "heart chamber": (42, 150, 6, _LABEL["heart"]),
    "aorta": (42, 190, 5, _LABEL["aorta"]),
    "vein": (40, 110, 6, 0),
    "vertebra": (190, 0, 45, _LABEL["spine"]),
    "cortical bone": (480, 0, 60, _LABEL["spine"]),
    "disc": (75, 0, 10, _LABEL["spine"]),
    "spinal canal": (25, 0, 8, 0),
    "lung lesion": (35, 25, 15, _LABEL["lesion"]),
    "liver lesion": (10, 5, 10, _LABEL["lesion"]),
}
_ID = {name: index for index, name in enumerate(_TISSUES)}


class Phantom(NamedTuple):
    """A scan (x, y, z) in RAS+: int16 HU, uint8 labels (`ORGANS`; 0 elsewhere), and the size of its voxels in mm."""

    ct: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Acquisition:
    """How a patient is scanned.

    centre_mm: the place in the body at the middle of the field of view; the origin is between the lung bases, the
    body reaches from about -220 (pelvis) to 220 mm (neck). rotation_degrees: about the x, y and z axis.
    noise_hu: standard deviation.
    """

    shape: tuple[int, int, int] = (96, 80, 72)
    spacing_mm: tuple[float, float, float] = (3.6, 3.6, 4.5)
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise_hu: float = 15.0

    @classmethod
    def draw(cls, source: torch.Generator) -> "Acquisition":
        """A scan of varied field of view, position, pose, voxel size and noise, of less than a megavoxel."""
        in_plane, slices = _draw(source, 3.2, 4.2), _draw(source, 3.0, 5.0)
        return cls(
            shape=(_integer(source, 80, 100), _integer(source, 68, 84), _integer(source, 56, 80)),
            spacing_mm=(round(in_plane, 2), round(in_plane, 2), round(slices, 2)),
            centre_mm=(_draw(source, -18, 18), _draw(source, -15, 15), _draw(source, -40, 40)),
            rotation_degrees=(_draw(source, -6, 6), _draw(source, -4, 4), _draw(source, -6, 6)),
            noise_hu=_draw(source, 6, 22),
        )


def phantom(
    anatomy: torch.Generator,
    noise: torch.Generator,
    acquisition: Acquisition = Acquisition(),
    *,
    lesions: bool = True,
) -> Phantom:
    """Scan a patient.

    `anatomy` decides about the patient (body and organ sizes and places, textures, contrast agent, one to three
    lesions in lung and liver if `lesions`), `noise` about the noise alone: two calls with equally seeded `anatomy`
    and different `noise` are two scans of one patient.
    """
    points = _body_points(acquisition, anatomy)
    tissue = _anatomy(points, anatomy, lesions)
    dose = _draw(anatomy, 0.0, 1.0)
    table = torch.tensor([row[:3] for row in _TISSUES.values()], dtype=torch.float32)
    table = table + torch.rand(len(table), 1, generator=anatomy) * torch.tensor([12.0, 0, 0])
    table[_ID["air"]] = torch.tensor([-1000.0, 0, 0])
    index = tissue.int()
    hu = (table[:, 0] + dose * table[:, 1])[index] + table[:, 2][index] * _field(points, anatomy, 9.0)
    grain = _blur(torch.randn(hu.shape, generator=noise), 0.15)
    hu = _blur(hu, 0.2) + grain * (acquisition.noise_hu / (0.7**2 + 2 * 0.15**2) ** 1.5)  # what blurring left of 1
    labels = torch.tensor([row[3] for row in _TISSUES.values()], dtype=torch.uint8)[index]
    return Phantom(hu.round().clamp(-1024, 3000).to(torch.int16).numpy(), labels.numpy(), acquisition.spacing_mm)


def write_sample_cohort(folder: Path, seed: int = 0, patients: int = 32) -> Path:
    """Write CTs of `patients` phantoms into a folder, as a Decathlon `dataset.json` names them; return that file.

    Five patients of eight have label maps and a split (of twenty: ten train, four val, six test); the others have
    neither. Every second patient has lesions; `target` is 1 where the label map shows one.
    """
    labelled = patients * 5 // 8
    splits = ["train"] * round(labelled * 0.5) + ["val"] * round(labelled * 0.2)
    splits += ["test"] * (labelled - len(splits))
    training, unlabelled = [], []
    with write_folder_aside(folder) as aside, progress("sample cohort", patients, "scans") as bar:
        (aside / "images").mkdir()
        (aside / "labels").mkdir()
        for number in range(patients):
            name = f"sample_{number:03}"
            acquisition = Acquisition.draw(generator(seed, "acquisition", number))
            anatomy, noise = generator(seed, "anatomy", number), generator(seed, "noise", number)
            scan = phantom(anatomy, noise, acquisition, lesions=number % 2 == 0)
            case: dict[str, str | int] = {"image": f"images/{name}.nii.gz", "patient_id": name}
            _write_nifti(aside / f"images/{name}.nii.gz", scan.ct, scan.spacing_mm)
            if number < labelled:
                case["label"] = f"labels/{name}.nii.gz"
                case["split"] = splits[number]
                case["target"] = int((scan.labels == _LABEL["lesion"]).any())
                _write_nifti(aside / f"labels/{name}.nii.gz", scan.labels, scan.spacing_mm)
                training.append(case)
            else:
                unlabelled.append(case)
            bar.advance()
        description = {
            "name": "genesis sample cohort",
            "description": "procedurally made phantoms of thorax and abdomen; not scans of people",
            "modality": {"0": "CT"},
            "labels": {"0": "background", **{str(label): name for label, name in ORGANS.items()}},
            "training": training,
            "unlabelled": unlabelled,
        }
        (aside / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return folder / "dataset.json"


def _write_nifti(path: Path, array: np.ndarray, spacing_mm: tuple[float, float, float]) -> None:
    import nibabel

    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * step for n, step in zip(array.shape, spacing_mm, strict=True)]
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def _draw(source: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=source))


def _integer(source: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=source))


def _body_points(acquisition: Acquisition, anatomy: torch.Generator) -> Tensor:
    """Where each voxel is in the standard body, (3, x, y, z) in mm: posed, scaled to the patient, and deformed."""
    axes = [
        (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * step
        for n, step in zip(acquisition.shape, acquisition.spacing_mm, strict=True)
    ]
    turn = torch.eye(3)
    for axis, degrees in enumerate(acquisition.rotation_degrees):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = torch.eye(3)
        step[i, i], step[i, j], step[j, i], step[j, j] = cos, -sin, sin, cos
        turn = step @ turn
    scale = _draw(anatomy, 0.9, 1.1) * (1 + 0.06 * (torch.rand(3, generator=anatomy) - 0.5))
    turn = turn / scale[:, None]
    middle = torch.tensor(acquisition.centre_mm) / scale
    points = torch.stack(
        [
            middle[i] + (turn[i, 0] * axes[0])[:, None, None] + (turn[i, 1] * axes[1])[:, None] + turn[i, 2] * axes[2]
            for i in range(3)
        ]
    )
    return points + 4.0 * _field(points, anatomy, 60.0, channels=3)


def _field(points: Tensor, source: torch.Generator, cell_mm: float, channels: int = 1) -> Tensor:
    """Smooth noise fixed in the body, standard deviation 1 at the lattice of `cell_mm`."""
    reach = 320.0
    lattice = torch.randn(1, channels, *[math.ceil(2 * reach / cell_mm)] * 3, generator=source)
    where = points.flip(0).movedim(0, -1) / reach  # grid_sample counts its axes from the last
    noise = F.grid_sample(lattice.transpose(2, 4), where[None], padding_mode="border", align_corners=True)[0]
    return noise if channels > 1 else noise[0]


def _blur(x: Tensor, share: float) -> Tensor:
    """Mix each voxel with `share` of either neighbour along every axis."""
    for axis in range(3):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        padded = torch.cat([first, x, last], axis)
        n = x.shape[axis]
        x = (1 - 2 * share) * x + share * (padded.narrow(axis, 0, n) + padded.narrow(axis, 2, n))
    return x


def _anatomy(points: Tensor, source: torch.Generator, lesions: bool) -> Tensor:
    """Tissue of each voxel (x, y, z). Shapes are painted from the outside in; the later covers the earlier."""
    x, y, z = points
    tissue = torch.zeros(x.shape, dtype=torch.uint8)

    def paint(name: str, where: Tensor) -> None:
        tissue.masked_fill_(where, _ID[name])

    def vary(amount: float) -> Tensor:
        return amount * (2 * torch.rand(3, generator=source) - 1)

    def ellipsoid(centre: Tensor, radii: Tensor) -> Tensor:
        a, b, c = ((p - m).mul_(1 / r).square_() for p, m, r in zip(points, centre, radii, strict=True))
        return a.add_(b).add_(c) < 1

    def organ(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        return torch.tensor(centre) + vary(4.0), torch.tensor(radii) * (1 + vary(0.1))

    def column(cx: Tensor | float, cy: Tensor | float, radius: float) -> Tensor:
        return (x - cx).square() + (y - cy).square() < radius**2

    # body: cavity, wall with ribs, subcutaneous fat of the patient's thickness
    waist = 1 - 0.07 * torch.exp(-((z + 90) / 60).square()) - 0.5 * torch.sigmoid((z - 205) / 8)
    across, along = (x / (132 * waist)).square(), (y / (86 * waist)).square()
    rho = across + along - 0.3 * across * along  # squared distance from the middle, 1 at the wall: a rounded box
    fat = _draw(source, 1.19, 1.42)
    paint("fat", rho < fat**2)
    wall = rho < 1.14**2
    paint("muscle", wall)
    inside = rho < 1
    paint("fat", inside)
    slant = z + 0.45 * y
    rib = ((slant / 27 + _draw(source, 0, 1)) % 1 < 0.36) & (slant > -75) & (z < 185) & (x.abs() > 18)
    sternum = (x.abs() < 16) & (y > 0) & (z > 5) & (z < 150)
    paint("rib", wall & (rho > 1.03**2) & (rho < 1.11**2) & (rib | sternum))

    # abdomen's filling
    coils, *pair = _field(points, source, 22.0, channels=3)
    branches = pair[0].square() + pair[1].square()  # near zero along lines: vessels of lung and liver
    abdomen = (rho < 0.92) & (z < -45)
    paint("bowel", abdomen & (coils > -0.1))
    paint("bowel gas", abdomen & (coils > 0.75) & (y > -15))

    # thorax, above a dome that is higher on the right
    dome = 28 + _draw(source, -6, 6) + 0.09 * x - 48 * (((x.abs() - 66) / 76).square() + (y / 92).square())
    paint("mediastinum", inside & (z > dome) & (z < 190))
    hila = ((x.abs() - 30) / 60).square() + ((y + 5) / 70).square() + ((z - 70) / 80).square()
    for side, sign in (("right", 1), ("left", -1)):
        lung = ellipsoid(*organ((sign * 74, -4, 55), (58, 92, 132))) & (rho < 0.97) & (z > dome)
        paint(f"{side} lung", lung)
        paint(f"{side} lung vessel", lung & (branches < 0.16 * torch.exp(-hila)))
    below = z < dome - 4

    liver, lobe = organ((64, 6, -38), (70, 72, 70)), organ((8, 38, -28), (55, 36, 36))
    mask = (ellipsoid(*liver) | ellipsoid(*lobe)) & below & (rho < 0.97)
    paint("liver", mask)
    paint("liver vessel", mask & (branches < 0.05))
    paint("gallbladder", ellipsoid(*organ((48, 38, -82), (14, 14, 22))) & below)
    stomach = organ((-56, 30, -38), (36, 38, 40))
    mask = ellipsoid(*stomach) & below & (rho < 0.95)
    paint("stomach", mask)
    paint("stomach gas", mask & (y > stomach[0][1] + _draw(source, 0, 25)))
    paint("spleen", ellipsoid(*organ((-100, -30, -36), (25, 40, 42))) & below & (rho < 0.97))
    spine_y = -55 + 9 * torch.cos((z - 60) / 62)
    for sign in (1, -1):
        paint("muscle", column(sign * 36, spine_y + 2, 17) & (z < -55))
    for side, sign in (("right", 1), ("left", -1)):
        centre, radii = organ((sign * 62, -44, -98 - 5 * sign), (24, 25, 48))
        paint(f"{side} kidney", ellipsoid(centre, radii))
        paint(f"{side} renal sinus", ellipsoid(centre - torch.tensor([8.0 * sign, 0, 0]), radii * 0.42))

    centre, radii = organ((-22, 28, 30), (50, 42, 46))
    paint("heart muscle", ellipsoid(centre, radii))
    paint("heart chamber", ellipsoid(centre + torch.tensor([-16.0, -4, -8]), radii * 0.45))
    paint("heart chamber", ellipsoid(centre + torch.tensor([18.0, 8, 4]), radii * 0.42))

    # tubes: airways, veins, and the aorta with its arch from (8, 18) over to (-18, -30)
    paint("airway", column(2, -8, 8.5) & (z > 98))
    for sign in (1, -1):
        paint("airway", column(sign * 0.75 * (98 - z), -10, 7.5) & (z > 60) & (z < 98))
    paint("vein", column(18, spine_y + 36, 10.5) & (z < 30))
    paint("vein", column(24, 12, 9) & (z > 60) & (z < 170))
    radius = _draw(source, 10.5, 13.5)
    over = torch.stack([(x + 5) * 0.476 + (y + 6) * 0.879, (x + 5) * 0.879 - (y + 6) * 0.476])
    ring = (over[0].square() + (z - 112).square()).sqrt() - 27.3
    arch = (ring.square() + over[1].square() < radius**2) & (z >= 112)
    paint("aorta", arch | (column(8, 18, radius) & (z > 55) & (z < 112)) | (column(-18, -30, radius) & (z < 112)))

    # spine: bodies and discs by turns, arches and processes behind the canal
    turn = (z / 27 + _draw(source, 0, 1)) % 1
    body = (x / 21).square() + ((y - spine_y) / 17).square()
    paint("cortical bone", body < 1)
    paint("vertebra", body < 0.72)
    paint("disc", (body < 0.95) & (turn < 0.24))
    behind = y - (spine_y - 26)
    solid = turn > 0.3
    paint("cortical bone", (x.square() + behind.square() < 14**2) & solid)
    paint("cortical bone", (x.abs() < 32) & (behind.abs() < 5) & (turn > 0.45) & (turn < 0.85))
    paint("cortical bone", (x.abs() < 4.5) & (behind < 0) & (behind > -30) & (turn > 0.35) & (turn < 0.9) & wall)
    paint("spinal canal", x.square() + behind.square() < 8.5**2)

    if lesions:
        for _ in range(_integer(source, 1, 3)):
            within = torch.tensor([74.0, -4, 60]) + vary(1.0) * torch.tensor([25.0, 45, 40])
            within[0] *= 1 if _draw(source, 0, 1) < 0.5 else -1
            lung = (tissue >= _ID["left lung"]) & (tissue <= _ID["right lung vessel"])
            paint("lung lesion", ellipsoid(within, _draw(source, 9, 15) * (1 + vary(0.15))) & lung)
            within = liver[0] + vary(0.5) * liver[1]
            mask = (tissue == _ID["liver"]) | (tissue == _ID["liver vessel"])
            paint("liver lesion", ellipsoid(within, _draw(source, 9, 17) * (1 + vary(0.15))) & mask)
    return tissue
