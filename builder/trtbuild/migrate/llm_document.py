"""LLM arguments as YAML: a stock ``model.yaml``, the options of ``trtllm-serve``, or an ``llm_args.yaml`` of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.errors import Problem, RecipeError
from trtbuild.migrate import package_recipe
from trtbuild.migrate.legacy import Clients, Legacy, leaves, split_unset

_GRAPHS = "cuda_graph_config"
_LISTED = 4


def read_document(
    document: Mapping[str, Any],
    where: str,
    root: Path,
    *,
    model_name: str | None = None,
    clients: Clients | None = "llm",
) -> Legacy:
    """The arguments of one document; null is unset, but it switches CUDA graphs off.

    Raises:
        RecipeError: the document is a recipe, or its keys are no names.
    """
    if "schema_version" in document and "runtime" in document:
        return package_recipe.read_recipe(document, where, root)
    odd = [key for key in document if not isinstance(key, str) or not key.isidentifier()]
    if odd:
        shown = ", ".join(repr(key) for key in odd[:_LISTED])
        message = f"{where} holds {shown}, which are no LLM arguments"
        raise RecipeError([Problem("SOURCE", message, "name a model.yaml, or a text with one call on each line")])
    pairs = leaves(document)
    if _GRAPHS in document and document[_GRAPHS] is None:
        pairs = [(name, False if name == _GRAPHS else value) for name, value in pairs]
    settings, unset = split_unset("llm", pairs, where)
    return Legacy("LLM arguments", root, tuple(settings), tuple(unset), clients=clients, model_name=model_name)
