"""Reading the published checkpoints: Genesis_Chest_CT.pt, semantic_genesis_chest_ct.pt, TransVW_chest_ct.pt."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor

from ..errors import UserError
from ..models import PublishedUNet

# Their training scripts stored losses as NumPy scalars. These types only rebuild such numbers and run no code.
_NUMPY_SCALARS: list[Any] = [
    scalar,
    (scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]
_WRAPPERS = ("module.", "classficationNet.")  # sic; of DataParallel and of the classification script
_NOT_THE_UNET = ("projection_head", "prototypes", "clc_out")


def read_published(path: Path) -> dict[str, Tensor]:
    """The weights of a published checkpoint under `PublishedUNet`'s keys, without classification and other heads.

    Raises `UserError` when the file is no such checkpoint, or holds more than tensors and plain numbers.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as a published checkpoint (tensors and plain numbers only): "
            f"{str(error).splitlines()[0]}"
        ) from None
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    with torch.device("meta"):  # its keys are wanted, not its weights
        known = PublishedUNet().state_dict()
    weights = {_plain(key): value for key, value in state.items() if not _plain(key).startswith(_NOT_THE_UNET)}
    if unknown := sorted(weights.keys() - known.keys()):
        raise UserError(f"{path} is not a checkpoint of the published 3D U-Net: it has {unknown[0]}.")
    if missing := sorted(known.keys() - weights.keys()):
        raise UserError(f"{path} is not a whole checkpoint of the published 3D U-Net: {missing[0]} is missing.")
    return weights


def _plain(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key
