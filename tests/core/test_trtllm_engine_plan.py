"""Plans for TensorRT engines: values, the arguments of trtllm-build with their reasons, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from core.test_model import edit_config
from tiny import save_checkpoint
from trtbuild.build_flags import flag_table
from trtbuild.checkpoint_files import open_directory
from trtbuild.compat import facts
from trtbuild.console import plan_text
from trtbuild.convert.architectures import ARCHITECTURES
from trtbuild.errors import CompatibilityError, RecipeError, TrtbuildError
from trtbuild.migrate.target import Target
from trtbuild.model import read_facts
from trtbuild.pipeline import prepare
from trtbuild.plan import Plan, Source
from trtbuild.planner import make_plan
from trtbuild.recipe import json_schema
from trtbuild.recipe_file import load_recipe
from trtbuild.releases import lines
from trtbuild.support import refused_in_line
from trtbuild.toolchain import tool_versions
from trtbuild.trtllm_build import arguments, choose, spec_from_json

RUNTIME = "runtime: {kind: trtllm-engine}\ntarget: {gpu: H100}\n"
FP8 = ("compress.format=fp8", "compress.kv_cache=fp8")


def plan_for(checkpoint: Path, tmp_path: Path, *overrides: str, runtime: str = RUNTIME) -> Plan:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\n{runtime}")
    loaded = load_recipe(recipe, overrides)
    return make_plan(loaded, read_facts(open_directory(checkpoint)), Source(str(checkpoint)), tool_versions())


def origins(plan: Plan) -> dict[str, str]:
    return {value.path: value.origin for value in plan.values}


def flags(plan: Plan) -> dict[str, str]:
    return {choice.flag: " ".join(choice.values) for choice in plan.arguments}


def test_the_default_plan(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path)
    assert origins(plan)["runtime.version"] == (
        "default: the newest with a container; container 26.07; "
        "flags of trtllm-build: 58fb435e, proven identical to 1.2.1"
    )
    assert origins(plan)["target.gpu"] == "recipe; SM90"
    assert (plan.value("serving.layout"), plan.value("deploy.files")) == (
        "ensemble", ("dockerfile", "compose", "launch"),
    )  # fmt: skip
    assert plan.step("evaluate").parameters["device"] == "auto"
    assert plan.estimates["kv_bytes_per_token"] == 2 * plan.facts.kv_elements_per_token
    engine = plan.step("engine").parameters
    assert (engine["version"], engine["container"], engine["world_size"]) == ("1.2.1", "26.07", 1)
    assert flags(plan) == {
        "max_batch_size": "8", "max_seq_len": "512", "max_input_len": "511", "max_num_tokens": "4096",
        "max_beam_width": "1", "kv_cache_type": "paged", "tokens_per_block": "32", "use_paged_context_fmha": "enable",
        "use_fp8_context_fmha": "disable", "gemm_plugin": "auto", "input_timing_cache": "/build/timing.cache",
        "output_timing_cache": "/build/timing.new", "workers": "1", "monitor_memory": "",
    }  # fmt: skip
    assert not any("proven" in warning for warning in plan.warnings)


def test_older_releases_are_planned_with_their_own_facts(tiny_llama: Path, tmp_path: Path) -> None:
    """0.20 and 0.21 build engines; what was not read of them is said, what they do not have is refused."""
    plan = plan_for(tiny_llama, tmp_path, "runtime.version=0.21.0", "compress.format=int4_awq")
    assert plan.step("engine").parameters["container"] == "25.08"
    assert origins(plan)["runtime.version"].endswith("flags of trtllm-build: b8e38f9c, proven identical to 0.21.0")
    sentence = "TensorRT-LLM 0.21.0: the inputs of its backend are taken from releases before and after it"
    assert any(sentence in warning for warning in plan.warnings)
    for changes, refusal in (
        (("compress.format=fp8", "target.gpu=B200"), "TensorRT-LLM 0.20 lists FP8 for SM89, SM90 only"),
        (
            ("runtime.extra.log_level=trace",),
            "'trace' is not allowed by trtllm-build 0.20; write one of internal_error",
        ),
    ):
        with pytest.raises(TrtbuildError) as caught:
            plan_for(tiny_llama, tmp_path, "runtime.version=0.20.0", *changes)
        assert refusal in str(caught.value)


def test_classes_that_a_release_or_format_does_not_have(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    plan_for(checkpoint, tmp_path, "runtime.version=1.0.0")
    with pytest.raises(TrtbuildError) as caught:
        plan_for(checkpoint, tmp_path, "runtime.version=0.21.0")
    assert "TensorRT-LLM 0.21 builds no engines of Qwen3ForCausalLM, 1.0 is the first" in str(caught.value)
    line = lines()[-1]
    assert refused_in_line(line, "Qwen2MoeForCausalLM", "FP8") is None
    refusal = "TensorRT-LLM's own class for Qwen2MoeForCausalLM cannot load W4A16_AWQ experts"
    assert refused_in_line(line, "Qwen2MoeForCausalLM", "W4A16_AWQ") == (refusal, "use another compress.format")


def test_everything_that_decides_the_engine_arrives(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(
        tiny_llama, tmp_path, *FP8, "runtime.tensor_parallel_size=2", "runtime.max_batch_size=5",
        "runtime.max_num_tokens=300", "runtime.max_seq_len=200", "serving.max_input_tokens=100",
        "runtime.kv_cache.tokens_per_block=64", "compress.sparsity='2:4'", "target.gpu='L40S'",
        "runtime.extra={multiple_profiles: enable, gather_generation_logits: true, opt_num_tokens: 64}",
    )  # fmt: skip
    wanted = {
        "max_batch_size": "5", "max_seq_len": "200", "max_input_len": "100", "max_num_tokens": "300",
        "tokens_per_block": "64", "use_fp8_context_fmha": "enable", "gemm_plugin": "disable", "weight_sparsity": "",
        "reduce_fusion": "enable", "multiple_profiles": "enable", "gather_generation_logits": "",
        "opt_num_tokens": "64",
        "workers": "2",
    }  # fmt: skip
    assert wanted.items() <= flags(plan).items()
    engine = json.loads(json.dumps(dict(plan.step("engine").parameters)))
    spec = spec_from_json(engine["spec"])
    assert (spec.gpu, spec.kv_cache, spec.world_size, spec.sparse) == (89, "FP8", 2, True)
    assert engine["arguments"] == list(arguments(choose(spec), "CHECKPOINT", "ENGINE"))
    assert engine["world_size"] == plan.value("target.count") == 2


def test_extra_takes_the_place_of_a_choice(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.extra={gemm_plugin: bfloat16}")
    rows = [choice for choice in plan.arguments if choice.flag == "gemm_plugin"]
    assert [(row.values, row.reason) for row in rows] == [(("bfloat16",), "runtime.extra")]


def test_every_row_is_shown_with_its_reason(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.extra={multiple_profiles: enable}")
    text, document = plan_text(plan), plan.to_json()
    for choice in plan.arguments:
        assert any(line.split()[:1] == [f"--{choice.flag}"] and choice.reason in line for line in text.splitlines())
        assert choice.reason
    assert [row["flag"] for row in document["arguments"]] == [choice.flag for choice in plan.arguments]
    table = {row.what: [str(cell) for cell in row.cells] for row in plan.comparison.rows}  # type: ignore[union-attr]
    assert plan.comparison is not None
    assert plan.comparison.columns[:2] == ("1.2.1 engine", "1.2.1 LLM API")
    assert table["runtime.extra.multiple_profiles"] == ["available", *2 * ["not available: a flag of trtllm-build"]]


def test_what_the_server_reads(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(
        tiny_llama, tmp_path, "runtime.kv_cache.host_cache_size=1024",
        "runtime.kv_cache.max_attention_window=[64, 512]",
        "runtime.cuda_graph_config.enabled=true", "runtime.capacity_scheduler_policy=MAX_UTILIZATION",
    )  # fmt: skip
    engine = plan.step("repository").parameters["engine"]
    assert engine["gpt_model_path"] == "/package/engine/built"
    assert engine["runtime"]["capacity_scheduler_policy"] == "MAX_UTILIZATION"
    assert engine["more"] == {
        "kv_cache_host_memory_bytes": 1024, "max_attention_window_size": [64, 512], "cuda_graph_mode": True,
        "backend": "tensorrtllm",
    }  # fmt: skip


def test_attention_windows(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=64)
    assert plan_for(checkpoint, tmp_path).value("runtime.kv_cache.max_attention_window") == (64,)
    edit_config(checkpoint, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    sentence = "the model has an attention window of 64 tokens, which the server must be told"
    assert any(sentence in warning for warning in plan_for(checkpoint, tmp_path).warnings)
    short = plan_for(checkpoint, tmp_path, "runtime.max_seq_len=64")
    assert not any(sentence in warning for warning in short.warnings)


def test_the_table_of_architectures_is_the_conversions() -> None:
    table = facts("architectures")["engine"]
    assert table["converted"] == {name: row.model_type for name, row in ARCHITECTURES.items()}
    assert set(table["one_stage"]) == {name for name, row in ARCHITECTURES.items() if not row.pipeline}
    assert set(table["converted"]) <= set(table["classes"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["runtime.version=1.3.0rc22"], "TensorRT-LLM 1.3.0rc22 builds no engines, the last that did is 1.3.0rc20; us"),
        (
            ["runtime.version=0.18.0", "runtime.guided_decoding_backend=xgrammar"],
            "the backend of TensorRT-LLM 0.18.0 has no parameter guided_decoding_backend; remove it, or use a later",
        ),
        (
            ["runtime.version=0.17.0", "speculative.method=lookahead"],
            "speculative.method: the backend of TensorRT-LLM 0.17.0 has no parameter lookahead_window_size; remove",
        ),
        (
            ["runtime.version=1.3.0rc5"],
            "runtime.version: trtbuild knows no Triton container with TensorRT-LLM 1.3.0rc5, and engines are",
        ),
        (
            ["runtime.version=1.2.9"],
            "no known release of TensorRT-LLM; the nearest are 1.3.0rc0, 1.2.1, 1.2.0; or set runtime.allow_unknown",
        ),
        (
            ["runtime.version=1.4.9", "runtime.allow_unknown_version=true"],
            "TensorRT-LLM 1.4.9 builds no engines, the last that did is 1.3.0rc20; use 1.2.1, or runtime.kind: trtllm",
        ),
        (["runtime.kv_cache.tokens_per_block=48"], "48: TensorRT-LLM's blocks hold a power of two of tokens; use 32"),
        (["serving.layout=llm"], "serving.layout: llm: TensorRT engines are served by the five models of layout ensem"),
        (["serving.model_py=upstream"], "serving.model_py: upstream: only the runtime trtllm has it; remove it"),
        (
            ["serving.layout=tokens", "serving.default_max_tokens=5"],
            "serving.default_max_tokens: nothing of layout tokens heeds it: every request says request_output_len; rem",
        ),
        (["model.adapters=[a]"], "runtime.lora_config.max_lora_rank: is not set; an adapter of a higher rank than"),
        (["runtime.device=cpu"], "runtime.device: cpu: only the embedded runtime has it; use auto"),
        (["runtime.attn_backend=FLASHINFER"], "runtime.attn_backend: TensorRT engines have no counterpart of it; remo"),
        (["runtime.enable_attention_dp=true"], "runtime.enable_attention_dp: TensorRT engines have no counterpart"),
        (["runtime.context_parallel_size=2"], "the conversion divides models over tensor and pipeline ranks only"),
        (["runtime.guided_decoding_backend=llguidance"], "llguidance: the backends of TensorRT engines know xgrammar"),
        (["target.gpu=H1000"], "target.gpu: 'H1000' is no known GPU; did you mean H100"),
        (["target.gpu=A100", "compress.format=fp8"], "compress.format: fp8 does not run on A100 (SM80): TensorRT-LLM"),
        (["target.gpu=A100", "compress.kv_cache=fp8"], "an FP8 KV cache needs compute capability 8.9, the target has"),
        (
            ["target.count=1", "runtime.tensor_parallel_size=2"],
            "target.count: 1 GPUs, but tensor x pipeline parallel n",
        ),
        (["runtime.tensor_parallel_size=3"], "3 does not divide the model's 4 attention heads; use one of 1, 2, 4"),
        (
            ["runtime.tensor_parallel_size=4", "compress.format=int4_awq", "compress.group_size=64"],
            "each of 4 ranks gets 16 attention output inputs, no whole number of groups of 64",
        ),
        (["compress.format=int4_awq", "compress.group_size=32"], "TensorRT-LLM's INT4 kernels take groups of 64 or 12"),
        (["runtime.pipeline_parallel_size=9"], "9 is more than the model's 3 layers; use at most 3"),
        (["speculative.method=ngram"], "speculative.method: ngram: trtllm-build has no such mode; use none, or runtim"),
        (["speculative.method=eagle3"], "speculative.method: eagle3: trtllm-build has no such mode; use none, or runt"),
        (
            ["speculative.method=medusa", "runtime.pipeline_parallel_size=3"],
            "speculative decoding does not run with pipeline_parallel_size 3; use tensor_parallel_size instead",
        ),
        (
            ["runtime.pipeline_parallel_size=3", "compress.format=fp8", "compress.exclude=['*.1.mlp.*']"],
            "compress.exclude: leaves out other layers in some of 3 pipeline stages, which TensorRT-LLM cannot be told",
        ),
        (
            ["runtime.pipeline_parallel_size=2", "compress.format=fp8", "compress.exclude=['*.2.mlp.*']"],
            "compress.exclude: leaves out other layers in some of 2 pipeline stages, which TensorRT-LLM cannot be told",
        ),
        (["speculative.draft=x"], "speculative.draft: x: of no use without a speculative.method; remove it"),
        (
            ["compress.format=fp8", "compress.exclude=['*.1.self_attn.q_proj']"],
            "names model.layers.1.self_attn.q_proj, but not model.layers.1.self_attn.k_proj",
        ),
    ],
)
def test_what_engines_do_not_do(tiny_llama: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        plan_for(tiny_llama, tmp_path, *overrides)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["serving.gpu_device_ids=[[0], [1]]", "serving.communication_mode=leader"],
            "serving.communication_mode: leader: 2 instances of an engine (serving.gpu_device_ids) have no common",
        ),
        (
            ["serving.gpu_device_ids=[[0], [1]]", "serving.backend=python"],
            "serving.gpu_device_ids: names GPUs for 2 instances, and the container's python model reads one list o",
        ),
        (["serving.gpu_device_ids=[[0, 1]]"], "serving.gpu_device_ids.0: names 2 GPUs, and one engine takes 1 (tensor"),
        (
            ["runtime.tensor_parallel_size=2", "serving.gpu_device_ids=[[3, 3]]"],
            "serving.gpu_device_ids.0: [3, 3] names a GPU twice; give each rank a GPU of its own",
        ),
        (["serving.layout=tokens", "serving.model_name=chat"], "'chat': the model of layout tokens has a fixed name"),
        (["target.gpu=null"], "target.gpu: is missing, and an engine is built for one GPU architecture; name the GPU"),
        (["runtime.extra.gemm_plugins=auto"], "is no flag of trtllm-build 1.2; did you mean gemm_plugin?"),
        (
            ["runtime.extra.kv_cache_config={}"],
            "runtime.extra.kv_cache_config: is an argument of the LLM API, not a flag of trtllm-build; remove it; ",
        ),
        (
            ["runtime.extra.gemm_plugin=int4"],
            "runtime.extra.gemm_plugin: 'int4' is not allowed by trtllm-build 1.2; wr",
        ),
        (["runtime.extra.use_fused_mlp=true"], "True is not allowed by trtllm-build 1.2; write one of enable, disable"),
        (
            ["runtime.extra.gather_context_logits=1"],
            "1 is not allowed by trtllm-build 1.2; write true, or leave it out",
        ),
        (["runtime.extra.opt_num_tokens=0"], "0 is not allowed by trtllm-build 1.2; write a whole number above 0"),
        (["runtime.extra.log_level=3"], "3 is not allowed by trtllm-build 1.2; write one of internal_error, error"),
        (["runtime.extra.max_seq_len=64"], "runtime.extra.max_seq_len: the recipe says it in runtime.max_seq_len; set"),
        (["runtime.extra.max_beam_width=4"], "the package's models answer with one beam; remove it"),
        (["runtime.extra.context_fmha=disable"], "in-flight batching needs it as it is; remove it"),
        (["runtime.extra.workers=1"], "runtime.extra.workers: the parallel sizes say it; remove it"),
        (["runtime.extra.max_draft_len=5"], "runtime.extra.max_draft_len: speculative.method says it; set it there"),
        (["runtime.extra.use_fp8_context_fmha=enable"], "takes effect only with FP8 weights and an FP8 KV cache"),
        (
            ["runtime.extra.gemm_plugin=auto", "compress.sparsity='2:4'"],
            "auto: the plugin would bypass the kernels that use 2:4 weights",
        ),
    ],
)
def test_mistakes(tiny_llama: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_for(tiny_llama, tmp_path, *overrides)
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1, "one mistake, one sentence"


def test_older_lines(tiny_llama: Path, tmp_path: Path) -> None:
    """Their flags and formats, and the tensors of their backend; clients' names stay."""
    for version, line in (("'25.01'", "0.17"), ("0.18.2", "0.18"), ("0.19.0", "0.19")):
        plan = plan_for(tiny_llama, tmp_path, f"runtime.version={version}", "compress.format=fp8")
        assert plan.step("repository").parameters["engine_line"] == line
        assert set(flags(plan)) <= set(flag_table(plan.value("runtime.version")).flags)
    assert "engine_line" not in plan_for(tiny_llama, tmp_path, "runtime.version=0.20.0").step("repository").parameters
    experts = save_checkpoint(tmp_path / "mixtral", "mixtral")
    with pytest.raises(CompatibilityError, match=r"no engines of MixtralForCausalLM in W4A16_AWQ, 0\.19 is the first"):
        plan_for(experts, tmp_path, "runtime.version=0.18.0", "compress.format=int4_awq", "compress.group_size=64")
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "yarn"))
    edit_config(checkpoint, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    recipe = tmp_path / "yarn.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\n{RUNTIME}")
    assert prepare(recipe).plan.value("runtime.version") == "1.2.1"
    with pytest.raises(
        CompatibilityError, match="'yarn': TensorRT-LLM 1.0 builds no engines with it, 1.1 is the first"
    ):
        prepare(recipe, ["runtime.version=1.0.0"])


