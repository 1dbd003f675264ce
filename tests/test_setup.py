"""The set-up: what is built and why, what is said where something is missing, and what a release holds."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mipnerf_fast import _native

ROOT = Path(__file__).resolve().parent.parent

# Python looks for sitecustomize at every start: this one makes modules as absent as if they were not installed.
HIDE = """
import importlib.machinery, os
original = importlib.machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name in os.environ["HIDDEN"].split() else original(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_py"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_hiding(tmp_path: Path, hidden: str, *command: str, path: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with `command`, modules hidden, and PATH as given."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "HIDDEN": hidden, "PYTHONPATH": str(tmp_path), "PATH": path}
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


# ------------------------------------------------------------------------------------ what is built and why


def nvcc(setup_py: ModuleType, release: str = "13.0", without: tuple[str, ...] = ()) -> object:
    capabilities = {"7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"} - set(without)
    return setup_py.Nvcc("/opt/cuda/bin/nvcc", "/opt/cuda", release, tuple(sorted(capabilities)))


def test_cuda_is_built_where_torch_and_nvcc_agree(setup_py: ModuleType) -> None:
    built, why = setup_py.cuda_decision("2.13.0+cu130", "13.0", nvcc(setup_py, "13.1"), 3)
    assert built
    assert "2.13.0+cu130" in why
    assert "13.1" in why


@pytest.mark.parametrize(
    ("torch_cuda", "release", "num_sources", "said"),
    [
        (None, "13.0", 3, "torch 2.13.0 has no CUDA"),
        ("13.0", None, 3, "no nvcc was found"),
        ("13.0", "12.8", 3, "the major versions must agree"),
        ("13.0", "13.0", 0, "no CUDA sources"),
    ],
)
def test_the_cpu_alone_is_built_otherwise(
    setup_py: ModuleType, torch_cuda: str | None, release: str | None, num_sources: int, said: str
) -> None:
    found = nvcc(setup_py, release) if release else None
    built, why = setup_py.cuda_decision("2.13.0", torch_cuda, found, num_sources)
    assert not built
    assert why.startswith("CPU only: ")
    assert said in why


