"""Policies kept as tests: import directions, purity of `functional`, no global changes, every test asserts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
    "reports",
    "calibration",
    "cli",
    "__main__",
)
PURE_LIBRARIES = {"torch", "einops", "jaxtyping", "collections", "itertools", "math", "typing"}
SOURCES = sorted(ROOT.rglob("*.py"))
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
    assert users == {"cond": {"functional/branch.py"}, "compile": {"pipeline.py"}}


def called(path: Path) -> set[str]:
    """Attributes of `torch` that a file uses."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_public_name_has_a_docstring_and_resolves():
    for name in afcache.__all__:
        value = getattr(afcache, name)
        assert isinstance(value, str | dict) or value.__doc__, name


def test_unknown_names_say_what_is_offered():
    with pytest.raises(AttributeError, match="it offers POLICIES, PRESETS, CacheConfig"):
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
