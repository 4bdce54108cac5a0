"""Kill the verbs (SIGKILL) at many instants, repeat the same command, and compare the end with an undisturbed run.

    python tests/chaos.py --kills 45

Every kill is either at a named point, right before or after the n-th fsync or rename, or at a random instant after the
first write. The commands run as forks of this process, which has imported everything: so a kill costs seconds. The
hooks that count the points are in the fork alone. An undisturbed run in a process of its own is the reference; files
must be the same to the last byte, checkpoints to the last bit of every tensor, and nothing may be left over.
"""

import argparse
import csv
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported
    os.environ |= {"OMP_NUM_THREADS": "1", "GENESIS_ID_KEY": "chaos"}

import nibabel as nib
import numpy as np
import torch

from genesis import cli, discover, export, finetune, prepare, train  # noqa: F401  the verbs, before the forks
from genesis.data.phantom import Acquisition, phantom
from genesis.engine.checkpoint import read_checkpoint
from genesis.seeding import generator

SPLITS = ("train", "train", "train", "train", "val", "test")
TINY = [
    "data.patch_size=[16,16,16]", "discovery.autoencoder.steps=4", "discovery.autoencoder.batch_size=2",
    "discovery.autoencoder.channels=[4,8]", "discovery.autoencoder.shape=[16,16,16]", "discovery.classes=3",
    "discovery.neighbours=3", "discovery.validation_neighbours=1", "discovery.min_score=0",
]  # fmt: skip
NETWORK = ["network.channels=[4,8]", "network.strides=[2]", "network.num_res_units=1"]
TRAINING = [
    "train.batch_size=2", "train.steps=6", "train.validate_every=2", "train.validation_samples=2",
    "train.optimizer.warmup_steps=0", "train.workers=0",
]  # fmt: skip
FINETUNING = [
    "finetune.steps=4", "finetune.batch_size=2", "finetune.learning_rates=[0.001]", "finetune.validate_every=2",
    "finetune.warmup_steps=1", "finetune.workers=0",
]  # fmt: skip


def commands(root: Path) -> dict[str, list[str]]:
    """The pipeline, in order."""

    def settings(*texts: str) -> list[str]:
        return [part for text in texts for part in ("--set", text)]

    return {
        "prepare": ["--data", str(root / "scans.csv"), "--modality", "ct", "--workers", "1"],
        "discover": settings(*TINY, *NETWORK),
        "train": ["--run", "run", *settings(*NETWORK, *TRAINING)],
        "export": ["--run", "run"],
        "finetune": ["--labels", "2", "--run", "tuned", *settings(*FINETUNING)],
    }


