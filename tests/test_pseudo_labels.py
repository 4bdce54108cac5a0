"""The pseudo-label table: an exact round trip, and refusals that say what to mend."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genesis.data.pseudo_labels import PseudoLabels
from genesis.errors import UserError

HEADER = "class,reference,volume,patient,rank,distance,x,y,z,sx,sy,sz,cx_mm,cy_mm,cz_mm,split"


def table(rows: int = 40) -> PseudoLabels:
    rng = np.random.default_rng(0)
    place = rng.normal(0, 100, (3, rows))
    corner, size = rng.integers(-5, 90, (3, rows)), rng.integers(8, 64, (3, rows))
    return PseudoLabels(
        class_=np.arange(rows) % 5,
        reference=np.array(["a1"] * rows),
        volume=np.array([f"v{row % 7}" for row in range(rows)]),
        patient=np.array([f"p{row % 7}" for row in range(rows)]),
        rank=np.arange(rows) // 5,
        distance=rng.random(rows).astype(np.float32),
        x=corner[0], y=corner[1], z=corner[2],
        sx=size[0], sy=size[1], sz=size[2],
        cx_mm=place[0], cy_mm=place[1] / 3, cz_mm=place[2] * 1e-9,
        split=np.array(["train", "val"] * (rows // 2)),
    )  # fmt: skip


def columns(labels: PseudoLabels) -> dict[str, list[object]]:
    return {name: column.tolist() for name, column in vars(labels).items()}


def test_round_trip_is_exact_and_reproducible(tmp_path: Path) -> None:
    table().write(tmp_path / "a.csv")
    read = PseudoLabels.read(tmp_path / "a.csv")
    assert columns(read) == columns(table())
    assert {column.dtype.kind for column in vars(read).values()} == {"i", "f", "U"}
    read.write(tmp_path / "b.csv")
    text = (tmp_path / "a.csv").read_bytes()
    assert text == (tmp_path / "b.csv").read_bytes()
    assert text.decode().splitlines()[0] == HEADER


def test_a_split_is_selected_in_order() -> None:
    labels = table()
    val = labels.select("val")
    assert val.class_.tolist() == labels.class_[1::2].tolist()
    assert len(labels.select("test")) == 0
    assert labels.classes == 5
    np.testing.assert_array_equal(val.centre_mm[:, 2], labels.cz_mm[1::2])


def test_columns_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match="column rank has shape"):
        PseudoLabels(**{**vars(table()), "rank": np.arange(3)})


def edit(change: Callable[[str], str]) -> Callable[[str], str]:
    """Change the second row (line 3)."""

    def changed(text: str) -> str:
        lines = text.splitlines()
        lines[2] = change(lines[2])
        return "\n".join(lines)

    return changed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("patient", "person", 1).replace("cz_mm", "depth", 1), "columns patient, cz_mm"),
        (lambda text: "", "lacks the columns"),
        (lambda text: HEADER + "\n", "no rows"),
        (edit(lambda row: row[: len(row) // 2]), "line 3, has"),
        (edit(lambda row: "liver" + row[1:]), "line 3, column class: 'liver' is not a whole number"),
        (edit(lambda row: "-" + row), "negative class"),
        (edit(lambda row: ",".join([*row.split(",")[:12], "nan", *row.split(",")[13:]])), "column cx_mm: 'nan'"),
        (edit(lambda row: "9" * 30 + row), "column class: '9999"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    path = tmp_path / "pseudo_labels.csv"
    table().write(path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        PseudoLabels.read(path)
    assert str(path) in str(error.value)
    assert "genesis.discover" in str(error.value)


def test_no_table_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There are no pseudo-labels at .*genesis\.discover"):
        PseudoLabels.read(tmp_path / "pseudo_labels.csv")
    (tmp_path / "image.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read as CSV"):
        PseudoLabels.read(tmp_path / "image.csv")
