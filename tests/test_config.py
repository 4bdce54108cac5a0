"""Configs: shipped ones are valid, precedence holds, mistakes are named."""

from pathlib import Path

import pytest

from genesis.config import load_config, recipes
from genesis.errors import UserError


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("sample", [False, True])
def test_shipped_configs_are_valid_and_round_trip(name: str, sample: bool, tmp_path: Path) -> None:
    config = load_config(name, sample=sample)
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(), encoding="utf-8")
    assert load_config(str(file)) == config
    assert name.endswith(("_2d", "_2d_published", "_3d", "_3d_published"))


def test_precedence_is_file_overlay_value_override() -> None:
    name = "semantic_genesis_3d"
    from_file = load_config(name).train.steps
    from_overlay = load_config(name, sample=True).train.steps
    assert from_file != from_overlay
    assert load_config(name, sample=True, values={"train.steps": 7}).train.steps == 7
    assert load_config(name, ["train.steps=8"], sample=True, values={"train.steps": 7}).train.steps == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=3", "unknown key train.step; did you mean steps?"),
        ("trian.steps=3", "did you mean train?"),
        ("train.steps=-1", "train.steps: Input should be greater than 0"),
        ("train.steps", "expected section.key=value"),
        ("train.steps=[", "not a YAML value"),
        ("data.patch_size=[64, 64]", "data.patch_size has 2 numbers; a 3D config needs 3"),
        ("data.patch_size=[64, 64, 4]", "a side below 8 voxels"),
        ("data.window_hu=[100, -100]", r"must be \[lower, upper\]"),
        ("data.resident=2", "data.resident: must be auto, or a share of the device's memory from 0"),
        ("data.resident=true", r"data.resident: must be auto, or a share .*\(got True\)"),
        ("data.resident=yes", r"data.resident: must be auto, or a share .*\(got True\)"),
        ("train.optimizer.learning_rate=abc", r"learning_rate: expected a number \(got 'abc'\)"),
        ("train.compile=maybe", r"train.compile: expected 'auto' or true or false \(got 'maybe'\)"),
        ("train.compile=2", r"train.compile: expected 'auto' or true or false \(got 2\)"),
        ("train.workers=lots", r"train.workers: expected 'auto' or a whole number \(got 'lots'\)"),
        ("train.workers=-1", r"train.workers: Input should be greater than or equal to 0 \(got -1\)"),
        ("data.spacing_mm=2", r"expected 'median' or 'native' or a list, for instance \[32,32,32\] \(got 2\)"),
        ("data.spacing_mm=[1,2,x]", r"data.spacing_mm.2: expected a number \(got 'x'\)"),
        ("train.steps.more=3", "is a single value, not a section"),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("semantic_genesis_3d", [override])


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("0", 0.0), ("1", 1.0), ("0.25", 0.25), ("1e-4", 1e-4), ("'1e-4'", 1e-4)]
)
def test_a_share_of_memory_is_auto_or_any_number(text: str, value: float | str) -> None:
    assert load_config("semantic_genesis_3d", [f"data.resident={text}"]).data.resident == value


def test_unknown_names_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shipped are .*semantic_genesis_3d"):
        load_config("semantic_genesis_4d")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(broken))
    broken.write_text("just text", encoding="utf-8")
    with pytest.raises(UserError, match="mapping of sections"):
        load_config(str(broken))
