"""The draft step: prompts, the target's own answers, training, measurement, and the exported draft."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trtbuild.compress.journal import Journal
from trtbuild.compress.request import Meter
from trtbuild.compress.source import pick_device
from trtbuild.runtime.drafts.medusa import heads_of
from trtbuild.runtime.drafts.tensors import Taker
from trtbuild.runtime.intake import read_end_ids
from trtbuild.training.answers import Answered, answer_all
from trtbuild.training.batches import frequent_tokens
from trtbuild.training.drafting import EagleDraft
from trtbuild.training.export import exported, write
from trtbuild.training.loop import Training
from trtbuild.training.measure import Draft, eagle_draft, measure, medusa_draft
from trtbuild.training.prompts import Prompts, load_prompts
from trtbuild.training.request import Request, parse_request, resume_key
from trtbuild.training.room import disk_errors
from trtbuild.training.target import convert, load_target
from trtbuild.worker import Clock, Progress

_POINTS = 400  # of the loss curve
_HOW = (
    "greedy answers of the checkpoint itself, one path; place by place over the whole answer with the answer's own "
    "tokens before each, the exported bf16 weights in the runtimes' arithmetic; `match`: the position's likeliest "
    "token is the answer's; `accepted`: those before it are too; `held_out`: prompts that were never learned from, "
    "`learned`: as many that were"
)


def run(raw: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train as `raw` says and return what was done and measured.

    Raises:
        RecipeError: the prompts are of no use.
        ArtifactError, CompatibilityError: the checkpoint cannot be loaded.
        HostError: the device is not there, or the disk is full.
        ToolError: the training has diverged.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    request = parse_request(raw)
    request.work.mkdir(parents=True, exist_ok=True)
    with disk_errors(request.work):
        return _run(request, progress)


def _run(request: Request, progress: Progress) -> dict[str, Any]:
    device = pick_device(request.device)
    prompts = load_prompts(request)
    learned, held = len(prompts.learned), len(prompts.held_out)
    steps = request.epochs * -(-learned // request.batch_size)
    meter, clock = Meter(progress, learned + 3 * held + steps + 1), Clock()
    meter.advance(0, "load the model")
    with clock.phase("load"):
        model = load_target(request, device)
    key = resume_key(request, device)
    journal = Journal(request.work, key)
    with clock.phase("answers"):
        answered, resumed = answer_all(
            model,
            [*prompts.learned, *prompts.held_out],
            sorted(read_end_ids(request.checkpoint, model.config)),
            request.max_answer_tokens,
            journal,
            lambda count: meter.advance(count, "prompts answered"),
        )
    training, tensors = _train(model, answered[:learned], request, key, meter, clock)
    with clock.phase("measure"):
        acceptance = _measure(model, tensors, answered, prompts, request, meter)
    write(tensors, model, request)
    shutil.rmtree(request.work)
    progress(1, 1, "done")
    return _result(request, prompts, answered, training, acceptance, clock.seconds, resumed)


def _train(
    model: Any, answered: Sequence[Answered], request: Request, key: str, meter: Meter, clock: Clock
) -> tuple[Training, dict[str, Tensor]]:
    reduced = request.draft_vocab_size not in (None, 0, model.config.vocab_size)
    draft_tokens = frequent_tokens(answered, request.draft_vocab_size or 0) if reduced else None
    with clock.phase("convert"):
        learning: nn.Module = convert(model, request, draft_tokens)
    training = Training(model, learning, answered, request, key)
    meter.advance(training.resumed, "steps of an earlier run")
    with clock.phase("train"):
        training.run(lambda what: meter.advance(1, what))
    return training, exported(learning)


def _measure(
    model: Any,
    tensors: dict[str, Tensor],
    answered: Sequence[Answered],
    prompts: Prompts,
    request: Request,
    meter: Meter,
) -> dict[str, Any]:
    """Acceptance on the held-out prompts, and on as many of those that were learned from."""
    draft = _draft(model, tensors, request)
    learned, held = len(prompts.learned), len(prompts.held_out)
    parts = {"held_out": answered[learned:], "learned": answered[: min(held, learned)]}
    return {
        name: measure(model, draft, part, request, lambda: meter.advance(1, "acceptance measured")).to_json()
        for name, part in parts.items()
    }


def _draft(model: Any, tensors: dict[str, Tensor], request: Request) -> Draft:
    """What was exported, in the target's compute type."""
    like = model.lm_head.weight
    if request.method == "medusa":
        take = Taker(request.output, tensors, like)
        return medusa_draft(heads_of(take, request.num_heads, request.num_layers, tuple(like.shape)))
    used = {name: value.to(like.dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    config = model.eagle_config
    model.eagle_module._maybe_init_rope(device=model.device)  # noqa: SLF001 -- a resumed run may have taken no step
    draft = EagleDraft(
        tensors=used,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        embedding=model.model.embed_tokens.weight,
        head=model.lm_head.weight,
        rotary=model.eagle_module.rotary_emb,
    )
    return eagle_draft(draft, request)


def _result(
    request: Request,
    prompts: Prompts,
    answered: Sequence[Answered],
    training: Training,
    acceptance: dict[str, Any],
    seconds: dict[str, float],
    resumed: int,
) -> dict[str, Any]:
    notes = []
    if prompts.left_out:
        notes.append(f"{prompts.left_out} of {prompts.found} prompts were too long and left out")
    used = len(prompts.learned) + len(prompts.held_out)
    if used < request.samples:
        notes.append(f"the file has {used} usable prompts, and speculative.train.samples is {request.samples}")
    if resumed or training.resumed:
        notes.append(f"an earlier run had answered {resumed} prompts and finished {training.resumed} steps")
    learned = answered[: len(prompts.learned)]
    return {
        "method": request.method,
        "format": request.format,
        "prompts": {"learned": len(prompts.learned), "held_out": len(prompts.held_out)},
        "answer_tokens": {"learned": sum(len(one.answer) for one in learned),
                          "held_out": sum(len(one.answer) for one in answered[len(learned):])},
        "steps": training.total,
        "loss": _curve(training.losses),
        "acceptance": acceptance,
        "how": _HOW,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
        "notes": notes,
    }  # fmt: skip


def _curve(losses: Sequence[float]) -> list[list[float]]:
    """Pairs of a step's number and the mean loss up to it from the pair before, at most `_POINTS`."""
    stride = -(-len(losses) // _POINTS)
    parts = [losses[start : start + stride] for start in range(0, len(losses), stride)]
    ends = [min((number + 1) * stride, len(losses)) for number in range(len(parts))]
    return [[float(end), round(sum(part) / len(part), 6)] for end, part in zip(ends, parts, strict=True)]
