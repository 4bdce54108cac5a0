"""Write tests/version_1: each artefact as its version 1 is, to stay readable. Run once; never to be repeated.

python tests/record_version_1.py
"""

import shutil
import tempfile
from pathlib import Path

from chaos import commands, write_scans

from genesis import cli

KEPT = ("store", "discovery", "runs", "weights")
TARGET = Path(__file__).parent / "version_1"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scans(root)
        for verb in ("prepare", "discover", "train", "export"):
            arguments = commands(root)[verb]
            cli.main([verb, "--workspace", str(root / "workspace"), "--device", "cpu", *arguments])
        for kind in KEPT:
            shutil.copytree(
                root / "workspace" / kind, TARGET / kind, ignore=shutil.ignore_patterns("figures", "tensorboard")
            )


if __name__ == "__main__":
    main()
