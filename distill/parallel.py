"""Several processes, one lesson: each takes a share of every batch, gradients are added up.

The losses hold the sums over all processes (`distill.masked.global_sum`) and batch norm its
statistics, so that two processes learn exactly what one does with the whole batch. Gradients go in
one flat all-reduce after the backward pass: simpler than overlapping it, cheap for a student (30 M
parameters are 120 MB), and a NaN of one process is a NaN of all, so that all skip the same step.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from distill.masked import world
from teacher.errors import EnvironmentFailure

LINGER_S = 30.0  # how long companions may take to end after the first process has
TIMEOUT = datetime.timedelta(minutes=30)  # a validation or a checkpoint of the first may take so


def rank() -> int:
    """Number of this process among those that share the lesson; only 0 writes."""
    return dist.get_rank() if world() > 1 else 0


def started_as_companion() -> bool:
    """Whether `companions` or torchrun has already started the processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def companions(devices: int, arguments: dict[str, Any]) -> Iterator[None]:
    """Start ``devices - 1`` further processes of `distill.train.train` with the same arguments.

    This process becomes the first of them. They end with it: by themselves after the last step or
    a signal, which all agree on, else by force.
    """
    shared = {
        "WORLD_SIZE": str(devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    before = {name: os.environ.get(name) for name in (*shared, "RANK", "LOCAL_RANK")}
    others = []
    try:
        for number in range(1, devices):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            command = [sys.executable, "-m", "distill.parallel", json.dumps(arguments)]
            environment = {**os.environ, **shared, **own}
            # a group of their own: Ctrl-C reaches the first process, which tells the others
            others.append(
                subprocess.Popen(command, env=environment, process_group=0, stdout=sys.stderr)
            )
        os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
        yield
    except RuntimeError as error:
        codes = {i: p.poll() for i, p in enumerate(others, 1) if p.poll()}
        if not codes or hasattr(error, "exit_code"):
            raise
        listed = ", ".join(f"{i} with code {code}" for i, code in codes.items())
        raise EnvironmentFailure(
            f"trainer.devices={devices}: process {listed} ended before the lesson did (its last "
            "words are above; a negative code is a signal, -9 often means no memory). The last "
            "checkpoint is whole; the same command goes on there."
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _end(others)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    failed = sys.exc_info()[0] is not None
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0 if failed else LINGER_S)
        if process.poll() is None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Meet the other processes, if there are any, for the time of the block."""
    if not started_as_companion():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def said_by_first(value: Any) -> Any:
    """What the first process says, in all; the others' ``value`` is not looked at."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agreed(*values: float, device: torch.device) -> list[float]:
    """The largest of each value over all processes."""
    if world() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by the sum over all processes."""
    if world() == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


class _Sum(torch.autograd.Function):
    """Sum over all processes whose gradient is the sum of all their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _shared_statistics(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm over the pixels of all processes (Ioffe & Szegedy 2015, algorithm 1)."""
    wide = x.float()
    sums = torch.cat([wide.sum((0, 2, 3)), (wide**2).sum((0, 2, 3))])
    count = float(x.numel() // x.shape[1] * world())  # all processes have equal shares
    mean, square = (_Sum.apply(sums) / count).chunk(2)
    variance = (square - mean**2).clamp(min=0)
    if norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None and norm.num_batches_tracked is not None
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = norm.momentum if norm.momentum is not None else 0.1
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    return (wide * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


def share_norms(student: nn.Module) -> None:
    """Let every batch norm of ``student`` see the whole batch; only while it trains.

    torch's own SyncBatchNorm runs on GPUs only, so could not be held to one process in a test.
    """
    if world() == 1:
        return
    for module in student.modules():
        if not isinstance(module, nn.BatchNorm2d):
            continue

        def forward(norm: nn.BatchNorm2d, x: Tensor, plain: Any = module.forward) -> Tensor:
            if not norm.training:
                return plain(x)
            x = _shared_statistics(norm, x)
            return norm.act(norm.drop(x)) if isinstance(norm, BatchNormAct2d) else x

        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def main(arguments: str) -> int:
    """A companion: `distill.train.train` with JSON arguments; the first tells what ended all."""
    from distill.train import train

    try:
        train(**json.loads(arguments))
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if isinstance(code, int):
            return code
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
