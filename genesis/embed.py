"""Turn scans into vectors: what a pretrained encoder sees in each, to search, cluster or plot.

    python -m genesis.embed --weights NAME --data SCANS
    python -m genesis.embed --weights NAME --split test      (of the workspace's store)

SCANS is one scan, a folder, a CSV or a dataset.json. The encoder is shown patches that cover the body, of voxels as it
was trained on, and the vector is the mean of its features over them; the encoder of an image-text method, which has
learned from whole bodies, is shown that. Results are in embeddings/NAME of the workspace: vectors.csv with the columns
volume, patient, split, target and v0, v1, … (float32, to the last bit), and embedding.json.
Ids are hashed; case_map.csv, readable by you alone, leads from them to your files.

In Python: genesis.embed(package, scans) gives a dict of arrays by path, and writes nothing.
"""

import argparse
import shlex
import sys
from types import ModuleType
from typing import Any

from .downstream import add_scan_arguments, chosen_package, labelled_store
from .engine.launch import launch
from .errors import UserError
from .evaluation.embedding import FrozenEncoder, embed, embed_volumes, write_vectors
from .files import sha256, write_folder_aside, write_json
from .weights import read_card
from .workspace import Workspace


class _Verb(ModuleType):
    """`genesis.embed` is this module, as every verb's, and the function too."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return embed(*arguments, **settings)


sys.modules[__name__].__class__ = _Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_scan_arguments(parser, "scans, labelled or not (default: the workspace's own)")
    parser.add_argument(
        "--split", choices=("all", "train", "val", "test"), default="all", help="only those scans (default: all)"
    )
    parser.add_argument("--run", metavar="NAME", help="name of the result (default: after the weights and the data)")


def run(options: argparse.Namespace) -> None:
    workspace = Workspace.at(options.workspace)
    package = chosen_package(options.weights, workspace)
    card = read_card(package)
    device = launch(options.device).device
    encoder = FrozenEncoder.of(package, device)
    store, data_name = labelled_store(options, workspace, card, unlabelled=True)
    metas = store.select(None if options.split == "all" else options.split)
    if not metas:
        splits = ", ".join(sorted({meta.split for meta in store}))
        raise UserError(f"None of the {len(store)} scans is in the split {options.split}; there: {splits}.")
    folder = workspace.new_run(options.run or f"{package.resolve().name}-on-{data_name}", workspace.embeddings)
    vectors = embed_volumes(encoder, store, metas)
    with write_folder_aside(folder) as aside:
        write_vectors(aside / "vectors.csv", metas, vectors)
        record = {
            "schema": 1,
            "package": package.resolve().name,
            "weights": sha256(package / "weights.safetensors"),
            "split": options.split,
            "volumes": len(metas),
            "length": vectors.shape[1],
        }
        write_json(aside / "embedding.json", record)
    print(f"{len(metas)} vectors of {vectors.shape[1]} numbers are in {folder / 'vectors.csv'}.")
    labelled = f" --data {shlex.quote(options.data)}" if options.data else ""
    if not any(meta.labelled for meta in metas):
        labelled = " --data LABELLED"
    again = f"evaluate --task retrieval --weights {shlex.quote(options.weights or package.name)}{labelled}"
    print(f"What they are worth: {workspace.command(again)}")


if __name__ == "__main__":
    from .cli import main

    main(["embed", *sys.argv[1:]])
