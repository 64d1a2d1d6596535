"""The code stays light: this counts lines and fails above a budget. Every new line is paid for by another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "minimedshift").rglob("*.py"))
COMMANDS = [ROOT / "train.py", ROOT / "translate.py"]
STUDIES = sorted((ROOT / "studies").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
METHOD = ("flow", "coupling", "sampler", "model", "student", "batches")
READING_PATH = [ROOT / "minimedshift" / f"{name}.py" for name in METHOD] + [ROOT / "train.py"]


def lines(*paths):
    """Lines of files: blank ones, comments and docstrings too."""
    return sum(len(path.read_text().splitlines()) for path in paths)


@pytest.mark.parametrize("name, paths, most", [
    ("package and commands", [*PACKAGE, *COMMANDS], 5311),
    ("tests", TESTS, 6373),
    ("reading path", READING_PATH, 1300),
    ("train.py", [ROOT / "train.py"], 320),
    ("support/", [path for path in PACKAGE if path.parent.name == "support"], 907),
    ("studies/", STUDIES, 710),
    ("RESULTS.md", [ROOT / "RESULTS.md"], 500),
])
def test_the_budget_holds(name, paths, most):
    assert lines(*paths) <= most, f"{name} has {lines(*paths)} lines, {most} are allowed"


def test_no_line_is_long():
    for path in [*PACKAGE, *COMMANDS, *STUDIES, *TESTS]:
        long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        assert not long, f"{path}: lines {long} have over 110 characters"


def test_no_function_is_long():
    for path in [*PACKAGE, *COMMANDS, *STUDIES]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                count = node.end_lineno - node.lineno + 1
                assert count <= 60, f"{path}: {node.name} has {count} lines"


def imported(path):
    """The modules of the package that a file imports, as dotted names."""
    known = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PACKAGE}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    packages = {name for name in found if f"{name}.__init__" in known and name != "minimedshift"}
    return (found & known) | {f"{name}.__init__" for name in packages}


def test_train_imports_few_modules():
    found = imported(ROOT / "train.py")
    assert len(found - {"minimedshift.support.__init__"}) <= 14, sorted(found)


def test_no_small_file_has_a_single_reader():
    readers = [*PACKAGE, *COMMANDS, *STUDIES]
    for path in PACKAGE:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if lines(path) < 40 and path.name != "__init__.py":
            count = sum(name in imported(reader) for reader in readers)
            assert count > 1, f"{path} has {lines(path)} lines and {count} reader"


def test_support_imports_nothing_of_the_method():
    for path in PACKAGE:
        if path.parent.name == "support":
            assert all(name.startswith("minimedshift.support") for name in imported(path)), path


def test_imports_run_one_way():
    """No circle: files can be sorted so that each imports only those before it."""
    graph = {".".join(p.relative_to(ROOT).with_suffix("").parts): imported(p) for p in PACKAGE}
    while graph:
        free = [name for name, needs in graph.items() if not (needs - {name}) & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]
