"""`pip install .`: the package has what it needs, and its command works in any directory."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib

import pytest
from documented import REPOSITORY
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures

PARTS = ("gptvq_jax", "scripts", "configs", "pyproject.toml", "requirements.txt", "LICENSE")
CONFIG = """
from gptvq_jax.config import default_config
def get_config(num_blocks="0"):
    config = default_config()
    config.update({fields!r})
    config.num_blocks = int(num_blocks)
    return config
"""


def test_every_folder_of_the_package_is_installed():
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = (REPOSITORY / "gptvq_jax").rglob("*.py")
    folders = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in files}
    shipped = setuptools["package-dir"]
    names = ("scripts", "configs", "configs/sweeps")
    assert shipped == {f"gptvq_jax.shipped.{name.replace('/', '.')}": name for name in names}
    assert sorted(setuptools["packages"]) == sorted([*folders, *shipped])


def test_every_other_file_of_the_package_is_installed():
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]
    for path in (REPOSITORY / "gptvq_jax").rglob("*.*"):
        if path.suffix not in (".py", ".pyc", ".so"):
            package = ".".join(path.parent.relative_to(REPOSITORY).parts)
            assert any(path.match(pattern) for pattern in patterns.get(package, [])), path


@pytest.fixture(scope="module")
def bin_dir(tmp_path_factory):
    """Of an environment with the package, which sees everything else that is installed here."""
    source, venv = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("venv")
    for part in PARTS:  # a build leaves files where it builds
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        copy(REPOSITORY / part, source / part)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*install, "--no-deps", source], check=True)
    names = {"base": venv, "platbase": venv}
    purelib = sysconfig.get_path("purelib", "venv", names)
    with open(f"{purelib}/others.pth", "w") as file:
        file.writelines(f"{path}\n" for path in site.getsitepackages())
    return venv / "bin"


@pytest.fixture
def installed(bin_dir, tmp_path):
    def run(*words, program="gptvq_jax"):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [bin_dir / program, *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )

    return run


@pytest.mark.slow
def test_the_command_is_the_installed_one(installed, bin_dir):
    done = installed("-c", "import gptvq_jax; print(gptvq_jax.__file__)", program="python")
    assert done.stdout.startswith(str(bin_dir.parent))
    done = installed("--help")
    assert done.returncode == 0 and "gptvq_jax torture" in done.stdout
    assert "smollm2_135m_aqlm" in done.stdout
    done = installed("quantize", "--help")
    assert "gptvq_jax quantize --config=smollm2_135m_2d" in done.stdout
    done = installed("quantise")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no command 'quantise'; the nearest is 'quanti")


@pytest.mark.slow
def test_a_model_from_quantization_to_text(installed, tiny_config, tmp_path):  # noqa: F811
    (tmp_path / "c.py").write_text(CONFIG.format(fields=tiny_config.to_dict()))
    done = installed("quantize", "--config=c.py:1")
    assert done.returncode == 0 and "bits per value" in done.stdout, done.stderr
    checkpoint = "--checkpoint=runs/c_1/checkpoint"
    assert "perplexity" in installed("evaluate", checkpoint).stdout
    done = installed(
        "generate", checkpoint, "--prompt=tea", "--max_tokens=2", "--implementation=xla"
    )
    assert "generated: 2 tokens" in done.stdout
    assert "written to out" in installed("export", checkpoint, "--output=out").stdout
    code = "import gptvq_jax; print(gptvq_jax.load('runs/c_1/checkpoint').perplexity('tea ' * 99))"
    assert float(installed("-c", code, program="python").stdout) > 1
    # A config by its name, with a model of one's own in it.
    words = [f"--config.model={tiny_config.model}", "--config.allocation.bits_per_value=0"]
    for section in ("calibration", "evaluation"):
        for field in ("seqlen", "batch_size"):
            words += [f"--config.{section}.{field}={tiny_config[section][field]}"]
    words += [f"--config.calibration.datasets={','.join(tiny_config.calibration.datasets)}"]
    words += [f"--config.evaluation.dataset={tiny_config.evaluation.dataset}"]
    done = installed("quantize", "--config=smollm2_135m_2d:smoke", *words)
    assert (tmp_path / "runs/smollm2_135m_2d_smoke/report.png").is_file(), done.stderr


@pytest.mark.slow
def test_a_script_that_starts_itself_does_so_where_it_is_installed(installed):
    done = installed("benchmark-big-layer", "--shape=64x64", "--settings=2d_2.125")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("2d_2.125")
