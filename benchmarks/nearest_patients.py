"""The nearest 200 of a million patients against reading their latents once from memory.

    python benchmarks/nearest_patients.py

1,000,000 × 512 float32 latents lie in a file of 2 GB, memory-mapped and in the page cache; the rival sums them, in
pieces and with as many threads. Anonymous memory (RssAnon of the whole process, libraries included) is sampled while
ours searches.
"""

import argparse
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from measure import cores, row, seconds, write

from genesis.discovery.neighbours import nearest_patients

COUNT, LATENT, NEAREST = 1_000_000, 512, 200
PIECE = 65_536


class AnonymousMemory(threading.Thread):
    """The most anonymous memory of this process while it runs, in GB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.most = 0.0

    def run(self) -> None:
        while not self._ended.wait(0.005):
            self.most = max(self.most, anonymous_gb())

    def __enter__(self) -> "AnonymousMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def anonymous_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "latents.npy"
        written = np.lib.format.open_memmap(file, "w+", np.float32, (options.count, LATENT))
        rng = np.random.default_rng(0)
        for start in range(0, options.count, PIECE):
            part = written[start : start + PIECE]
            part[:] = rng.standard_normal(part.shape, np.float32)
        written.flush()
        del written, part
        latents = np.load(file, mmap_mode="r+")  # torch warns of arrays that cannot be written to
        patients = [f"{number // 2:016x}" for number in range(options.count)]  # two scans of each

        def ours() -> np.ndarray:
            return nearest_patients(17, latents, patients, range(options.count), NEAREST)[0]

        def read() -> float:
            return sum(float(torch.from_numpy(latents[s : s + PIECE]).sum()) for s in range(0, options.count, PIECE))

        before = anonymous_gb()
        with AnonymousMemory() as memory:
            found = ours()
        expected = np.concatenate([
            np.linalg.norm(latents[s : s + PIECE] - latents[17], axis=1) for s in range(0, options.count, PIECE)
        ])  # fmt: skip
        nearest = np.sort(expected.reshape(-1, 2).min(1))[:NEAREST] if options.count % 2 == 0 else None
        assert len({patients[r] for r in found}) == NEAREST
        if nearest is not None:
            np.testing.assert_allclose(expected[found], nearest, rtol=1e-5)
        took = seconds({"ours": ours, "rival": read}, options.repeats)
    subject = f"top-{NEAREST} of {options.count:,} × {LATENT}"
    write(
        "nearest_patients",
        [
            row(f"{subject}, vs reading them", took["ours"], took["rival"], "s", "≤ 3"),
            row(f"{subject}, anonymous memory", memory.most, 1.0, "GB", "≤ 1"),
        ],
        f"least of {options.repeats} turns, {options.threads} threads; memory-mapped float32, two scans of a patient; "
        f"{before:.2f} GB of the anonymous memory were there before the search, ids of the patients included",
    )


if __name__ == "__main__":
    main()
