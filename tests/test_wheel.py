"""The wheel carries the assets, and works from an empty environment."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

# One process builds the wheel for all of them.
pytestmark = pytest.mark.xdist_group("wheel")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources: setuptools writes into what it builds from, and tests run beside each other."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "outputs", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_assets_types_and_licence(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "afcache/py.typed",
        "afcache/functional/step.py",
        "afcache/assets/mini_flux/model_index.json",
        "afcache/assets/mini_flux/transformer/diffusion_pytorch_model.safetensors",
        "afcache/assets/mini_flux/ATTRIBUTION.md",
        "afcache/assets/mini_wan/model_index.json",
        "afcache/assets/mini_wan/ATTRIBUTION.md",
    ):
        assert name in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "bench/")) for name in names)
    # The weights of mini-FLUX and mini-Wan, and those of no other model.
    weights = {name for name in names if name.endswith(".safetensors")}
    assert len(weights) == 7
    assert all(name.startswith(("afcache/assets/mini_flux/", "afcache/assets/mini_wan/")) for name in weights)
    assert wheel.stat().st_size < 13.5 * 2**20


def test_the_wheel_draws_from_an_empty_environment(wheel: Path, tmp_path: Path):
    """A new environment that sees this one's dependencies but not this checkout."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip())
    ours = Path(subprocess.run([sys.executable, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    # Everything but the editable install of this checkout, whose .pth file a path entry does not execute.
    (site / "dependencies.pth").write_text(f"{ours}\n")
    afcache = str(environment / "bin" / "afcache")
    command = [afcache, "generate", "--no-compile", "--steps", "4", "--output", "drawn", "--prompt", "a seven"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "drawn" / "a_seven_seed0.png").is_file()
    where = subprocess.run(
        [python, "-c", "import afcache; print(afcache.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert str(site) in where.stdout


# What an extra is for; all else must do without it.
OF_EXTRAS = {"afcache/serving/fleet/": "serve", "afcache/cli/serve.py": "serve"}


def test_every_import_is_declared(wheel: Path):
    """The empty environment borrows this one's dependencies, so what is imported is checked against what is declared."""
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    requirements = re.findall(r"^Requires-Dist: ([A-Za-z0-9_-]+)(?:.*extra == ['\"](\w+))?", metadata, re.MULTILINE)
    distributions = packages_distributions()
    needed: dict[str, set[str]] = {}
    for name in archive.namelist():
        if name.startswith("afcache/") and name.endswith(".py"):
            modules = {module.split(".")[0] for module in _imported(archive.read(name))}
            third_party = modules - set(sys.stdlib_module_names) - {"afcache"}
            extra = next((extra for start, extra in OF_EXTRAS.items() if name.startswith(start)), "")
            needed.setdefault(extra, set()).update(distributions[module][0].lower() for module in third_party)
    assert {"torch", "diffusers", "einops"} <= needed[""]
    assert {"ray", "fastapi"} <= needed["serve"]
    for extra, names in needed.items():
        assert names <= {name.lower() for name, of in requirements if of in ("", extra)}


def _imported(source: bytes) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        found |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return found
