"""``trtllm-build`` in the shape of upstream's commands/build.py @65f1d153: the names, calls and processes that matter.

FAKE_MODE: ``right``; ``lies`` writes another version into config.json; ``fails`` and ``hangs`` do so in rank 1, with
half of its engine written. Each rank that is built is noted in FAKE_LOG.
"""

import json
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

_LIMITS = ("max_batch_size", "max_seq_len", "max_input_len", "max_num_tokens", "max_beam_width", "max_draft_len")


def build_and_save(rank, gpu_id, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **kwargs):
    mode = os.environ.get("FAKE_MODE", "right")
    noted = ["rank", str(rank), f"gpu {gpu_id}", str(Path(build_config["input_timing_cache"]).exists())]
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(json.dumps(noted) + "\n")
    engine = Path(output_dir, f"rank{rank}.engine")
    print(f"[TRT-LLM] [I] Build TensorRT engine Unnamed Network {rank}", flush=True)
    if rank == 1 and mode in ("fails", "hangs"):
        while not Path(output_dir, "rank0.done").exists():
            time.sleep(0.02)  # so that the tests know what is finished by then
        engine.write_bytes(b"half")
        if mode == "fails":
            raise RuntimeError("CUDA out of memory")
        print("[TRT-LLM] [I] hanging", flush=True)
        time.sleep(120)  # long past the test, and an end where a test fails
    if rank == 0:
        Path(build_config["output_timing_cache"]).write_bytes(b"timings")
        names = {name: int(build_config[name]) for name in _LIMITS if name in build_config}
        names["max_seq_len"] += names.get("max_draft_len", 0)  # as tensorrt_llm/builder.py @14e801da
        speculation = build_config.get("speculative_decoding_mode", "none")
        plugins = {"tokens_per_block": int(build_config["tokens_per_block"]), "use_paged_context_fmha": True}
        config = {
            "version": "1.1.0" if mode == "lies" else os.environ.get("FAKE_VERSION", "1.2.1"),
            "pretrained_config": model_config,
            "build_config": names | {"plugin_config": plugins, "speculative_decoding_mode": speculation.upper()},
        }
        Path(output_dir, "config.json").write_text(json.dumps(config))
    engine.write_bytes(b"engine of rank %d" % rank)
    return True


def parallel_build(model_config, ckpt_dir, build_config, output_dir, workers=1, log_level="info", model_cls=None):
    rest = (ckpt_dir, build_config, output_dir, log_level, model_config, model_cls)
    world_size = model_config["mapping"]["world_size"]
    if workers == 1:
        for rank in range(world_size):
            assert build_and_save(rank, rank % workers, *rest), "Engine building failed"
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_workers=workers) as pool:
        futures = [pool.submit(build_and_save, rank, rank % workers, *rest) for rank in range(world_size)]
        failed = 0
        for future in as_completed(futures):
            try:
                future.result()
            except RuntimeError:
                traceback.print_exc()
                failed += 1
    assert not failed, "Engine building failed, please check error log."


def main():
    given = sys.argv[1:]
    pairs = zip(given, [*given[1:], ""], strict=True)
    flags = {name.removeprefix("--"): value for name, value in pairs if name.startswith("--")}
    Path(flags["output_dir"]).mkdir(exist_ok=True)
    config = json.loads(Path(flags["checkpoint_dir"], "config.json").read_text())
    workers = min(torch.cuda.device_count(), int(flags["workers"]))
    parallel_build(config, flags["checkpoint_dir"], flags, flags["output_dir"], workers)
