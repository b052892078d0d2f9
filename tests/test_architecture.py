"""The design's rules on the code, from its syntax trees: who may import what, sizes, and what nobody may do."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpo_jax"

# A unit is a file of the package or a folder. It imports only from units in earlier rows.
LAYERS = (
    {"errors", "libtpu"},
    {"records", "named", "paths", "distributed", "sharding"},
    {"intervals", "microbatches"},
    {"optim", "losses", "models", "data"},
    {"logprobs"},
    {"step", "reference"},
    {"sampling"},
    {"evaluation", "rewards"},
    {"config"},
    {"training"},
    {"experiments"},
    {"pages"},
    {"runs"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
ROW = {unit: row for row, units in enumerate(LAYERS) for unit in units} | {"__init__": -1}
# The core, in reading order: what one reads to know how a batch becomes an update.
CORE = ("records.py", "logprobs.py", "step.py", "reference.py")
# One file of losses stands for the others, which are more equations.
CORE += tuple(f"losses/{name}.py" for name in ("__init__", "pairwise", "parts", "registry"))
CORE += tuple(f"losses/{name}.py" for name in ("objective", "term_options", "metrics"))
CORE += ("optim/optimizers.py", "optim/schedules.py")
CORE += tuple(f"data/{name}.py" for name in ("encode", "chat", "truncate", "table", "order", "pack", "collate"))
CORE += tuple(f"models/{name}.py" for name in ("model", "architecture", "decoder", "layers", "attention"))
CORE += ("models/interface.py", "models/decoder_layer.py")
LONGEST_CHAIN = 14
ONLY_IN = {
    "flax": {"models"},
    "optax": {"optim", "step", "experiments"},
    "orbax": {"training"},
    "tyro": {"config"},
    "matplotlib": {"pages"},
}
WITHOUT_JAX = {"data", "config", "named", "errors", "records", "intervals", "paths", "pages", "cli"}
MAY_JIT = {
    "models/init.py",
    "models/model.py",
    "evaluation.py",
    "reference.py",
    "sampling",
    "training",
    "experiments",
}
# Names that repeat because they are a contract: of a data source, of a model family, of an objective and an optimizer.
CONTRACTS = {"fused_tensors", "read", "rows", "architecture", "tensors", "build"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "subprocess"}
TORCH = {"rewards/classifier.py"}  # runs models of any family, read as safetensors
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_TRUE = {"shell", "allow_pickle", "trust_remote_code"}


def python_files(*folders):
    files = itertools.chain.from_iterable((ROOT / folder).rglob("*") for folder in folders)
    return sorted(f for f in files if f.is_file() and (f.suffix == ".py" or is_python_script(f)))


def is_python_script(file):
    return not file.suffix and file.parent.name == "scripts" and "python" in file.read_text().partition("\n")[0]


FILES = python_files("dpo_jax")
TREES = {file: ast.parse(file.read_text(), str(file)) for file in python_files("dpo_jax", "scripts", "tests")}
package = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
everywhere = pytest.mark.parametrize("file", TREES, ids=lambda f: str(f.relative_to(ROOT)))


def unit_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    """Yields the dotted name of everything imported; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    """Returns a.b.c of an expression, or the empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@package
def test_imports_point_one_way(file):
    unit = unit_of(file)
    assert unit in ROW, f"{unit} has no place in the layers"
    used = {name.split(".")[1] for name in imports(TREES[file]) if name.startswith("dpo_jax.")} - {unit, "__version__"}
    wrong = {u for u in used if ROW.get(u, len(LAYERS)) >= ROW[unit]}
    assert not wrong or unit == "__init__", f"{unit} may not import {sorted(wrong)}"


def imported_files(file):
    """Returns the files of the package that a file imports, at any place."""
    found = set()
    for name in imports(TREES[file]):
        path = PACKAGE.joinpath(*name.split(".")[1:])
        for place in (path, path.parent):
            module = next((m for m in (place.with_suffix(".py"), place / "__init__.py") if m.is_file()), None)
            if name.startswith("dpo_jax.") and module:
                found.add(module)
                break
    return found - {file, PACKAGE / "__init__.py"}


def chains():
    """Returns the longest chain of imports that begins at each file; a circle is an error."""
    longest, under_way = {}, set()

    def visit(file):
        assert file not in under_way, f"{file} imports itself, through others"
        if file not in longest:
            under_way.add(file)
            longest[file] = [file, *max((visit(f) for f in imported_files(file)), key=len, default=[])]
            under_way.remove(file)
        return longest[file]

    return [visit(file) for file in FILES if file != PACKAGE / "__init__.py"]


def test_no_chain_of_imports_is_long_or_a_circle():
    longest = max(chains(), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(str(f.relative_to(PACKAGE)) for f in longest)


def test_the_core_reads_in_an_afternoon():
    names = [f.relative_to(PACKAGE).as_posix() for f in FILES]
    core = [n for n in names if n.startswith(CORE)]
    lines = sum((PACKAGE / name).read_text().count("\n") for name in core)
    assert lines < 5000, f"{lines} lines in {len(core)} files"
    folders = {n.split("/")[0] for n in names if "/" in n}
    assert len(folders) <= 13
    assert len([n for n in names if "/" not in n]) <= 15


def test_names_are_unique():
    seen = {}
    for file in FILES:
        for node in TREES[file].body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                seen.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    twice = {name: files for name, files in seen.items() if len(files) > 1 and name not in CONTRACTS}
    assert not twice


@package
def test_third_parties_stay_in_their_places(file):
    unit = unit_of(file)
    roots = {name.split(".")[0] for name in imports(TREES[file])}
    wrong = {library for library, units in ONLY_IN.items() if library in roots and unit not in units}
    if unit in WITHOUT_JAX and file not in (PACKAGE / "paths.py",):
        wrong |= roots & {"jax", "jaxlib"}
    assert not wrong, f"{unit} may not import {sorted(wrong)}"


@package
def test_compilation_is_asked_for_at_the_root_only(file):
    names = {dotted(node) for node in ast.walk(TREES[file]) if isinstance(node, ast.Attribute)} | set(
        imports(TREES[file])
    )
    if not MAY_JIT & {unit_of(file), file.relative_to(PACKAGE).as_posix()}:
        assert not names & {"jax.jit", "jax.pmap", "jax.experimental.pjit", "nn.jit"}


@package
def test_mesh_axes_are_named_in_sharding_only(file):
    texts = {node.value for node in ast.walk(TREES[file]) if isinstance(node, ast.Constant)}
    if unit_of(file) != "sharding":
        words = {"fsdp", "expert", "tensor"} | (set() if unit_of(file) in WITHOUT_JAX else {"sequence"})
        assert not texts & words


@package
def test_nothing_dangerous_is_imported_or_called(file):
    allowed = TORCH & {file.relative_to(ROOT / "dpo_jax").as_posix()} and {"torch"}
    assert not {name.split(".")[0] for name in imports(TREES[file])} & (FORBIDDEN_MODULES - allowed)
    assert not {dotted(call.func) for call in calls(TREES[file])} & FORBIDDEN_CALLS


@everywhere
def test_nothing_dangerous_is_switched_on(file):
    switched = [
        k.arg for c in calls(TREES[file]) for k in c.keywords if isinstance(k.value, ast.Constant) and k.value.value
    ]
    assert not set(switched) & FORBIDDEN_TRUE


@everywhere
def test_files_and_functions_are_short(file):
    assert file.read_text().count("\n") <= 400
    functions = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f"{f.name} at line {f.lineno}" for f in functions if (f.end_lineno or 0) - f.lineno + 1 >= 60]


@everywhere
def test_no_error_is_swallowed(file):
    handlers = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.ExceptHandler)]
    wide = [h.lineno for h in handlers if h.type is None or dotted(h.type) in ("Exception", "BaseException")]
    # A kernel that raises anything is not used, and why is logged; likewise a tracker. A user's module may raise
    # anything when imported, a user's loss at the pairs of a report, and transformers on a damaged file. A fuzzer looks
    # for what is raised.
    wide_ones = ("training/attention_check.py", "training/trackers.py", "named.py", "models/huggingface/tokenizer.py")
    wide_ones += ("commands/gradient_weights.py",)
    allowed = file in [*(PACKAGE / name for name in wide_ones), ROOT / "scripts/fuzz"]
    assert len(wide) <= allowed, f"lines {wide} catch everything"


def public(body, prefix=""):
    """Yields the public functions, classes and methods of a module."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@package
