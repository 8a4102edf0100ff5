"""What the ranks of a parallel run draw, and what one process draws to compare with."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import torch
from diffusers import FluxControlNetPipeline, FluxKontextPipeline, FluxTransformer2DModel, UniPCMultistepScheduler
from peft import LoraConfig
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

import afcache
from afcache import CacheConfig, ParallelConfig
from tests.support.mini_flux import fresh_mini_flux
from tests.support.pipelines import load_ip_adapters, make_controlnet, picture

ADAPTIVE = CacheConfig(tolerance=0.02, warmup_steps=2)
NOISE, VELOCITY = (dataclasses.replace(ADAPTIVE, target=target) for target in ("noise", "velocity"))
DBCACHE = afcache.policy("dbcache", first_blocks=1, last_blocks=1, threshold=0.5)
LAYERWISE = afcache.policy("layerwise", groups=4)
# As much as a compiler can get wrong of them, in half the time.
TWO_GROUPS = afcache.policy("layerwise", groups=2)


FLOW = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}


class Case(NamedTuple):
    """One image.

    Attributes:
        text: text tokens.
        height, width: pixels; four to a token.
        cfg: true CFG scale.
        config: settings.
        steps: of the schedule.
        backend: of torch.compile; None: eager. Dynamo's graph is what "eager" runs; "aot_eager" traces it three times more, to
            find what it mutates and to take its operations apart, and takes three times as long.
        steered_by: what steers the blocks beside the prompt: "controlnet", "image prompt", "reference image", "adapter"
            or nothing.
        blocks: double-stream and single-stream ones.
        mixes: whether the scheduler mixes several outputs.

    """

    text: int = 8
    height: int = 32
    width: int = 32
    cfg: float = 1.0
    config: CacheConfig = ADAPTIVE
    steps: int = 28
    backend: str | None = "eager"
    steered_by: str = ""
    blocks: tuple[int, int] = (1, 2)
    mixes: bool = False


class Drawn(NamedTuple):
    """An image, and how it came about.

    Attributes:
        latents: at the end.
        decisions: what every call refreshed.
        choices: what groups did at every call, where there are some.
        graphs: graphs that Dynamo made.
        breaks: graph breaks.
        reported: collectives and bytes of every call, by the report.
        counted: those that really ran, where nothing is compiled.
        branches: collectives on the path of every step, on refreshes, and on cached steps, where a graph was looked into.
        correction: how forecasts were caught up with.

    """

    latents: torch.Tensor
    decisions: list[tuple[bool, ...]]
    choices: list[tuple[str, ...]]
    graphs: int
    breaks: int
    reported: list[tuple[int, int]]
    counted: list[tuple[int, int]]
    branches: tuple[int, int, int] | None
    correction: str


class MessageCounter(TorchDispatchMode):
    """Counts what every call of a transformer sends: the collectives that reach the dispatcher."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []
        self._hook = transformer.register_forward_pre_hook(lambda *_: self.calls.append((0, 0)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sent = sent_bytes(func, args)
        if sent is not None:
            collectives, size = self.calls[-1]
            self.calls[-1] = (collectives + 1, size + sent)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        self._hook.remove()
        super().__exit__(*raised)


def sent_bytes(func: Any, args: Any) -> int | None:
    """What this rank sends in a collective, or None for other operations."""
    ops = torch.ops._c10d_functional
    if func is ops.all_reduce.default:
        ranks = group_size(args[2])
        return -(-2 * (ranks - 1) * args[0].nbytes // ranks)
    if func is ops.all_gather_into_tensor.default:
        return (args[1] - 1) * args[0].nbytes
    if func is ops.all_to_all_single.default:
        x, _, splits, name = args
        own = splits[torch.distributed.get_rank(_resolve_process_group(name))]
        return x.nbytes * (sum(splits) - own) // sum(splits)
    assert func.namespace != "_c10d_functional" or func is ops.wait_tensor.default
    return None


def group_size(name: Any) -> int:
    return torch.distributed.get_world_size(_resolve_process_group(name))


class GraphReader:
    """A backend that counts the collectives in a graph and in the branches of its decision."""

    def __init__(self) -> None:
        self.branches: tuple[int, int, int] | None = None

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        conds = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.cond]
        if len(conds) == 1:
            computed, cached = (getattr(graph, str(branch.target)) for branch in conds[0].args[1:3])
            everything = sum(collectives_of(m) for m in graph.modules() if isinstance(m, torch.fx.GraphModule))
            inside = (collectives_of(computed), collectives_of(cached))
            self.branches = (everything - sum(inside), *inside)
        return lookup_backend("eager")(graph, inputs)


def collectives_of(graph: torch.fx.GraphModule) -> int:
    ops = [torch.ops._c10d_functional.all_reduce, torch.ops._c10d_functional.all_gather_into_tensor]
    ops.append(torch.ops._c10d_functional.all_to_all_single)
    return sum(getattr(node.target, "overloadpacket", node.target) in ops for node in graph.graph.nodes)


CASES = {
    "divisible": Case(),
    "short text": Case(text=5),
    "long text, odd image": Case(text=77, height=28, width=28),
    "odd everything": Case(text=5, height=20, width=28, backend="aot_eager"),
    "guided": Case(text=5, height=28, width=28, cfg=2.0),
    "layerwise": Case(config=LAYERWISE, blocks=(2, 3)),
    "two groups": Case(config=TWO_GROUPS),
    "two groups, guided": Case(config=TWO_GROUPS, cfg=2.0),
    "layerwise, odd": Case(text=5, height=20, width=28, config=LAYERWISE, blocks=(2, 3)),
    "layerwise, guided": Case(config=LAYERWISE, cfg=2.0, blocks=(2, 3)),
    "teacache": Case(text=5, height=28, width=28, config=afcache.policy("teacache", threshold=0.6)),
    "teacache, guided": Case(text=5, height=28, width=28, cfg=2.0, config=afcache.policy("teacache", threshold=0.6)),
    "first and last blocks": Case(text=5, height=28, width=28, config=DBCACHE),
    "uncached": Case(text=5, height=28, width=28, config=afcache.policy("none"), steps=6),
    "inductor": Case(text=5, height=28, width=28, backend="inductor", blocks=(1, 1)),
    "eager": Case(text=5, height=28, width=28, backend=None),
    "counted": Case(text=5, height=28, width=28, cfg=2.0, backend=None),
    "counted, layerwise": Case(text=5, height=28, width=28, cfg=2.0, config=LAYERWISE, backend=None, blocks=(2, 3)),
    "counted, first and last blocks": Case(text=5, config=DBCACHE, backend=None),
    "counted, uncached": Case(config=afcache.policy("none"), backend=None, steps=2),
    "controlnet": Case(text=5, height=28, width=28, steered_by="controlnet"),
    "controlnet, guided": Case(cfg=2.0, steered_by="controlnet"),
    "image prompt": Case(text=5, height=20, width=28, steered_by="image prompt"),
    "image prompt, guided": Case(cfg=2.0, steered_by="image prompt"),
    "reference image, guided": Case(cfg=2.0, steered_by="reference image"),
    "looked into": Case(backend="read", steps=8),
    "velocity": Case(text=5, height=28, width=28, config=VELOCITY),
    "noise": Case(text=5, height=20, width=28, config=NOISE),
    "noise, guided": Case(text=5, height=28, width=28, cfg=2.0, config=NOISE, backend="aot_eager"),
    "noise, solver": Case(text=5, height=28, width=28, config=NOISE, mixes=True),
    "noise, solver, guided": Case(cfg=2.0, config=NOISE, mixes=True),
    "noise, controlnet": Case(text=5, height=28, width=28, config=NOISE, steered_by="controlnet"),
    "noise, controlnet, guided": Case(cfg=2.0, config=NOISE, steered_by="controlnet"),
    "noise, reference image, guided": Case(cfg=2.0, config=NOISE, steered_by="reference image"),
    "counted, noise": Case(text=5, height=28, width=28, cfg=2.0, config=NOISE, backend=None),
    "looked into, noise": Case(backend="read", steps=8, config=NOISE),
}


def make_pipeline(steered_by: str = "", blocks: tuple[int, int] = (1, 2)) -> Any:
    """Mini-FLUX with a random transformer of four heads, as a pipeline that takes what else is to steer it."""
    pipe: Any = fresh_mini_flux()
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    parts: dict[str, Any] = {name: part for name, part in pipe.components.items() if part is not None}
    if steered_by == "controlnet":
        pipe = FluxControlNetPipeline(**parts, controlnet=make_controlnet(pipe.transformer))
    elif steered_by == "reference image":
        pipe = FluxKontextPipeline(**parts)
    elif steered_by == "image prompt":
        load_ip_adapters(pipe, 1)
    elif steered_by == "adapter":
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, case: Case, parallel: ParallelConfig | None = None, *, seed: int = 0, prompt: str = "a two") -> Drawn:
    """Draw a case, alone or together with other ranks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reader = GraphReader()
    backend = reader if case.backend == "read" else case.backend
    compiled: dict[str, Any] = {"backend": backend} if backend else {"compile": False}
    afcache.compile_pipeline(pipe, case.config, parallel=parallel, **compiled)
    guided: dict[str, Any] = {"true_cfg_scale": case.cfg, "negative_prompt": ""} if case.cfg > 1 else {}
    shown = picture().resize((case.width, case.height))
    if case.steered_by == "controlnet":
        guided["control_image"] = shown
    elif case.steered_by == "reference image":
        guided |= {"image": shown, "max_area": case.width * case.height, "_auto_resize": False}
    elif case.steered_by == "image prompt":
        prompts = [torch.ones(1, 1, 16), torch.zeros(1, 1, 16)]
        guided |= {"ip_adapter_image_embeds": prompts[:1], "negative_ip_adapter_image_embeds": prompts[1:]}
    scheduler = pipe.scheduler
    if case.mixes:
        pipe.scheduler = UniPCMultistepScheduler.from_config(scheduler.config, **FLOW)
    counter = MessageCounter(pipe.transformer)
    with contextlib.nullcontext() if backend else counter:
        latents = pipe(
            prompt=prompt,
            height=case.height,
            width=case.width,
            max_sequence_length=case.text,
            num_inference_steps=case.steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **guided,
        ).images
    report = afcache.report(pipe)
    pipe.scheduler = scheduler
    counters = torch._dynamo.utils.counters
    return Drawn(
        latents,
        [step.refreshed for step in report.steps],
        [tuple(group.choice[0] for group in step.groups) for step in report.steps],
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        [(step.collectives, step.bytes_sent) for step in report.steps],
        counter.calls,
        reader.branches,
        report.correction,
    )
