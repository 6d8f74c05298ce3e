"""What is shipped: wheel and sdist hold what git tracks, and the command runs however it was installed."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import mini_vllm

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {"mini_vllm/": "mini_vllm/", "cli/": "mini_vllm/cli/", "cuda_src/": "mini_vllm/cuda_src/"}
VERSION_LINE = f"mini-vllm, version {mini_vllm.__version__}"
PIP = ["-m", "pip", "--disable-pip-version-check"]


def run(*command: object, cwd: Path, **environment: str) -> str:
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Paths of the files that git tracks."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, so there is no list of what should be shipped")
    paths = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [path for path in paths if path and (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def sources(tracked, tmp_path_factory) -> Path:
    """A copy of the tracked files alone: whatever else lies in the checkout does not matter."""
    directory = tmp_path_factory.mktemp("sources with a space")
    for path in tracked:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, directory / path)
    return directory


@pytest.fixture(scope="module")
def dist(sources, tmp_path_factory) -> Path:
    """The sdist, and the wheel made from the sdist, as `python -m build` makes them for an index."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, sources, cwd=directory)
    return directory


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A working directory from which nothing of the checkout can be imported by accident."""
    return tmp_path


def test_wheel_holds_what_git_tracks(wheel, tracked):
    expected = {
        new + path.removeprefix(old) for old, new in SHIPPED.items() for path in tracked if path.startswith(old)
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - info == expected
    assert f"mini_vllm-{mini_vllm.__version__}.dist-info/licenses/LICENSE" in info


def test_wheel_metadata(wheel):
    assert wheel.name == f"mini_vllm-{mini_vllm.__version__}-py3-none-any.whl"
    info = f"mini_vllm-{mini_vllm.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "mini-vllm"
    assert metadata["Version"] == mini_vllm.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"cuda12", "cuda13", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert "mini-vllm = mini_vllm.cli:main" in entry_points
    assert not any(name in requirement for name in ("torch", "cupy") for requirement in base_requirements(metadata))
    assert len(base_requirements(metadata)) == 8


def base_requirements(metadata: email.message.Message) -> list[str]:
    return [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]


def test_sdist_holds_what_git_tracks(dist, tracked):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("mini_vllm.egg-info/")} - made == set(tracked)


LOCATIONS = """
import mini_vllm, mini_vllm.cli, mini_vllm.cuda_src
for module in (mini_vllm, mini_vllm.cli, mini_vllm.cuda_src):
    print(module.__file__)
"""


def check_runs(python: object, home: Path, cli: Path, cuda_src: Path, cwd: Path, **environment: str) -> None:
    """The command answers, and the three packages come from where they should."""
    assert run(python, "-m", "mini_vllm.cli", "--version", cwd=cwd, **environment).strip() == VERSION_LINE
    found = [Path(line) for line in run(python, "-c", LOCATIONS, cwd=cwd, **environment).splitlines()]
    assert found == [directory / "__init__.py" for directory in (home, cli, cuda_src)]
    assert list((cuda_src / "include").glob("*.cuh"))


def test_installed_wheel(wheel, elsewhere):
    target = elsewhere / "site"
    run(sys.executable, *PIP, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"mini_vllm", "bin"}
    home = target / "mini_vllm"
    check_runs(sys.executable, home, home / "cli", home / "cuda_src", elsewhere, PYTHONPATH=str(target))


def test_plain_checkout(sources, elsewhere):
    places = (sources / "mini_vllm", sources / "cli", sources / "cuda_src")
    check_runs(sys.executable, *places, elsewhere, PYTHONPATH=str(sources))


def test_editable_install(sources, elsewhere):
    """In an environment of its own, which sees this one's packages (--system-site-packages would show the base's)."""
    run(sys.executable, "-m", "venv", "--without-pip", elsewhere / "venv", cwd=elsewhere)
    python = elsewhere / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--ignore-installed",
        "--editable",
        sources,
    ]
    run(python, *PIP, *install, cwd=elsewhere)
    check_runs(python, sources / "mini_vllm", sources / "cli", sources / "cuda_src", elsewhere)
    assert run(elsewhere / "venv" / "bin" / "mini-vllm", "--version", cwd=elsewhere).strip() == VERSION_LINE
