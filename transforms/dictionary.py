"""The transforms in MONAI pipelines."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple_rep
from torch import Tensor

from .corruption import Corruption
from .random import BatchGenerator


class DictionaryTransform(RandomizableTransform, MapTransform):
    """Makes any transform of this package a MONAI dictionary transform of unbatched images (C, *spatial) in [0, 1].

    All keys get the same random parameters. Reproducible by `set_random_state` and `monai.utils.set_determinism`.
    Tensors, MetaTensors and NumPy arrays stay what they are; a flip does not change a MetaTensor's affine.

    Args:
        keys: of the images.
        transform: for instance `LocalShuffle()`.
        prob: probability of transforming at all.
        target_keys: only with `Corruption`: where what is to be restored goes, one key per image.
        allow_missing_keys: pass over keys that the data lack.

    Raises:
        ValueError: for a `Corruption` without target keys, or another transform with them.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Callable[[Tensor, BatchGenerator], Any],
        prob: float = 1.0,
        target_keys: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if isinstance(transform, Corruption) != (target_keys is not None):
            raise ValueError(f"target_keys={target_keys}: a Corruption needs one per key, other transforms have none.")
        self.transform = transform
        self.target_keys = ensure_tuple_rep(target_keys, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize(None)
        seed = int(self.R.randint(np.iinfo(np.int32).max))
        for key, target_key in self.key_iterator(result, self.target_keys):
            changed, target = self._change(convert_to_tensor(data[key], track_meta=False), seed)
            result[key] = convert_to_dst_type(changed, data[key])[0]
            if target_key is not None:
                result[target_key] = convert_to_dst_type(target, data[key])[0]
        return result

    def _change(self, image: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The changed image and the target."""
        if not self._do_transform:
            return image, image
        changed = self.transform(image.unsqueeze(0), BatchGenerator.from_seed(seed, 1, image.device))
        return (changed[0][0], changed[1][0]) if isinstance(changed, tuple) else (changed[0], image)
