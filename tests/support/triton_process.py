"""The Triton kernels, run on what the machine has: compiled on a GPU, else by Triton's interpreter.

Triton decides between the two when it is imported, and vLLM has imported it by then: the interpreter gets a
process of its own.
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from server.engine import triton_delta

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def delta(
    y: Tensor, x: Tensor, weights: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """A copy of y with the experts' delta added."""
    y = y.clone()
    triton_delta.add_expert_delta(y, x, triton_delta.plan(weights), lora_a, lora_b, scaling)
    return y


def plan(weights: Tensor) -> Tensor:
    """The routing plan of one step."""
    return triton_delta.plan(weights)


class Kernels:
    """`delta` and `plan`, taking and returning tensors of `DEVICE`."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self._run = run

    def delta(self, *args: Tensor | float) -> Tensor:
        return self._run(delta, *args)

    def plan(self, weights: Tensor) -> Tensor:
        return self._run(plan, weights)


@contextmanager
def running() -> Iterator[Kernels]:
    """Kernels to call; ends the interpreter's process."""
    if DEVICE == "cuda":
        yield Kernels(lambda function, *args: function(*args))
        return
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(torch.set_num_threads, 1).result()  # starts the process, in this environment
        patch.undo()

        def run(function: Callable[..., Tensor], *args: Tensor | float) -> Tensor:
            return _unpack(pool.submit(_call, function, _pack(args)).result())[0]

        yield Kernels(run)


def _call(function: Callable[..., Tensor], args: bytes) -> bytes:
    return _pack((function(*_unpack(args)),))


def _pack(values: tuple[Tensor | float, ...]) -> bytes:
    """Bytes, not shared memory: what the other side does to a tensor must not show here."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> tuple[Tensor | float, ...]:
    return torch.load(io.BytesIO(data), weights_only=True)
