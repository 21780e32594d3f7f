"""Name the module where numbers stop being finite while calibration text goes through a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from trtbuild.compress.blocks import is_finite
from trtbuild.errors import ToolError


def first_overflow(root: nn.Module, name: str, run: Callable[[], object]) -> str | None:
    """The first module inside `root`, named `name` in the model, that takes or gives what is not finite in `run`."""
    found: list[str] = []

    def watch(what: str, place: str) -> Any:
        def hook(module: nn.Module, *values: Any) -> None:  # noqa: ARG001  the signature of both kinds of hook
            value = values[-1][0] if isinstance(values[-1], tuple) and values[-1] else values[-1]
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not is_finite(value):
                found.append(f"the {what} of {place}")

        return hook

    handles = []
    for inner, module in root.named_modules():
        if inner:
            place = f"{name}.{inner}" if name else inner
            handles.append(module.register_forward_pre_hook(watch("input", place)))
            handles.append(module.register_forward_hook(watch("output", place)))
    with suppress(AssertionError):  # ModelOpt's answer to a range that is not finite
        run()
    for handle in handles:
        handle.remove()
    return found[0] if found else None


def overflow_error(index: int, culprit: str, kind: torch.dtype, size: int = 1) -> ToolError:
    """The error for `size` samples from `index` on, from 0."""
    samples = f"sample {index + 1}" if size == 1 else f"samples {index + 1} to {index + size}"
    return ToolError(
        f"calibration {samples}: {culprit} is not finite in {kind}",
        "the model does not compute with these weights and this text; check both",
    )