def test_everything_public_has_a_docstring(file):
    tree = TREES[file]
    assert ast.get_docstring(tree), "the module has none"
    overrides = {"construct_mapping"}  # documented where it is first defined
    assert not [name for name, node in public(tree.body) if node.name not in overrides and not ast.get_docstring(node)]


def test_importing_the_package_touches_no_device():
    code = """
import importlib, pkgutil, sys, dpo_jax
names = [m.name for m in pkgutil.walk_packages(dpo_jax.__path__, "dpo_jax.") if m.name != "dpo_jax.__main__"]
for name in names:
    importlib.import_module(name)
from jax._src import xla_bridge
print(len(names), sorted(xla_bridge._backends))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len([f for f in FILES if unit_of(f) not in ("__init__", "__main__")])), "[]"]


def test_no_file_names_this_machine_or_a_registry():
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # The patterns are written so that this file does not match them.
    paths = r"(?<![\w.])/(?:work|root|farm|home/[a-z]\w+)/|/opt/(?:wheels|pypi)"
    hosts = r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs|download[.]pytorch|deb[.]debian|crates[.]io|proxy[.]golang"
    found = []
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            for match in re.finditer(f"{paths}|{hosts}", (ROOT / name).read_text(errors="replace")):
                found.append(f"{name}: {match.group()}")
    assert not found
