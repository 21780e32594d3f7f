"""Word lists as TensorRT-LLM takes them: token ids and the ends of the words among them, two rows of one length.

Of the words [[5, 6], [7]] the rows are the ids [5, 6, 7] and the ends [2, 3, -1], padded with -1 (upstream:
triton_backend/all_models/inflight_batcher_llm/preprocessing/1/model.py `_to_word_list_format` @01259b15 writes them,
tensorrt_llm/1/model.py `convert_word_list` @0d5352f5 reads them).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from model_repo.llm.wire import Array, BadRequestError, Inputs


def pack(words: Sequence[Sequence[int]]) -> Array:
    """The words as int32 [1, 2, length]; no word at all has length 0."""
    ids = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words], dtype=np.int32).tolist()
    ends += [-1] * (len(ids) - len(ends))
    return np.array([[ids, ends]], dtype=np.int32)


def unpack(inputs: Inputs, name: str) -> tuple[tuple[int, ...], ...]:
    """The words of an input of shape [1, 2, length]; none where it is not given or empty.

    Raises:
        BadRequestError: it has another shape, or its ends do not rise within its ids.
    """
    array = inputs.get(name)
    if array is None or array.size == 0:
        return ()
    rows = array.reshape(array.shape[-2:]) if array.ndim >= 2 else array
    if rows.ndim != 2 or rows.shape[0] != 2:
        raise BadRequestError(
            f"{name}: its shape is {list(array.shape)}; send [1, 2, length]: one row of token ids and one of the ends "
            "of the words among them, filled up with -1"
        )
    ids, ends = rows[0].tolist(), [end for end in rows[1].tolist() if end != -1]
    starts = [0, *ends[:-1]]
    if any(not start < end <= len(ids) for start, end in zip(starts, ends, strict=True)):
        raise BadRequestError(f"{name}: the ends {ends} do not rise within the {len(ids)} token ids; count from 1")
    return tuple(tuple(ids[start:end]) for start, end in zip(starts, ends, strict=True))
