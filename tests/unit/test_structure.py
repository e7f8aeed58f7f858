# SPDX-License-Identifier: Apache-2.0
"""The architecture, checked by reading files: tiers, pairing of ops, one list of sources, sizes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "nemotron_fast"

# A module may import modules of its own and of lower tiers; tier 0 runs without torch. A folder counts for all in it.
TIERS: dict[int, str] = {
    0: """errors dtypes files progress config config_reader blocks sharding quant_config module_patterns sampling_params
          generation_defaults request pages admission turns prompt_budget scheduler metrics hardware footprint rank_plan
          planner cache_size step_size""",
    1: """_C ops attention_ops sampling_ops reference reference_attention reference_sampling packing cpu_backend rope
          kv_cache safetensors_file checkpoint
          inventory param_loader weights random_weights packed_weights quantize sampling staging penalties comm
          device""",
    2: """batch residual model graphs prompt_warm_up executor""",
    3: """engine""",
    4: """__init__ __main__ llm async_llm text_engine prompts outputs conversation loading sequence_text tokenizer
          token_bytes detokenizer stop_strings chat_template template_sandbox template_rewrite template_limits
          reasoning reasoning_stream cli models testing""",
}
TIER_OF = {module: tier for tier, modules in TIERS.items() for module in modules.split()}

DEVICE_LINES, PYTHON_LINES, TEST_LINES, README_LINES = 500, 300, 400, 200

CODE_SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh", ".cmake", ".sh"}
CODE_FOLDERS = ("csrc", "python", "tests", "bench", "cmake", ".ci")
CODE = [
    p
    for folder in CODE_FOLDERS
    for p in sorted((ROOT / folder).rglob("*"))
    if p.suffix in CODE_SUFFIXES and "__pycache__" not in p.parts
] + [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
MODULES = sorted(PACKAGE.rglob("*.py"))
C_FILES = [p for p in CODE if p.suffix in {".cpp", ".cu", ".h", ".cuh"} and p.is_relative_to(ROOT / "csrc")]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    """`config` for config.py, `cli` for everything in cli/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that the module imports at run time, at its top level or inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            found.add(module)
            if module == "nemotron_fast":
                found.update(f"nemotron_fast.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def ops_of_library() -> list[str]:
    text = (ROOT / "csrc/ops/library.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


def ops_with_a_kernel() -> set[str]:
    text = "".join(p.read_text() for p in (ROOT / "csrc/ops").glob("*.cpp"))
    return set(re.findall(r'register_cuda\(m, "(\w+)"', text))


def mentioned(pattern: str, files: str) -> bool:
    return any(re.search(pattern, p.read_text()) for p in ROOT.glob(files))


def functions(path: Path) -> set[str]:
    return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_is_in_a_tier(path: Path) -> None:
    assert module_name(path) in TIER_OF, f"{module_name(path)}: add it to a tier in {relative(Path(__file__))}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_imports_only_its_own_and_lower_tiers(path: Path) -> None:
    tier = TIER_OF.get(module_name(path), 4)
    for name in imports(path):
        if name == "nemotron_fast" or not name.startswith("nemotron_fast."):
            continue
        target = name.split(".")[1]
        if (PACKAGE / f"{target}.py").exists() or (PACKAGE / target).is_dir() or target == "_C":
            assert TIER_OF[target] <= tier, f"tier {tier} imports {target} of tier {TIER_OF[target]}"


@pytest.mark.parametrize("path", [p for p in MODULES if TIER_OF.get(module_name(p)) == 0], ids=relative)
def test_tier_0_runs_without_torch(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("folder", ["kernels", "host"])
def test_no_torch_below_the_ops(folder: str) -> None:
    for path in C_FILES:
        if path.is_relative_to(ROOT / "csrc" / folder):
            includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
            assert not [i for i in includes if re.match(r"(torch|ATen|c10|pybind11|Python)\b", i)], relative(path)


def test_host_layer_has_no_cuda_beyond_the_version() -> None:
    for path in C_FILES:
        if path.is_relative_to(ROOT / "csrc/host") and path.name != "build_info.cpp":
            assert "cuda" not in " ".join(re.findall(r"#include.*", path.read_text())), relative(path)


def test_library_is_found() -> None:
    assert len(ops_of_library()) >= 12
    assert {"rms_norm", "add_rms_norm"} <= ops_with_a_kernel() <= set(ops_of_library())


@pytest.mark.parametrize("op", ops_of_library())
def test_op_has_its_companions(op: str) -> None:
    references = ("reference.py", "reference_attention.py", "reference_sampling.py", "packing.py")
    places = (references, ("ops.py", "attention_ops.py", "sampling_ops.py"))
    missing = [
        f"function {op} in {' or '.join(files)}"
        for files in places
        if not any(op in functions(PACKAGE / file) for file in files)
    ]
    if not mentioned(rf"\b(ops\.|test_){op}\b", "tests/kernels/test_*.py"):
        missing.append(f"ops.{op} or test_{op} in tests/kernels/test_*.py")
    if not mentioned(rf"\bops\.{op}\(", "bench/bench_*.py"):
        missing.append(f"ops.{op} in bench/bench_*.py")
    assert not missing, f"{op} lacks: " + "; ".join(missing)


def test_sources_lists_exactly_the_sources() -> None:
    lines = (ROOT / "csrc/SOURCES").read_text().splitlines()
    entries = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    assert all(len(e) == 2 and e[0] in ("any", "cuda") for e in entries)
    assert not [path for need, path in entries if path.endswith(".cu") and need != "cuda"]
    listed = [path for _, path in entries]
    on_disk = [str(p.relative_to(ROOT / "csrc")) for p in C_FILES if p.suffix in {".cpp", ".cu"}]
    assert sorted(listed) == sorted(on_disk)


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_file_says_its_licence_once_and_is_not_too_long(path: Path) -> None:
    lines = path.read_text().splitlines()
    marks = [i for i, line in enumerate(lines[:3]) if "SPDX-License-Identifier: Apache-2.0" in line]
    assert len(marks) == 1, "want one line 'SPDX-License-Identifier: Apache-2.0' at the top"
    limit = DEVICE_LINES
    if path.suffix == ".py":
        limit = TEST_LINES if path.is_relative_to(ROOT / "tests") else PYTHON_LINES
    assert len(lines) <= limit, f"{len(lines)} lines, the cap is {limit}: split it"


@pytest.mark.parametrize("path", sorted(ROOT.glob("**/README.md")), ids=relative)
def test_readme_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= README_LINES
