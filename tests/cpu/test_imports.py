"""Importing sonic loads little, and inside the package imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sonic

ROOT = Path(sonic.__file__).parents[1]

# Upper rooms first; a module may import rooms below its own, and its own room.
ROOMS = [
    ("sonic.__main__", "sonic.cli", "sonic.tune"),
    ("sonic.integrations",),
    ("sonic.nn",),
    ("sonic.parallel",),
    ("sonic.functional",),
    ("sonic.memory", "sonic.flops"),
    ("sonic.autograd",),
    ("sonic.ops",),
    ("sonic.routing",),
    ("sonic.plan",),
    ("sonic.stages",),
    ("sonic.testing",),
    ("sonic.reference",),
    ("sonic.triton",),
    ("sonic.runtime.backend", "sonic.runtime.fill", "sonic.runtime.launch", "sonic.runtime.tuning"),
    ("kernels_sm90", "kernels_sm100", "kernels_sm120"),
    ("sonic.device",),
    ("sonic.checks",),
    ("sonic.runtime",),
    ("sonic.enums",),
    ("sonic.runtime.errors",),
]
OPTIONAL = ("triton", "cutlass", "tvm_ffi", "kernels_sm90", "kernels_sm100", "kernels_sm120")
# Where optional packages may be imported when the module itself is.
LAZY_ROOMS = ("sonic.triton", "sonic.device", "sonic.stages", "kernels_sm")


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules():
    for package in ("sonic", "kernels_sm90", "kernels_sm100", "kernels_sm120"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(path, name):
    """(imported module, whether it is imported together with the module) of one file."""

    def walk(node, eager):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative import"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield (full if is_module(full) else child.module), eager
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, eager and not function)

    yield from walk(ast.parse(path.read_text()), True)


def is_module(name):
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def level(name):
    """Index of the room, the most specific prefix winning; None outside of the package."""
    matches = [
        (len(prefix), index)
        for index, room in enumerate(ROOMS)
        for prefix in room
        if within(name, prefix)
    ]
    return max(matches)[1] if matches else None


def test_every_module_has_a_room():
    homeless = [name for name, _ in modules() if name != "sonic" and level(name) is None]
    assert not homeless


def test_imports_point_down():
    wrong = []
    for name, path in modules():
        if name == "sonic":
            continue
        for target, _ in imports_of(path, name):
            if level(target) is None or level(target) >= level(name):
                continue
            wrong.append(f"{name} imports {target}, which is above it")
    assert not wrong, "\n".join(wrong)


def test_the_layering_test_sees_imports():
    """It would be vacuous if the walk found nothing."""
    seen = dict(
        (target, eager)
        for target, eager in imports_of(ROOT / "sonic" / "ops.py", "sonic.ops")
        if target.startswith("sonic")
    )
    assert seen["sonic.enums"] is True and seen["sonic.stages"] is False
    assert level("sonic.ops") < level("sonic.stages") < level("sonic.enums")


def test_kernel_packages_know_no_upper_room():
    allowed = ("sonic.device", "sonic.runtime", "sonic.enums")
    for name, path in modules():
        if not name.startswith("kernels_sm"):
            continue
        package = name.split(".")[0]
        for target, _ in imports_of(path, name):
            if target.startswith("sonic"):
                assert any(within(target, room) for room in allowed), f"{name} -> {target}"
            if target.startswith("kernels_sm"):
                assert within(target, package), f"{name} -> {target}"


def test_optional_packages_are_imported_lazily():
    for name, path in modules():
        if name.startswith(LAZY_ROOMS):
            continue
        for target, eager in imports_of(path, name):
            optional = target.split(".")[0] in OPTIONAL
            assert not (eager and optional), f"{name} imports {target} at its top"


def test_import_loads_nothing_heavy():
    loaded = run_python("import sys, sonic; print(*sorted(sys.modules))").split()
    heavy = [m for m in loaded if m.split(".")[0] in (*OPTIONAL, "torch", "numpy")]
    assert not heavy
    assert "sonic" in loaded


def test_cpu_layer_runs_where_optional_packages_are_absent():
    blocked = (
        f"OPTIONAL = {OPTIONAL!r}"
        + """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in OPTIONAL:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
import torch, sonic
torch.manual_seed(0)
layer = sonic.MoE(4, 2, 16, 8, 'swiglu', True, 0.5)
x = torch.randn(3, 16, requires_grad=True)
out, loss = layer(x, sonic.KernelBackendMoE.torch)
(out.sum() + loss).backward()
assert out.any() and x.grad.any()
assert not torch.cuda.is_initialized()
assert not set(OPTIONAL) & set(sys.modules)
print('ran', sonic.is_available().ok)
"""
    )
    assert run_python(blocked).split()[0] == "ran"


@pytest.mark.parametrize("name", sonic.__all__)
def test_public_names_resolve(name):
    assert getattr(sonic, name) is not None
    assert name in dir(sonic)


@pytest.mark.parametrize("name", [*sonic._MODULES, "integrations.transformers", "reference.stages"])
def test_modules_need_no_import_of_their_own(name):
    code = f"import sys, sonic; assert 'torch' not in sys.modules; print(sonic.{name}.__name__)"
    assert run_python(code).strip() == f"sonic.{name}"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'sonic' has no attribute 'mow'"):
        sonic.mow  # noqa: B018


def test_names_for_the_type_checker_are_those_of_the_table():
    tree = ast.parse(Path(sonic.__file__).read_text())
    (block,) = (node for node in tree.body if is_type_checking(node))
    declared = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = {(m, n) for m, names in sonic._NAMES_BY_MODULE.items() for n in names}
    table |= {("sonic", name) for name in sonic._MODULES}
    assert declared == table


def test_version_has_a_fallback(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    assert sonic._version() == "1.2.3"
    monkeypatch.setattr(metadata, "version", missing)
    assert sonic._version() == "0+unknown"


def test_docstring_examples_run():
    import doctest

    import sonic.functional
    import sonic.memory

    for module in (sonic.functional, sonic.memory):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0, module.__name__
