"""The shape of the code: layers, heavy imports, and what the compatibility table claims."""

from __future__ import annotations

import ast
import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from trtbuild.compat import compat
from trtbuild.doctor import REQUIRED

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "builder" / "trtbuild"

RECIPE = {
    "recipe",
    "recipe_fields",
    "recipe_compress",
    "recipe_speculative",
    "recipe_training",
    "recipe_runtime",
    "recipe_file",
}

# A module may import from its own row and from the rows below it.
LAYERS = [
    {"errors", "paths"},
    {
        "checkpoint_checks",
        "checkpoint_files",
        "adapter_file",
        "draft",
        "eagle3_draft",
        "embedded_draft",
        "medusa_draft",
        "planned_draft",
        "trained_for",
        "tokenizer_file",
        "text_sets",
        "safetensors_header",
        *RECIPE,
        "recipe_edit",
        "yaml_text",
        "compat",
        "manifest",
        "linking",
        "model",
        "layer_size",
        "weight_formats",
        "format_support",
        "releases",
        "support",
        "model_classes",
        "llm_keys",
        "llm_schema",
        "schema_changes",
        "build_flags",
        "llm_validate",
    },
    {
        "store",
        "gates",
        "plan",
        "compress_memory",
        "choice_memory",
        "choice_picture",
        "speculation_advice",
        "speculation_picture",
        "mixed_settings",
        "memory_settings",
        "setting_values",
        "compress_settings",
        "serving_settings",
        "settings",
        "training_settings",
        "llm_speculation",
        "llm_speculation_conflicts",
        "llm_speculation_refusals",
        "trtllm_settings",
        "trtllm_parallel",
        "trtllm_common",
        "trtllm_instances",
        "embedded_settings",
        "embedded_speculation",
        "trtllm_deploy",
        "trtllm_build",
        "trtllm_build_extra",
        "trtllm_engine_drafts",
        "trtllm_engine_lora",
        "trtllm_medusa",
        "trtllm_engine_settings",
        "trtllm_engine_refusals",
        "refusals",
        "trtllm_refusals",
        "comparison",
        "planner",
        "render",
        "report",
        "process",
        "worker",
        "toolchain",
    },
    {"adapters", "compress", "convert", "evaluate", "runtime", "serving", "speculate", "training"},
    {
        "source",
        "steps",
        "package",
        "engine_build",
        "foresight",
        "draft_checks",
        "draft_inputs",
        "evidence",
        "evidence_picture",
        "pipeline",
        "init_recipe",
        "inspection",
        "verification",
        "doctor",
        "migrate",
        "speculation_candidates",
        "speculation_study",
    },
    {"console"},
    {"versions", "speculation_text"},
    {"cli_speculate"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "transformers", "modelopt", "accelerate"}
MAY_BE_HEAVY = {"compress", "evaluate", "runtime", "speculate", "training", "serving/reference.py"}
ONLY_IN = {
    "click": {"cli", "cli_speculate"},
    "jinja2": {"render", "compress"},  # compress: the errors of a chat template
    "huggingface_hub": {"adapters"},
    "pydantic": RECIPE | {"migrate"},
    "tritonclient": {"adapters", "serving"},
}


def modules() -> list[tuple[str, Path, set[str]]]:
    """(top name below trtbuild, file, imported dotted names) of every module."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.append((top, path, imports(path)))
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_layer() -> None:
    assert {top for top, _, _ in modules()} - {"__init__"} == set(LEVEL)


def test_imports_point_downwards() -> None:
    wrong = []
    for top, path, names in modules():
        for name in names:
            parts = name.split(".")
            if parts[0] != "trtbuild" or len(parts) < 2 or parts[1] not in LEVEL or top == "__init__":
                continue
            if LEVEL[parts[1]] > LEVEL[top]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_the_runtime_is_a_library_of_its_own() -> None:
    wrong = [
        f"{path.name} imports {name}"
        for top, path, names in modules()
        for name in names
        if top == "runtime"
        and name.startswith("trtbuild.")
        and not name.startswith(("trtbuild.runtime", "trtbuild.errors"))
    ]
    assert wrong == []


def test_adapters_do_not_know_each_other() -> None:
    for top, path, names in modules():
        if top == "adapters":
            others = {name.split(".")[2] for name in names if name.startswith("trtbuild.adapters.")}
            own = path.stem.split("_")[0]
            assert all(other.split("_")[0] == own for other in others), path


def test_heavy_libraries_stay_where_they_belong() -> None:
    wrong = []
    for top, path, names in modules():
        relative = path.relative_to(PACKAGE).as_posix()
        if top in MAY_BE_HEAVY or relative in MAY_BE_HEAVY:
            continue
        wrong += [f"{relative} imports {name}" for name in names if name.split(".")[0] in HEAVY]
    assert wrong == []


def test_libraries_with_one_home() -> None:
    wrong = []
    for top, path, names in modules():
        for name in names:
            home = ONLY_IN.get(name.split(".")[0])
            if home is not None and top not in home:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_files_are_short() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): count
        for folder in ("builder", "model_repo")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 320
    }
    assert long == {}


def test_pytest_looks_into_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """It passes folders of some names by, `build` for one, without a word."""
    names = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert "package" in names
    passed_by = [name for name in names for each in pytestconfig.getini("norecursedirs") if fnmatch.fnmatch(name, each)]
    assert passed_by == []


def test_compatibility_table_has_sources_and_dates() -> None:
    table = compat()
    for row in [table["transformers"], *table["refused"]]:
        assert row["source"]
        assert row["date"].year >= 2026


def test_known_architectures_are_those_of_the_installed_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert compat()["transformers"]["causal_lm"] == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_doctor_and_pyproject_agree_on_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in project["optional-dependencies"]["build"])  # type: ignore[union-attr]
    assert {name: declared[name] for name in REQUIRED} == REQUIRED
