"""The architecture, held by its import statements: a file knows only what lies below it."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import knnlm

# From the lowest to the highest: folders, the apps within theirs, and files that stand by
# themselves. A file imports from the layers above its own line in this list, and from its own
# folder, where no circle is allowed.
LAYERS = [
    ["errors"],
    ["choices", "display", "progress", "provenance", "rules", "threads"],
    ["index.protocol", "text"],
    ["mixture"],
    ["model"],
    ["datastore"],
    ["workers"],
    ["index"],
    ["retrieval"],
    ["attachment", "evaluation"],
    ["exchange", "knn_lm"],
    ["tuning"],
    ["maintenance"],
    ["__init__"],  # the public names, for the apps alone
    ["apps.engine"],
    ["apps.explorer"],
    ["apps.server"],
    ["apps.mcp"],
    ["apps.cli"],
    ["__main__"],
]
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "faiss", "datasets", "safetensors"}

SOURCE = Path(knnlm.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def module_name(file: Path) -> str:
    """Return knnlm/index/exact.py's name within the package: index.exact."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


MODULES = {module_name(file): file for file in FILES}
PACKAGES = {name.removesuffix(".__init__") for name in MODULES if name.endswith(".__init__")}


def layer(module: str) -> int | None:
    """Return the number of a module's layer: that of its own name, else of its folder."""
    parts = module.split(".")
    for name in (module, ".".join(parts[:2]), parts[0]):
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    return None


def imported_modules(source: str) -> set[str]:
    """Return the modules of knnlm that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import from knnlm by its full name"
            # from a package its modules are imported, from a module its names
            names = [
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}".removeprefix("knnlm.") in MODULES
                else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "knnlm":
                found.add(name.removeprefix("knnlm").removeprefix(".") or "__init__")
    return found


def layer_problems(module: str, source: str) -> list[str]:
    """Return every import of a module that its layer does not allow."""
    own = layer(module)
    if own is None:
        return [f"{module} is in no layer: add it to LAYERS in tests/test_layers.py"]
    problems = []
    for imported in sorted(imported_modules(source)):
        other = layer(imported)
        if other is None:
            problems.append(f"{module} imports {imported}, which is in no layer")
            continue
        same_folder = "." in module and module.split(".")[0] == imported.split(".")[0]
        if other > own or (other == own and not same_folder):
            problems.append(f"{module} imports {imported}, which is not below it")
    return problems


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, or an empty list."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        modules: list[str] = error.args[1]
        return modules
    return []


# the __init__ files of folders hold a docstring and nothing else
CHECKED = [name for name in MODULES if name == "__main__" or not name.endswith(".__init__")]


@pytest.mark.parametrize("module", [name for name in CHECKED if name != "__init__"])
def test_a_file_imports_only_what_lies_below_it(module: str) -> None:
    assert layer_problems(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    imports = {
        name: imported_modules(MODULES[name].read_text(encoding="utf-8")) - {"__init__"}
        for name in CHECKED
    }
    assert circle(imports) == []


def test_a_circle_is_noticed() -> None:
    assert circle({"index.a": {"index.b"}, "index.b": {"errors"}}) == []
    assert circle({"index.a": {"index.b"}, "index.b": {"index.a"}}) != []


@pytest.mark.parametrize("package", sorted(PACKAGES - {"__init__"}))
def test_folders_say_what_they_are_and_import_nothing(package: str) -> None:
    tree = ast.parse(MODULES[f"{package}.__init__"].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("new", "", "new is in no layer"),
        ("model.reading", "from knnlm.datastore.shards import publish", "datastore.shards"),
        ("model.reading", "def f():\n    import knnlm.tuning.tune", "imports tuning.tune"),
        ("evaluation.explain", "from knnlm.knn_lm import KNNLM", "imports knn_lm"),
        ("datastore.catalog", "from knnlm.index import exact", "imports index.exact"),
        ("mixture.parameters", "from knnlm.index.exact import E", "imports index.exact"),
        ("tuning.plot", "import knnlm", "imports __init__"),
        ("text.documents", "if TYPE_CHECKING:\n    import knnlm.apps.cli.main", "apps.cli.main"),
        ("apps.new.file", "", "apps.new.file is in no layer"),
        ("apps.engine.jobs", "from knnlm.apps.server import schema", "apps.server.schema"),
        ("apps.engine.steps", "from knnlm.apps.explorer.analysis import a", "explorer.analysis"),
        ("apps.explorer.page", "from knnlm.apps.server.app import a", "apps.server.app"),
        ("apps.server.routes.models", "from knnlm.apps.cli import console", "apps.cli.console"),
    ],
)
def test_what_the_layers_forbid_is_noticed(module: str, source: str, problem: str) -> None:
    (found,) = layer_problems(module, source)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mixture.interpolation", "from knnlm.index.protocol import Neighbors"),
        ("index.ivf.index", "from knnlm.index.ivf import kernels"),
        ("apps.cli.demo", "import knnlm\nfrom knnlm.apps.cli import console"),
        ("apps.cli.serve", "def f():\n    from knnlm.apps.server.service import Service"),
        ("apps.server.routes.explorer", "from knnlm.apps.explorer import page"),
        ("apps.explorer.analysis", "from knnlm.apps.engine.text_stream import TextStream"),
        ("text.documents", "import numpy as np\nfrom knnlm.errors import KNNLMError"),
    ],
)
def test_what_the_layers_allow_is_allowed(module: str, source: str) -> None:
    assert layer_problems(module, source) == []


@pytest.mark.parametrize("module", ["knnlm", "knnlm.apps.cli.main"])
def test_importing_is_light(module: str) -> None:
    program = f"import sys, {module}; sys.stdout.write(' '.join(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(answer.stdout.split())
    assert module in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("module", MODULES)
def test_files_are_silent(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    printing = [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == [], f"{module} prints; only the apps show anything, through their consoles"
