"""Checkpoints come back as written, and damage is named."""

from pathlib import Path

import pytest
import torch

from genesis.engine.checkpoint import read_checkpoint, write_checkpoint
from genesis.errors import UserError

STATE = {"step": 3, "method": {"weight": torch.arange(5.0)}, "metrics": {"loss": 0.5}, "names": ["a"], "none": None}


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    write_checkpoint(path, STATE)
    for state in (read_checkpoint(path), torch.load(path, weights_only=True)):  # readable without this project
        assert torch.equal(state.pop("method")["weight"], STATE["method"]["weight"])  # type: ignore[index]
        assert state == {"schema": 1, **{name: value for name, value in STATE.items() if name != "method"}}
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_any_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, STATE)
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"last\.pt is damaged"):
            read_checkpoint(path)
    for length in (0, 10, 64, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"last\.pt is damaged"):
            read_checkpoint(path)


def test_a_missing_or_newer_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no checkpoint .*last\.pt"):
        read_checkpoint(tmp_path / "last.pt")
    write_checkpoint(tmp_path / "last.pt", {"schema": 2})
    with pytest.raises(UserError, match="newer genesis"):
        read_checkpoint(tmp_path / "last.pt")
