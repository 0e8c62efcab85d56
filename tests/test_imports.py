"""The package's imports point down the list in the README's "The code", and never in a circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptvq_jax"


def wings() -> list[str]:
    """Names in the README's list, top first."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## The code\n.*?```\n(.*?)```", text, re.DOTALL).group(1)
    return re.findall(r"^gptvq_jax/(\w+)", block, re.MULTILINE)


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """{name inside the package: file}; a wing's __init__.py has the name of the wing."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return files


def imports(path: Path, names) -> set[str]:
    """What a file imports of the package, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("gptvq_jax.") for a in node.names if ours(a.name)}
        elif isinstance(node, ast.ImportFrom) and ours(node.module or ""):
            module = node.module.removeprefix("gptvq_jax").removeprefix(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}".removeprefix(".")
                found.add(whole if whole in names else module or "__init__")
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{path}: a relative import")
    return found


def ours(module: str) -> bool:
    return module == "gptvq_jax" or module.startswith("gptvq_jax.")


FILES = modules()
ARROWS = {name: imports(path, FILES) for name, path in FILES.items()}


def test_the_list_has_every_wing():
    listed = wings()
    assert len(listed) == len(set(listed))
    assert set(listed) == {name.partition(".")[0] for name in FILES}


def test_arrows_point_down_the_list():
    level = {wing: i for i, wing in enumerate(wings())}
    up = [
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if level[other.partition(".")[0]] < level[name.partition(".")[0]]
    ]
    assert not up


def test_no_circle():
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_are_found(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import gptvq_jax.core.grid\nfrom gptvq_jax.core import packing\n"
        "def f():\n    from gptvq_jax.run.job import quantize\n    from gptvq_jax import load\n"
    )
    assert imports(file, FILES) == {"core.grid", "core.packing", "run.job", "__init__"}


@pytest.mark.parametrize("wing", ["core", "moves"])
def test_array_maths_knows_no_flax_no_config_no_file(wing):
    foreign = r"\b(flax|ml_collections|orbax|pathlib|json)\b|\bopen\(|\bconfig\."
    for name, path in FILES.items():
        if name.startswith(f"{wing}."):
            code = [line for line in path.read_text().splitlines() if "import" in line]
            assert not re.search(foreign, "\n".join(code)), name
            assert not re.search(r"\bopen\(", path.read_text()), name


def test_tests_mirror_the_wings():
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders <= set(wings())
