"""Rendering: strict, and safe for any text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, StrictUndefined, UndefinedError

from trtbuild.render import data_dir, pb_string, render
from trtbuild.yaml_text import parse_yaml, yaml_key, yaml_scalar, yaml_string

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def test_a_missing_name_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("llm/config.pbtxt.j2", {})
    with pytest.raises(UndefinedError):
        Environment(undefined=StrictUndefined).from_string("{{ nothing }}").render()


def test_shipped_files_are_found() -> None:
    for kind in ("templates", "model_repo", "docker"):
        assert any(data_dir(kind).iterdir())


@given(TEXT)
def test_yaml_string_survives_yaml_and_json(text: str) -> None:
    assert json.loads(yaml_string(text)) == text
    if not any(char in text for char in "\ufeff\ufffe\uffff"):  # what YAML 1.2 itself cannot hold
        assert parse_yaml(yaml_string(text)) == text


# Words that YAML 1.1 takes for a truth value, numbers that it takes for text, and what YAML cannot hold left out.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["no", "On", "y", "NULL", "1e5", "word", "2:4", "~", ""])
    | st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"], exclude_characters="\ufeff"), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["no", "a b", "key"]), inner),
    max_leaves=6,
)


@given(VALUES, st.booleans())
def test_yaml_of_both_versions_reads_a_scalar_alike(value: Any, plain: bool) -> None:
    text = f"{yaml_key('on')}: {yaml_scalar(value, plain=plain)}\n"
    assert parse_yaml(text) == yaml.safe_load(text) == {"on": value}


def test_words_stay_plain_where_people_read() -> None:
    assert (yaml_scalar("fp8", plain=True), yaml_scalar("fp8"), yaml_scalar("no", plain=True)) == (
        "fp8", '"fp8"', '"no"',
    )  # fmt: skip


@given(TEXT)
def test_pb_string_survives_protobuf(text: str) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    message = model_config_pb2.ModelConfig()
    text_format.Parse(f"name: {pb_string(text)}", message)
    assert message.name == text
