"""The body that phantoms scan: tissues, organs, and where they lie, in mm.

The origin is between the lung bases; x grows towards the patient's right, y forwards, z upwards.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
LABELS = {name: label for label, name in ORGANS.items()}

# HU without contrast agent, HU that a full dose of it adds, HU of texture, label
TISSUES = {
    "air": (-1000, 0, 0, 0),
    "fat": (-100, 0, 12, 0),
    "muscle": (50, 10, 14, 0),
    "rib": (420, 0, 60, 0),
    "bowel": (20, 25, 20, 0),
    "bowel gas": (-750, 0, 90, 0),
    "left lung": (-860, 0, 35, LABELS["left lung"]),
    "right lung": (-860, 0, 35, LABELS["right lung"]),
    "left lung vessel": (20, 60, 20, LABELS["left lung"]),
    "right lung vessel": (20, 60, 20, LABELS["right lung"]),
    "mediastinum": (10, 20, 30, 0),
    "airway": (-980, 0, 0, 0),
    "liver": (58, 45, 10, LABELS["liver"]),
    "liver vessel": (45, 110, 8, LABELS["liver"]),
    "gallbladder": (8, 0, 4, 0),
    "stomach": (25, 10, 25, 0),
    "stomach gas": (-950, 0, 15, 0),
    "spleen": (50, 65, 8, LABELS["spleen"]),
    "left kidney": (34, 130, 14, LABELS["left kidney"]),
    "right kidney": (34, 130, 14, LABELS["right kidney"]),
    "left renal sinus": (-60, 20, 20, LABELS["left kidney"]),
    "right renal sinus": (-60, 20, 20, LABELS["right kidney"]),
    "heart muscle": (48, 55, 8, LABELS["heart"]),
    "heart chamber": (42, 150, 6, LABELS["heart"]),
    "aorta": (42, 190, 5, LABELS["aorta"]),
    "vein": (40, 110, 6, 0),
    "vertebra": (190, 0, 45, LABELS["spine"]),
    "cortical bone": (480, 0, 60, LABELS["spine"]),
    "disc": (75, 0, 10, LABELS["spine"]),
    "spinal canal": (25, 0, 8, 0),
    "lung lesion": (35, 25, 15, LABELS["lesion"]),
    "liver lesion": (10, 5, 10, LABELS["lesion"]),
}
ID = {name: index for index, name in enumerate(TISSUES)}


def anatomy_of(points: Tensor, source: torch.Generator, lesions: bool) -> Tensor:
    """Tissue of each voxel (x, y, z). Shapes are painted from the outside in; the later covers the earlier."""
    x, y, z = points
    tissue = torch.zeros(x.shape, dtype=torch.uint8)

    def paint(name: str, where: Tensor) -> None:
        tissue.masked_fill_(where, ID[name])

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
    fat = draw(source, 1.19, 1.42)
    paint("fat", rho < fat**2)
    wall = rho < 1.14**2
    paint("muscle", wall)
    inside = rho < 1
    paint("fat", inside)
    slant = z + 0.45 * y
    rib = ((slant / 27 + draw(source, 0, 1)) % 1 < 0.36) & (slant > -75) & (z < 185) & (x.abs() > 18)
    sternum = (x.abs() < 16) & (y > 0) & (z > 5) & (z < 150)
    paint("rib", wall & (rho > 1.03**2) & (rho < 1.11**2) & (rib | sternum))

    # abdomen's filling
    coils, *pair = field(points, source, 22.0, channels=3)
    branches = pair[0].square() + pair[1].square()  # near zero along lines: vessels of lung and liver
    abdomen = (rho < 0.92) & (z < -45)
    paint("bowel", abdomen & (coils > -0.1))
    paint("bowel gas", abdomen & (coils > 0.75) & (y > -15))

    # thorax, above a dome that is higher on the right
    dome = 28 + draw(source, -6, 6) + 0.09 * x - 48 * (((x.abs() - 66) / 76).square() + (y / 92).square())
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
    paint("stomach gas", mask & (y > stomach[0][1] + draw(source, 0, 25)))
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
    radius = draw(source, 10.5, 13.5)
    over = torch.stack([(x + 5) * 0.476 + (y + 6) * 0.879, (x + 5) * 0.879 - (y + 6) * 0.476])
    ring = (over[0].square() + (z - 112).square()).sqrt() - 27.3
    arch = (ring.square() + over[1].square() < radius**2) & (z >= 112)
    paint("aorta", arch | (column(8, 18, radius) & (z > 55) & (z < 112)) | (column(-18, -30, radius) & (z < 112)))

    # spine: bodies and discs by turns, arches and processes behind the canal
    turn = (z / 27 + draw(source, 0, 1)) % 1
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
        for _ in range(draw_integer(source, 1, 3)):
            within = torch.tensor([74.0, -4, 60]) + vary(1.0) * torch.tensor([25.0, 45, 40])
            within[0] *= 1 if draw(source, 0, 1) < 0.5 else -1
            lung = (tissue >= ID["left lung"]) & (tissue <= ID["right lung vessel"])
            paint("lung lesion", ellipsoid(within, draw(source, 9, 15) * (1 + vary(0.15))) & lung)
            within = liver[0] + vary(0.5) * liver[1]
            mask = (tissue == ID["liver"]) | (tissue == ID["liver vessel"])
            paint("liver lesion", ellipsoid(within, draw(source, 9, 17) * (1 + vary(0.15))) & mask)
    return tissue


def field(points: Tensor, source: torch.Generator, cell_mm: float, channels: int = 1) -> Tensor:
    """Smooth noise fixed in the body, standard deviation 1 at the lattice of `cell_mm`."""
    reach = 320.0
    lattice = torch.randn(1, channels, *[math.ceil(2 * reach / cell_mm)] * 3, generator=source)
    where = points.flip(0).movedim(0, -1) / reach  # grid_sample counts its axes from the last
    noise = F.grid_sample(lattice.transpose(2, 4), where[None], padding_mode="border", align_corners=True)[0]
    return noise if channels > 1 else noise[0]


def draw(source: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=source))


def draw_integer(source: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=source))
