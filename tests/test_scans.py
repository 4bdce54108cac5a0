"""Reading: real awkward files, every orientation, and every way in which a file can be wrong."""

import gzip
import itertools
import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from genesis.data import scans
from genesis.data.scans import Quarantine, Scan, read_label_map, read_scan, write_label_map

ORIENTATIONS = [
    "".join(codes) for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)
]


def volume(shape: tuple[int, ...] = (7, 9, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine), path)
    return path


def reason(path: Path, channels: str | int | None = None) -> str:
    with pytest.raises(Quarantine) as fault:
        read_scan(path, channels)
    assert path.name not in str(fault.value)
    return str(fault.value)


def oriented(array: np.ndarray, codes: str, affine: np.ndarray) -> nib.Nifti1Image:
    """A RAS array in another order of axes, at the same places."""
    to = nib.orientations.axcodes2ornt(tuple(codes))
    image = nib.Nifti1Image(array, affine)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), to))


# --- real files ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("complex64.nii.gz", "complex"),
        ("rgb24_ctperfusion.nii.gz", "colour"),
        ("CT_sheared_affine_slope7.1_inter-1024.nii.gz", "not perpendicular, by 18.5°"),
        ("MR_float_with_inf.nii.gz", "7.9% of the voxels are not numbers"),
        ("nifti_4d_oblique_int16.nii.gz", "2 volumes in one file"),
        ("nifti_4d_slope_inter.nii", "20 volumes in one file"),
        ("nifti_5d_vector_oblique24.nii.gz", "2 volumes in one file"),
        ("us_4d_11frames.nii.gz", "11 volumes in one file (channels, time points or directions)"),
    ],
)
def test_awkward_files_are_quarantined_with_a_reason(shared_data: Path, name: str, expected: str) -> None:
    assert expected in reason(shared_data / "awkward" / name)


@pytest.mark.parametrize(
    "name",
    [
        "MR_FLAIR_oblique19.nii.gz",
        "MR_freesurfer_norm.mgz",
        "MR_t2s_aniso_0.5x0.5x7.5.nii.gz",
        "int16_slope_with_nan.nii.gz",
        "nifti_bigendian_int16.nii",
        "orientations/ASR.nii.gz",
    ],
)
def test_awkward_files_hold_the_values_and_places_of_nibabel(shared_data: Path, name: str) -> None:
    expected = nib.as_closest_canonical(nib.load(shared_data / "awkward" / name))
    scan = read_scan(shared_data / "awkward" / name)
    assert np.abs(scan.array[0] - expected.get_fdata(dtype=np.float32)).max() <= 1e-6 * np.abs(scan.array).max()
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(scan.spacing_mm, expected.header.get_zooms()[:3], rtol=1e-5)


def test_slope_and_intercept_are_applied_once_to_chosen_channels(shared_data: Path) -> None:
    path = shared_data / "awkward" / "nifti_4d_slope_inter.nii"
    expected = np.moveaxis(nib.as_closest_canonical(nib.load(path)).get_fdata(), 3, 0)
    np.testing.assert_allclose(read_scan(path, "all").array, expected, rtol=1e-6)
    np.testing.assert_allclose(read_scan(path, 3).array, expected[3:4], rtol=1e-6)
    assert "counted from 0" in reason(path, 20)


def test_one_scan_in_eight_orders_of_axes_is_one_scan(shared_data: Path) -> None:
    scans = [read_scan(path) for path in sorted((shared_data / "awkward" / "orientations").glob("*.nii.gz"))]
    assert len(scans) == 8
    for scan in scans[1:]:
        np.testing.assert_array_equal(scan.array, scans[0].array)
        np.testing.assert_allclose(scan.affine, scans[0].affine, atol=1e-3)


def test_nrrd_and_nifti_of_one_scan_agree(shared_data: Path) -> None:
    nifti, nrrd = (read_scan(shared_data / "awkward" / f"MR_FLAIR_oblique19.{end}") for end in ("nii.gz", "nrrd"))
    np.testing.assert_array_equal(nifti.array, nrrd.array)
    np.testing.assert_allclose(nifti.affine, nrrd.affine, atol=1e-3)


