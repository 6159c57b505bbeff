"""What is shipped: the wheel's contents, its requirements, and the files around it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sonic

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ROOTS = ["kernels_sm100", "kernels_sm120", "kernels_sm90", "sonic"]
GIT = shutil.which("git")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built offline from a copy of the sources, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Directories that must stay out of the wheel are there to be picked up by mistake.
    for name in (*IMPORT_ROOTS, "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def _entry(wheel: zipfile.ZipFile, suffix: str) -> str:
    (name,) = (name for name in wheel.namelist() if name.endswith(suffix))
    return wheel.read(name).decode()


def test_the_wheel_holds_exactly_the_four_import_roots(wheel: zipfile.ZipFile) -> None:
    assert sorted(_entry(wheel, "dist-info/top_level.txt").split()) == IMPORT_ROOTS
    roots = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert sorted(roots) == IMPORT_ROOTS


def test_the_wheel_holds_every_module_of_the_checkout(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for root in IMPORT_ROOTS
        for path in ROOT.glob(f"{root}/**/*.py")
    }
    assert expected, "no modules found"
    assert expected <= shipped


@pytest.mark.parametrize("root", IMPORT_ROOTS)
def test_every_root_is_marked_as_typed(wheel: zipfile.ZipFile, root: str) -> None:
    assert f"{root}/py.typed" in wheel.namelist()


def test_the_wheel_is_pure_and_licensed(wheel: zipfile.ZipFile) -> None:
    assert "Root-Is-Purelib: true" in _entry(wheel, "dist-info/WHEEL")
    metadata = Parser().parsestr(_entry(wheel, "dist-info/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in _entry(wheel, "licenses/LICENSE")


def test_requirements_are_ranges(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(_entry(wheel, "dist-info/METADATA"))
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    names = {requirement.name for requirement in requirements}
    assert {"torch", "triton", "nvidia-cutlass-dsl", "apache-tvm-ffi", "numpy"} <= names
    for requirement in requirements:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators <= {">=", "<", "!="}, f"{requirement} is a pin"
    pythons = SpecifierSet(metadata["Requires-Python"])
    supported = [minor for minor in range(8, 17) if pythons.contains(f"3.{minor}.1")]
    assert supported == [10, 11, 12, 13]


def test_every_pattern_of_package_data_matches_a_file() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[tool.setuptools.package-data]")[2].partition("\n\n")[0]
    patterns = re.findall(r'"([^"]+)"', section.partition("=")[2])
    assert patterns
    for pattern in patterns:
        assert any(list(ROOT.glob(f"{root}/**/{pattern}")) for root in IMPORT_ROOTS), pattern


def test_the_wheel_imports_outside_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Both import orders, with nothing heavy loaded and from the wheel, not from the checkout."""
    wheel.extractall(tmp_path / "site")
    for first, second in (("sonic", "kernels_sm100"), ("kernels_sm120", "sonic")):
        program = (
            f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
            f"import {first}, {second}\n"
            "loaded = {'cutlass', 'triton'} & set(sys.modules)\n"
            "assert not loaded, loaded\n"
            f"print({first}.__file__); print({second}.__file__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert all(line.startswith(str(tmp_path)) for line in done.stdout.split())


@pytest.mark.parametrize("root", ["kernels_sm100", "kernels_sm120"])
def test_rooms_for_later_kernels_say_what_they_are(root: str) -> None:
    module = __import__(root)
    assert module.__doc__ == "Implementation package of sonic; not an API."
    assert "later" in (ROOT / root / "README.md").read_text()


def test_version_and_changelog_agree_with_the_metadata(wheel: zipfile.ZipFile) -> None:
    version = Parser().parsestr(_entry(wheel, "dist-info/METADATA"))["Version"]
    assert sonic.__version__ in (version, "0+unknown")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[({re.escape(version)}|Unreleased)\]", changelog, re.MULTILINE)


def _make(*arguments: str) -> str:
    return _run_make("--dry-run", *arguments)


def _run_make(*arguments: str) -> str:
    # `make TORCH=... test` hands its own variables on to whatever it runs.
    ours = ("MAKE", "TORCH", "EXTRAS", "VENV", "PYTHON")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "benchmarks/moe-cute.py"),
        ("test", "-m pytest"),
        ("lint", "-m ruff format --check"),
        ("lint", "-m mypy"),
        ("bench", "benchmarks/validate.py --parts speed"),
        ("clean", "rm -rf"),
    ],
)
def test_make_targets(target: str, command: str) -> None:
    assert command in _make(target)


@needs_make
def test_make_installs_the_chosen_torch_first(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    lines = _make("test", f"VENV={venv}", "TORCH=torch==2.13.0", "EXTRAS=cu13").splitlines()
    installs = [line for line in lines if "pip" in line and "install" in line]
    assert '"torch==2.13.0"' in installs[0]
    assert f"-c {venv}/constraints.txt" in installs[1]
    assert '".[test,cu13]"' in installs[1]


@needs_make
def test_make_installs_again_when_a_variable_changes(tmp_path: Path) -> None:
    """With an interpreter that only writes down what it is asked for."""
    log, venv, python = tmp_path / "log", tmp_path / "venv", tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {log}\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    )
    python.chmod(0o755)

    def installed(*variables: str) -> list[str]:
        log.write_text("")
        _run_make(f"{venv}/.test", f"VENV={venv}", f"PYTHON={python}", *variables)
        lines = log.read_text().splitlines()
        return [line.split()[-1] for line in lines if "pip" in line and "install" in line]

    assert installed() == ["torch>=2.9", ".[test]"]
    assert installed() == []
    assert installed("EXTRAS=cu13") == ["torch>=2.9", ".[test,cu13]"]
    assert installed("EXTRAS=cu13") == []
    assert installed("EXTRAS=cu13", "TORCH=torch==2.13.0") == ["torch==2.13.0", ".[test,cu13]"]
    assert installed("TORCH=torch==2.13.0") == ["torch==2.13.0", ".[test]"]
    assert installed() == ["torch>=2.9", ".[test]"]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_the_ci_script_parses_and_runs_lint_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert re.search(r"^make .* lint test$", text, re.MULTILINE)


@pytest.mark.skipif(GIT is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_generated_is_tracked() -> None:
    done = subprocess.run(
        [str(GIT), "ls-files", "-ci", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""


def _readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("index", range(len(_readme_blocks())))
def test_the_readme_examples_run(index: int) -> None:
    """Those that need a GPU, at a smaller size and with the reference where there is none."""
    block = _readme_blocks()[index]
    if 'device="cuda"' in block and not sonic.is_available().ok:
        for large, small in (("4096", "64"), ("1536", "32"), ("32768", "16"), ("cuda", "cpu")):
            assert large in block
            block = block.replace(large, small)
        block = block.replace("KernelBackendMoE.sonicmoe", "KernelBackendMoE.torch")
    if "transformers" in block:
        pytest.importorskip("transformers")
    exec(compile(block, f"README block {index}", "exec"), {})
