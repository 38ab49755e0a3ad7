"""The house rules that a linter does not know: who imports whom, sizes, forbidden calls."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "framework" / "shardwise"
KERNELS = ROOT / "kernels" / "shardwise_kernels"

# From the ground up; rooms on one line may not import each other either, but for the pairs below.
FLOORS = [
    {"environment", "errors", "lazy"},
    {"safe_files"},
    {"hub", "integrity"},
    {"config"},
    {"terminal"},
    {"storage"},
    {"metrics", "memory"},
    {"ops"},
    {"models"},
    {"parallel"},
    {"precision"},
    {"adapters"},
    {"assemble"},
    {"optim"},
    {"data"},
    {"losses", "rewards"},
    {"curation"},
    {"checkpoint"},
    {"engines"},
    {"rollout"},
    {"search"},
    {"resilience"},
    {"stages"},
    {"report", "verify", "recipes"},
    {"launch"},
    {"sweep", "serve"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load"}

WRITERS = {"print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write"}


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(node: ast.expr) -> str:
    """``os.path.join`` for the expression of that name, else an empty text."""
    if isinstance(node, ast.Attribute):
        inner = name_of(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "shardwise" and len(parts) > 1 else ""


def upward(path: Path, room: str) -> list[str]:
    """Imports of ``path`` that lead to a room which is not below ``room``."""
    found = []
    for line, module in imports(path):
        target = room_of(module)
        if target in HEIGHT and target != room and HEIGHT[target] >= HEIGHT[room]:
            found.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {target}")
    return found


def test_every_room_has_its_floor() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms <= set(HEIGHT), f"give {sorted(rooms - set(HEIGHT))} a floor in FLOORS"


def test_rooms_import_only_rooms_below() -> None:
    found = []
    for path in sources(PACKAGE):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":  # the package's front page names every room, lazily
            found += upward(path, room)
    assert not found, "\n".join(found)


def test_the_import_rule_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text("def f():\n    from shardwise.stages import run\n")
    assert upward(path, "models") == ["a.py:2: models imports stages"] * 2
    assert upward(path, "cli") == []


def circles(modules: dict[str, Path]) -> list[list[str]]:
    """Every set of modules that reach each other by imports, those inside functions included."""
    goes: dict[str, set[str]] = {}
    for name, path in modules.items():
        goes[name] = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                goes[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):  # of a front page a file, or what it says itself
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                goes[name] |= {i if i in modules else str(node.module) for i in inner}
        goes[name] &= set(modules) - {name}
    reach = {name: set(targets) for name, targets in goes.items()}
    for middle in modules:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    rings = {tuple(sorted(m for m in reach[n] if n in reach[m])) for n in modules if n in reach[n]}
    return [list(ring) for ring in sorted(rings)]


def files_of(room: Path) -> dict[str, Path]:
    """Path by dotted module name; a folder's front page goes by the folder's name."""
    names = {
        p: ".".join(p.relative_to(room.parents[1]).with_suffix("").parts) for p in sources(room)
    }
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@pytest.mark.parametrize("room", sorted(p.name for p in PACKAGE.iterdir() if p.is_dir()))
def test_files_of_a_room_import_each_other_in_no_circle(room: str) -> None:
    found = circles(files_of(PACKAGE / room))
    assert not found, "\n".join(" <-> ".join(ring) for ring in found)


def test_the_circle_rule_can_fail(tmp_path: Path) -> None:
    texts = {
        "r.a": "from r import b\nfrom r.c import x",
        "r.b": "def f():\n    import r.d",
        "r.c": "",
        "r.d": "from r.a import f",
        "r": "from r.a import f",
    }
    modules = {name: tmp_path / f"{name}.py" for name in texts}
    for name, path in modules.items():
        path.write_text(texts[name])
    assert circles(modules) == [["r.a", "r.b", "r.d"]]
    modules["r.c"].write_text("from r import f")
    assert circles(modules) == [["r", "r.a", "r.b", "r.c", "r.d"]]


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "shardwise_kernels", "__future__"}
    found = [
        f"{path.name}:{line}: {module}"
        for path in sources(KERNELS)
        for line, module in imports(path)
        if module.split(".")[0] not in allowed
    ]
    assert not found, found
    assert not (ROOT / "kernels" / "__init__.py").exists()  # would shadow another package


def test_files_and_functions_fit_on_the_table() -> None:
    found = []
    folders = [ROOT / name for name in ("framework", "kernels", "tests", "benchmarks")]
    for path in sources(*folders):
        where = path.relative_to(ROOT)
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES:
            found.append(f"{where}: {length} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{where}: {node.name} has {length} lines")
    assert not found, "\n".join(found)


def dangers(module: ast.Module) -> list[tuple[int, str]]:
    """Calls and imports that could run code out of data."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [
                (node.lineno, f"import {a.name}")
                for a in node.names
                if a.name.split(".")[0] in FORBIDDEN_MODULES
            ]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                found.append((node.lineno, f"from {node.module} import"))
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in FORBIDDEN_CALLS:
                found.append((node.lineno, f"{name}()"))
            if name == "compile":  # the builtin; torch.compile has a dot
                found.append((node.lineno, "compile()"))
            for keyword in node.keywords:
                true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg == "shell" and true:
                    found.append((node.lineno, "shell=True"))
                if keyword.arg in ("trust_remote_code", "allow_pickle") and true:
                    found.append((node.lineno, f"{keyword.arg}=True"))
            # Objects over a process group travel as pickles.
            if name.rpartition(".")[2] in (
                "all_gather_object",
                "broadcast_object_list",
                "gather_object",
                "scatter_object_list",
                "send_object_list",
                "recv_object_list",
            ):
                found.append((node.lineno, f"{name}()"))
    return found


def test_nothing_dangerous_is_called() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sources(PACKAGE, KERNELS)
        for line, what in dangers(tree(path))
    ]
    assert not found, "\n".join(found)


def test_one_file_writes_to_the_terminal() -> None:
    """The others ask it: it escapes control characters, and hides secrets."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(PACKAGE)
        if path.name != "terminal.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and name_of(node.func) in WRITERS
    ]
    assert not found, found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('x = 1')",
        "compile('1', '', 'eval')",
        "import torch\ntorch.load('x')",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "dist.all_gather_object(a, b)",
    ],
)
def test_the_danger_rule_can_fail(text: str) -> None:
    assert dangers(ast.parse(text))


def test_the_danger_rule_lets_the_rest_pass() -> None:
    text = "torch.compile(f)\nre.compile('x')\nmodel.eval()\nsubprocess.run(['ls'], shell=False)"
    assert not dangers(ast.parse(text))


def test_no_text_is_half_merged() -> None:
    marks = re.compile("^(<{7}|>{7}|[|]{7}) ", re.MULTILINE)
    texts = [p for end in ("py", "md", "yaml", "toml", "sh", "cpp") for p in ROOT.rglob(f"*.{end}")]
    ours = [p for p in texts if not {".venv", "_build", "runs"} & set(p.relative_to(ROOT).parts)]
    assert len(ours) > 500
    assert not [
        str(p) for p in ours if marks.search(p.read_text(encoding="utf-8", errors="replace"))
    ]