def test_a_few_values_that_are_no_numbers_are_counted_and_filled(shared_data: Path) -> None:
    path = shared_data / "awkward" / "float_inf_nan.mha"
    raw = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    scan = read_scan(path)
    assert np.isfinite(scan.array).all()
    assert scan.notes == (f"{np.count_nonzero(~np.isfinite(raw))} voxels that were not numbers (NaN or infinite) "
                          "filled with the minimum",)  # fmt: skip
    assert scan.array.min() == raw[np.isfinite(raw)].min()


def test_a_written_dicom_series(tmp_path: Path) -> None:
    slices = volume((4, 6, 8))
    write_series(tmp_path / "series", slices[::-1], positions_mm=(7.5, 5, 2.5, 0))
    scan = read_scan(tmp_path / "series")
    np.testing.assert_array_equal(scan.array[0], slices.transpose(2, 1, 0)[::-1, ::-1])
    assert scan.spacing_mm == (0.5, 0.75, 2.5)
    assert scan.patient == "P1"


@pytest.mark.parametrize(
    ("positions", "tags", "expected"),
    [
        ((0, 2.5, 5, 10), {}, "varies from 2.5 to 5 mm"),
        ((0, 2.5, 2.5, 5), {}, "several slices at one position"),
        (None, {"0020|0037": "1\\0\\0\\0\\0.9563\\-0.2924"}, "tilted by 17.0°"),
    ],
)
def test_dicom_series_that_are_no_volume(
    tmp_path: Path, positions: tuple[float, ...] | None, tags: dict[str, str], expected: str
) -> None:
    files = write_series(tmp_path, volume((4, 6, 8)), positions_mm=positions, tags=tags)
    with pytest.raises(Quarantine, match=expected):
        read_scan(files)


def test_dicom_slices_without_positions(tmp_path: Path) -> None:
    files = write_series(tmp_path, volume((4, 6, 8)))
    position, other = b"\x20\x00\x32\x00", b"\x20\x00\x33\x00"
    files[2].write_bytes(files[2].read_bytes().replace(position, other))
    with pytest.raises(Quarantine, match="no position"):
        read_scan(files)


def test_dicom_slices_of_different_sizes_and_orientations(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a", volume((4, 6, 8)))
    with pytest.raises(Quarantine, match="different sizes"):
        read_scan(files + write_series(tmp_path / "b", volume((1, 6, 7)), positions_mm=(10,)))
    turned = {"0020|0037": "0\\1\\0\\0\\0\\-1"}
    with pytest.raises(Quarantine, match="different orientations"):
        read_scan(files + write_series(tmp_path / "c", volume((1, 6, 8)), positions_mm=(10,), tags=turned))


def test_a_radiograph_in_which_white_is_low(tmp_path: Path) -> None:
    pixels = volume((1, 6, 8))
    file = write_series(tmp_path, pixels)[0]
    normal = read_scan(file).array
    assert normal.shape == (1, 8, 6, 1)
    file.write_bytes(file.read_bytes().replace(b"MONOCHROME2 ", b"MONOCHROME1 "))
    total = np.add(normal, read_scan(file).array, dtype=int)
    assert np.unique(total).size == 1


def test_a_real_dicom_series_is_read_in_order_and_rescaled_once(shared_data: Path) -> None:
    folder = shared_data / "dicom" / "ct_abdomen"
    scan = read_scan(folder)
    assert scan.array.shape == (1, 512, 512, 35)
    assert scan.array.dtype == np.int16
    assert scan.array.min() == -3024  # padding: −2000 stored, intercept −1024
    assert scan.spacing_mm == pytest.approx((0.859375, 0.859375, 5.0))
    assert scan.patient == "C3L-00189"
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)  # its axes run to the left, the back and the head
    np.testing.assert_array_equal(scan.array[0], sitk.GetArrayFromImage(image).transpose(2, 1, 0)[::-1, ::-1])
    corner = image.TransformIndexToPhysicalPoint((511, 511, 0))
    np.testing.assert_allclose(scan.affine[:3, 3], np.array(corner) * [-1, -1, 1], atol=1e-3)


