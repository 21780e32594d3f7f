"""Rendering: strict, and safe for any text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, StrictUndefined, UndefinedError

from trtbuild.render import data_dir, pb_string, render, yaml_string
from trtbuild.yaml_text import parse_yaml

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


@given(TEXT)
def test_pb_string_survives_protobuf(text: str) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    message = model_config_pb2.ModelConfig()
    text_format.Parse(f"name: {pb_string(text)}", message)
    assert message.name == text