def test_one_rank_of_a_kind_is_no_demand(tiny_llama: Path, tmp_path: Path) -> None:
    """A migrated recipe may say so."""
    one = plan_for(tiny_llama, tmp_path, "runtime.context_parallel_size=1")
    assert one.step("engine").parameters == plan_for(tiny_llama, tmp_path).step("engine").parameters


def test_versions_that_no_table_has(tiny_llama: Path, tmp_path: Path) -> None:
    allowed = "runtime.allow_unknown_version=true"
    plan = plan_for(tiny_llama, tmp_path, "runtime.version=1.2.9", allowed)
    newest = flag_table("1.2.1")
    assert newest.releases == ("1.2.0", "1.2.1")
    assert (
        f"TensorRT-LLM 1.2.9 is in no table of trtbuild; flags of trtllm-build: {newest.commit[:8]}, not proven "
        "identical to 1.2.9; classes, formats and the backend's parameters are those of 1.2" in plan.warnings
    )
    assert any(warning.startswith("no Triton container with TensorRT-LLM 1.2.9 is known") for warning in plan.warnings)
    assert "no Triton container has it; flags of trtllm-build: " in origins(plan)["runtime.version"]
    engine = plan.step("engine").parameters
    assert (engine["version"], engine["container"], engine["image"]) == ("1.2.9", None, None)
    assert engine["arguments"] == plan_for(tiny_llama, tmp_path).step("engine").parameters["arguments"]
    assert plan.value("deploy.files") == ()
    # Known, and in no container: the tables hold for it, and its image must be told as well.
    plan = plan_for(tiny_llama, tmp_path, "runtime.version=1.3.0rc5", allowed)
    assert any(warning.startswith("flags of trtllm-build: ") for warning in plan.warnings)
    assert any(warning.startswith("no Triton container with TensorRT-LLM 1.3.0rc5") for warning in plan.warnings)
    with pytest.raises(CompatibilityError, match="compose: no Triton container has TensorRT-LLM 1.2.9; remove it"):
        plan_for(tiny_llama, tmp_path, "runtime.version=1.2.9", allowed, "deploy.files=[compose]")