def test_an_oblique_dicom_series_lies_where_itk_puts_it(shared_data: Path) -> None:
    folder = shared_data / "dicom" / "mr_brain_oblique"
    scan = read_scan(folder)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    array = sitk.GetArrayViewFromImage(image)
    brightest = np.unravel_index(int(np.argmax(array)), array.shape)
    x, y, z = image.TransformIndexToPhysicalPoint([int(i) for i in reversed(brightest)])
    ours = np.unravel_index(int(np.argmax(scan.array[0])), scan.array.shape[1:])
    np.testing.assert_allclose((scan.affine @ [*ours, 1])[:3], (-x, -y, z), atol=0.05)


def test_uneven_and_tilted_slices_are_noticed(shared_data: Path) -> None:
    text = reason(shared_data / "dicom" / "ct_head_variable_spacing")
    assert "varies from 1.08 to 7 mm" in text
    assert "tilted by 18.5°" in text


def test_a_missing_slice_is_noticed(shared_data: Path) -> None:
    files = sorted((shared_data / "dicom" / "ct_abdomen").iterdir())
    with pytest.raises(Quarantine, match="varies from 5 to 10 mm"):
        read_scan(files[:10] + files[11:])
    with pytest.raises(Quarantine, match="several DICOM series"):
        read_scan([files[0], next((shared_data / "dicom" / "mr_brain_oblique").iterdir())])


# --- round trips ---


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("dtype", ["u1", ">i2", "f4"])
def test_scans_larger_than_the_buffer_are_turned_in_tiles(
    order: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "TILE", (4, 3))
    monkeypatch.setattr(scans, "BUFFER", 2**11)
    for shape in ((9, 23, 7), (23, 9, 4), (2, 2, 2), (1, 5, 6), (6, 1, 1), (0, 3, 2)):
        array = volume(shape).astype(dtype).transpose(order).copy().transpose(np.argsort(order))
        for flips in itertools.product((1, -1), repeat=3):
            source, target = array[tuple(slice(None, None, step) for step in flips)], np.zeros(shape, dtype)
            scans._copy(source, target)
            np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("shape", [(3000, 1, 2000), (3000, 2000, 1), (1, 3000, 2000), (1500, 2, 2000)])
def test_turning_takes_little_memory(shape: tuple[int, int, int]) -> None:
    source, target = np.zeros(shape, np.int16, order="F"), np.zeros(shape, np.int16)
    tracemalloc.start()
    scans._copy(source, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * scans.BUFFER


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_labels_return_to_the_grid_of_every_orientation(tmp_path: Path, codes: str) -> None:
    assert len(ORIENTATIONS) == 48
    array, affine = volume(), np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (5, -8, 3), degrees=True).as_matrix() * (2, 3, 4)
    affine[:3, 3] = 5, 6, 7
    source = oriented(array, codes, affine)
    nib.save(source, tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(scan.array[0], array)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    write_label_map(tmp_path / "labels.nii.gz", (scan.array[0] > 0).astype(np.uint8), scan)
    written = nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(source.dataobj) > 0)
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    np.testing.assert_array_equal(read_label_map(tmp_path / "labels.nii.gz", scan), scan.array[0] > 0)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".nii.gz", ".nii"])
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    array = volume()
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((2.0, 3.0, 4.0))
    image.SetOrigin((10.0, 20.0, 30.0))
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    scan = read_scan(tmp_path / f"scan{suffix}")
    np.testing.assert_array_equal(scan.array[0], array[::-1, ::-1])  # LPS to RAS
    np.testing.assert_allclose(scan.affine @ [6, 8, 0, 1], (-10, -20, 30, 1))
    assert scan.spacing_mm == (2.0, 3.0, 4.0)


def test_mgz(tmp_path: Path) -> None:
    array = volume().astype(np.float32) / 3
    nib.save(nib.MGHImage(array, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "scan.mgz")
    np.testing.assert_array_equal(read_scan(tmp_path / "scan.mgz").array[0], array)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(["u1", "i2", ">i2", "u2", "i4", "f4", ">f4", "f8"]),
    slope=st.sampled_from([1.0, 0.5, -2.0]),
    inter=st.sampled_from([0.0, -1024.0, 0.25]),
    seed=st.integers(0, 99),
)
def test_slope_and_intercept(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, slope: float, inter: float, seed: int
) -> None:
    path = tmp_path_factory.mktemp("slope") / "scan.nii"
    raw = np.random.default_rng(seed).integers(0, 200, (4, 5, 6)).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(raw.dtype)
    image = nib.Nifti1Image(raw, np.eye(4), header)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    scan = read_scan(path)
    stored = nib.load(path)
    np.testing.assert_allclose(scan.array[0], stored.get_fdata(), rtol=1e-6)
    if slope == 1 and inter == -1024 and raw.dtype.kind in "iu" and stored.dataobj.slope == 1:
        assert scan.array.dtype == np.int16


