"""Execution: packs the tokens of a step in one row and runs the Transformers class over them."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from trtbuild.errors import ArtifactError, CompatibilityError, HostError
from trtbuild.runtime.architecture import check_calls, check_config, check_rope, prepare
from trtbuild.runtime.attention import ATTENTION_NAME, LAYER_ATTRIBUTE, LayerCall, PagedLayer, Segment, Step, register
from trtbuild.runtime.capture import Capture
from trtbuild.runtime.checkpoint import LoadedModel, load_model
from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.fast.choice import why_general
from trtbuild.runtime.joined import JoinedScales
from trtbuild.runtime.kv_cache import LayerCache, bytes_per_slot
from trtbuild.runtime.places import segment_of, slots_of
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.step_logits import StepLogits

if TYPE_CHECKING:  # these need the Triton language, which only the fast path loads
    from trtbuild.runtime.fast.path import FastPath
    from trtbuild.runtime.fast.weights import Weights

_PROBE_TOKENS = 3
# Logits of at most this many (position, token) pairs are computed in one step where every position is wanted.
_LOGITS_AT_ONCE = 2**25


class ModelRunner:
    """A loaded model with its paged cache; `path` says which path its steps take, and why if not the fast one."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, *, set_aside: int = 0) -> None:
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.compute_dtype, self.device)
        self.model = loaded.model
        self.notes = list(loaded.notes)
        self.hf_config = loaded.config
        self.vocab_size = int(loaded.config.vocab_size)
        self.block_size = config.kv_cache.tokens_per_block
        self._takes_rows = "logits_to_keep" in inspect.signature(type(self.model).forward).parameters
        self._context = [Step()]
        layers = self._examine()
        self.kv_form = None if config.kv_cache.dtype == "auto" else config.kv_cache.dtype
        self.calls = [call for _, call in layers]
        weights = self._fuse(config)
        self.num_blocks = self._allocate(layers, config, loaded.kv_scales, set_aside)
        self._caches = [layer.cache for layer, _ in layers if layer.cache is not None]
        self.fast: FastPath | None = None
        self.capture: Capture | None = None
        if weights is not None:
            self.fast = self._fast_path(weights, self._caches, config)

    @classmethod
    def load(
        cls, engine_dir: Path, config: EngineConfig, *, joined: JoinedScales | None = None, set_aside: int = 0
    ) -> ModelRunner:
        """The runner of the checkpoint in `engine_dir`, with the scales of its projections joined where that is given.

        `set_aside` bytes of a GPU's memory are left to others before the cache takes what is free.

        Raises:
            ArtifactError: a file is missing or damaged.
            CompatibilityError: the model is of a kind that this engine does not run.
            HostError: the host lacks the device or the memory.
        """
        device = choose_device(config.device)
        hf_config = _hf_config(engine_dir, config)
        check_config(hf_config)
        check_rope(hf_config, config.max_seq_len)
        register()
        started = time.monotonic()
        loaded = load_model(
            engine_dir,
            device=device,
            dtype=choose_dtype(config.compute_dtype, device),
            weights=config.weights,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
            joined=joined,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
            loaded.notes.append(f"the checkpoint was read in {time.monotonic() - started:.1f} s")
        return cls(loaded, config, set_aside=set_aside)

    @property
    def chunk_limit(self) -> int:
        """The most tokens of a step for a sequence that wants the logits of every position."""
        return max(1, _LOGITS_AT_ONCE // self.vocab_size)

    def execute(self, chunks: list[Chunk]) -> StepLogits:
        """Compute `chunks` and return the logits that are wanted of them: float32, or float64 where computed so."""
        return self.fast.execute(chunks) if self.fast else self.execute_general(chunks)

    def execute_general(self, chunks: list[Chunk]) -> StepLogits:
        """As `execute`, through the Transformers class also where the fast path takes the model."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        rows: list[slice] = []
        segments: list[Segment] = []
        for chunk in chunks:
            sequence, row, first = chunk.sequence, len(token_ids), len(wanted)
            token_ids += chunk.token_ids
            tree = chunk.tree
            positions += range(chunk.start, chunk.end) if tree is None else [chunk.start + at for at in tree.depths]
            slots += slots_of(sequence, chunk.start, chunk.end, self.block_size)
            segment = segment_of(
                sequence, chunk.start, chunk.end, row, block_size=self.block_size, device=self.device, tree=tree
            )
            segments.append(segment)
            if sequence.wants_every_position and chunk.start < sequence.prompt_len:
                wanted += range(row, len(token_ids))
            elif chunk.is_last:
                wanted += range(len(token_ids) - 1 - chunk.num_drafted, len(token_ids))
            rows.append(slice(first, len(wanted)))
        step = Step(segments=segments, slots=self._tensor(slots))
        logits = self._forward(token_ids, positions, wanted, step)
        return StepLogits(logits, rows, states=None if self.capture is None else self.capture.take(wanted))

    def keep_paths(self, chunks: list[Chunk]) -> None:
        """Move the keys and values of a tree's right tokens to where they would lie had nothing else been drafted."""
        sources: list[int] = []
        targets: list[int] = []
        for chunk in chunks:
            path = [] if chunk.draft is None else chunk.draft.path
            if path != list(range(len(path))):
                slots = slots_of(chunk.sequence, chunk.start + 1, chunk.end, self.block_size)
                sources += [slots[place] for place in path]
                targets += slots[: len(path)]
        if sources:
            for cache in self._caches:
                cache.move(self._tensor(sources), self._tensor(targets))

    def release(self) -> None:
        """Give the memory of weights and cache back; the runner cannot be used afterwards."""
        for module in self.model.modules():
            layer = getattr(module, LAYER_ATTRIBUTE, None)
            if layer is not None:
                layer.cache = None
        self._context[0] = Step()
        self._caches = []
        self.fast = None

    def _forward(self, token_ids: list[int], positions: list[int], wanted: list[int], step: Step) -> torch.Tensor:
        self._context[0] = step
        rows = self._tensor(wanted)
        keep: dict[str, Any] = {"logits_to_keep": rows} if self._takes_rows else {}
        with torch.inference_mode():
            logits = self.model(
                input_ids=self._tensor(token_ids)[None],
                position_ids=self._tensor(positions)[None],
                use_cache=False,
                **keep,
            ).logits[0]
            if not self._takes_rows:
                logits = logits[rows]
            return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _examine(self) -> list[tuple[PagedLayer, LayerCall]]:
        """Run a few tokens to learn how each layer calls its attention."""
        layers = prepare(self.model, self._context)
        try:
            self._forward([0] * _PROBE_TOKENS, list(range(_PROBE_TOKENS)), [0], Step(probing=True))
        except (TypeError, AttributeError, RuntimeError, ValueError, NotImplementedError, IndexError) as error:
            name = type(self.model).__name__
            raise CompatibilityError(
                f"{name} does not run on the embedded engine's packed steps: {error}",
                "serve it with runtime.kind: trtllm, or choose a decoder with ordinary attention",
            ) from error
        return check_calls(self.hf_config, layers)

    def _fuse(self, config: EngineConfig) -> Weights | None:
        """The weights of the fast path if it takes this model; `path` says so."""
        reason = why_general(self.model, self.calls, device=self.device, dtype=self.dtype, cache=self.kv_form)
        if reason is None and config.speculative is not None:
            reason = "it verifies no drafts"
        self.path = "fast" if reason is None else f"general: {reason}"
        if self.device.type == "cuda":
            self.notes.append(
                f"the model runs on the {self.path.partition(':')[0]} path" + (f": {reason}" * bool(reason))
            )
        if reason is not None:
            return None
        from trtbuild.runtime.fast.weights import fuse

        started = time.monotonic()
        weights = fuse(self.model, self.calls, config.max_seq_len)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the parts that were joined; the cache is sized by what is free
        self.notes.append(f"weights were packed for the fast path in {time.monotonic() - started:.1f} s")
        return weights

    def _fast_path(self, weights: Weights, caches: list[LayerCache], config: EngineConfig) -> FastPath:
        from trtbuild.runtime.fast.path import FastPath

        started = time.monotonic()
        path = FastPath(
            weights,
            caches,
            page=self.block_size,
            max_batch_size=config.max_batch_size,
            max_seq_len=config.max_seq_len,
        )
        self.notes.append(f"kernels and CUDA graphs were made in {time.monotonic() - started:.1f} s")
        return path

    def _allocate(
        self,
        layers: list[tuple[PagedLayer, LayerCall]],
        config: EngineConfig,
        scales: dict[int, tuple[float, float]] | None,
        set_aside: int,
    ) -> int:
        """Make the pools and return their number of blocks."""
        form = self.kv_form
        if form and not scales:
            self.notes.append(f"kv_cache.dtype is {form} and the checkpoint has no k_scale and v_scale: 1.0 is used")
        if scales and not form:
            self.notes.append("the checkpoint's k_scale and v_scale are not used: kv_cache.dtype is auto")
        shapes = [(call.key_shape, call.value_shape) for _, call in layers]
        slot = bytes_per_slot(shapes, self.dtype, form)
        tokens = config.kv_cache.max_tokens or self._tokens_in_free_memory(slot, config, set_aside)
        num_blocks = tokens // self.block_size
        slots = num_blocks * self.block_size
        if num_blocks < 1:
            raise HostError(
                f"the free memory holds {tokens} tokens of KV cache, less than one block of {self.block_size}",
                "free memory on the GPU or give kv_cache.max_tokens",
            )
        for layer, call in layers:
            pair = (scales or {}).get(layer.index, (1.0, 1.0))
            layer.cache = LayerCache(
                (call.key_shape[0], slots, call.key_shape[1]),
                (call.value_shape[0], slots, call.value_shape[1]),
                dtype=self.dtype,
                device=self.device,
                form=form,
                scales=pair,
            )
        return num_blocks

    def _tokens_in_free_memory(self, token_bytes: int, config: EngineConfig, set_aside: int) -> int:
        if self.device.type != "cuda":
            raise ArtifactError(
                "kv_cache.max_tokens: null is allowed only on a GPU", "give the number of tokens that the cache holds"
            )
        free, _ = torch.cuda.mem_get_info(self.device)
        share = 0.0 if config.speculative is None else config.speculative.draft_kv_cache_share
        return int((free - set_aside) * config.kv_cache.free_gpu_memory_fraction * (1 - share)) // token_bytes


def choose_device(name: str) -> torch.device:
    """The device that `device: name` of engine.json means here.

    Raises:
        HostError: it asks for a GPU, and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise HostError("device: cuda, and PyTorch sees no NVIDIA GPU on this host", "use device: cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and has_cuda) else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that `compute_dtype: name` of engine.json means on `device`."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


def _hf_config(engine_dir: Path, config: EngineConfig) -> Any:
    if not (engine_dir / "config.json").is_file():
        raise ArtifactError(
            f"{engine_dir}: there is no config.json, so this is no checkpoint", "build the package again"
        )
    try:
        return AutoConfig.from_pretrained(engine_dir, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{engine_dir / 'config.json'}: Transformers cannot read it: {error}") from error
