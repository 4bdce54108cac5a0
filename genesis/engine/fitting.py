"""How many patches a step can take: judged by a few before the first, and tried when memory has run out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.host_memory import host_memory
from ..errors import UserError
from .batches import first_samples
from .launch import processes_here
from .memory import MARGIN, bytes_kept, largest_that_fits, memory_of
from .method import Batch, Method, Output

if TYPE_CHECKING:
    from lightning.fabric import Fabric

FEW = 8  # patches of which the memory is measured


class Fitting:
    """Of a method that computes its share of a batch in so many parts, each within `autocast`."""

    def __init__(
        self, fabric: "Fabric", method: Method, autocast: Callable[[], AbstractContextManager], parts: int
    ) -> None:
        self._fabric, self._method, self._autocast, self._parts = fabric, method, autocast, parts

    def check(self, samples: Dataset[Batch], prepare: Callable[[Batch], Batch], share: int) -> None:
        """Raise `UserError` that says what fits when a process' share of a batch is far too large for host memory.

        Found on a few patches, before anything is trained: a CPU would compute for minutes until it has no more. What a
        forward pass keeps is the least that a step takes; measured was 1.6 to 1.8 times as much, for gradients, and
        layouts of oneDNN's own.
        """
        if share // self._parts <= FEW:
            return
        few = first_samples(samples, self._fabric, prepare, FEW)
        made = sum(tensor.nbytes for tensor in few.values()) / FEW
        self._method.eval()
        some = ({name: x[:count].clone() for name, x in few.items()} for count in (FEW // 2, FEW))
        less, more = (bytes_kept(partial(self._forward, batch)) for batch in some)  # with the weights, both
        self._method.train()
        kept = max(1.0, (more - less) / (FEW - FEW // 2))
        room = MARGIN * host_memory(swap=True)[0] / processes_here(self._fabric)
        if share * made > room:
            raise UserError(
                f"The {share} patches of a step do not fit into {memory_of(self._fabric.device)}, about "
                f"{int(room / (made + 2 * kept))} do: use a smaller batch_size."
            )
        if share * made + share // self._parts * kept > room:
            one_part = room / (made + 2 * kept)
            fits = one_part if self._parts == 1 else (room - share * made) / (2 * kept)
            raise UserError(self._refusal(share, int(fits)))

    def tried(self, batch: Batch, learned: Sequence[Tensor]) -> str:
        """What to say of a batch that was too large: how many of its patches fit, found by trying."""

        def attempt(count: int) -> None:
            losses = self._forward({name: tensor[:count] for name, tensor in batch.items()}).losses
            torch.autograd.grad(torch.stack(list(losses.values())).sum(), learned, allow_unused=True)

        share = len(batch["image"])
        self._method.eval()  # in which a method waits for no other process either
        fits = largest_that_fits(attempt, share // self._parts)
        self._method.train()
        return self._refusal(share, fits)

    def _forward(self, batch: Batch) -> Output:
        """Without the model's wrapper, so that no other process is waited for."""
        with self._autocast(), torch.compiler.set_stance("force_eager"):
            output: Output = self._method(batch)
        return output

    def _refusal(self, share: int, fits: int) -> str:
        where = memory_of(self._fabric.device)
        if not fits:
            return f"Not even one patch fits into {where}: use a smaller data.patch_size or network, or another device."
        return (
            f"{share // self._parts} patches at once do not fit into {where}, {fits} do: use a smaller batch_size, or "
            "a larger train.accumulate, which takes a batch in parts where the method allows it."
        )