def test_pictures(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (6, 8)).astype(np.uint8)
    for name, pixels in (("grey", rows), ("grey_rgb", np.stack([rows] * 3, -1)), ("opaque", np.stack([rows] * 4, -1))):
        sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=pixels.ndim == 3), str(tmp_path / f"{name}.png"))
        scan = read_scan(tmp_path / f"{name}.png")
        assert scan.array.shape == (1, 8, 6, 1)
        np.testing.assert_array_equal(scan.array[0, ::-1, ::-1, 0], rows.T)
        assert "1 mm assumed" in scan.notes[0]
    colour = np.stack([rows, rows, 255 - rows], -1)
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(tmp_path / "colour.png"))
    assert "colour" in reason(tmp_path / "colour.png")
    sitk.WriteImage(sitk.GetImageFromArray(rows), str(tmp_path / "photo.jpg"))
    assert read_scan(tmp_path / "photo.jpg").array.shape == (1, 8, 6, 1)


def test_a_file_per_channel(tmp_path: Path) -> None:
    files = [save(tmp_path / f"case_{n:04}.nii", volume(seed=n)) for n in range(3)]
    np.testing.assert_array_equal(read_scan(files, "all").array, np.stack([volume(seed=n) for n in range(3)]))
    np.testing.assert_array_equal(read_scan(files, 2).array[0], volume(seed=2))
    with pytest.raises(Quarantine, match="the case has 3, counted from 0"):
        read_scan(files, 3)
    files.append(save(tmp_path / "case_0003.nii", volume((7, 9, 6))))
    with pytest.raises(Quarantine, match="do not lie on one grid"):
        read_scan(files, "all")


