"""What is measured is what runtimes compute, and acceptance counts what verification would accept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_requests import make_request

from trtbuild.runtime.drafts.medusa import heads_of
from trtbuild.runtime.drafts.tensors import Taker
from trtbuild.training import run as step
from trtbuild.training.answers import Answered
from trtbuild.training.drafting import EagleDraft, Seen, eagle_logits, look
from trtbuild.training.export import served_names
from trtbuild.training.measure import eagle_draft, measure
from trtbuild.training.request import Request, parse_request
from trtbuild.training.target import convert, load_target

IDS = torch.tensor([5, 9, 70, 81, 33, 250, 12, 99, 140, 7, 64, 201])


def request_of(tiny_llama: Path, tmp_path: Path, method: str, **changes: Any) -> Request:
    return parse_request(make_request(tiny_llama, tmp_path, method, **changes))


def shaken(learning: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of what learns, with norms and biases away from their neutral values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.05)
    return served_names({name: tensor.detach() for name, tensor in learning.state_dict().items()})


@contextmanager
def recorded(model: Any) -> Iterator[list[Tensor]]:
    """The logits that ModelOpt's training computes its losses from."""
    logits: list[Tensor] = []
    own = model._eagle_loss

    def record(targets: Tensor, tokens: Tensor, drafted: Tensor, mask: Tensor) -> Any:
        logits.append(drafted.detach()[0])
        return own(targets, tokens, drafted, mask)

    model._eagle_loss = record
    yield logits
    del model._eagle_loss


@pytest.mark.parametrize("layers", [1, 2])
def test_a_draft_of_eagle3_computes_what_modelopt_trains(tiny_llama: Path, tmp_path: Path, layers: int) -> None:
    asked = request_of(tiny_llama, tmp_path, "eagle3", ttt_steps=3, num_layers=layers)
    model = load_target(asked, torch.device("cpu"))
    tensors = shaken(convert(model, asked, None))
    model.train()
    with recorded(model) as trained, torch.no_grad():
        model(input_ids=IDS[None], attention_mask=torch.ones(1, len(IDS), dtype=torch.long))
    seen = look(model, IDS, asked.captured)
    config = model.eagle_config
    draft = EagleDraft(
        tensors=tensors, num_layers=layers, num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim, eps=config.rms_norm_eps,
        embedding=model.model.embed_tokens.weight, head=model.lm_head.weight, rotary=model.eagle_module.rotary_emb,
    )  # fmt: skip
    assert seen.captured is not None
    found = eagle_logits(draft, seen.captured, IDS, steps=3)
    assert [len(logits) for logits in trained] == [len(IDS) - 1 - number for number in range(3)]
    for number, (ours, theirs) in enumerate(zip(found, trained, strict=True)):
        # ModelOpt's rows of a step begin at its first root, and it has more of them at the end.
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=1e-4, atol=1e-4, msg=f"step {number}")


def test_medusa_heads_compute_what_modelopt_trains(tiny_llama: Path, tmp_path: Path) -> None:
    asked = request_of(tiny_llama, tmp_path, "medusa", num_layers=2)
    model = load_target(asked, torch.device("cpu"))
    tensors = shaken(convert(model, asked, None))
    with torch.no_grad():
        trained = model(input_ids=IDS[None]).medusa_logits
    heads = heads_of(Taker(tmp_path, tensors, model.lm_head.weight), 2, 2, tuple(model.lm_head.weight.shape))
    hidden = look(model, IDS, None).hidden
    for head, theirs in zip(heads, trained, strict=True):
        torch.testing.assert_close(head.logits(hidden), theirs[0], rtol=1e-4, atol=1e-4)


def test_only_the_draft_learns(tiny_llama: Path, tmp_path: Path) -> None:
    for method in ("medusa", "eagle3"):
        asked = request_of(tiny_llama, tmp_path, method)
        model = load_target(asked, torch.device("cpu"))
        learning = convert(model, asked, None)
        ours = {id(parameter) for parameter in learning.parameters()}
        assert all(parameter.requires_grad == (id(parameter) in ours) for parameter in model.parameters())


class Target:
    """A stand-in for the model: nothing is computed."""

    device = torch.device("cpu")

    class Layers:
        layers: tuple[()] = ()

        def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"last_hidden_state": torch.zeros(1, input_ids.shape[1], 1)})

    model = Layers()


def test_acceptance_counts_a_chain(tiny_llama: Path, tmp_path: Path) -> None:
    asked = request_of(tiny_llama, tmp_path, "medusa", num_heads=3)
    one = Answered(tuple(range(100, 104)), tuple(range(10, 20)))
    ids = torch.tensor(one.ids)
    places: list[int] = []

    def draft(_: Seen, given: Tensor) -> list[Tensor]:
        """The first position always right, the second at even tokens alone, the third always right."""
        assert given.tolist() == ids.tolist()
        ahead = [torch.cat((ids[2 + step :], torch.zeros(2 + step, dtype=torch.long))) for step in range(3)]
        ahead[1] = torch.where(ahead[1] % 2 == 0, ahead[1], 0)
        return ahead

    found = measure(Target(), draft, [one], asked, lambda: places.append(1))
    # Roots are the prompt's last token and the answer's first six: three drafts and the target's own token follow.
    assert (found.places, found.answers, places) == (7, 1, [1])
    second = sum(token % 2 == 0 for token in range(12, 19)) / 7
    assert found.match == pytest.approx((1.0, second, 1.0))
    assert found.accepted == pytest.approx((1.0, second, second))
    assert found.tokens_per_step == pytest.approx(2 + 2 * second)
    short = Answered((1, 2), (3, 4, 5))
    assert measure(Target(), draft, [short], asked, lambda: None).places == 0


def test_a_reduced_vocabulary_drafts_its_own_tokens_alone(
    eagle3: tuple[Path, dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    """Tokens that the draft does not know are never counted as foreseen."""
    from safetensors.torch import load_file

    asked = request_of(tiny_llama, tmp_path, "eagle3", draft_vocab_size=100)
    model = load_target(asked, torch.device("cpu"))
    convert(model, asked, list(range(100)))
    tensors = load_file(eagle3[0] / "model.safetensors")
    known = set((tensors["d2t"] + torch.arange(100)).tolist())
    propose = step._draft(model, tensors, asked)
    proposed = {int(token) for column in propose(look(model, IDS, asked.captured), IDS) for token in column}
    assert proposed <= known
    assert not proposed <= set(range(100)) or known == set(range(100))
    with pytest.raises(ValueError, match="no layers were captured"):
        eagle_draft(step_draft(model, tensors), replace(asked))(Seen(torch.zeros(1, 64), None), IDS)


def step_draft(model: Any, tensors: dict[str, Tensor]) -> EagleDraft:
    config = model.eagle_config
    return EagleDraft(
        tensors=tensors, num_layers=1, num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, eps=config.rms_norm_eps, embedding=model.model.embed_tokens.weight,
        head=model.lm_head.weight, rotary=None,
    )  # fmt: skip