def test_the_default_architectures(setup_py: ModuleType) -> None:
    chosen, why = setup_py.choose_architectures(None, nvcc(setup_py))
    assert chosen == ["7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
    assert why == "the default list"


def test_an_older_nvcc_leaves_out_what_it_does_not_know(setup_py: ModuleType) -> None:
    chosen, why = setup_py.choose_architectures(None, nvcc(setup_py, "12.6", without=("10.0", "12.0")))
    assert chosen == ["7.5", "8.0", "8.6", "8.9", "9.0a"]
    assert "10.0, 12.0+PTX" in why
    assert "12.6" in why


@pytest.mark.parametrize("requested", ["8.0 9.0a 12.0+PTX", "8.0;9.0a;12.0+PTX", " 8.0, 9.0a, 12.0+PTX "])
def test_torch_cuda_arch_list_is_obeyed(setup_py: ModuleType, requested: str) -> None:
    chosen, why = setup_py.choose_architectures(requested, nvcc(setup_py))
    assert chosen == ["8.0", "9.0a", "12.0+PTX"]
    assert "TORCH_CUDA_ARCH_LIST" in why


@pytest.mark.parametrize(("requested", "named"), [("Hopper", "'Hopper'"), ("8.0 7.0", "7.0"), ("80", "'80'")])
def test_a_bad_torch_cuda_arch_list_is_refused(setup_py: ModuleType, requested: str, named: str) -> None:
    with pytest.raises(setup_py.BuildError, match=f"TORCH_CUDA_ARCH_LIST holds {named}"):
        setup_py.choose_architectures(requested, nvcc(setup_py))


def test_compiler_flags_for_an_architecture(setup_py: ModuleType) -> None:
    flags = setup_py.gencode_flags(["7.5", "9.0a", "12.0+PTX"], "csrc/composite/composite_cuda.cu")
    assert flags == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_the_mlp_is_not_compiled_for_7_5(setup_py: ModuleType) -> None:
    source = "csrc/mlp/mlp_cuda.cu"
    assert setup_py.gencode_flags(["7.5", "8.0"], source) == ["-gencode=arch=compute_80,code=sm_80"]
    assert setup_py.gencode_flags(["7.5"], source) == []


def test_sources_are_found_not_listed(setup_py: ModuleType, tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    for name in (
        "library.cpp",
        "module.cpp",
        "common/checks.h",
        "common/notes.cpp",
        "blend/blend_cpu.cpp",
        "blend/blend_cuda.cu",
        "blend/blend_cublaslt.cpp",
        "blend/blend_kernels.cuh",
    ):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).touch()
    cxx, cuda = setup_py.find_sources(csrc)
    assert cxx == ["csrc/blend/blend_cpu.cpp", "csrc/library.cpp", "csrc/module.cpp"]
    assert cuda == ["csrc/blend/blend_cublaslt.cpp", "csrc/blend/blend_cuda.cu"]


def test_cublaslt_of_the_toolkit_or_beside_torch(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit, wheels = tmp_path / "toolkit", tmp_path / "site-packages"
    compiler = replace(nvcc(setup_py), home=str(toolkit))  # type: ignore[type-var]
    monkeypatch.setattr(sys, "path", [str(wheels)])
    assert setup_py.find_cublaslt(compiler) is None
    for home, folder, name in (
        (wheels / "nvidia" / "cu13", "lib", "libcublasLt.so.13"),
        (toolkit, "lib64", "libcublasLt.so"),
    ):
        for file in (home / "include" / "cublasLt.h", home / folder / name):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        # The toolkit's, made last, goes before the wheels'.
        assert setup_py.find_cublaslt(compiler) == (str(home / "include"), str(home / folder), name)


def test_both_compilers_are_told_of_cuda(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ over torch's CUDA interface, and the headers compiled for it, need it as the kernels do."""
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: nvcc(setup_py))
    plan, _ = setup_py.make_plan("2.13.0+cu130", "13.0", "c++")
    assert all("-DUSE_CUDA" in plan.flags[compiler] for compiler in ("cxx", "nvcc"))
    plan, _ = setup_py.make_plan("2.13.0+cpu", None, "c++")
    assert "-DUSE_CUDA" not in plan.flags["cxx"]


def test_the_build_header_is_rewritten_only_when_the_plan_changed(
    setup_py: ModuleType, tmp_path: Path
) -> None:
    plan, _ = setup_py.make_plan("2.13.0+cpu", None, "c++")
    setup_py.write_build_header(plan, tmp_path)
    (header,) = tmp_path.iterdir()
    os.utime(header, (0, 0))
    setup_py.write_build_header(plan, tmp_path)
    assert header.stat().st_mtime == 0
    setup_py.write_build_header(replace(plan, torch="2.11.0"), tmp_path)
    assert header.stat().st_mtime > 0


@pytest.mark.parametrize(
    ("flags", "unit"),
    [
        ("fpu sse2", "baseline"),
        ("sse2 fma avx2 bmi2", "avx2"),
        ("avx2 sse2", "baseline"),
        ("avx512f avx512dq avx512bw avx2 fma", "avx2"),
        ("avx512f avx512dq avx512bw avx512vl avx2 fma", "avx512"),
    ],
)
def test_the_vector_unit_of_this_processor_alone(setup_py: ModuleType, flags: str, unit: str) -> None:
    cpuinfo = f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n"
    assert setup_py.choose_vector_units("host", cpuinfo) == [unit]
    number = ["baseline", "avx2", "avx512"].index(unit)
    assert setup_py.vector_flags([unit]) == [f"-DMIPNERF_ONLY_VECTOR_UNIT={number}"]


def test_every_vector_unit_unless_asked_otherwise(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("", "all"):
        units = setup_py.choose_vector_units(given, "")
        assert units == ["baseline", "avx2", "avx512"] and setup_py.vector_flags(units) == []
    assert setup_py.choose_vector_units("host", "") == ["baseline"]
    with pytest.raises(
        setup_py.BuildError, match="MIPNERF_FAST_VECTOR_UNITS holds 'mine'; expected all or host"
    ):
        setup_py.choose_vector_units("mine", "")
    monkeypatch.setenv("MIPNERF_FAST_VECTOR_UNITS", "host")
    plan, _ = setup_py.make_plan("2.13.0+cpu", None, "c++")
    assert len(plan.vector_units) == 1 and plan.flags["cxx"][-1].startswith("-DMIPNERF_ONLY_VECTOR_UNIT=")


# ------------------------------------------------------------------------------ what is said is missing


@pytest.mark.parametrize(
    ("hidden", "with_compiler", "said"),
    [
        ("", False, "no C++ compiler was found"),
        ("torch", True, "torch was not found by the Python that builds"),
        ("ninja", True, "ninja was not found"),
        ("pybind11", True, "pybind11 was not found"),
    ],
)
def test_one_sentence_for_what_is_missing(
    tmp_path: Path, hidden: str, with_compiler: bool, said: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    if with_compiler:
        compiler = shutil.which("c++") or shutil.which("g++")
        assert compiler is not None
        (tools / "c++").symlink_to(compiler)
    if hidden == "pybind11":  # the one that is looked for after ninja
        (tools / "ninja").write_text("#!/bin/sh\necho 1.11\n")
        (tools / "ninja").chmod(0o755)
    done = run_hiding(tmp_path, hidden, "setup.py", "--quiet", "build_ext", path=str(tools))
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {said}"), done.stderr
    assert "Traceback" not in done.stderr


def test_the_compiler_that_cxx_names_must_exist(setup_py: ModuleType) -> None:
    with pytest.raises(setup_py.BuildError, match=r"named by CXX, no-such-compiler -m64, was not found"):
        setup_py.find_compiler({"CXX": "no-such-compiler -m64", "PATH": os.environ["PATH"]})


def test_an_older_torch_is_refused(setup_py: ModuleType) -> None:
    setup_py.check_torch_version("2.11.0+cu130")
    setup_py.check_torch_version("3.0")
    with pytest.raises(setup_py.BuildError, match=r"torch 2\.9\.1 was found, and at least 2\.11 is needed"):
        setup_py.check_torch_version("2.9.1")


def test_missing_python_headers_are_named(setup_py: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(setup_py.BuildError, match=r"Python\.h was not found"):
        setup_py.check_python_headers(str(tmp_path))


# ------------------------------------------------------------------------------------- the library, or none


def test_build_info_says_how_the_library_was_built(setup_py: ModuleType) -> None:
    info = _native.build_info()
    assert set(info) == set(setup_py.Plan.__dataclass_fields__)
    assert info["torch"].split(".")[0] == torch.__version__.split(".")[0]
    assert info["flags"]["cxx"] == setup_py.CXX_FLAGS
    assert info["architectures"] == [] or "nvcc" in info["compilers"]


def test_the_library_holds_every_source(setup_py: ModuleType) -> None:
    cxx, cuda = setup_py.find_sources(ROOT / "csrc")
    info = _native.build_info()
    assert set(cxx) <= set(info["sources"])
    assert set(info["sources"]) <= set(cxx + cuda)


def import_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The loader in a package of its own, with whatever stands beside it there."""
    package = tmp_path / name
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "mipnerf_fast" / "_native.py", package)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(f"{name}._native")


def test_a_library_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = import_copy(tmp_path, monkeypatch, "not_built")
    assert loader.load() is None
    assert not loader.available()
    assert loader.build_info() == {}
    assert "has not been built" in loader.why_missing()
    assert "python setup.py build_ext --inplace" in loader.why_missing()


def test_a_library_for_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_python").mkdir()
    (tmp_path / "other_python" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    loader = import_copy(tmp_path, monkeypatch, "other_python")
    assert not loader.available()
    assert "another Python (_C.cpython-39-x86_64-linux-gnu.so)" in loader.why_missing()


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no shared object")
    loader = import_copy(tmp_path, monkeypatch, "broken")
    assert not loader.available()
    assert "cannot be loaded" in loader.why_missing()


def test_a_loaded_library_has_no_reason_to_be_missing() -> None:
    assert _native.available()
    assert _native.why_missing() == ""


def test_a_suite_without_the_library_fails(tmp_path: Path) -> None:
    """And the package imports without it, or there would be no tests that pass."""
    check = "tests/test_import_rule.py::test_the_model_is_made_of_ops"
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", check)
    done = run_hiding(tmp_path, "mipnerf_fast._C", *arguments, path=os.environ["PATH"])
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "without the native library" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert run_hiding(tmp_path, "", *arguments, path=os.environ["PATH"]).returncode == pytest.ExitCode.OK


# ------------------------------------------------------------------------------------- what a release holds


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    base = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", "-q", *base], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    wanted = [ROOT / name for name in ("LICENSE", "Makefile", "train.py", ".ci/run", "mipnerf_fast/py.typed")]
    for folder in ("csrc", "mipnerf_fast", "tests"):
        wanted += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    ignored = {".so", ".pyc"}
    missing = {path.relative_to(ROOT).as_posix() for path in wanted if path.suffix not in ignored} - held
    assert not missing
    assert not {name for name in held if Path(name).suffix in ignored}