def test_stages_may_leave_out_the_same_layers(tiny_llama: Path, tmp_path: Path) -> None:
    """Of three layers on two stages, the second is alone in its place; the others are first in theirs."""
    for size, pattern in ((3, "*.mlp.*"), (2, "*.1.mlp.*"), (2, "*.[02].mlp.*")):
        stages, exclude = f"runtime.pipeline_parallel_size={size}", f"compress.exclude=['{pattern}']"
        plan_for(tiny_llama, tmp_path, stages, "compress.format=fp8", exclude)


def test_what_the_conversion_would_refuse_is_refused_before_anything_is_compressed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\n{RUNTIME}")
    assert prepare(recipe).plan.value("runtime.kind") == "trtllm-engine"
    edit_config(checkpoint, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    assert prepare(recipe).plan.value("runtime.max_seq_len") == 512, "where the scaling begins"
    with pytest.raises(RecipeError, match="1024 is more than the 512 positions the model knows"):
        prepare(recipe, ["runtime.max_seq_len=1024"])
    edit_config(checkpoint, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False})
    with pytest.raises(CompatibilityError, match="truncate: false: TensorRT-LLM rounds"):
        prepare(recipe)
    assert prepare(recipe, ["runtime.kind=trtllm"]).plan.value("runtime.kind") == "trtllm"


