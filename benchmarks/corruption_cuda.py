"""Corruption of a batch of 64 on a CUDA card against one training step of the published U-Net on it.

    python benchmarks/corruption_cuda.py

The step is bf16, channels last, compiled, on one fixed batch, so it is as short as it gets. That corruption never makes
the host wait for the card is not measured but enforced: PyTorch raises an error where it would. What each transform
takes alone, on all samples, is printed below.
"""

import argparse

import torch
from measure import row, write
from steps import seconds_of, stepper
from torch import nn

from genesis.engine.method import Batch
from genesis.methods.semantic_genesis import SemanticGenesis
from genesis.models import build_backbone
from genesis.transforms import BatchGenerator, BezierNonlinearity, Corruption, Flip, LocalShuffle, Paint, Transform
from genesis.transforms.fused import kernels


def smooth_batch(size: int, patch_size: tuple[int, ...], device: torch.device) -> Batch:
    """Images in [0, 1] that vary slowly."""
    noise = torch.rand(size, 1, *patch_size, generator=torch.Generator().manual_seed(0))
    images = nn.functional.avg_pool3d(noise, 5, stride=1, padding=2).to(device)
    zeros = torch.zeros(size, dtype=torch.int64, device=device)
    return {"image": images, "label": zeros, "key": torch.arange(size, device=device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu, with a small --batch and --size: to try the script")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 32))
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    device, size = torch.device(options.device), tuple(options.size)
    cuda = device.type == "cuda"
    corruption = Corruption()
    method = SemanticGenesis(build_backbone("published_unet", spatial_dims=3), 44, corruption).to(device)
    method.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    batch = smooth_batch(options.batch, size, device)
    if cuda:
        method.compile()

    def corrupt() -> None:
        corruption(batch["image"], BatchGenerator(batch["key"]))

    step = stepper(method, method.prepare(batch))
    how = "compiled" if cuda else "not compiled"
    try:
        step()
    except torch._dynamo.exc.TorchDynamoException as error:  # no compiler on this machine
        print(f"torch.compile failed: {type(error).__name__}")
        torch.compiler.set_stance("force_eager")
        how = "not compiled"
    corrupt()  # small tables are made and copied once, kernels are compiled once
    turns = []
    for _ in range(3):
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            corrupt()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        turns.append((seconds_of(corrupt, options.repeats, device), seconds_of(step, options.repeats, device)))
    ours, rival = (min(times) * 1000 for times in zip(*turns, strict=True))
    subject = (
        f"corruption, batch {options.batch}, {'×'.join(map(str, size))}, vs a training step of the published U-Net"
    )
    parts = {}
    for transform in (Flip(), LocalShuffle(), BezierNonlinearity(), Paint()):

        def alone(transform: Transform = transform) -> None:
            transform(batch["image"], BatchGenerator(batch["key"]))

        parts[type(transform).__name__] = min(seconds_of(alone, options.repeats, device) for _ in range(3)) * 1000
    write(
        "corruption_cuda",
        [row(subject, ours, rival, "ms", "≤ 0.03")],
        f"least of 3 turns of {options.repeats}; the step: bf16, channels last, {how}, on one fixed batch",
        "ms of each transform alone: " + ", ".join(f"{name} {time:.2f}" for name, time in parts.items()),
        f"kernels: {'of PyTorch' if kernels(device) is None else 'of our own, in Triton'}",
        "no synchronisation: torch.cuda.set_sync_debug_mode('error') was on while corrupting",
        device=device.type,
    )


if __name__ == "__main__":
    main()
