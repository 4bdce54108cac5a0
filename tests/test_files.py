"""Artefacts are written aside and renamed; damage is noticed."""

from pathlib import Path

import pytest

from genesis.engine.monitor import Monitor, read_metrics
from genesis.errors import UserError
from genesis.files import read_json, seal, unseal, verify_folder, write_aside, write_folder_aside, write_json
from genesis.seeding import generator, key
from genesis.workspace import Workspace


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with pytest.raises(ZeroDivisionError), write_aside(path) as aside:
        aside.write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert read_json(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    for text in ("first", "second"):
        with write_folder_aside(folder) as aside:
            (aside / "file.txt").write_text(text, encoding="utf-8")
    assert (folder / "file.txt").read_text(encoding="utf-8") == "second"
    verify_folder(folder)
    (folder / "file.txt").write_text("secone", encoding="utf-8")
    with pytest.raises(UserError, match=r"file\.txt is damaged"):
        verify_folder(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_checksums_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    with write_folder_aside(tmp_path / "package") as aside:
        (aside / "file.txt").write_text("x", encoding="utf-8")
    (tmp_path / "package" / "SHA256SUMS").write_text("0  ../../etc/passwd\n", encoding="utf-8")
    with pytest.raises(UserError, match="damaged or missing"):
        verify_folder(tmp_path / "package")


def test_keys_are_stable_and_distinct() -> None:
    assert key(0, "patch", 3) == key(0, "patch", 3)
    assert len({key(seed, "patch", index) for seed in range(10) for index in range(100)}) == 1000
    assert generator(1, "x").initial_seed() != generator(2, "x").initial_seed()


def test_the_workspace_key_is_private_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENESIS_ID_KEY", raising=False)
    workspace = Workspace.at(str(tmp_path / "ws"))
    assert workspace.id_key() == workspace.id_key()
    assert (tmp_path / "ws" / "id_key").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("GENESIS_ID_KEY", "secret")
    assert workspace.id_key() == b"secret"


def test_a_next_step_is_in_the_same_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENESIS_WORKSPACE", raising=False)
    assert Workspace.at(None).command("export") == "python -m genesis.export"
    there = Workspace(tmp_path / "my work")
    assert there.command("export") == f"python -m genesis.export --workspace '{tmp_path}/my work'"
    monkeypatch.setenv("GENESIS_WORKSPACE", str(there.root))
    assert Workspace.at(None).command("export") == there.command("export") == "python -m genesis.export"


def test_a_missing_run_names_those_there(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    with pytest.raises(UserError, match=r"python -m genesis\.train"):
        workspace.run(None, "train")
    write_json(workspace.runs / "first" / "run.json", {"kind": "train"})
    assert workspace.run(None, "train").name == "first"
    with pytest.raises(UserError, match="there: first"):
        workspace.run("second", "train")


@pytest.mark.parametrize("text", [b"a: 1\nb: 2\n", b""])
def test_every_flipped_bit_of_a_sealed_text_is_noticed(tmp_path: Path, text: bytes) -> None:
    sealed, path = seal(text), tmp_path / "config.yaml"
    assert unseal(path, sealed) == text
    assert unseal(path, text) == text  # of version 0.1
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError, match=r"config\.yaml is damaged"):
            unseal(path, bytes(flipped))


def test_every_flipped_bit_of_metrics_is_noticed(tmp_path: Path) -> None:
    with Monitor(tmp_path, 0) as monitor:
        monitor.write(1, "train", {"loss": 0.5})
        monitor.alarm(2, "stalled", "none")
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    assert read_metrics(tmp_path, "train") == [{"step": 1, "split": "train", "loss": 0.5}]
    path.write_bytes(whole[:-9])  # torn by a kill
    assert read_metrics(tmp_path, "alarm") == []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="is damaged"):
            read_metrics(tmp_path, "train")
