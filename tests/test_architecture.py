"""Policies kept as tests: import directions, purity of `functional`, no global changes, every test asserts."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import afcache

ROOT = Path(afcache.__file__).parent
TESTS = Path(__file__).parent
# From the top down: what is in a room may import from its own room and from those before it.
ROOMS = (
    "_typing",
    "_checks",
    "_version",
    "assets",
    "settings",
    "functional",
    "models",
    "parallel",
    "runtime",
    "pipeline",
    "sampling",
    "serving",
    "reports",
    "calibration",
    "cli",
    "__main__",
)
PURE_LIBRARIES = {"torch", "einops", "jaxtyping", "collections", "itertools", "math", "typing"}
SOURCES = sorted(ROOT.rglob("*.py"))
ELSEWHERE = sorted(path for room in ("bench", "tests") for path in (ROOT.parent / room).rglob("*.py"))
FUNCTIONAL = sorted((ROOT / "functional").rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            is_package = node.module == "afcache" or (node.module or "").startswith("afcache.")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if is_package else {node.module or ""}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward_only(path: Path):
    used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("afcache.")}
    room = part_of(path)
    before = ROOMS if room == "__init__" else ROOMS[: ROOMS.index(room) + 1]
    assert used <= set(before), f"{path.name} imports {sorted(used - set(before))}"


@pytest.mark.parametrize("path", FUNCTIONAL, ids=lambda path: path.name)
def test_functional_knows_no_host_library(path: Path):
    libraries = {name.split(".")[0] for name in imported_modules(path)}
    assert libraries <= PURE_LIBRARIES | {"afcache"}


@pytest.mark.parametrize("path", FUNCTIONAL, ids=lambda path: path.name)
def test_functional_is_pure(path: Path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert [base.id for base in node.bases if isinstance(base, ast.Name)] == ["NamedTuple"], node.name
            assert not [x for x in node.body if isinstance(x, ast.FunctionDef)], f"{node.name} has behaviour"
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"item", "tolist", "disable", "environ"}, f"{path.name}:{node.lineno}"
            assert not (node.attr.endswith("_") and not node.attr.startswith("_")), f"in place: {path.name}:{node.lineno}"
        assert not isinstance(node, ast.Global | ast.Nonlocal)


def test_torch_cond_and_torch_compile_are_called_in_one_place_each():
    users = {name: {str(p.relative_to(ROOT)) for p in SOURCES if name in called(p)} for name in ("cond", "compile")}
    assert users == {"cond": {"functional/branch.py"}, "compile": {"pipeline.py", "serving/batcher.py"}}


def called(path: Path) -> set[str]:
    """Attributes of `torch` that a file uses."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    }


@pytest.mark.parametrize("path", [*SOURCES, *ELSEWHERE], ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_files_stay_readable(path: Path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", FUNCTIONAL, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_of_functional_take_few_parameters(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len(given) <= 6, f"{node.name} takes {len(given)}"
            assert not (node.args.vararg and node.args.kwarg), node.name


def test_the_top_level_holds_rooms_and_little_else():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == {"__init__", "__main__", "_checks", "_typing", "_version", "pipeline"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_called_like_a_public_function(path: Path):
    """`afcache.report` must be the function, whatever was imported before."""
    functions = {name for name in afcache.__all__ if name.islower() and not name.startswith("__")}
    assert path.stem not in functions
    assert path.parent.name not in functions


# Rooms that may name a family of models, and files of other rooms that must, with the reason.
FAMILY_ROOMS = {"models", "assets", "cli"}
NAMES_A_FAMILY = {
    "__init__.py": "afcache.FluxInputs and afcache.load_mini_flux are public names",
    "settings/policies.py": "MagCache's constants are its authors' calibration of one model",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_families_of_models_are_named_in_their_rooms_alone(path: Path):
    if part_of(path) not in FAMILY_ROOMS:
        names_one = "flux" in path.read_text().lower()
        assert names_one == (str(path.relative_to(ROOT)) in NAMES_A_FAMILY)


@pytest.mark.host
def test_the_latents_way_to_the_first_multiplication_is_short(pipe):
    """From `pipe(...)` to the embedding, where a residual is forecast: the modules that are given the latents, in order.

    Whose they are, and whether they are where the last step led, is looked at on the way.
    """
    way: list[str] = []
    latents: list[torch.Tensor] = []

    def holds_latents(value: object) -> bool:
        if isinstance(value, tuple):
            return any(map(holds_latents, value))
        return any(value is tensor for tensor in latents)

    def follow(frame: FrameType, event: str, argument: object) -> None:
        del argument
        path = Path(frame.f_code.co_filename)
        if event != "call" or ROOT not in path.parents or path.stem == "_typing":
            return
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount + 2]
        given = [frame.f_locals.get(name) for name in names]
        if any(holds_latents(tuple(value.values()) if isinstance(value, dict) else value) for value in given):
            way.append(str(path.relative_to(ROOT)))

    def stop(module: torch.nn.Module, arguments: object) -> None:
        del module, arguments
        sys.setprofile(None)

    def start(module: torch.nn.Module, arguments: object, options: dict[str, torch.Tensor]) -> None:
        del module, arguments
        latents.append(options["hidden_states"])
        sys.setprofile(follow)

    afcache.compile_pipeline(pipe, afcache.policy("residual"), compile=False)
    hooks = [
        pipe.transformer.register_forward_pre_hook(start, with_kwargs=True),
        pipe.transformer.x_embedder.register_forward_pre_hook(stop),
    ]
    try:
        pipe("a", num_inference_steps=1, max_sequence_length=16, output_type="latent")
    finally:
        sys.setprofile(None)
        for hook in hooks:
            hook.remove()
    visited = [module for module, _ in itertools.groupby(way)]
    assert len(set(visited)) <= 12, visited
    assert len(visited) <= 18, visited
    assert visited[-1] == "models/flux1/architecture.py"


def test_every_public_name_has_a_docstring_and_resolves():
    for name in afcache.__all__:
        value = getattr(afcache, name)
        assert isinstance(value, str | dict) or value.__doc__, name


def test_unknown_names_say_what_is_offered():
    with pytest.raises(AttributeError, match="it offers POLICIES, PRESETS, Batcher"):
        afcache.compile_pipe  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_every_test_asserts_something():
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                source = ast.unparse(node)
                assert any(word in source for word in ("assert", "pytest.raises")), f"{path.name}: {node.name}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_light_and_changes_nothing_global():
    code = (
        "import sys, afcache; light = 'torch' not in sys.modules\n"
        "import torch, diffusers, warnings, logging\n"
        "def settings(): return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),"
        " torch._dynamo.config.recompile_limit, torch._inductor.config.triton.cudagraphs, logging.root.level,"
        " len(warnings.filters), diffusers.FluxPipeline.__call__, diffusers.FluxTransformer2DModel.forward)\n"
        "import torch._dynamo, torch._inductor.config\n"
        "from diffusers import FluxPipeline, FluxTransformer2DModel\n"
        "before = settings()\n"
        "[getattr(afcache, name) for name in afcache.__all__]\n"
        "print(light, settings() == before, 'xfuser' in sys.modules)"
    )
    assert run_python(code) == "True True False"
