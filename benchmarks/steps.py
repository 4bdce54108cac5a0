"""Training steps on one fixed batch that is prepared already: what data, corruption and logging cannot slow down."""

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from genesis.engine.method import Batch
from genesis.methods.semantic_genesis import SemanticGenesis


def stepper(method: SemanticGenesis, batch: Batch) -> Callable[[], None]:
    """A function that takes one step: bf16 autocast on CUDA and Adam as one kernel, as the trainer has it."""
    method.train()  # `genesis.train` leaves it in eval mode, in which batch norm computes no statistics
    device = batch["image"].device
    optimizer = torch.optim.Adam(method.parameters(), 1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = method(batch).losses
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(run: Callable[[], object], count: int, device: torch.device, warm_up: int = 3) -> float:
    """Mean seconds of one of `count` calls in a row; the device is waited for at both ends."""
    for _ in range(warm_up):
        run()
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    wait(device)
    return (time.perf_counter() - start) / count


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_flops(method: SemanticGenesis, batch: Batch) -> float:
    """Floating point operations of convolutions and matrix products, forward and backward, of one step."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        torch.stack(list(method(batch).losses.values())).sum().backward()
    method.zero_grad()
    return float(counter.get_total_flops())


def matrix_rate(device: torch.device, side: int = 8192) -> float:
    """Measured FLOP/s of a product of square bf16 matrices: what the device can do at best, in practice."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: a @ b, 10, device) for _ in range(3))
