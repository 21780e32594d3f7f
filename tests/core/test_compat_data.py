"""The tables of TensorRT-LLM's releases: consistent, sourced and dated, and read as they are meant."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from trtbuild.compat import DATA, facts
from trtbuild.errors import Problem
from trtbuild.llm_keys import LLM_ARGUMENT, RESERVED
from trtbuild.llm_schema import Kind, Schema, load_schema, parse_kind, schema_header, schema_names
from trtbuild.llm_validate import validate
from trtbuild.recipe import Recipe
from trtbuild.recipe_fields import Format, KvCacheFormat
from trtbuild.recipe_speculative import Speculative
from trtbuild.releases import Release, containers, find_release, known_versions, lines, newest, newest_of_all
from trtbuild.schema_changes import changes
from trtbuild.setting_values import recipe_value
from trtbuild.support import QUANT_ALGO, group_sizes, refused_format, sm_version, speculative_method

TABLES = (
    *("containers", "lines", "build_flags", "gpus", "formats", "speculative", "architectures", "engine_names"),
    "legacy_names",
)
SCALARS = {"str", "int", "float", "bool", "None", "Any", "object", "Literal", "list", "dict", "union", "tuple"}


def found(text: str | None, *, allow_unknown: bool = False) -> Release:
    release = find_release(text, allow_unknown=allow_unknown)
    assert isinstance(release, Release), release
    return release


def sections(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every table and row that says where it comes from."""
    if isinstance(value, dict):
        if "source" in value:
            yield path, value
        for key, inner in value.items():
            yield from sections(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from sections(inner, f"{path}[{index}]")


def test_every_table_is_tested() -> None:
    assert {path.stem for path in DATA.glob("*.toml")} == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_rows_have_a_source_and_a_date(name: str) -> None:
    table = facts(name)
    named = list(sections(table, name))
    assert named
    for path, row in named:
        assert len(row["source"]) > 10, path
        date = row.get("date", table.get("date"))
        assert isinstance(date, dt.date), path
        assert dt.date(2026, 1, 1) <= date <= dt.date(2100, 1, 1), path
    covered = {path.removeprefix(f"{name}.").partition("[")[0].partition(".")[0] for path, _ in named}
    loose = {key for key, value in table.items() if isinstance(value, (dict, list))} - covered
    assert not loose or "source" in table, loose


def unsourced(value: Any, path: str = "", *, sourced: bool = False, dated: bool = False) -> Iterator[str]:
    """Every value that neither has a source and a date nor stands in a table, or a row, that has them."""
    if isinstance(value, dict):
        sourced |= "source" in value or {"repo", "path", "commit", "proof"} <= set(value)
        dated |= isinstance(value.get("date"), dt.date)
        for key, inner in value.items():
            if key != "date" and (path, key) != ("", "schema_version"):
                yield from unsourced(inner, f"{path}.{key}", sourced=sourced, dated=dated)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unsourced(inner, f"{path}[{index}]", sourced=sourced, dated=dated)
    elif not (sourced and dated):
        yield path


@pytest.mark.parametrize(
    "path", [DATA.with_name("compat.toml"), *sorted(DATA.rglob("*.toml"))], ids=lambda path: path.stem
)
def test_no_value_is_without_a_source(path: Path) -> None:
    assert list(unsourced(tomllib.loads(path.read_text(encoding="utf-8")))) == []


def test_a_value_without_a_source_is_found() -> None:
    """One row among others, a table among others, a date that is missing."""
    for name, rows in (("lines", "line"), ("lines", "renamed"), ("speculative", "method"), ("gpus", "support")):
        table = dict(facts(name))
        first, *others = table[rows]
        table[rows] = [{key: value for key, value in first.items() if key != "source"}, *others]
        assert f".{rows}[0].{next(key for key in first if key != 'source')}" in list(unsourced(table)), name
        assert f".{rows}[0].source" not in list(unsourced(facts(name)))
    assert list(unsourced({"a": {"source": "x", "value": 1}})) == [".a.source", ".a.value"], "no date"
    dated = {"date": dt.date(2026, 1, 1), "a": {"source": "x", "b": {"c": 1}}, "d": 1}
    assert list(unsourced(dated)) == [".d"], "a date alone is no source"


def test_rows_have_no_unknown_keys() -> None:
    line = {"name", "first", "last", "flows", "schema", "unread", "base", "source", "date"}
    line |= {"renamed_inputs", "absent_tensors", "absent_parameters"}
    assert [row["name"] for row in facts("lines")["line"] if set(row) - line] == []
    method = {"name", "decoding_type", "engine", "needs_draft", "source", "date"}
    assert [row["name"] for row in facts("speculative")["method"] if set(row) - method] == []
    support = {"name", "lines", "sm", "source", "date"}
    assert [row["name"] for row in facts("gpus")["support"] if set(row) - support] == []
    renamed = {"from", "to", "source", "date"}
    assert [row["from"] for row in facts("lines")["renamed"] if set(row) - renamed] == []
    assert set(facts("lines")) == {"line", "releases", "renamed"}


def test_containers_begin_with_25_01_and_have_a_line() -> None:
    tags = [container.tag for container in containers()]
    assert tags == sorted(set(tags), reverse=True)
    assert tags[-1] == "25.01"
    for container in containers():
        assert [line.name for line in lines() if line.has(container.tensorrt_llm)], container
        cells = (container.tensorrt, container.cuda, container.driver, container.torch, container.python)
        assert all(cell is None or cell for cell in cells)


def test_what_containers_require() -> None:
    unread = {one.tensorrt_llm for one in containers() if one.modelopt is None}
    assert unread == {"1.0.3.2510", "0.17.0.post1", "0.17.0"}
    for container in (one for one in containers() if one.tensorrt_llm not in unread):
        base = next(line.base for line in lines() if line.has(container.tensorrt_llm))
        for name in ("transformers", "modelopt"):
            # What release notes say of the line is what the release requires.
            if name in base and "(" not in base[name]:
                noted = base[name] + (".0" if base[name].count(".") == 1 else "")
                assert SpecifierSet(getattr(container, name)).contains(noted), container


def test_lines_do_not_overlap_and_name_what_exists() -> None:
    for version in known_versions():
        assert len([line for line in lines() if line.has(version)]) == 1, version
    for line in lines():
        assert line.schema is None or line.schema in schema_names()
        assert (line.schema is not None) == ("llm-api" in line.flows)
        assert ("engine" in line.flows) == (line.name not in {"1.3", "1.4"})
    named = {name for row in facts("gpus")["support"] for name in row["lines"]}
    assert named == {line.name for line in lines()}
    assert {name for row in facts("gpus")["support"] for name in row["lines"] if row["name"] == "1.2"} >= {"1.2"}


def test_renamed_arguments_exist_in_one_schema_and_not_in_the_same() -> None:
    for row in facts("lines")["renamed"]:
        old = {name for name in schema_names() if load_schema(name).has(row["from"])}
        new = {name for name in schema_names() if load_schema(name).has(row["to"])}
        assert new, row
        assert row["from"] not in LLM_ARGUMENT.values(), row  # a recipe's field would have two names
        # A choice between classes may have both names, in different classes; a new name may stand beside the old one.
        assert old != new or row["from"].startswith("speculative_config."), row


@pytest.fixture(params=schema_names())
def schema(request: pytest.FixtureRequest) -> Schema:
    """Every schema that was read."""
    return load_schema(request.param)


def kinds(kind: Kind) -> Iterator[Kind]:
    yield kind
    for part in kind.parts if kind.name != "Literal" else ():
        yield from kinds(part)


def test_schema_headers(schema: Schema) -> None:
    header = schema.header
    assert re.fullmatch(r"[0-9a-f]{40}", header.commit)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", header.repo)
    read = ("tensorrt_llm/llmapi/", "third_party/tensorrt_llm/tensorrt_llm/llmapi/", f"{header.release}/_modules/")
    assert header.path.startswith(read)
    assert bool(header.release) != bool(header.era)
    assert header.proof
    assert isinstance(header.date, dt.date)
    assert header == schema_header(header.name)


def test_schemas_are_closed(schema: Schema) -> None:
    """Every type parses, and every name in it is a class, an enum or a choice of the same file that something uses."""
    named = set(schema.classes) | set(schema.enums) | set(schema.unions)
    used = {schema.header.root} | {member for union in schema.unions.values() for member in union.members.values()}
    for fields in schema.classes.values():
        for entry in fields.values():
            used |= {kind.name for kind in kinds(parse_kind(entry.type))} - SCALARS
            assert entry.status in {None, "beta", "prototype", "deprecated"}
    assert used == named
    for union in schema.unions.values():
        assert set(union.engine_only) <= set(union.members)
    for fields in schema.sources:
        assert fields in named


def test_defaults_pass_their_own_schema(schema: Schema) -> None:
    for name, entry in schema.root.items():
        if entry.default is not None:
            assert validate({name: entry.default}, schema, partial=True) == [], name


def test_reached_classes(schema: Schema) -> None:
    """What the issue of compatibility names, and a sample of the facts, against the reference."""
    wanted = {"KvCacheConfig", "SchedulerConfig", "MoeConfig", "LoraConfig", "PeftCacheConfig", "TorchCompileConfig"}
    assert wanted | {"AttentionDpConfig", "NGramDecodingConfig"} <= set(schema.classes)
    assert schema.has("cuda_graph_config.batch_sizes")
    cache = schema.classes["KvCacheConfig"]
    assert cache["enable_block_reuse"].default is True
    assert "tokens_per_block" not in cache if schema.header.name == "1.0.0" else cache["tokens_per_block"].default == 32
    old = schema.header.name in {"1.0.0", "1.1.0"}  # two defaults that came later
    assert cache["free_gpu_memory_fraction"].default == (None if old else 0.9)
    assert schema.root["max_num_tokens"].default == (None if old else 8192)
    assert schema.has("scheduler_config.capacity_scheduler_policy")
    assert not schema.has("scheduler_config.policy")


def test_known_differences_between_the_schemas() -> None:
    old, new = load_schema("1.2.1"), load_schema("newest")
    assert "Eagle3" not in old.unions["SpeculativeConfig"].members
    assert "Eagle3" in new.unions["SpeculativeConfig"].members
    assert "DraftTarget" in old.unions["SpeculativeConfig"].members
    oldest = load_schema("1.1.0")
    assert (oldest.has("enable_sleep"), oldest.has("nvfp4_gemm_config"), oldest.has("build_config")) == (
        False,
        False,
        True,
    )
    assert (old.has("model_kwargs"), new.has("model_kwargs")) == (False, True)
    assert (old.has("enable_sleep"), new.has("enable_sleep"), new.has("sleep_config")) == (True, False, True)


def test_what_became_of_arguments() -> None:
    found = dict(changes(load_schema("1.1.0"), load_schema("1.2.1")))
    assert "build_config" in found["TorchLlmArgs"].partition("removed ")[2].partition(";")[0]
    assert "speculative_model_dir is now speculative_model" in found["AutoDecodingConfig"]
    assert "added max_total_draft_tokens, draft_len_schedule" in found["AutoDecodingConfig"], "but no new name"
    assert found["KvCacheConfig"] == "free_gpu_memory_fraction defaults to 0.9 instead of None"
    newest = dict(changes(load_schema("1.3rc"), load_schema("newest")))
    assert newest["KVEventsConfig"].startswith("new: enable_kv_cache_events, publisher")
    assert newest["MedusaDecodingConfig"] == "removed"
    assert "no more Medusa" in newest["SpeculativeConfig"]
    assert "onboard_blocks" in dict(changes(load_schema("1.2.1"), load_schema("newest")))["KvCacheConfig"]
    for name in schema_names():
        assert changes(load_schema(name), load_schema(name)) == []


def test_recipe_fields_and_arguments_exist() -> None:
    recipe = Recipe.model_validate({"schema_version": 1, "model": {"path": "x"}, "runtime": {"kind": "trtllm"}})
    for path, argument in LLM_ARGUMENT.items():
        recipe_value(recipe, path)
        assert all(load_schema(name).has(argument) for name in schema_names() if name != "1.0.0"), argument
    for argument in RESERVED:
        assert any(load_schema(name).has(argument) for name in schema_names() if name != "1.0.0"), argument
    for part in ("build", "checkpoint", "triton"):
        assert set(facts("engine_names")[part]) - {"source"} <= set(LLM_ARGUMENT)


def test_formats_and_methods_of_recipes_are_in_the_tables() -> None:
    formats = {row for table in facts("gpus")["support"] for row in table["sm"]}
    assert set(QUANT_ALGO) == set(Format.__args__)
    # What no runtime of TensorRT-LLM loads is in no table of its GPUs.
    loaded = {row["algo"] for row in facts("formats")["weights"].values() if row["engine"] or row["llm_api"]}
    assert {algo for algo in QUANT_ALGO.values() if algo in loaded} <= formats
    assert {f"kv:{name.upper()}" for name in KvCacheFormat.__args__ if name != "none"} <= formats
    methods = Speculative.model_fields["method"].annotation.__args__  # type: ignore[union-attr]
    for name in set(methods) - {"none"}:
        method = speculative_method(name)
        assert set(method.decoding_type) <= set(schema_names())
        for schema_name, key in method.decoding_type.items():
            assert key in load_schema(schema_name).unions["SpeculativeConfig"].members


def test_versions_and_tags() -> None:
    assert newest("llm-api").version == found(None).version == containers()[0].tensorrt_llm
    assert newest_of_all().version == known_versions()[0]
    assert (found("1.2.1").container, found("26.07").container) == (containers()[0], containers()[0])
    assert found("nvcr.io/nvidia/tritonserver:26.03-trtllm-python-py3").version == "1.2.0"
    assert found("v1.2.0rc7").version == "1.2.0rc7"
    assert found("1.3.0rc14").container is None
    assert found("1.2.1").schema_note == "schema: 58fb435e, proven identical to 1.2.1"
    assert found("1.2.0").schema_note == "schema: 58fb435e, not proven identical to 1.2.0"
    assert (found("1.3.0rc20").line.flows, found("1.3.0rc22").line.flows) == (("engine", "llm-api"), ("llm-api",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1.2.7",
            "1.2.7 is no known release of TensorRT-LLM; the nearest are 1.3.0rc0, 1.2.1, 1.2.0; or set runtime.al",
        ),
        (
            "9.0",
            "9.0 is in no known release line (0.17.0 to 1.4.99); the nearest known versions are 1.4.0rc1, 1.4.0rc0",
        ),
        ("0.5.0", "0.5.0 is in no known release line (0.17.0 to 1.4.99); the nearest known versions are"),
        ("26.13", "there is no Triton image 26.13-trtllm-python-py3 in compatibility data; near are 26.07, 26.06"),
        ("24.10", "no Triton image 24.10-trtllm-python-py3 in compatibility data; near are 25.03, 25.02, 25.01"),
        (
            "newest",
            "'newest' is neither a version of TensorRT-LLM nor a container tag; give a version such as 1.2.1 or a",
        ),
    ],
)
def test_unknown_versions(text: str, message: str) -> None:
    problem = find_release(text)
    assert isinstance(problem, Problem)
    assert str(problem).startswith("runtime.version: ")
    assert message in str(problem)