def write_scans(root: Path) -> None:
    with (root / "scans.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("image", "label", "patient_id", "split"))
        for number, split in enumerate(SPLITS):
            how = Acquisition(
                shape=(44 + number, 40, 34), spacing_mm=(7.0, 7.0, 8.0), centre_mm=(0.0, 0.0, 5.0 * number)
            )
            scan = phantom(generator(number, "anatomy"), generator(number, "noise"), how)
            affine = np.diag([*scan.spacing_mm, 1.0])
            names = f"scan{number}.nii.gz", f"labels{number}.nii.gz"
            for name, array in zip(names, (scan.ct, scan.labels), strict=True):
                nib.save(nib.Nifti1Image(array, affine), root / name)
            table.writerow((*names, f"patient{number}", split))


class Fork:
    """One command in a fork of this process, killed at its n-th point if it has so many."""

    def __init__(self, verb: str, arguments: list[str], root: Path, kill_at: int = 0) -> None:
        self.log = root / "log.txt"
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _child(verb, arguments, root, self.log, kill_at, writing)
        os.close(writing)
        self._pipe = reading

    def wait_for_first_write(self) -> bool:
        return os.read(self._pipe, 1) == b"w"

    def end(self) -> tuple[int, int]:
        """Exit status, negative after a signal, and the number of points passed."""
        told = b""
        while part := os.read(self._pipe, 64):
            told += part
        os.close(self._pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, int(told.strip(b"w") or 0)


def _child(verb: str, arguments: list[str], root: Path, log: Path, kill_at: int, pipe: int) -> None:
    passed, wrote = 0, False

    def point() -> None:
        nonlocal passed
        passed += 1
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            point()
            result = call(*args, **options)
            point()
            return result

        return called

    def note(event: str, args: tuple[Any, ...]) -> None:
        nonlocal wrote
        writes = event == "os.mkdir" or (event == "open" and isinstance(args[2], int) and args[2] & 3)
        if writes and not wrote and str(args[0]).startswith(f"{root}/workspace"):
            wrote = True
            os.write(pipe, b"w")

    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.fsync, os.replace = around(os.fsync), around(os.replace)
        sys.addaudithook(note)
        cli.main([verb, "--workspace", str(root / "workspace"), "--device", "cpu", *arguments])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.write(pipe, str(passed).encode())
        os._exit(status)


def contents(workspace: Path) -> dict[str, str]:
    """A hash of every file but TensorBoard's, which hold times, and the store's index, made when it is asked for."""
    found = {}
    for file in sorted(workspace.rglob("*")):
        name = file.relative_to(workspace).as_posix()
        if file.is_file() and "/tensorboard/" not in name and file.name != "index.txt":
            content = repr(_bits(read_checkpoint(file))).encode() if file.suffix == ".pt" else file.read_bytes()
            found[name] = hashlib.sha256(content).hexdigest()
        elif any(part.startswith(".") for part in file.parts[len(workspace.parts) :]):
            found[name] = "left over"
    return found


def _bits(value: Any) -> Any:
    """Plain values and the bytes of tensors; two checkpoints may share objects otherwise, and so differ as files."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return [(name, _bits(part)) for name, part in value.items()]
    return [_bits(part) for part in value] if isinstance(value, (list, tuple)) else value


def undisturbed(verb: str, arguments: list[str], root: Path) -> None:
    call = [sys.executable, "-m", f"genesis.{verb}", "--workspace", str(root / "workspace"), "--device", "cpu"]
    done = subprocess.run([*call, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{verb} fails undisturbed:\n{done.stdout}{done.stderr}")


def torture(verb: str, arguments: list[str], root: Path, kills: int, source: random.Random) -> list[str]:
    """Kill a verb so many times, half at points, half at random, each time from the state before; what went wrong."""
    workspace, before = root / "workspace", root / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(workspace, before)

    def reset() -> None:
        shutil.rmtree(workspace)
        shutil.copytree(before, workspace)

    undisturbed(verb, arguments, root)
    wanted, faults = contents(workspace), []
    reset()
    fork = Fork(verb, arguments, root)
    fork.wait_for_first_write()
    started = time.monotonic()
    status, points = fork.end()
    lasts = time.monotonic() - started
    if status or contents(workspace) != wanted:
        return [f"{verb}: two undisturbed runs differ in {_differing(contents(workspace), wanted)}, exit {status}"]
    at_points = kills - kills // 2
    places = sorted(source.sample(range(1, points + 1), min(at_points, points))) + [0] * (kills // 2)
    for number, place in enumerate(places):
        reset()
        fork = Fork(verb, arguments, root, place)
        where = f"{verb}, kill {number + 1} of {len(places)}: point {place} of {points}"
        if place == 0:
            fork.wait_for_first_write()
            delay = source.uniform(0, lasts)
            where = f"{verb}, kill {number + 1} of {len(places)}: {delay:.3f} s after the first write"
            time.sleep(delay)
            os.kill(fork.pid, signal.SIGKILL)
        killed, _ = fork.end()
        fork = Fork(verb, arguments, root)
        status, _ = fork.end()
        result = "the same" if status == 0 and contents(workspace) == wanted else "WRONG"
        print(f"{where}: {result}{'' if killed == -signal.SIGKILL else ' (it had ended before)'}", flush=True)
        if result == "WRONG":
            differing = _differing(contents(workspace), wanted)
            faults.append(f"{where}: exit {status}, other {differing}\n{fork.log.read_text(encoding='utf-8')}")
    return faults


def _differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=45, help="in all (default: 45)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source, faults, started = random.Random(options.seed), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scans(root)
        (root / "workspace").mkdir()
        pipeline = commands(root)
        for number, (verb, arguments) in enumerate(pipeline.items()):
            share = options.kills * (number + 1) // len(pipeline) - options.kills * number // len(pipeline)
            faults += torture(verb, arguments, root, share, source)
    print(f"{options.kills} kills in {time.monotonic() - started:.0f} s: {len(faults)} wrong ends")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
