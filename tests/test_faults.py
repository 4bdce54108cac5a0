"""Flipped bits in every artefact, full disks, limits and read-only folders: noticed, said in one sentence, mended."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from chaos import commands, contents, write_scans

from genesis import cli, load_pretrained
from genesis.data.case_map import CaseMap
from genesis.data.store import Volume
from genesis.engine.checkpoint import read_checkpoint
from genesis.engine.monitor import read_metrics
from genesis.errors import UserError
from genesis.files import read_json, verify_folder
from genesis.runs import read_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scans, and a workspace in which all verbs but finetune were run."""
    root = tmp_path_factory.mktemp("finished")
    write_scans(root)
    for verb in ("prepare", "discover", "train", "export"):
        run(root, verb)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "root")


def run(root: Path, verb: str, scans: Path | None = None) -> None:
    cli.main([verb, "--workspace", str(root / "workspace"), "--device", "cpu", *commands(scans or root)[verb]])


def read_labels(file: Path) -> object:
    return Volume(file.parents[1] / "volumes" / file.name).labels()


KINDS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "volume": ("store/volumes/*.b2nd", lambda file: Volume(file).read()),
    "label map": ("store/labels/*.b2nd", read_labels),
    "audit": ("store/audit.json", read_json),
    "discovery": ("discovery/3d/[!S]*.*", lambda file: verify_folder(file.parent)),
    "pseudo-labels": ("discovery/3d/pseudo_labels.csv", lambda file: verify_folder(file.parent, file.name)),
    "checkpoint": ("runs/run/checkpoints/*.pt", read_checkpoint),
    "run": ("runs/run/run.json", read_json),
    "config": ("runs/run/config.yaml", lambda file: read_config(file.parent)),
    "metrics": ("runs/run/metrics.jsonl", lambda file: read_metrics(file.parent, "train")),
    "figures": ("runs/run/figures/*.png", lambda file: verify_folder(file.parents[1])),
    "case map": ("case_map.csv", lambda file: CaseMap(file, "store").rows),
    "weights": ("weights/run/weights.safetensors", lambda file: load_pretrained(file.parent)),
    "card": ("weights/run/card.json", lambda file: verify_folder(file.parent)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_noticed_and_named(kind: str, root: Path) -> None:
    pattern, read = KINDS[kind]
    files = sorted((root / "workspace").glob(pattern))
    source = np.random.default_rng(0)
    for _ in range(20):
        file = files[source.integers(len(files))]
        whole, wanted = file.read_bytes(), read(file)
        flipped = bytearray(whole)
        place = source.integers(len(whole))
        flipped[place] ^= 1 << source.integers(8)
        file.write_bytes(flipped)
        message, got = "", None
        try:
            got = read(file)
        except UserError as fault:
            message = str(fault)
        if message:
            assert file.stem in message
        else:  # blosc2 has bytes of no meaning around the checked ones
            assert isinstance(wanted, np.ndarray), f"{file.name}, byte {place}, is not checked"
            assert isinstance(got, np.ndarray)
            assert np.array_equal(got, wanted), f"{file.name}, byte {place}: other voxels"
        file.write_bytes(whole)


def limited(root: Path, verb: str, limits: str, *more: str) -> tuple[int, str]:
    """A verb in a process with limits, as `resource` has them."""
    code = f"import resource, sys; from genesis import cli, {verb}; {limits}; cli.main(sys.argv[1:])"
    arguments = [verb, "--workspace", str(root / "workspace"), "--device", "cpu", *commands(root)[verb], *more]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def said(root: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a verb, which must fail with exit code 2, says at last."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(root, verb)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(("verb", "size"), [("prepare", 1000), ("discover", 3000), ("train", 20_000), ("export", 2000)])
def test_a_limit_of_file_sizes_as_a_quota(
    verb: str,
    size: int,
    root: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the same command, once there is room, ends as if nothing had been."""
    workspace, made = (
        root / "workspace",
        {"prepare": "store", "discover": "discovery", "train": "runs", "export": "weights"},
    )
    shutil.rmtree(workspace / made[verb])
    if verb == "prepare":
        (workspace / "case_map.csv").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        assert "File too large" in said(root, verb, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run(root, verb)
    names = {name for name in contents(finished / "workspace") if name.startswith(made[verb])}
    assert {name for name in contents(workspace) if name.startswith(made[verb])} == names


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system in place of an empty folder, which only root may mount."""
    shutil.rmtree(folder)
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False)  # where the test has not


def test_a_full_disk(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace, runs = root / "workspace", root / "workspace" / "runs"
    with small_disk(runs, "80k"):
        assert "No space left on device" in said(root, "train", capsys)
        subprocess.run(["mount", "-o", "remount,size=50m", str(runs)], check=True)
        run(root, "train")
        assert read_checkpoint(runs / "run" / "checkpoints" / "last.pt")["step"] == 6
        assert not [name for name, digest in contents(workspace).items() if digest == "left over"]


@pytest.mark.parametrize("size", ["16k", "32k", "64k"])
def test_a_disk_that_fills_while_latents_are_written(size: str, root: Path) -> None:
    """They are memory-mapped, where the system ends the process that writes more than there is room for."""
    with small_disk(root / "workspace" / "discovery", size):
        code, error = limited(root, "discover", "pass")
        assert (code, "Traceback" in error) == (2, False), error
        assert "No space left on device" in error.splitlines()[-1]


def test_a_mount_that_vanishes(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a network drive does: what is opened is not there, and what was open cannot be written any more."""
    workspace = root / "workspace"
    shutil.copytree(workspace / "store", root / "copy")
    with small_disk(workspace / "store", "50m"):
        shutil.copytree(root / "copy", workspace / "store", dirs_exist_ok=True)
        subprocess.run(["umount", "-l", workspace / "store"], check=True)
        assert "store" in said(root, "train", capsys)
        assert read_json(workspace / "runs" / "run" / "run.json")["status"] == "finished"
    shutil.copytree(root / "copy", workspace / "store", dirs_exist_ok=True)
    shutil.rmtree(workspace / "runs")
    whole, calls = os.fsync, 0

    def stale(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        whole(descriptor)

    monkeypatch.setattr("os.fsync", stale)
    assert os.strerror(errno.ESTALE) in said(root, "train", capsys)
    monkeypatch.undo()
    run(root, "train")
    assert read_json(workspace / "runs" / "run" / "run.json")["status"] == "finished"


def test_a_read_only_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a read-only mount, for root may write into any folder."""
    weights = root / "workspace" / "weights"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(weights)], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        assert "Read-only file system" in said(root, "export", capsys)
    finally:
        subprocess.run(["umount", "-l", str(weights)], check=True)
    run(root, "export")


@pytest.mark.slow
def test_no_memory(root: Path) -> None:
    shutil.rmtree(root / "workspace" / "runs")
    limit = "m = int(open('/proc/self/statm').read().split()[0]) * 4096 + 5 * 10**8; "
    limit += "resource.setrlimit(resource.RLIMIT_AS, (m, m))"
    code, error = limited(root, "train", limit, "--set", "train.batch_size=1024")
    assert code == 2, error
    assert "memory" in error.splitlines()[-1]
    run(root, "train")
