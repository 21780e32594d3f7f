"""Run calibration text through the model: one sample at a time, with progress and a count of what experts saw."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from trtbuild.compress.blocks import is_finite
from trtbuild.compress.overflow import first_overflow, overflow_error
from trtbuild.compress.request import Meter
from trtbuild.runtime.experts import UnfusedExperts

Loop = Callable[[nn.Module], None]


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of the decoder layers; None where the class has no such list."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    return None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order; their number is what progress counts."""
    found = layer_list(model)
    return list(found[1]) if found else []


def calibration_loop(samples: Sequence[Sequence[int]], meter: Meter, passes: Sequence[tuple[str, int]]) -> Loop:
    """Return the function that ModelOpt calls to put the samples through the model, once for every pass.

    Args:
        samples: Token ids, one list per sample.
        meter: Told after every decoder layer.
        passes: For each call of the loop what it does, and what one decoder layer costs in it.

    The loop raises ToolError where an activation is not finite, and names the module.
    """
    remaining = list(passes)

    def loop(model: nn.Module) -> None:
        what, cost = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        layers = decoder_layers(model)
        device = next(model.parameters()).device
        arguments = forward_arguments(model)
        position = [0]

        def tick(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  the signature of a hook
            sample, layer = divmod(position[0], len(layers))
            position[0] += 1
            hidden = output[0] if isinstance(output, tuple) else output
            if not is_finite(hidden):
                raise _OverflowError
            meter.advance(cost, f"{what}: sample {sample + 1} of {len(samples)}, layer {layer + 1} of {len(layers)}")

        handles = [layer.register_forward_hook(tick) for layer in layers]
        try:
            with torch.no_grad():
                for index, sample in enumerate(samples):
                    ids = torch.tensor([list(sample)], device=device)
                    _run(model, index, partial(model, input_ids=ids, **arguments))
        finally:
            for handle in handles:
                handle.remove()

    return loop


class _OverflowError(Exception):
    """A decoder layer's output is not finite."""


def _run(model: nn.Module, index: int, run: Callable[[], object]) -> None:
    """Run one sample.

    Raises:
        ToolError: An activation is not finite; names the module.
    """
    try:
        run()
    except (_OverflowError, AssertionError) as error:  # the second is ModelOpt's answer to a range that is not finite
        culprit = first_overflow(model, "", lambda: _until_overflow(run))
        if culprit is None:
            raise
        raise overflow_error(index, culprit, next(model.parameters()).dtype) from error


def _until_overflow(run: Callable[[], object]) -> None:
    with suppress(_OverflowError):
        run()


def forward_arguments(model: nn.Module) -> dict[str, Any]:
    """Keep no KV cache and, where the class can, compute the logits of one position only: they are not used."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if name in known}


@contextmanager
def count_expert_tokens(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Count, while open, the tokens that every expert receives; by the name of the experts module."""
    counts: dict[str, list[int]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            counts[name] = [0] * module.num_experts
            handles.append(module.register_forward_pre_hook(_counter(counts[name])))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tally_experts(model: nn.Module, prefix: str, tokens: int) -> Iterator[dict[str, list[int]]]:
    """Count, while open, what every expert receives of the first `tokens` tokens: of one pass over the samples.

    The result is by the name of the experts module, which begins with `prefix`; it is empty where nothing passed.
    """
    counts: dict[str, list[int]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            full = ".".join(part for part in (prefix, name) if part)
            handles.append(module.register_forward_pre_hook(_tally(counts, full, module.num_experts, tokens)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _tally(counts: dict[str, list[int]], name: str, experts: int, tokens: int) -> Callable[[nn.Module, Any], None]:
    left = [tokens]

    def count(module: nn.Module, args: Any) -> None:  # noqa: ARG001  the signature of a hook
        chosen = args[1]  # [T, k]
        if left[0] <= 0:
            return
        left[0] -= len(chosen)
        _add(counts.setdefault(name, [0] * experts), chosen)

    return count


def _counter(counts: list[int]) -> Callable[[nn.Module, Any], None]:
    def count(module: nn.Module, args: Any) -> None:  # noqa: ARG001  the signature of a hook
        _add(counts, args[1])

    return count


def _add(counts: list[int], chosen: torch.Tensor) -> None:
    """Count how often each expert is chosen [T, k]."""
    for index, seen in enumerate(torch.bincount(chosen.flatten(), minlength=len(counts)).tolist()[: len(counts)]):
        counts[index] += seen


def idle_experts(counts: dict[str, list[int]]) -> list[str]:
    """Names of the experts that no calibration token reached."""
    return [f"{name}.{index}" for name, seen in counts.items() for index, tokens in enumerate(seen) if tokens == 0]