def test_units_and_absent_orientation(tmp_path: Path) -> None:
    image = nib.Nifti1Image(volume(), np.diag([2e-3, 3e-3, 4e-3, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")
    assert read_scan(tmp_path / "metres.nii").spacing_mm == pytest.approx((2, 3, 4))
    image = nib.Nifti1Image(volume(), None)
    nib.save(image, tmp_path / "nowhere.nii")
    assert "no orientation" in read_scan(tmp_path / "nowhere.nii").notes[0]


# --- what makes no sense ---


def header_bytes(path: Path, offset: int, form: str, *values: float) -> Path:
    """Overwrite a field of an uncompressed NIfTI-1 header."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


DIM, PIXDIM, SROW = 40, 76, 280


def test_geometry_that_cannot_be(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return save(tmp_path / f"{name}.nii", volume())

    assert "voxel size 0 ×" in reason(header_bytes(fresh("zero"), PIXDIM + 4, "<f", 0.0))
    assert "voxel size -2 ×" in reason(header_bytes(fresh("negative"), PIXDIM + 4, "<f", -2.0))
    assert "NaN" in reason(header_bytes(fresh("nan"), SROW, "<f", float("nan")))
    assert "cannot be" in reason(header_bytes(fresh("singular"), SROW, "<4f", 0, 0, 0, 0))
    assert "not perpendicular" in reason(
        header_bytes(fresh("parallel"), SROW, "<12f", 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0)
    )
    assert "cannot be" in reason(save(tmp_path / "kilometres.nii", volume(), np.diag([1e6, 1, 1, 1])))
    (tmp_path / "negative.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 7 9 5\nElementSpacing = -1 1 1\n"
        b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n" + volume().tobytes()
    )
    assert "voxel size -1 × 1 × 1" in reason(tmp_path / "negative.mha")


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = header_bytes(save(tmp_path / "vast.nii", volume()), DIM, "<4h", 3, 30000, 30000, 30000)
    assert "30000 × 30000 × 30000 voxels, more than any scan" in reason(path)
    path = header_bytes(save(tmp_path / "short.nii", volume()), DIM, "<4h", 3, 700, 700, 700)
    assert "more than the file holds" in reason(path)
    compressed = tmp_path / "short.nii.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert "more than the file holds" in reason(compressed)
    header = b"ObjectType = Image\nNDims = 3\nDimSize = 900 900 900\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "short.mha").write_bytes(header + volume().tobytes())
    assert "more than the file holds" in reason(tmp_path / "short.mha")
    (tmp_path / "lost.mhd").write_bytes(header.replace(b"LOCAL", b"lost.raw"))
    assert "data file is missing" in reason(tmp_path / "lost.mhd")


def test_damaged_files(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii.gz", volume((30, 30, 30))).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    for name, content in (
        ("empty.nii.gz", b""),
        ("cut.nii.gz", good[: len(good) // 2]),
        ("flipped.nii.gz", bytes(flipped)),
        ("text.nii.gz", b"not an image at all"),
        ("text.nrrd", b"not an image at all"),
        ("text.mha", b"not an image at all"),
        ("text.mgz", b"not an image at all"),
        ("text.png", b"not an image at all"),
        ("text.dcm", b"not an image at all"),
        ("plain.nii", gzip.decompress(good)[:-10]),
    ):
        (tmp_path / name).write_bytes(content)
        text = reason(tmp_path / name)
        assert any(word in text for word in ("damaged", "empty", "cut off")), (name, text)
    assert "missing" in reason(tmp_path / "absent.nii")
    (tmp_path / "nothing").mkdir()
    assert "without DICOM" in reason(tmp_path / "nothing")


def test_constant_and_non_finite_volumes(tmp_path: Path) -> None:
    assert "every voxel has the value 7" in reason(save(tmp_path / "flat.nii", np.full((4, 4, 4), 7, np.int16)))
    array = volume((10, 10, 10)).astype(np.float32)
    array.ravel()[:11] = np.nan
    assert "1.1% of the voxels" in reason(save(tmp_path / "nan.nii", array))
    array.ravel()[:11] = [*[np.inf] * 10, -2000]
    scan = read_scan(save(tmp_path / "few.nii", array))
    assert scan.array.min() == -2000
    assert scan.notes[0].startswith("10 voxels")
    assert "are not numbers" in reason(save(tmp_path / "all.nii", np.full((4, 4, 4), np.nan, np.float32)))


def test_label_maps_that_do_not_fit(tmp_path: Path) -> None:
    scan = read_scan(save(tmp_path / "scan.nii", volume()))
    labels = (volume() > 0).astype(np.float32)
    np.testing.assert_array_equal(read_label_map(save(tmp_path / "float.nii", labels), scan), labels)
    assert read_label_map(save(tmp_path / "many.nii", labels * 300), scan).dtype == np.uint16

    def misfit(name: str, array: np.ndarray, affine: np.ndarray | None = None) -> str:
        with pytest.raises(Quarantine) as fault:
            read_label_map(save(tmp_path / f"{name}.nii", array, affine), scan)
        return str(fault.value)

    assert misfit("small", labels[1:]) == "the label map has 6 × 9 × 5 voxels, its image 7 × 9 × 5"
    shifted = np.diag([2.0, 3.0, 4.0, 1.0])
    shifted[0, 3] = 12
    assert "12.0 mm away" in misfit("shifted", labels, shifted)
    assert "no labels" in misfit("half", labels / 2)
    assert "no labels" in misfit("negative", -labels)
    assert "2 channels" in misfit("channels", np.stack([labels] * 2, -1))


def test_label_maps_are_written_as_nifti_of_the_right_shape(tmp_path: Path) -> None:
    scan: Scan = read_scan(save(tmp_path / "scan.nii", volume()))
    with pytest.raises(ValueError, match="written as"):
        write_label_map(tmp_path / "labels.nrrd", np.zeros((7, 9, 5), np.uint8), scan)
    with pytest.raises(ValueError, match="do not fit"):
        write_label_map(tmp_path / "labels.nii", np.zeros((7, 9, 4), np.uint8), scan)
