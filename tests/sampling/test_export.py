"""The exported step: the eager one to the last bit, in memory, from a file, and without AFCache."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import afcache
from afcache import CacheConfig, FluxInputs, Layerwise
from afcache.functional.branch import branch
from afcache.functional.plans import schedule_steps
from afcache.models.flux1.inputs import probe_inputs
from tests.support.sampling import page_example
from tests.support.tiny import tiny_flux
from tests.support.toy import tensors_of

ADAPTIVE = CacheConfig(target="noise", tolerance=0.05, warmup_steps=2)
SIGMAS = torch.linspace(1, 0, 13)
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
# torchao would otherwise change inductor's settings for the whole process.
INT8 = Int8WeightOnlyConfig(set_inductor_config=False)
COND = torch.ops.higher_order.cond


def make_transformer() -> Any:
    """Two blocks of random weights."""
    torch.manual_seed(0)
    return tiny_flux()


@pytest.fixture
def transformer() -> Any:
    return make_transformer()


@pytest.fixture(scope="module")
def adaptive() -> ExportedProgram:
    """The step of one branch of that transformer."""
    transformer = make_transformer()
    return afcache.export_step(transformer, probe(transformer), config=ADAPTIVE)


def probe(transformer: Any) -> FluxInputs:
    return probe_inputs(transformer, dtype=torch.float32, device="cpu")


def unlike(inputs: FluxInputs) -> FluxInputs:
    return inputs._replace(encoder_hidden_states=-inputs.encoder_hidden_states)


def run(step: Any, program: ExportedProgram, config: CacheConfig, scale: float = 1.0) -> tuple[str, Tensor, Any]:
    """Pattern, latents and states of a trajectory of exported steps."""
    assert program.example_inputs is not None
    inputs, latents, states, _, guidance_scale = program.example_inputs[0]
    pattern = ""
    for schedule in schedule_steps(SIGMAS, config):
        given = {name: value for name, value in schedule._asdict().items() if value is not None}
        with torch.no_grad():
            latents, states, records = step(inputs, latents, states, given, torch.full_like(guidance_scale, scale))
        pattern += "F" if bool(records[0]["is_computed"]) else "."
    return pattern, latents, states


def count(graph: torch.fx.GraphModule, target: Any) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("config", "scale", "num_conds"),
    [
        (ADAPTIVE, 2.0, 1),
        (afcache.policy("teacache", threshold=0.4), 1.0, 1),
        (dataclasses.replace(ADAPTIVE, target="residual", layerwise=Layerwise(groups=2, strategy="similarity")), 1.0, 2),
    ],
    ids=["guided", "teacache", "groups"],
)
def test_an_exported_step_is_the_eager_one_to_the_last_bit(
    transformer, tmp_path, config: CacheConfig, scale: float, num_conds: int
):
    """States and latents of a trajectory that takes both branches, before and after a file."""
    inputs = probe(transformer)
    negative = unlike(inputs) if scale != 1 else None
    program = afcache.export_step(transformer, inputs, negative=negative, config=config)
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    assert str(Path(afcache.__file__).parent).encode() not in (tmp_path / "step.pt2").read_bytes()
    arguments = {"negative": negative, "guidance_scale": scale}
    # The second schedule has another tolerance, with what follows it: they are arguments.
    others = dataclasses.replace(config, tolerance=config.tolerance / 4, max_growth=1.5, damping=0.3)
    for settings in (config, others):
        eager = afcache.denoise(transformer, inputs, SIGMAS, config=settings, **arguments)
        assert set(eager.pattern()) == {"F", "."}
        for each in (program, loaded):
            pattern, latents, states = run(each.module(), each, settings, scale)
            assert pattern == eager.pattern()
            pairs = zip(tensors_of((latents, states)), tensors_of((eager.latents, eager.states)), strict=True)
            assert all(torch.equal(exported, ours) for exported, ours in pairs)
    for each in (program, loaded):
        conds = each.graph.find_nodes(op="call_function", target=COND)
        assert len(conds) == num_conds
        assert count(each.graph_module, ATTENTION) == 0
        branches = [[getattr(each.graph_module, argument.target) for argument in cond.args[1:3]] for cond in conds]
        blocks = 2 if negative is None else 4
        assert sum(count(if_true, ATTENTION) for if_true, _ in branches) == blocks
        assert sum(count(if_false, ATTENTION) for _, if_false in branches) == 0


@pytest.mark.host
def test_the_pages_program_runs_without_afcache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    given, _ = page_example("torch.compile(afcache.denoising_step").split("step = torch.compile")
    scope: dict[str, Any] = {}
    exec(given, scope)
    # Fewer blocks export in a fifth of the time.
    transformer = scope["transformer"]
    transformer.transformer_blocks = transformer.transformer_blocks[:1]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:1]
    exec(page_example("afcache.export_step("), scope)
    alone = "import sys; sys.modules['afcache'] = sys.modules['diffusers'] = None\n"
    source = alone + page_example("torch.export.load(") + "torch.save(latents, 'latents.pt')\n"
    (tmp_path / "alone.py").write_text(source)
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    eager = afcache.denoise(transformer, scope["inputs"], torch.linspace(1, 0, 29))
    assert done.stdout.strip() == eager.pattern()
    assert set(eager.pattern()) == {"F", "."}
    assert torch.equal(torch.load("latents.pt"), eager.latents)


@pytest.mark.xdist_group("exported step")
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("when", ["ahead of time", pytest.param("just in time", marks=pytest.mark.contract)])
def test_inductor_takes_the_exported_step(transformer, adaptive, tmp_path, when: str):
    """Within 1e-5: generated kernels round differently."""
    eager = afcache.denoise(transformer, probe(transformer), SIGMAS, config=ADAPTIVE)
    if when == "ahead of time":
        with torch.no_grad():
            package = torch._inductor.aoti_compile_and_package(adaptive, package_path=str(tmp_path / "step.pt2"))
        step = torch._inductor.aoti_load_package(package)
    else:
        step = torch.compile(adaptive.module(), fullgraph=True)
    pattern, latents, _ = run(step, adaptive, ADAPTIVE)
    assert pattern == eager.pattern()
    torch.testing.assert_close(latents, eager.latents, rtol=0, atol=1e-5)


@pytest.mark.xdist_group("exported step")
def test_shapes_are_fixed_and_torch_says_so(adaptive: Any):
    inputs, latents, *others = adaptive.example_inputs[0]
    with pytest.raises(AssertionError, match=r"Guard failed: latents\.size\(\)\[1\] == 64"):
        adaptive.module()(inputs, latents[:, :32], *others)


def test_quantised_weights_are_refused(transformer):
    quantize_(transformer, INT8)
    with pytest.raises(NotImplementedError, match=r"is a Int8Tensor, .* Export the transformer before it is quantised"):
        afcache.export_step(transformer, probe(transformer))


@pytest.mark.contract
def test_torch_does_not_export_quantised_weights_inside_a_branch_yet():
    """The day this fails, they need not be refused: outside of a branch they are exported."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32).requires_grad_(False)
            quantize_(self.layer, INT8)

        def forward(self, x: Tensor, is_computed: Tensor) -> Tensor:
            del is_computed
            return self.layer(x)

    class Branching(Plain):
        def forward(self, x: Tensor, is_computed: Tensor) -> Tensor:
            return branch(is_computed, lambda: self.layer(x), lambda: x.clone())

    plain, arguments = Plain(), (torch.randn(3, 32), torch.tensor(True))
    assert torch.equal(torch.export.export(plain, arguments).module()(*arguments), plain(*arguments))
    with pytest.raises(NotImplementedError, match=r"Int8Tensor dispatch: attempting to run unimplemented"):
        torch.export.export(Branching(), arguments)


def test_hooks_that_cast_weights_are_refused(transformer):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"has diffusers hooks \['layerwise_casting'\], which cannot be exported"):
        afcache.export_step(transformer, probe(transformer))


def test_what_denoise_refuses_is_refused(transformer):
    inputs = probe(transformer)
    with pytest.raises(ValueError, match=r"inputs\.guidance must be None for this transformer"):
        afcache.export_step(transformer, inputs._replace(guidance=torch.ones(1)))
