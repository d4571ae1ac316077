"""Where and how networks compute: device, precision, threads, compilation - chosen once, printed, written down.

The choice follows from the machine and the net by rule, never from a stopwatch alone, so that the same command on the
same machine computes the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from runs.config import Knob, UserError

CORES = torch.get_num_threads()  # what torch starts with
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@dataclass(frozen=True)
class ComputeConfig:
    """The flags of this file."""

    device: Annotated[str, Knob("where to compute", choices=("auto", "cpu", "cuda"))] = "auto"
    precision: Annotated[str, Knob("of layers; weights stay fp32", choices=("auto", "fp32", "bf16"))] = "auto"
    threads: Annotated[int, Knob("torch threads; 0 chooses for the net", low=0)] = 0
    compile: Annotated[str, Knob("compile the update", choices=("auto", "on", "off"))] = "auto"


@dataclass(frozen=True)
class Compute:
    """A resolved `ComputeConfig`."""

    device: str
    precision: str
    threads: int
    compile: bool
    threads_acting: int = 1

    def learning(self) -> None:
        """Use the threads that learning uses."""
        if self.threads_acting != self.threads:
            torch.set_num_threads(self.threads)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """No gradients, the precision of layers, and the threads for few observations."""
        if self.threads_acting != self.threads:
            torch.set_num_threads(self.threads_acting)
        with torch.inference_mode(), self.autocast():
            yield

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Layers in bf16 where that was chosen; nothing elsewhere."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def __str__(self) -> str:
        """One line for the panel."""
        where = (
            torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"cpu, {_count(self.threads, 'thread')}"
        )
        return f"{where}, {self.precision}, {'compiled' if self.compile else 'eager'} update"


def choose(
    config: ComputeConfig, *, image: bool, updates: int, say: Callable[[str], None], wide: bool = True
) -> Compute:
    """Resolve every "auto" for a net that reads images or not, in a run of about `updates` updates.

    Sets torch's thread count. Convolutions use every core. Dense nets act on one thread, and learn on two where they
    are `wide` and the update is compiled: otherwise the cost is dispatch, not arithmetic. Compilation costs 5-20 s,
    which long runs earn back.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no usable CUDA device is here; use --device cpu")
    compiled = config.compile == "on" or (
        config.compile == "auto" and updates >= (5_000 if image else 20_000)
    )
    if compiled and not _can_compile(device):
        say("no C++ compiler found: the update runs uncompiled (slower, same results up to rounding)")
        compiled = False
    threads = config.threads or (CORES if image else min(CORES, 2) if compiled and wide else 1)
    torch.set_num_threads(threads)
    precision = config.precision
    if precision == "auto":
        precision = _precision(device, say) if image else "fp32"
    _keep_memory()
    return Compute(device, precision, threads, compiled, threads if image else 1)


def to_device(part: Any, device: str) -> Any:
    """Arrays and tensors (or dicts and tuples of them) on the device, without a copy on the CPU."""
    if isinstance(part, dict):
        return {name: to_device(leaf, device) for name, leaf in part.items()}
    if isinstance(part, tuple):
        return tuple(to_device(leaf, device) for leaf in part)
    return torch.as_tensor(part).to(device, non_blocking=True)


def to_numpy(part: Any) -> Any:
    """Tensors (or dicts and tuples of them) as arrays, without a copy on the CPU."""
    if isinstance(part, dict):
        return {name: to_numpy(leaf) for name, leaf in part.items()}
    if isinstance(part, tuple):
        return tuple(to_numpy(leaf) for leaf in part)
    return part.detach().cpu().numpy()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, part: float = 1.0) -> None:
    """Move the weights of `target` that part of the way to those of `source`; all the way is exact."""
    if source is target:
        return
    for new, old in zip(source.parameters(), target.parameters(), strict=True):
        old.copy_(new) if part == 1 else old.lerp_(new, part)


def guarded_compile(function: Callable[..., Any], say: Callable[[str], None]) -> Callable[..., Any]:
    """`torch.compile(function)`, falling back to the function itself if its first call fails to compile.

    The shapes and types of tensors are checked at each call, nothing else: whatever the function reads besides, and
    which arguments are None, must stay as it was at the first call.
    """
    # isolated, since without its other guards the graph of one agent would do for any other
    how: Any = {"dynamic": False, "options": {"guard_filter_fn": _of_arguments}, "isolate_recompiles": True}
    compiled = torch.compile(function, **how)
    # lets a graph hold torch.autograd.grad, and with it the whole update
    torch._dynamo.config.trace_autograd_ops = True
    state = {"run": compiled, "proven": False}

    def call(*arguments: Any) -> Any:
        if state["proven"]:
            return state["run"](*arguments)
        try:
            result = state["run"](*arguments)
        except (
            Exception
        ) as error:  # inductor fails in many ways; an error of ours comes again from the plain call
            state["run"] = function
            result = function(*arguments)
            say(f"compilation failed ({type(error).__name__}): the update runs uncompiled")
        state["proven"] = True
        return result

    return call


def _keep_memory() -> None:
    """Let the C library keep the memory that is freed (up to a gigabyte) instead of giving it back to the system.

    A batch of images needs blocks that are large enough to be mapped anew at each update otherwise, and touching
    fresh pages costs as much as the convolutions.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    # without the first option the second would have every larger block mapped; older versions allow 32 MiB
    if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20):
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which guards to check at each call: those of tensors that are passed, not those of the nets and settings."""
    return [g.guard_type == "TENSOR_MATCH" and "self" not in g.name for g in guards]


def _can_compile(device: str) -> bool:
    return device == "cuda" or any(
        shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")
    )


def _precision(device: str, say: Callable[[str], None]) -> str:
    """bf16 if the processor has it, and a convolution agrees with fp32 and is not far slower; else fp32."""
    if device == "cpu" and not _cpu_has_bf16():
        return "fp32"
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        return "fp32"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads would measure whatever else the machine is doing
    difference, ratio = _compare_bf16(device)
    torch.set_num_threads(threads)
    if difference > 0.02:
        say(f"bf16 convolutions are off by {difference:.1%} here: computing in fp32")
        return "fp32"
    if ratio > 3:  # some builds of the kernels are many times slower; noise does not reach this
        say(f"bf16 convolutions are {ratio:.1f} times slower than fp32 here: computing in fp32")
        return "fp32"
    say(f"bf16 checked against fp32: difference {difference:.2%}, weights stay fp32")
    return "bf16"


def _cpu_has_bf16() -> bool:
    capability = torch.cpu.get_capabilities()
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))


def _compare_bf16(device: str) -> tuple[float, float]:
    """Relative difference of the output and gradient of NatureCNN's second layer, and time(bf16) / time(fp32)."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(32, 32, 20, 20, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
    )
    layer = nn.Conv2d(32, 64, 4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 23)
        layer.bias.zero_()  # type: ignore[union-attr]  # built with a bias
    layer = layer.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it

    def run(enabled: bool) -> tuple[torch.Tensor, float]:
        best = float("inf")
        for _ in range(10):
            layer.zero_grad()
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                y = layer(x).float()
            y.square().mean().backward()
            result = torch.cat([y.detach().flatten(), layer.weight.grad.flatten() * 1e2]).cpu()  # type: ignore[union-attr]
            best = min(best, time.perf_counter() - start)
        return result, best

    (exact, slow), (rough, fast) = run(False), run(True)
    return float((rough - exact).norm() / exact.norm()), fast / slow


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
