"""The package: importing it, its stubs, its version, the topology."""

import ast
import inspect
import subprocess
import sys
from importlib import resources

import pytest

import peerlane
from peerlane import Communicator, _peerlane


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_importing_needs_nothing_else() -> None:
    code = """
import sys
for name in ("numpy", "torch", "ml_dtypes", "cupy"):
    sys.modules[name] = None  # importing it fails
import peerlane
rank, = peerlane.Communicator.connect(["sim:0/1"])
rank.barrier()
rank.synchronize()
rank.close()
with open("/proc/self/maps") as maps:
    print("libcuda" in maps.read(), peerlane.version())
"""
    assert python(code) == f"False {peerlane.version()}\n"


def test_a_communicator_may_outlive_the_interpreter() -> None:
    code = """
import peerlane, sys
ranks = peerlane.Communicator.connect(["sim:0/2", "sim:1/2"])
ranks[0].barrier(), ranks[1].barrier()
sys.kept = [ranks, ranks]
sys.kept.append(sys.kept)
print("end")
"""
    assert python(code) == "end\n"


def test_the_version() -> None:
    assert peerlane.__version__ == peerlane.version()
    assert [part.isdigit() for part in peerlane.version().split(".")] == [True] * 3


def stubs() -> ast.Module:
    return ast.parse(resources.files("peerlane").joinpath("_peerlane.pyi").read_text())


def signature(function: ast.FunctionDef) -> list[tuple[str, str, object]]:
    """Name, kind and default of every parameter but self."""
    arguments = function.args
    kinds = ["POSITIONAL_ONLY"] * len(arguments.posonlyargs)
    kinds += ["POSITIONAL_OR_KEYWORD"] * len(arguments.args)
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    defaults = [None] * required + arguments.defaults
    pairs = list(zip(kinds, plain, defaults))
    pairs += [("VAR_KEYWORD", arguments.kwarg, None)] if arguments.kwarg else []
    pairs += [("KEYWORD_ONLY", *pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return [
        (name.arg, kind, ast.literal_eval(default) if default else inspect.Parameter.empty)
        for kind, name, default in pairs
        if name.arg != "self"
    ]


def actual(function: object) -> list[tuple[str, str, object]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default) for p in parameters if p.name != "self"]


def test_the_stubs_are_the_module() -> None:
    described = {node.name: node for node in stubs().body if hasattr(node, "name")}
    public = {name for name in vars(_peerlane) if not name.startswith("_")}
    assert set(described) == public
    for name in public:
        if isinstance(described[name], ast.ClassDef):
            compare_classes(described[name], getattr(_peerlane, name))
        else:
            assert signature(described[name]) == actual(getattr(_peerlane, name))


def compare_classes(described: ast.ClassDef, real: type) -> None:
    methods = {node.name: node for node in described.body if hasattr(node, "name")}
    there = {name for name in vars(real) if not name.startswith("_")}
    assert {name for name in methods if not name.startswith("_")} == there
    if "__init__" in methods:
        assert signature(methods["__init__"]) == actual(real)
    for name in there:
        member = inspect.getattr_static(real, name)
        decorators = [decorator.id for decorator in methods[name].decorator_list]
        if inspect.isgetsetdescriptor(member) or inspect.ismemberdescriptor(member):
            assert decorators == ["property"]
        else:
            assert decorators == (["staticmethod"] if isinstance(member, staticmethod) else [])
            assert signature(methods[name]) == actual(getattr(real, name)), name
        assert getattr(real, name).__doc__


def test_the_stubs_are_installed() -> None:
    files = {file.name for file in resources.files("peerlane").iterdir()}
    assert {"__init__.py", "_peerlane.pyi", "errors.py", "py.typed"} <= files


def test_everything_named_is_there() -> None:
    assert sorted(peerlane.__all__) == peerlane.__all__
    for name in peerlane.__all__:
        assert getattr(peerlane, name).__doc__


def test_the_topology_of_simulated_gpus() -> None:
    facts = peerlane.topology(["sim:0/3", "sim:2/3"])
    assert set(facts) == {"backend", "nodes", "links", "notes"}
    assert facts["backend"] == "sim"
    assert [node["ordinal"] for node in facts["nodes"]] == [0, 2]
    assert [(link["from"], link["to"], link["access"]) for link in facts["links"]] == [
        (0, 1, True),
        (1, 0, True),
    ]
    assert peerlane.topology([]) == {"backend": "sim", "nodes": [], "links": [], "notes": []}
    with pytest.raises(ValueError, match="^topology: devices: expected .*, got 'gpu'$"):
        peerlane.topology(["gpu"])


def test_real_gpus_without_a_driver() -> None:
    try:
        facts = peerlane.topology()
    except peerlane.NoDriverError as error:
        assert str(error).startswith("no NVIDIA driver: ")
        with pytest.raises(peerlane.NoDriverError):
            Communicator(0, 1, "nobody", 0)
    else:
        assert facts["backend"] in ("cuda", "sim")  # "sim" stands for none at all


def test_empty_makes_what_numpy_can_name() -> None:
    with Communicator.connect(["sim:0/1"])[0] as rank:
        array = rank.empty([2, 3], float)
        assert (array.shape, array.dtype, array.flags.c_contiguous) == ((2, 3), "float64", True)
        assert rank.empty(4, "bfloat16").dtype.name in ("bfloat16", "uint16")
        assert rank.empty((), "int8").shape == ()
