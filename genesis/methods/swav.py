"""SwAV (Caron et al., NeurIPS 2020): views are clustered online, and the code of one is predicted from the others."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.gathering import gathered
from ..engine.method import Batch, Method, Output
from ..evaluation.probes import alignment, effective_rank, uniformity
from ..losses.clustering import code_entropy, nearest_prototypes, sinkhorn, swapped_prediction_loss
from ..models import Backbone, ProjectionHead, Prototypes
from ..models.heads import pool
from ..transforms import BatchGenerator, MultiCrop

KINDS = ("global", "local")  # of views


class Seen(NamedTuple):
    """What the network makes of B samples."""

    features: Tensor  # (G, B, C), pooled bottleneck of the global views
    embeddings: Tensor  # (V, B, D), unit vectors, of all views
    scores: Tensor  # (V, B, K), their similarity to the prototypes


class SwAV(Method):
    """L = swapped prediction: the cross-entropy between every global view's code and what each other view predicts.

    Codes are computed over the batch of all processes, and from step `queue_start` on over a queue of the latest
    embeddings beside it: a small batch cannot be spread over many prototypes. The queue is the same in all processes.

    Args:
        backbone: its encoder is trained, the decoder stays as it was initialised.
        views: how views are made, on the device, from each sample's own random key.
        prototypes: of the length of an embedding.
        head: from pooled bottleneck features to embeddings.
        temperature, epsilon, iterations: τ of the prediction; ε and rounds of Sinkhorn-Knopp.
        frozen_steps: the first steps, in which prototypes stay as they are.
        queue: its length in samples; 0: none.
    """

    queue: Tensor
    queued_modality: Tensor
    steps: Tensor

    def __init__(
        self,
        backbone: Backbone,
        views: MultiCrop,
        head: ProjectionHead,
        prototypes: Prototypes,
        *,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        frozen_steps: int = 313,
        queue: int = 0,
        queue_start: int = 0,
    ) -> None:
        super().__init__()
        self.backbone, self.views, self.head, self.prototypes = backbone, views, head, prototypes
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.frozen_steps, self.queue_start = frozen_steps, queue_start
        dim = prototypes.weight.shape[1]
        self.register_buffer("queue", torch.zeros(views.global_views, queue, dim))  # the latest first
        self.register_buffer("queued_modality", torch.full((queue,), -1))  # -1: nothing there yet
        self.register_buffer("steps", torch.tensor(0))  # taken
        backbone.train_encoder_only()

    def forward(self, batch: Batch) -> Output:
        """Batch, prepared: global (B, G, C, *spatial), perhaps local, and modality (B,) int64."""
        seen = self._see(batch)
        return self._output(seen, self._codes(seen, batch["modality"]), batch)

    def before_optimizer_step(self, step: int) -> None:
        gradient = self.prototypes.weight.grad
        if step < self.frozen_steps and gradient is not None:
            gradient.zero_()

    def after_optimizer_step(self, step: int) -> None:
        self.prototypes.normalise()
        self.steps.fill_(step + 1)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Codes are computed over all held-out samples at once.

        loss; swapped: the cross-entropy of codes and predictions, beside ln_prototypes, that of a uniform guess;
        agreement: how often a global view's nearest prototype is the first of another one's code; code_entropy, in
        units of ln_prototypes; prototype_usage and largest_prototype of the global views, see `nearest_prototypes`;
        alignment and uniformity of the embeddings of global views; effective_rank of their pooled bottleneck features.
        """
        seen, rest = [], []
        for batch in batches:
            seen.append(self._see(batch))
            rest.append({name: tensor for name, tensor in batch.items() if tensor.ndim == 1})
        everything = Seen(*(torch.cat(parts, dim=1) for parts in zip(*seen, strict=True)))
        batch = {name: torch.cat([each[name] for each in rest]) for name in rest[0]}
        codes = self._codes(everything, batch["modality"])
        return self._figures(everything, codes, batch)

    def collapsed(self, figures: dict[str, float]) -> list[str]:
        found = []
        if figures["swapped"] >= 0.99 * figures["ln_prototypes"]:
            found.append(
                f"the prediction of codes (loss {figures['swapped']:.3g}) is no better than a uniform guess "
                f"({figures['ln_prototypes']:.3g})"
            )
        if figures["code_entropy"] >= 0.99:
            found.append("codes are uniform: they tell no view from another")
        if figures["largest_prototype"] >= 0.95:
            found.append(f"one prototype gets {figures['largest_prototype']:.0%} of all views")
        if figures["effective_rank"] < 1.5:
            found.append("the features of all views lie on one line")
        return found

    def told(self, figures: dict[str, float]) -> list[str]:
        return [
            f"swapped prediction {figures['swapped']:.3g}, against {figures['ln_prototypes']:.3g} for a uniform guess; "
            f"the nearest prototypes of two views agree in {figures['agreement']:.1%}",
            f"code entropy {figures['code_entropy']:.2f} of 1, prototype usage {figures['prototype_usage']:.2f} of 1",
        ]

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        columns = {"region": batch["image"]}
        for kind in (kind for kind in KINDS if kind in batch):
            columns |= {f"{kind} {i}": view for i, view in enumerate(batch[kind].unbind(1), 1)}
        return {"views": columns}

    def augment(self, batch: Batch) -> Batch:
        """global (B, G, C, *spatial) and, if there are any, local (B, L, C, *spatial): the views by their size."""
        views, count = self.cut(batch), self.views.global_views
        kinds = {"global": views[:count], "local": views[count:]}
        return {kind: torch.stack(same, dim=1) for kind, same in kinds.items() if same}

    def cut(self, batch: Batch) -> list[Tensor]:
        """Global and local views (B, C, *spatial) of image (B, C, *region), by modality (B,) and key (B,) int64."""
        return self.views(batch["image"], batch["modality"], BatchGenerator(batch["key"]))

    def _see(self, batch: Batch) -> Seen:
        features = [
            pool(self.backbone.encode(views.transpose(0, 1).flatten(0, 1))[-1]).unflatten(0, (views.shape[1], -1))
            for views in (batch[kind] for kind in KINDS if kind in batch)
        ]
        pooled = torch.cat(features)
        embeddings = self.head(pooled.flatten(0, 1))
        modality = batch["modality"].repeat(len(pooled))
        scores = self.prototypes(embeddings, modality)
        shape = pooled.shape[:2]
        return Seen(features[0], embeddings.unflatten(0, shape), scores.unflatten(0, shape))

    @torch.compiler.disable
    @torch.no_grad()
    def _codes(self, seen: Seen, modality: Tensor) -> Tensor:
        """(G, B, K), the codes of global views."""
        count, samples = self.views.global_views, len(modality)
        embeddings, scores = seen.embeddings[:count].detach(), seen.scores[:count].detach()
        ranks = processes() if self.training else 1
        if self.training:
            scores = torch.cat((scores, self._queue_scores(ranks)), dim=1)
            self._enqueue(embeddings, modality)
        codes = [
            sinkhorn(of_view, epsilon=self.epsilon, iterations=self.iterations, distributed=ranks > 1)
            for of_view in scores
        ]
        return torch.stack(codes)[:, :samples]

    def _queue_scores(self, ranks: int) -> Tensor:
        """(G, this process's share of the queue, K); -inf for places that are empty or not yet used."""
        place = slice(torch.distributed.get_rank(), None, ranks) if ranks > 1 else slice(None)
        embeddings, modality = self.queue[:, place], self.queued_modality[place]
        scores = self.prototypes(embeddings.flatten(0, 1), modality.repeat(len(embeddings)))
        unused = (modality < 0) | (self.steps < self.queue_start)
        return scores.unflatten(0, embeddings.shape[:2]).masked_fill(unused[:, None], -math.inf)

    def _enqueue(self, embeddings: Tensor, modality: Tensor) -> None:
        length = self.queue.shape[1]
        if not length:
            return
        embeddings, modality = gathered(embeddings.transpose(0, 1))[0].transpose(0, 1), gathered(modality)[0]
        self.queue.copy_(torch.cat((embeddings, self.queue), dim=1)[:, :length])
        self.queued_modality.copy_(torch.cat((modality, self.queued_modality))[:length])

    def _output(self, seen: Seen, codes: Tensor, batch: Batch) -> Output:
        swapped = swapped_prediction_loss(codes, seen.scores, temperature=self.temperature)
        usage, _ = nearest_prototypes(seen.scores[: len(codes)].detach())
        entropy = code_entropy(codes, self.prototypes.count)
        metrics = {"swapped": swapped.detach(), "code_entropy": entropy, "prototype_usage": usage}
        return Output({"clustering": swapped}, metrics)

    def _figures(self, seen: Seen, codes: Tensor, batch: Batch) -> dict[str, float]:
        output = self._output(seen, codes, batch)
        globals_ = seen.scores[: len(codes)]
        _, largest = nearest_prototypes(globals_)
        figures = {name: float(value) for name, value in output.metrics.items()}
        return {
            "loss": float(torch.stack(list(output.losses.values())).sum()),
            **figures,
            "ln_prototypes": math.log(self.prototypes.count),
            "agreement": float((globals_[0].argmax(1) == codes[1].argmax(1)).float().mean()),
            "largest_prototype": float(largest),
            "alignment": float(alignment(seen.embeddings[0], seen.embeddings[1])),
            "uniformity": float(uniformity(seen.embeddings[0])),
            "effective_rank": effective_rank(seen.features.flatten(0, 1).float()),
        }


def processes() -> int:
    """How many train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
