"""The rules of the house: which room may know which, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(ROOT.glob("mcic/**/*.py")) + sorted(ROOT.glob("kernels/**/*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mcic", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere, absolute; `from a import b` counts as a and as a.b."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def below(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


ABOVE = {  # room → rooms it must not know
    "mcic.data": ("mcic.model", "mcic.trainer", "mcic.objective", "mcic.evaluate", "mcic.cli"),
    "mcic.model": ("mcic.data", "mcic.trainer", "mcic.objective", "mcic.evaluate", "mcic.cli"),
    "mcic.losses": ("mcic.data", "mcic.trainer", "mcic.model", "mcic.cli"),
    "mcic.pseudo": ("mcic.data", "mcic.trainer", "mcic.model", "mcic.cli"),
    "mcic.trainer": ("mcic.cli",),
    "mcic.config": ("mcic.data", "mcic.model", "mcic.trainer", "mcic.cli"),
}


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_imports_run_one_way(path):
    name, imports = module_name(path), imports_of(path)
    assert not [i for i in imports if below(i, "bench", "tests")]
    for room, forbidden in ABOVE.items():
        if below(name, room):
            assert not [i for i in imports if below(i, *forbidden)], f"{name} knows a room above it"
    if below(name, "mcic.kernels"):
        assert not [i for i in imports if below(i, "mcic") and not below(i, "mcic.kernels")]
    elif name != "mcic.ops":
        assert not [i for i in imports if below(i, "mcic.kernels")], "only mcic.ops knows the kernels"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_report_needs_no_torch():
    assert "torch" not in loaded_by("import mcic.report")


def test_importing_kernels_loads_neither_triton_nor_the_extension():
    loaded = loaded_by("import mcic.kernels")
    assert "mcic.kernels" in loaded
    assert not loaded & {"triton", "mcic.kernels._C"}


def test_everything_is_packaged():
    """A folder with code that setup forgets would be missing from an installed copy."""
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {module_name(path) for path in LIBRARY if path.name == "__init__.py"} == set(packages)


def test_train_script_stays_a_table_of_contents():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 90


def unsafe_calls(path: Path) -> list[str]:
    """What of a file could run code from data: pickles, unsafe YAML, XML parsers that follow entities."""
    found = [name for name in imports_of(path) if below(name, "pickle", "dill", "joblib", "shelve", "marshal", "xml")]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            safe = [ast.unparse(word.value) for word in node.keywords if word.arg == "weights_only"] == ["True"]
            if call in ("eval", "exec", "yaml.load", "np.load", "yaml.unsafe_load") or (
                call == "torch.load" and not safe
            ):
                found.append(f"{call}, line {node.lineno}")
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_no_code_is_ever_loaded_from_data(path):
    assert not unsafe_calls(path)


def test_unsafe_calls_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = tmp_path / "odd.py"
    source.write_text("import pickle\nimport torch\ntorch.load('a')\ntorch.load('b', weights_only=True)\neval('1')\n")
    assert unsafe_calls(source) == ["pickle", "torch.load, line 3", "eval, line 5"]
