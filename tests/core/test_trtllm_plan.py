"""Plans for TensorRT-LLM's LLM API: what is said to it, what is refused, and what runs where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.test_model import edit_config
from tiny import save_checkpoint
from trtbuild.adapters import trtllm
from trtbuild.checkpoint_files import open_directory
from trtbuild.console import plan_text
from trtbuild.errors import CompatibilityError, RecipeError
from trtbuild.llm_keys import LLM_ARGUMENT
from trtbuild.model import read_facts
from trtbuild.plan import Plan, Source
from trtbuild.planner import make_plan
from trtbuild.recipe_file import load_recipe
from trtbuild.toolchain import tool_versions
from trtbuild.yaml_text import parse_yaml


def plan_for(checkpoint: Path, tmp_path: Path, *overrides: str) -> Plan:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\nruntime: {{kind: trtllm}}\n")
    loaded = load_recipe(recipe, overrides)
    return make_plan(loaded, read_facts(open_directory(checkpoint)), Source(str(checkpoint)), tool_versions())


def arguments(plan: Plan) -> dict[str, Any]:
    """The LLM arguments of a plan, as they are written and read back."""
    parameters = json.loads(json.dumps(dict(plan.step("engine").parameters)))
    made = trtllm.llm_arguments(parameters)
    assert trtllm.check_arguments(made, parameters["schema"]["name"]) == []
    read = parse_yaml(trtllm.args_text(made, parameters))
    assert read == made
    return dict(read)


def origins(plan: Plan) -> dict[str, str]:
    return {value.path: value.origin for value in plan.values}


def test_the_default_plan(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path)
    assert plan.value("runtime.version") == "1.2.1"
    assert origins(plan)["runtime.version"].endswith(
        "newest container 26.07; schema: 58fb435e, proven identical to 1.2.1"
    )
    assert origins(plan)["runtime.stream_interval"] == "default of TensorRT-LLM 1.2.1"
    assert origins(plan)["runtime.max_num_tokens"] == "default of TensorRT-LLM 1.2.1"
    assert (plan.value("target.count"), plan.value("runtime.kv_cache.max_tokens")) == (1, None)
    assert plan.value("deploy.files") == ("dockerfile", "compose", "launch")
    evaluate = plan.step("evaluate").parameters
    assert (evaluate["device"], evaluate["kv_cache_dtype"]) == ("auto", "auto")
    assert plan.estimates["kv_bytes_per_token"] == 2 * plan.facts.kv_elements_per_token
    assert arguments(plan) == {
        "backend": "pytorch",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "context_parallel_size": 1,
        "enable_attention_dp": False,
        "max_batch_size": 8,
        "max_num_tokens": 8192,
        "max_seq_len": 512,
        "max_input_len": 511,
        "enable_chunked_prefill": True,
        "enable_iter_perf_stats": False,
        "return_perf_metrics": False,
        "trust_remote_code": False,
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        "kv_cache_config": {
            "dtype": "auto",
            "enable_block_reuse": True,
            "free_gpu_memory_fraction": 0.9,
            "tokens_per_block": 32,
        },
    }


EVERYTHING = {
    "runtime.tensor_parallel_size": 2,
    "runtime.context_parallel_size": 2,
    "runtime.enable_attention_dp": True,
    "runtime.max_batch_size": 5,
    "runtime.max_num_tokens": 300,
    "runtime.max_seq_len": 200,
    "runtime.enable_chunked_prefill": False,
    "runtime.attn_backend": "FLASHINFER",
    "runtime.guided_decoding_backend": "xgrammar",
    "runtime.stream_interval": 3,
    "runtime.return_perf_metrics": True,
    "runtime.enable_iter_perf_stats": True,
    "runtime.cuda_graph_config.batch_sizes": [1, 4],
    "runtime.cuda_graph_config.enable_padding": True,
    "runtime.moe_config.backend": "CUTLASS",
    "runtime.lora_config.max_lora_rank": 16,
    "runtime.lora_config.lora_target_modules": ["attn_q"],
    "runtime.lora_config.max_loras": 2,
    "runtime.lora_config.max_cpu_loras": 4,
    "runtime.kv_cache.free_gpu_memory_fraction": 0.5,
    "runtime.kv_cache.max_tokens": 4096,
    "runtime.kv_cache.tokens_per_block": 64,
    "runtime.kv_cache.enable_block_reuse": False,
    "runtime.kv_cache.host_cache_size": 1 << 30,
    "runtime.kv_cache.max_attention_window": [128, 512],
    "runtime.capacity_scheduler_policy": "MAX_UTILIZATION",
    "runtime.context_chunking_policy": "EQUAL_PROGRESS",
    "serving.max_input_tokens": 100,
}


def nested(document: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        document = document[key]
    return document


@pytest.mark.parametrize("version", ["1.1.0", "1.2.1", "1.3.0rc22", "1.4.0rc1"])
def test_everything_that_a_recipe_can_say_arrives(tmp_path: Path, version: str) -> None:
    overrides = [f"{path}={json.dumps(value)}" for path, value in EVERYTHING.items()]
    checkpoint = save_checkpoint(tmp_path / "mixtral", "mixtral")
    plan = plan_for(checkpoint, tmp_path, f"runtime.version={version}", *overrides)
    made = arguments(plan)
    for path, value in EVERYTHING.items():
        assert nested(made, LLM_ARGUMENT[path]) == value, path
    tested = {*EVERYTHING, "model.trust_remote_code", "compress.kv_cache", "runtime.cuda_graph_config.enabled"}
    tested |= {"runtime.cuda_graph_config.max_batch_size"}
    tested |= {"runtime.pipeline_parallel_size", "runtime.moe_expert_parallel_size"}
    assert tested == set(LLM_ARGUMENT)
    assert plan.step("engine").parameters["world_size"] == plan.value("target.count") == 4


def test_switches_and_formats(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = ("compress.format=fp8", "compress.kv_cache=fp8", "runtime.cuda_graph_config.enabled=false")
    plan = plan_for(tiny_llama, tmp_path, *overrides, "runtime.pipeline_parallel_size=2")
    made = arguments(plan)
    assert made["kv_cache_config"]["dtype"] == "fp8"
    assert plan.step("evaluate").parameters["kv_cache_dtype"] == "fp8"
    assert plan.estimates["kv_bytes_per_token"] == plan.facts.kv_elements_per_token
    assert made["cuda_graph_config"] is None
    assert made["pipeline_parallel_size"] == 2
    graphs = arguments(plan_for(tiny_llama, tmp_path, "runtime.cuda_graph_config.max_batch_size=4"))
    assert graphs["cuda_graph_config"] == {"max_batch_size": 4}
    assert "runtime.cuda_graph_config.batch_sizes" not in origins(plan)
    assert any("TRTLLM_LOAD_KV_SCALES" in warning for warning in plan.warnings)


def test_layers_left_out_as_a_whole(tiny_llama: Path, tmp_path: Path) -> None:
    patterns = "['*.1.self_attn.*', '*.mlp.gate_proj', '*.mlp.up_proj', '*o_proj']"
    plan_for(tiny_llama, tmp_path, "compress.format=fp8", f"compress.exclude={patterns}")


def test_what_a_recipe_leaves_open_is_left_to_the_vendor(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.lora_config.max_lora_rank=16")
    assert arguments(plan)["lora_config"] == {"max_lora_rank": 16}
    assert origins(plan)["runtime.lora_config.lora_target_modules"] == "default of TensorRT-LLM 1.2.1"


def test_key_value_heads_that_do_not_divide(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, num_attention_heads=12, num_key_value_heads=4, intermediate_size=120)
    with pytest.raises(
        CompatibilityError, match="6 and the model's 4 key-value heads: neither divides the other; use on"
    ):
        plan_for(checkpoint, tmp_path, "runtime.tensor_parallel_size=6")
    plan_for(checkpoint, tmp_path, "runtime.tensor_parallel_size=12", "runtime.enable_attention_dp=true")
    plan_for(checkpoint, tmp_path, "runtime.tensor_parallel_size=4")


def test_untested_combinations_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = ("runtime.pipeline_parallel_size=2", "runtime.guided_decoding_backend=xgrammar", "model.adapters=[a]")
    lora = "runtime.lora_config={max_lora_rank: 8, lora_target_modules: [attn_q]}"
    warnings = plan_for(tiny_llama, tmp_path, *sizes, lora).warnings
    assert "TensorRT-LLM calls chunked prefill with pipeline parallelism untested" in warnings
    assert "TensorRT-LLM calls LoRA with guided decoding untested" in warnings
    assert not any("untested" in warning for warning in plan_for(tiny_llama, tmp_path).warnings)


def test_experts(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, num_local_experts=4, architectures=["MixtralForCausalLM"], model_type="mixtral")
    sizes = ("runtime.tensor_parallel_size=2", "runtime.moe_expert_parallel_size=2")
    assert arguments(plan_for(checkpoint, tmp_path, *sizes))["moe_expert_parallel_size"] == 2
    with pytest.raises(CompatibilityError, match="3 does not divide tensor_parallel_size 2; use a divisor of it"):
        plan_for(checkpoint, tmp_path, sizes[0], "runtime.moe_expert_parallel_size=3")


def test_the_other_flow_is_named_where_it_has_the_class(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, architectures=["Gemma2ForCausalLM"], model_type="gemma2")
    with pytest.raises(CompatibilityError, match="LLM API; use runtime.kind: trtllm-engine or embedded, or anoth"):
        plan_for(checkpoint, tmp_path)


def test_blocks_that_the_kernels_do_not_take(tiny_llama: Path, tmp_path: Path) -> None:
    blocks = "runtime.kv_cache.tokens_per_block=48"
    with pytest.raises(CompatibilityError, match="48: TensorRT-LLM's blocks hold a power of two of tokens; use 32"):
        plan_for(tiny_llama, tmp_path, blocks)
    plan_for(tiny_llama, tmp_path, blocks, "runtime.attn_backend=FLASHINFER")


def test_who_sets_the_variable_of_the_scales(tiny_llama: Path, tmp_path: Path) -> None:
    for more, words in (((), "deploy/launch.sh sets it"), (("deploy.files=[dockerfile]",), "set it: no launch script")):
        warnings = plan_for(tiny_llama, tmp_path, "compress.format=fp8", "compress.kv_cache=fp8", *more).warnings
        assert any(f"TRTLLM_LOAD_KV_SCALES=1 ({words}" in warning for warning in warnings)


def test_extra_adds_to_the_sections(tiny_llama: Path, tmp_path: Path) -> None:
    extra = (
        "runtime.extra.kv_cache_config.copy_on_partial_reuse=false",
        "runtime.extra.speculative_config={decoding_type: NGram, max_draft_len: 3}",
        "runtime.extra.cuda_graph_config={}",
    )
    made = arguments(plan_for(tiny_llama, tmp_path, *extra[:2]))
    assert made["kv_cache_config"]["copy_on_partial_reuse"] is False
    assert made["kv_cache_config"]["tokens_per_block"] == 32
    assert made["speculative_config"] == {"decoding_type": "NGram", "max_draft_len": 3}
    with pytest.raises(RecipeError, match="the recipe says it in runtime.cuda_graph_config.enabled; set it there") as e:
        plan_for(tiny_llama, tmp_path, extra[2])
    assert len(e.value.problems) == 1


def test_numbers_are_numbers_for_every_reader_of_yaml() -> None:
    parameters = {"version": "1", "schema": {"name": "1.2.1", "commit": "0" * 40, "proven": True}}
    made = {"a": 1e-05, "b": "1e-05", "c": "yes", "d": [1.5, "no"], "e": {}, "yes": None, "f": {"g h": True}}
    text = trtllm.args_text(made, parameters)
    assert parse_yaml(text) == made
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(text) == made


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["runtime.version=0.21.0"],
            "TensorRT-LLM 0.21.0 has no LLM API that trtbuild writes arguments for, engines only",
        ),
        (
            ["runtime.version=1.2.9"],
            "1.2.9 is no known release of TensorRT-LLM; the nearest are 1.3.0rc0, 1.2.1, 1.2.0",
        ),
        (
            ["runtime.version='27.01'"],
            "27.01: there is no Triton image 27.01-trtllm-python-py3 in compatibility data; near",
        ),
        (
            ["deploy.files=[compose, launch]", "runtime.version=1.4.0rc1"],
            "deploy.files: compose, launch: no Triton container has TensorRT-LLM 1.4.0rc1; remove it, or use a release",
        ),
        (
            ["compress.format=fp8", "compress.exclude=['*.1.self_attn.q_proj']"],
            "compress.exclude: names model.layers.1.self_attn.q_proj, but not model.layers.1.self_attn.k_proj: Tensor",
        ),
        (["serving.backend=python"], "serving.backend: python: only the runtime trtllm-engine has it; remove it"),
        (
            ["serving.communication_mode=leader"],
            "serving.communication_mode: leader: only the runtime trtllm-engine ha",
        ),
        (["serving.layout=tokens"], "serving.layout: tokens: the LLM API is served by one model; use llm"),
        (["runtime.device=cpu"], "runtime.device: cpu: only the embedded runtime has it; use auto"),
        (
            ["runtime.compute_dtype=float32"],
            "runtime.compute_dtype: float32: only the embedded runtime has it; use auto",
        ),
        (["runtime.weights=packed"], "runtime.weights: packed: only the embedded runtime has it; use auto"),
        (["serving.layout=ensemble"], "serving.layout: ensemble: the LLM API is served by one model; use llm"),
        (["target.gpu=H1000"], "target.gpu: 'H1000' is no known GPU; did you mean H100"),
        (
            ["target.gpu=V100"],
            "none does not run on V100 (SM70): TensorRT-LLM runs bf16 from SM80 on; use another GPU",
        ),
        (
            ["target.gpu=A100", "compress.format=fp8"],
            "compress.format: fp8 does not run on A100 (SM80): TensorRT-LLM 1.2 lists FP8 for SM89, SM90, SM100, SM103",
        ),
        (
            ["target.gpu=B200", "compress.format=int4_awq", "compress.group_size=64", "runtime.version=1.4.0rc1"],
            "int4_awq does not run on B200 (SM100): TensorRT-LLM 1.4 lists W4A16_AWQ for SM80, SM86, SM89, SM90 only",
        ),
        (
            ["compress.format=int4_awq", "compress.group_size=32"],
            "compress.group_size: 32: TensorRT-LLM's INT4 kernels take groups of 64 or 128 only; use 64",
        ),
        (
            ["compress.kv_cache=fp8"],
            "compress.kv_cache: TensorRT-LLM takes no checkpoint with KV scales whose weights are",
        ),
        (["runtime.tensor_parallel_size=3"], "3 does not divide the model's 4 attention heads; use one of 1, 2, 4"),
        (
            ["runtime.tensor_parallel_size=4", "compress.format=int4_awq", "compress.group_size=64"],
            "each of 4 ranks gets 16 attention output inputs, no whole number of groups of 64; use a smaller tensor_",
        ),
        (["runtime.pipeline_parallel_size=9"], "9 is more than the model's 3 layers; use at most 3"),
        (
            ["runtime.tensor_parallel_size=2", "target.count=1"],
            "target.count: 1 GPUs, but tensor x pipeline x context par",
        ),
        (["runtime.moe_expert_parallel_size=2"], "2 is set, but LlamaForCausalLM has no experts; remove it"),
        (
            ["runtime.moe_config.backend=AUTO"],
            "runtime.moe_config.backend: 'AUTO' is not allowed by TensorRT-LLM 1.2.1; al",
        ),
        (
            ["runtime.context_chunking_policy=FAIR"],
            "runtime.context_chunking_policy: 'FAIR' is not allowed by TensorRT-LL",
        ),
        (
            ["speculative.method=medusa"],
            "medusa: the LLM API of TensorRT-LLM 1.2.1 has no such method, only TensorRT eng",
        ),
        (["speculative.draft=x"], "speculative.draft: x: of no use without a speculative.method; remove it"),
        (
            ["runtime.pipeline_parallel_size=2", "runtime.extra.speculative_config={decoding_type: NGram}"],
            "runtime.extra.speculative_config: speculative decoding does not run with pipeline_parallel_size 2; use te",
        ),
        (
            ["runtime.context_parallel_size=2", "runtime.extra.speculative_config={decoding_type: NGram}"],
            "speculative decoding does not run with context_parallel_size 2; use context_parallel_size: 1",
        ),
        (
            ["model.adapters=[a]"],
            "runtime.lora_config.lora_target_modules: is empty; without it TensorRT-LLM keeps room",
        ),
        (
            ["model.adapters=[a]"],
            "runtime.lora_config.max_lora_rank: is not set; an adapter of a higher rank than the def",
        ),
        (
            ["model.adapters=['..']"],
            "model.adapters: ..: '..' is no name that clients could send; name the adapter's dir",
        ),
        (
            ["model.adapters=['.']"],
            "model.adapters: .: '' is no name that clients could send; name the adapter's directo",
        ),
        (
            ["model.adapters=[a/x, b/x]"],
            "model.adapters: two adapters are called x; clients ask for an adapter by its di",
        ),
    ],
)
def test_what_the_llm_api_does_not_do(tiny_llama: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        plan_for(tiny_llama, tmp_path, *overrides)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["runtime.extra.foo=1"], "runtime.extra.foo: is not an argument of TensorRT-LLM 1.2.1; remove it"),
        (
            ["runtime.extra.model_kwargs={}"],
            "runtime.extra.model_kwargs: is not an argument of TensorRT-LLM 1.2.1; it came",
        ),
        (
            ["runtime.extra.enable_sleep=true", "runtime.version=1.4.0rc1"],
            "runtime.extra.enable_sleep: is not an argument of TensorRT-LLM newest (00043967); there it is called slee",
        ),
        (["runtime.extra.model=x"], "runtime.extra.model: the package holds the model; remove it"),
        (
            ["runtime.extra.load_format=dummy"],
            "runtime.extra.load_format: the package's weights are loaded as they are",
        ),
        (
            ["runtime.extra.backend=tensorrt"],
            "runtime.extra.backend: trtbuild writes arguments for the pytorch backend",
        ),
        (
            ["runtime.extra.max_batch_size=4"],
            "runtime.extra.max_batch_size: the recipe says it in runtime.max_batch_size",
        ),
        (
            ["runtime.extra.gemm_plugin=auto"],
            "gemm_plugin: is not an argument of TensorRT-LLM 1.2.1 but a flag of trtllm-build; remove it; engines have",
        ),
        (
            ["runtime.extra.kv_cache_config.max_tokens=4"],
            "runtime.extra.kv_cache_config.max_tokens: the recipe says it in runtime.kv_cache.max_tokens; set it there",
        ),
        (
            ["runtime.extra.kv_cache_config=null"],
            "runtime.extra.kv_cache_config: the recipe says it in compress.kv_cache",
        ),
        (["runtime.extra.garbage_collection_gen0_threshold=x"], "'x' must be a whole number"),
        (
            ["runtime.cuda_graph_config={enabled: false, batch_sizes: [1]}"],
            "batch_sizes: is set while cuda_graph_config.",
        ),
        (
            ["runtime.cuda_graph_config={batch_sizes: [1, 2], max_batch_size: 4}"],
            "runtime.cuda_graph_config.max_batch_size: 4 is set together with batch_sizes, which says it too; remove",
        ),
    ],
)
def test_mistakes(tiny_llama: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_for(tiny_llama, tmp_path, *overrides)
    assert sentence in str(caught.value)


def test_architectures(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, architectures=["GraniteForCausalLM"], model_type="granite")
    with pytest.raises(
        CompatibilityError, match="TensorRT-LLM 1.4.0rc1 runs GraniteForCausalLM through its AutoDeploy backend o"
    ):
        plan_for(checkpoint, tmp_path, "runtime.version=1.4.0rc1")
    edit_config(checkpoint, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    with pytest.raises(
        CompatibilityError, match="GPT2LMHeadModel is not among the classes that TensorRT-LLM 1.2.1 lists for"
    ):
        plan_for(checkpoint, tmp_path)


def test_versions_that_no_table_has(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.version=1.2.9", "runtime.allow_unknown_version=true")
    assert (
        "TensorRT-LLM 1.2.9 is in no table of trtbuild; schema: 58fb435e, not proven identical to 1.2.9"
        in plan.warnings
    )
    assert plan.step("engine").parameters["schema"]["proven"] is False
    plan = plan_for(tiny_llama, tmp_path, "runtime.version='26.03'")
    assert plan.value("runtime.version") == "1.2.0"
    assert any("schema: 58fb435e, not proven identical to 1.2.0" in warning for warning in plan.warnings)
    plan = plan_for(tiny_llama, tmp_path, "runtime.version='26.05'")
    assert "container 26.05, newest container 26.07" in origins(plan)["runtime.version"]


def test_a_release_without_a_default(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.version='26.02'")
    assert (plan.value("runtime.version"), plan.value("runtime.max_num_tokens")) == ("1.1.0", 8192)
    assert origins(plan)["runtime.max_num_tokens"] == "default"
    extra = "runtime.extra.speculative_config={decoding_type: Eagle, speculative_model: x}"
    oldest = plan_for(tiny_llama, tmp_path, "runtime.version='25.10'")
    assert oldest.value("runtime.version") == "1.0.0"
    assert "tokens_per_block" not in arguments(oldest)["kv_cache_config"]
    with pytest.raises(
        CompatibilityError, match="runtime.kv_cache.tokens_per_block: is not an argument of TensorRT-LLM 1"
    ):
        plan_for(tiny_llama, tmp_path, "runtime.version=1.0.0", "runtime.kv_cache.tokens_per_block=64")
    with pytest.raises(RecipeError, match=r"there it is called speculative_config\.speculative_model_dir"):
        plan_for(tiny_llama, tmp_path, "runtime.version=1.1.0", extra)


def test_the_version_decides_the_engine_and_nothing_before(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = (plan_for(tiny_llama, tmp_path, f"runtime.version={version}") for version in ("1.2.1", "1.4.0rc1"))
    changed = {step.kind for step in first.steps if step != second.step(step.kind)}
    assert changed == {"engine", "deploy"}


def test_what_runs_where(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = (
        *("compress.format=int4_awq", "compress.group_size=64", "target.gpu=B200", "compress.sparsity=2:4"),
        *("runtime.stream_interval=4", "runtime.kv_cache.max_tokens=4096", "runtime.extra.enable_sleep=true"),
    )
    plan = plan_for(tiny_llama, tmp_path, *overrides)
    found = plan.to_json()["comparison"]
    assert found["columns"] == ("1.2.1 engine", "1.2.1 LLM API", "1.4.0rc1 LLM API")
    rows = {row["what"]: [(cell["status"], cell["detail"]) for cell in row["cells"]] for row in found["rows"]}
    assert rows["runtime"][0] == ("available", "container 26.07")
    assert rows["runtime"][2] == ("available", "no Triton container")
    assert [status for status, _ in rows["format int4_awq"]] == ["not available", "available", "not available"]
    assert "trtllm-build refuses INT4" in rows["format int4_awq"][0][1]
    assert rows["model LlamaForCausalLM"] == [
        ("available", ""),
        ("available", ""),
        ("available", "by the newest list, not proven identical to 1.4.0rc1"),
    ]
    assert rows["sparsity 2:4"][1] == ("available", "without more speed")
    assert rows["runtime.stream_interval"] == [
        ("not available", "no counterpart"),
        ("available", ""),
        ("available", ""),
    ]
    assert rows["runtime.kv_cache.max_tokens"][0] == ("renamed", "max_tokens_in_paged_kv_cache")
    assert rows["runtime.extra.enable_sleep"] == [
        ("not available", "an argument of the LLM API"),
        ("available", ""),
        ("renamed", "sleep_config"),
    ]
    text = plan_text(plan)
    assert "this recipe on" in text
    assert "1.4.0rc1 LLM API" in text


def test_a_release_without_engines(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.version=1.4.0rc1", "runtime.max_batch_size=2")
    found = plan.to_json()["comparison"]
    assert found["columns"] == ("1.2.1 engine", "1.2.1 LLM API", "1.4.0rc1 LLM API"), "there is still the choice"
    assert found["rows"][0]["cells"][0]["detail"] == "container 26.07; 1.4.0rc1 has no engines"
    earlier = plan_for(tiny_llama, tmp_path, "runtime.version=1.3.0rc22").to_json()["comparison"]["columns"]
    assert earlier == ("1.2.1 engine", "1.3.0rc22 LLM API", "1.4.0rc1 LLM API")


def test_a_release_without_the_llm_api(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.kind=trtllm-engine", "target.gpu=H100", "runtime.version=0.21.0")
    found = plan.to_json()["comparison"]
    assert found["columns"] == ("0.21.0 engine", "1.2.1 LLM API", "1.4.0rc1 LLM API")
    assert found["rows"][0]["cells"][1]["detail"] == "container 26.07; 0.21.0 has no LLM API"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mixtral", "int4_awq: TensorRT-LLM's experts with weights of 4 bits have inputs in FP8"),
        ("phi3", "int4_gptq: TensorRT-LLM cuts Phi-3's joined projections as if a row of codes held one output"),
    ],
)
def test_weights_of_4_bits_that_would_not_load(name: str, sentence: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / name, name)
    with pytest.raises(CompatibilityError) as caught:
        plan_for(
            checkpoint, tmp_path, f"compress.format={sentence.split(':', maxsplit=1)[0]}", "compress.group_size=64"
        )
    assert sentence in str(caught.value)
    plan_for(checkpoint, tmp_path, "compress.format=fp8")
