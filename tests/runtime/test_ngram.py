"""Prompt lookup: what the pool remembers, which run it gives, and what an engine makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trtbuild.runtime import Engine, SamplingParams, SpeculativeConfig
from trtbuild.runtime.drafts import ngram
from trtbuild.runtime.drafts.ngram import Pool

TEXT = [1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 1, 2]


def pool(*texts: list[int], draft_len: int = 3, pattern_len: int = 2, keep_all: bool = True) -> Pool:
    made = Pool(draft_len=draft_len, pattern_len=pattern_len, keep_all=keep_all)
    for text in texts:
        made.add(text, 0)
    return made


def test_the_longest_known_end_is_looked_up_oldest_or_newest_run() -> None:
    one = pool(TEXT)
    assert one.find(TEXT, oldest=True) == (3, 4, 5)
    assert one.find(TEXT, oldest=False) == (6, 7, 8)
    assert one.find([9, 2], oldest=True) == (3, 4, 5)  # only the last token is known
    assert one.find([9, 9], oldest=True) == ()
    assert pool(TEXT, keep_all=False).find(TEXT, oldest=False) == (3, 4, 5)
    # Two tokens say more than one: behind (8, 1) the run differs from that behind the oldest 1.
    assert one.find([8, 1], oldest=True) == (2,)
    assert pool(TEXT, pattern_len=1).find([8, 1], oldest=True) == (2, 3, 4)


def test_runs_grow_with_the_text_and_replace_what_was_cut_short() -> None:
    one = pool([1, 2, 3])
    assert one.find([1], oldest=True) == (2, 3)
    one.add([1, 2, 3, 4, 5], 0)
    assert one.find([1], oldest=True) == one.find([1], oldest=False) == (2, 3, 4)
    assert pool([1, 2, 3], [1, 2, 3, 4, 5], keep_all=False).find([1], oldest=False) == (2, 3, 4)


def test_a_pool_forgets_its_oldest_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_MOST_PATTERNS", 6)
    one = pool(list(range(10, 30)), pattern_len=1)
    assert one.find([10], oldest=True) == ()
    assert one.find([28], oldest=True) == (29,)
    many = pool([1, 2], pattern_len=1, draft_len=1)
    for token in range(2, 40):
        many.add([1, token], 0)
    assert many.find([1], oldest=True) == (24,)


@pytest.mark.parametrize("public", [True, False])
def test_requests_share_what_they_have_seen_or_not(engine: Callable[..., Engine], public: bool) -> None:
    section = SpeculativeConfig("ngram", max_draft_len=4, max_matching_ngram_size=3, is_public_pool=public)
    one, plain = engine(speculative=section), engine()
    prompt, params = list(range(40, 60)), SamplingParams(max_tokens=30, ignore_eos=True)
    expected = plain.generate([prompt], params)
    cold, warm = (one.generate([prompt], params)[0].metrics for _ in range(2))
    assert one.generate([prompt], params)[0].token_ids == expected[0].token_ids
    if public:  # the second answer is the first one, which the pool knows by now
        assert warm.total_accepted_draft_tokens > 20
        assert warm.acceptance_rate > 0.9
    else:
        assert (warm.total_draft_tokens, warm.acceptance_rate) == (cold.total_draft_tokens, cold.acceptance_rate)
        assert one._speculation._drafter._own == {}
    assert one._speculation._drafter._taken == {}
    assert one.facts.speculation == "ngram"