def test_architectures(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, architectures=["GemmaForCausalLM"], model_type="gemma")
    with pytest.raises(
        CompatibilityError, match=r"GemmaForCausalLM \(gemma\) has no conversion here; convertible are"
    ) as e:
        plan_for(checkpoint, tmp_path)
    assert str(e.value).endswith("; use runtime.kind: embedded, or another model"), "the LLM API has no such class"
    edit_config(checkpoint, architectures=["NemotronForCausalLM"], model_type="nemotron")
    with pytest.raises(CompatibilityError, match="; use runtime.kind: trtllm or embedded, or another model"):
        plan_for(checkpoint, tmp_path)
    edit_config(checkpoint, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    with pytest.raises(CompatibilityError, match="GPT2LMHeadModel is not among the classes that TensorRT-LLM lists"):
        plan_for(checkpoint, tmp_path)
    edit_config(checkpoint, architectures=["Phi3ForCausalLM"], model_type="phi3")
    with pytest.raises(CompatibilityError, match="3: TensorRT-LLM cannot split Phi3ForCausalLM over pipeline stages"):
        plan_for(checkpoint, tmp_path, "runtime.pipeline_parallel_size=3")


def test_where_the_engine_is_built(tiny_llama: Path, tmp_path: Path) -> None:
    plan, named = plan_for(tiny_llama, tmp_path), plan_for(tiny_llama, tmp_path, "runtime.build_in=podman")
    assert (plan.value("runtime.build_in"), origins(plan)["runtime.build_in"]) == ("auto", "default")
    assert (named.value("runtime.build_in"), origins(named)["runtime.build_in"]) == ("podman", "--set")
    assert plan.digest == named.digest, "who builds an engine decides nothing of it"
    with pytest.raises(RecipeError, match="runtime.build_in: 'slrum' is not allowed; .*; did you mean slurm"):
        plan_for(tiny_llama, tmp_path, "runtime.build_in=slrum")
    for kind in ("trtllm", "embedded"):
        with pytest.raises(CompatibilityError, match="build_in: docker: only the runtime trtllm-engine has it"):
            plan_for(tiny_llama, tmp_path, f"runtime.kind={kind}", "runtime.build_in=docker")
        assert Target(kind).refuses("runtime.build_in", "docker") == "only TensorRT engines are built"
    assert Target("trtllm-engine").refuses("runtime.build_in", "docker") is None
    described = json_schema()["$defs"]["Runtime"]["properties"]["build_in"]
    assert described["enum"] == ["auto", "docker", "podman", "enroot", "slurm", "script"]
    assert "engine/build.sh" in described["description"]


def test_quality_is_measured_with_the_scales_of_the_engine(tiny_llama: Path, tmp_path: Path) -> None:
    """Only FP8 has them, only for TensorRT-LLM; each runtime joins in its own way."""

    def joined(*overrides: str) -> object:
        return plan_for(tiny_llama, tmp_path, *overrides).step("evaluate").parameters.get("joined_scales")

    assert joined("compress.format=fp8") == {"gate_up": True, "kv_cache": True, "intermediate": "float32"}
    apart = joined("compress.format=fp8", "runtime.extra.use_fused_mlp=disable")
    assert apart == {"gate_up": False, "kv_cache": True, "intermediate": "float32"}
    api = joined("runtime.kind=trtllm", "compress.format=fp8")
    assert api == {"gate_up": True, "kv_cache": False, "intermediate": "bfloat16"}
    for kind in ("trtllm", "trtllm-engine"):
        assert joined(f"runtime.kind={kind}") is None
        assert joined(f"runtime.kind={kind}", "compress.format=int4_awq", "compress.group_size=64") is None
    assert joined("runtime.kind=embedded", "target.gpu=null", "compress.format=fp8") is None


def test_gate_and_up_of_gemma_stay_apart(tmp_path: Path) -> None:
    """Its activation is none that trtllm-build joins them for."""
    plan = plan_for(save_checkpoint(tmp_path / "gemma", "gemma2"), tmp_path, "compress.format=fp8")
    assert plan.step("evaluate").parameters["joined_scales"]["gate_up"] is False
