"""Transformers that other libraries share out among ranks, and that the cache draws with: stories of ranks."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

import afcache
from afcache import ParallelConfig
from afcache.parallel.groups import connect
from tests.support.parallel_cases import make_pipeline
from tests.support.zoo.everything import CACHED, MIXED, STEPS, difference, options_of
from tests.support.zoo.kind import Kind, draw

FLUX1 = Kind(
    "FluxPipeline",
    "FLUX.1",
    make_pipeline,
    lambda pipe, prompt: {
        "prompt": ["a two", "a three"][prompt],
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
        "output_type": "latent",
    },
    guided={"true_cfg_scale": 2.0, "negative_prompt": ""},
)
# Of those that diffusers has a plan for; the zoo's prompts of two have lengths that ranks cannot share out evenly.
SHARED = ("FluxPipeline", "QwenImagePipeline", "Flux2KleinPipeline", "WanPipeline")
UNEVEN = ("QwenImagePipeline", "Flux2KleinPipeline")
# Of xfuser, those that run on a CPU.
WRAPPERS = {
    "WanPipeline": ("transformer_wan", "xFuserWanTransformer3DWrapper"),
    "QwenImagePipeline": ("transformer_qwen", "xFuserQwenImageTransformerWrapper"),
}
BACKENDS = {"ulysses": "native", "ring": "_native_flash"}
# What is compiled is the same but for the attention: of one way AOT looks at it, too.
COMPILERS = {"ulysses": "aot_eager", "ring": "eager"}


def kind_of(name: str) -> Kind:
    return next(kind for kind in (FLUX1, *CACHED) if kind.name == name)


def draw_one(pipe: Any, kind: Kind) -> torch.Tensor:
    """With its second prompt."""
    return draw(pipe, kind, steps=STEPS, prompt=1, **options_of(kind))


def share_out(pipe: Any, kind: Kind, way: str) -> None:
    """By diffusers, between two ranks."""
    uneven = kind.name in UNEVEN
    settings: dict[str, Any] = {f"{way}_degree": 2, f"{way}_anything": uneven}
    pipe.transformer.set_attention_backend(BACKENDS[way])
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**settings))


def draw_shared(way: str) -> dict[str, Any]:
    """What every model draws under diffusers' context parallelism: by itself, and with the cache."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    met: dict[str, Any] = {}
    with on_cpu():
        for name in SHARED:
            kind = kind_of(name)
            pipe = kind.make()
            share_out(pipe, kind, way)
            met[name] = _drawn(pipe, kind, compile=True, backend=COMPILERS[way])
        late = kind_of("Flux2KleinPipeline")
        met["late"] = _draw_late(late.make(), late, way)
    return met


def draw_wrapped() -> dict[str, Any]:
    """The same with xfuser's transformers, in its groups; they trace whole."""
    connect(ParallelConfig(ulysses_degree=2, backend="gloo"))
    _start_xfuser()
    met: dict[str, Any] = {}
    for name, (module, wrapper) in WRAPPERS.items():
        kind = kind_of(name)
        pipe = kind.make()
        own = pipe.transformer
        wrapped = getattr(importlib.import_module(f"xfuser.model_executor.models.transformers.{module}"), wrapper)
        pipe.transformer = wrapped(**{key: value for key, value in own.config.items() if not key.startswith("_")}).eval()
        pipe.transformer.load_state_dict(own.state_dict())
        met[name] = _drawn(pipe, kind, compile="step", backend="aot_eager")
    return met


def _start_xfuser() -> None:
    """What its pipelines would set up for its transformers."""
    runtime_state: Any = importlib.import_module("xfuser.core.distributed.runtime_state")
    attention = importlib.import_module("xfuser.core.distributed.attention_backend").AttentionBackendType.SDPA
    arguments = importlib.import_module("xfuser.config.args").xFuserArgs

    class State(runtime_state.ExternalRuntimeState):
        """As it is outside of its own pipelines, for two ranks."""

        def __init__(self) -> None:
            runtime_state.RuntimeState.__init__(self, arguments(ulysses_degree=2).create_config()[0])
            self.attention_backend = self.cross_attention_backend = attention

        def increment_step_counter(self) -> None:
            """Only schedules of attention backends ask."""

    runtime_state._RUNTIME = State()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """diffusers' parallelism on CPU processes: it counts accelerators, and its ring has a kernel for GPUs alone."""

    def flash(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        dropout: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        del ctx, enable_gqa, options
        heads_first = [each.transpose(1, 2).contiguous() for each in (query, key, value)]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = (each.transpose(1, 2).contiguous() for each in kernel(*heads_first, dropout, is_causal, scale=scale))
        assert mask is None
        return (out, lse) if return_lse else out

    with (
        mock.patch.object(torch.accelerator, "device_count", return_value=1),
        mock.patch.object(attention_dispatch, "_native_flash_attention_forward_op", flash),
    ):
        yield


def _drawn(pipe: Any, kind: Kind, *, compile: Any, backend: str) -> dict[str, Any]:
    """Latents, and how many messages each call sends."""
    with Messages(pipe.transformer) as own:
        expected = draw_one(pipe, kind)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    exact = difference(draw_one(pipe, kind), expected)
    # A graph's messages reach no dispatcher: they are counted where nothing is compiled.
    afcache.compile_pipeline(pipe, tolerance=0.05, compile=False)
    with Messages(pipe.transformer) as sent:
        adaptive = draw_one(pipe, kind)
    decided = afcache.report(pipe).pattern()
    afcache.compile_pipeline(pipe, MIXED, compile=compile, backend=backend)
    return {
        "exact": exact,
        "adaptive": adaptive.tolist(),
        "decided": decided,
        "own": own.calls,
        "sent": sent.calls,
        "mixed": draw_one(pipe, kind).tolist(),
        "pattern": afcache.report(pipe).pattern(),
    }


def _draw_late(pipe: Any, kind: Kind, way: str) -> dict[str, Any]:
    """Shared out after compile_pipeline: refused; and then taken as it is."""
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    share_out(pipe, kind, way)
    error = "none"
    try:
        draw_one(pipe, kind)
    except NotImplementedError as raised:
        error = str(raised)
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    again = draw_one(pipe, kind).tolist()
    afcache.restore_pipeline(pipe)
    return {"error": error, "again": again, "restored": draw_one(pipe, kind).tolist()}


class Messages(TorchDispatchMode):
    """Counts the collectives that each call of a transformer dispatches.

    Args:
        transformer: whose calls are told apart.

    Attributes:
        calls: collectives of each call.

    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.calls: list[int] = []
        self._handle = transformer.register_forward_pre_hook(lambda *_: self.calls.append(0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "c10d") and "wait" not in str(func):
            self.calls[-1] += 1
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        self._handle.remove()
        super().__exit__(*error)