def test_unknown_versions_on_demand() -> None:
    release = found("1.2.7", allow_unknown=True)
    assert (release.known, release.line.name, release.container) == (False, "1.2", None)
    assert found("9.0", allow_unknown=True).line.schema == "newest"
    assert isinstance(find_release("0.5.0", allow_unknown=True), Problem)


@pytest.mark.parametrize(
    ("gpu", "sm"),
    [
        *[("H100", 90), ("NVIDIA H100 80GB HBM3", 90), ("nvidia a100-sxm4-80gb", 80), ("L40S", 89), ("rtx 4090", 89)],
        *[("NVIDIA GeForce RTX 5090", 120), ("b200", 100), ("A10", 86), ("Radeon", None), ("", None), ("A1000", None)],
    ],
)
def test_gpu_names(gpu: str, sm: int | None) -> None:
    assert sm_version(gpu) == sm


def test_formats_on_gpus() -> None:
    old, new = found("1.2.1").line, found("1.4.0rc1").line
    assert refused_format(old, "FP8", 90) is None
    assert refused_format(old, "FP8", 80) == "TensorRT-LLM 1.2 lists FP8 for SM89, SM90, SM100, SM103, SM120 only"
    assert refused_format(old, "W4A16_AWQ", 100) is None
    assert refused_format(new, "W4A16_AWQ", 100) is not None
    assert refused_format(new, None, 75) == "TensorRT-LLM runs bf16 from SM80 on"
    assert group_sizes("W4A16_AWQ") == (64, 128)
