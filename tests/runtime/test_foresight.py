"""decide_ahead: the same images, and one wait for the device a refresh; otherwise one a step."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import afcache
from afcache import CacheConfig, policy
from afcache.functional.decision import decide, foresee
from afcache.functional.initial import uncoupled
from afcache.functional.model import scaled_dot_product_attention
from afcache.functional.plans import schedule_steps, stack_steps
from afcache.functional.state import StepSchedule
from afcache.models.family import Clock
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1 import inputs as flux1_inputs
from afcache.runtime import pipelines
from afcache.runtime.foresight import Foresight
from afcache.sampling.primitives import cached_forward, init_state
from bench.models.random_flux import SIZES, make_flux1
from tests.support.sampling import ADAPTIVE, PROMPT, largest_difference, sample

SCHEDULE_TYPES = (torch.float32, torch.float32, torch.int64, torch.bool, *[torch.float32] * 4)
READ = torch.ops.aten._local_scalar_dense.default


@pytest.mark.parametrize("decisions", ["independent", "shared"])
@pytest.mark.parametrize("law", ["power", "remainder"])
def test_foresee_decides_what_the_steps_will(law: Any, decisions: Any):
    """Samples of different error rates, with a second guidance branch; row by row until the first refresh."""
    config = CacheConfig(error_law=law, batch_decisions=decisions, tolerance=0.02, max_growth=20.0)
    schedules = schedule_steps(torch.linspace(1, 0, 21), config)
    start = init_state(3, 1, 1, config=config)._replace(
        nodes=torch.tensor([[0.8] * 3, [0.9] * 3]),
        num_nodes=torch.full((3,), 2),
        error_rate=torch.tensor([0.2, 3.0, 0.9]),
        error_order=torch.ones(3, dtype=torch.int64),
        last_gap=torch.tensor([0.1, 0.1, 0.1]),
    )
    other = start._replace(error_rate=torch.tensor([0.1, 0.1, 2.0]))
    weight, others_weight = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.5, 1.0, 0.0])
    later = schedules[5:]
    rows = foresee(start, (other,), stack_steps(later), weight, others_weight, config=config)
    assert rows.shape == (15, 3)
    state, seen = start, []
    for schedule, row in zip(later, rows, strict=True):
        _, error, *_ = decide(other, schedule, uncoupled(3), config=config)
        coupling = uncoupled(3)._replace(weight=weight, others_error=others_weight * error)
        refresh, _, accumulated, _ = decide(state, schedule, coupling, config=config)
        seen.append(refresh)
        assert torch.equal(row, refresh)
        state = state._replace(accumulated_error=accumulated)
    first = torch.stack(seen).int().argmax(dim=0)
    assert len(set(first.tolist())) == (3 if decisions == "independent" else 1)
    assert first.min() > 0


CASES: list[tuple[CacheConfig, dict[str, Any]]] = [
    (ADAPTIVE, {}),
    (ADAPTIVE, {"cfg": 2.0}),
    (ADAPTIVE, {"cfg": 1.0 + 2**-20}),
    (dataclasses.replace(ADAPTIVE, warmup_steps=1), {"cfg": 2.0}),
    (ADAPTIVE, {"seed": [0, 3], "prompt": [PROMPT, "a handwritten three on a palace"]}),
    (policy("taylorseer", interval=4), {"cfg": 2.0}),
    (CacheConfig(tolerance=0.0), {"steps": 6}),
    (CacheConfig(policy="none"), {"steps": 6}),
]
NAMES = [
    "one branch",
    "guidance",
    "guidance of almost nothing",
    "guidance, warmup 1",
    "batch",
    "intervals",
    "tolerance 0",
    "none",
]


@pytest.mark.host
@pytest.mark.parametrize(("config", "options"), CASES, ids=NAMES)
def test_images_and_decisions_are_the_same(pipe, config: CacheConfig, options: dict[str, Any]):
    found = []
    for decide_ahead in (False, True):
        afcache.compile_pipeline(pipe, config, compile=False, decide_ahead=decide_ahead)
        latents = sample(pipe, **options, output_type="latent")
        steps = afcache.report(pipe).steps
        # NaN, where nothing was measured, equals itself as text alone.
        found.append(
            (latents, [(step.refreshed, step.is_computed, step.estimated_error, str(step.measured_error)) for step in steps])
        )
    (expected, decisions), (latents, others) = found
    assert decisions == others
    assert largest_difference(latents, expected) == 0


@pytest.mark.host
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_what_a_callback_exchanges_is_noticed_ahead_too(pipe, cfg: float):
    """Another prompt starts the cache again: nothing that was foreseen may outlive it."""
    found = []

    def exchange(_pipe, step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        if step == 12:
            arguments["prompt_embeds"] = arguments["prompt_embeds"] * 0.5
        return arguments

    for decide_ahead in (False, True):
        afcache.compile_pipeline(pipe, ADAPTIVE, compile=False, decide_ahead=decide_ahead)
        options: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        latents = sample(pipe, cfg=cfg, callback_on_step_end=exchange, output_type="latent", **options)
        found.append((latents, afcache.report(pipe).pattern()))
    (expected, pattern), (latents, ahead) = found
    assert ahead == pattern
    assert pattern[13] == "F"
    assert largest_difference(latents, expected) == 0


@pytest.mark.host
def test_adapters_are_noticed_ahead_too(pipe):
    """Weights that change in the middle of an image end what was foreseen."""
    found = []
    for decide_ahead in (False, True):
        afcache.compile_pipeline(pipe, ADAPTIVE, compile=False, decide_ahead=decide_ahead)
        runtime = pipe.transformer._afcache

        def switch(_pipe, step: int, _timestep, arguments: dict[str, Any], runtime: Any = runtime) -> dict[str, Any]:
            if step == 12:
                runtime._weights.adapted = lambda: ("another",)
            return arguments

        found.append((sample(pipe, callback_on_step_end=switch, output_type="latent"), afcache.report(pipe).pattern()))
    (expected, pattern), (latents, ahead) = found
    assert ahead == pattern
    assert pattern[13:15] == "FF"
    assert largest_difference(latents, expected) == 0


class Reads(TorchDispatchMode):
    """Counts values that the host reads of tensors other than those that it made itself."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Tensor] = []
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        if func is READ and all(args[0].data_ptr() != tensor.data_ptr() for tensor in self.known):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Only where reading is free is the timestep checked at every step."""
    read_step = pipelines.read_step

    def unverified(scheduler: Any, timestep: Tensor, clock: Clock, *, verify: bool) -> Any:
        del verify
        return read_step(scheduler, timestep, clock, verify=False)

    monkeypatch.setattr(pipelines, "read_step", unverified)


@pytest.mark.host
@pytest.mark.parametrize(("cfg", "waits"), [(1.0, 1), (2.0, 2)])
def test_every_call_reads_one_value(pipe, as_on_an_accelerator, cfg: float, waits: int):
    """Between the ends of two steps, the pipeline's loop included; the first step reads the schedule."""
    afcache.compile_pipeline(pipe, ADAPTIVE, compile=False)
    reads, counts = Reads(), []

    def count(_pipe, _step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        counts.append(reads.count)
        reads.count = 0
        return arguments

    with reads:
        sample(pipe, cfg=cfg, output_type="latent", callback_on_step_end=count)
    assert counts[1:] == [waits] * 27
    assert "." in afcache.report(pipe).pattern()


@pytest.mark.host
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_ahead_a_step_reads_whether_it_begins_where_the_last_one_led(pipe, monkeypatch, as_on_an_accelerator, cfg: float):
    """However many branches; besides, a table after each refresh that error control may follow with a cached step."""
    reads, counts, tables = Reads(), [], []
    foresee_, tell = Foresight._foresee, Foresight._foretell

    def spy_on_tables(self: Foresight, position: int, *arguments: Any) -> Any:
        tables.append(position)
        return foresee_(self, position, *arguments)

    def spy_on_known(self: Foresight, coupling: Any, *, is_computed: bool) -> Any:
        told = tell(self, coupling, is_computed=is_computed)
        assert isinstance(told.known, torch.Tensor)
        reads.known.append(told.known)
        return told

    def count(_pipe, _step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        counts.append(reads.count)
        reads.count = 0
        return arguments

    monkeypatch.setattr(Foresight, "_foresee", spy_on_tables)
    monkeypatch.setattr(Foresight, "_foretell", spy_on_known)
    afcache.compile_pipeline(pipe, ADAPTIVE, compile=False, decide_ahead=True)
    with reads:
        sample(pipe, cfg=cfg, output_type="latent", callback_on_step_end=count)
    pattern = afcache.report(pipe).pattern()
    assert counts[1:] == [1] * 27
    # The two warmup steps are known; each other step after a computed one needs a new table.
    assert tables == [i for i in range(2, 28) if pattern[i - 1] == "F"]
    assert len(tables) < 14


@pytest.mark.host
@pytest.mark.parametrize("decide_ahead", [False, True])
def test_a_compiled_step_reads_its_predicate(short, as_on_an_accelerator, decide_ahead: bool):
    """In the running pipeline, by the profiler: and one flag before it, where the predicate is the host's own; one graph."""
    afcache.compile_pipeline(short, ADAPTIVE, compile=False)
    expected = sample(short, output_type="latent")
    pattern = afcache.report(short).pattern()
    afcache.compile_pipeline(short, ADAPTIVE, backend="aot_eager", decide_ahead=decide_ahead)
    sample(short, steps=6)
    labels: list[Any] = []

    def start(*_: Any) -> None:
        labels.append(torch.profiler.record_function("call"))
        labels[-1].__enter__()

    def stop(_pipe, _step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        labels.pop().__exit__(None, None, None)
        return arguments

    handle = short.transformer.register_forward_pre_hook(start)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            latents = sample(short, output_type="latent", callback_on_step_end=stop)
    finally:
        handle.remove()
    events: Any = profile.events()
    calls = sorted((e.time_range for e in events if e.name == "call"), key=lambda span: span.start)
    moments = [e.time_range.start for e in events if e.name == "aten::_local_scalar_dense"]
    counts = [sum(span.start <= moment < span.end for moment in moments) for span in calls]
    assert len(counts) == 28
    assert counts[1:] == [1 + decide_ahead] * 27
    assert afcache.report(short).pattern() == pattern
    assert largest_difference(latents, expected) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_a_step_that_is_decided_ahead_reads_nothing_of_the_device():
    """On the device "meta", whose values do not exist: whoever read one would fail, and the step by its own decision does."""
    config, size = CacheConfig(), SIZES["tiny"]
    with torch.device("meta"):
        transformer = make_flux1(size, dtype=torch.bfloat16, device="meta")
        inputs = flux1_inputs.probe_inputs(transformer, dtype=torch.bfloat16, device="meta")
        state = init_state(1, 64, size.dim, config=config, dtype=torch.bfloat16, device="meta")
        fields: Any = (torch.empty((), dtype=kind) for kind in SCHEDULE_TYPES)
        schedule = StepSchedule(*fields)

    def step(inputs: Any, state: Any, schedule: Any, coupling: Any) -> Any:
        model: dict[str, Any] = {"architecture": flux1.FLUX, "kernel": scaled_dot_product_attention}
        return cached_forward(transformer, inputs, state, schedule, coupling, config=config, **model)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for is_computed in (True, False):
        known = torch.tensor(is_computed)
        velocity, _, record = compiled(inputs, state, schedule, uncoupled(1, device="meta")._replace(known=known))
        assert velocity.is_meta
        assert velocity.shape == inputs.hidden_states.shape
        assert bool(record.is_computed) == is_computed
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(RuntimeError, match="meta tensors"):
        compiled(inputs, state, schedule, uncoupled(1, device="meta"))


@pytest.mark.host
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": policy("teacache")}, ValueError, r"decide_ahead must be False under policy 'teacache', got True"),
        ({"config": policy("layerwise")}, ValueError, r"decide_ahead must be False under layerwise, got True"),
        ({"parallel": afcache.ParallelConfig()}, NotImplementedError, r"decide_ahead=True cannot be combined with parallel="),
        ({"decide_ahead": 1}, TypeError, r"decide_ahead must be True or False, got 1"),
    ],
    ids=["gate", "groups", "parallel", "kind"],
)
def test_where_a_step_must_be_seen_deciding_ahead_is_refused(pipe, options: dict[str, Any], error: Any, message: str):
    with pytest.raises(error, match=message):
        afcache.compile_pipeline(pipe, compile=False, **{"decide_ahead": True, **options})
