"""The house stays in order: who may import whom, what loads early, lint, types, and what the README promises."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "diptych"

# From the bottom up: a module imports from its own place and from those before it.
ORDER = (
    "core",
    "objectives",
    "text",
    "models",
    "checkpoints",
    "generate",
    "data",
    "evaluate",
    "train",
    "explain",
    "search",
    "web",
    "cli",
    "__main__",
)
# These may be imported by all; config tells its mistakes of settings through errors, the others know nobody.
GROUND = {"errors": set(), "aside": set(), "settings": set(), "config": {"errors", "settings"}}
FACADE = {"UserError", "__version__"}  # what `from diptych import …` may fetch inside the package
HEAVY = {"torch", "torchvision", "transformers", "timm", "tensorboard", "matplotlib", "pandas", "scipy"}


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and dotted path of every import of ours in `tree`, inside functions too, relative ones made absolute.

    package: the package the source lies in, ("diptych", "core") for diptych/core/stack.py.
    """
    for node in ast.walk(tree):
        paths: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            paths = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            paths = [(*base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                paths = [tuple(first.value.split("."))]
        yield from ((node.lineno, path) for path in paths if path[0] == "diptych" and len(path) > 1)


def disorder(where: str, source: str) -> list[str]:
    """What is out of order in `source`, the text of the file `where` ("diptych/core/stack.py"), a line for each."""
    parts = Path(where).with_suffix("").parts
    place = parts[1]
    if place == "__init__":  # the facade fetches what it shows when asked: test_what_loads_early holds it
        return []
    if place not in GROUND and place not in ORDER:
        return [f"{where}: '{place}' has no place in the house; give it one in ORDER and in docs/design.md"]
    allowed = GROUND[place] if place in GROUND else {*GROUND, *ORDER[: ORDER.index(place) + 1]}
    return [
        f"{where}, line {line}: {place} may not import {'.'.join(path)}"
        for line, path in imports(ast.parse(source, where), parts[:-1])
        if path[1] not in allowed and not (len(path) == 2 and path[1] in FACADE and place != "errors")
    ]


def test_modules_import_only_what_stands_above_them():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    found = [line for f in files for line in disorder(str(f.relative_to(ROOT)), f.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("diptych/core/stack.py", "from diptych.models import clip"),
        ("diptych/core/stack.py", "from diptych import models"),
        ("diptych/core/stack.py", "import torch, diptych.objectives.matching as m"),
        ("diptych/core/stack.py", "from ..text.embeddings import TextEmbeddings"),
        ("diptych/core/stack.py", "from .. import train"),
        ("diptych/core/__init__.py", "from ..text import embeddings"),
        ("diptych/data/readers/coco.py", "from ...evaluate import retrieval"),
        ("diptych/models/clip.py", "def late():\n    from diptych.train import loop"),
        ("diptych/models/clip.py", "class C:\n    def f(self):\n        import diptych.cli"),
        ("diptych/models/clip.py", "import importlib\nimportlib.import_module('diptych.web.page')"),
        ("diptych/models/clip.py", "from diptych import load"),
        ("diptych/generate.py", "from . import data"),
        ("diptych/errors.py", "from diptych.config import Settings"),
        ("diptych/errors.py", "from diptych import __version__"),
        ("diptych/config.py", "from diptych.core.config import StackConfig"),
        ("diptych/attic/old.py", "import json"),
        ("diptych/loose.py", ""),
    ],
)
def test_disorder_is_seen(where, source):
    assert len(disorder(where, source)) == 1


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("diptych/core/stack.py", "import torch\nfrom diptych.core.block import Block\nfrom . import masks"),
        ("diptych/core/stack.py", "from diptych.errors import UserError\nfrom ..config import read"),
        ("diptych/train/loop.py", "from diptych import __version__, evaluate\nimport diptych.data.readers.coco"),
        ("diptych/config.py", "from diptych.errors import UserError"),
        ("diptych/cli.py", "def f():\n    from .web import page"),
    ],
)
def test_order_is_let_be(where, source):
    assert disorder(where, source) == []


def loaded_by(code: str) -> set[str]:
    """The modules, by first name, that a fresh interpreter holds after `code`, which may end by exiting."""
    ask = f"import json, sys\ntry:\n    {code}\nfinally:\n    print(json.dumps(list(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return {name.partition(".")[0] for name in json.loads(run.stderr.splitlines()[-1])}


@pytest.mark.parametrize(
    ("code", "always"),
    [
        ("import diptych", "diptych"),
        ("sys.argv = ['diptych', '--help']; from diptych.cli import main; main()", "diptych"),
        ("import matplotlib", "matplotlib"),  # what is loaded is seen: or the others could never fail
    ],
    ids=["import", "help", "control"],
)
def test_what_loads_early(code, always):
    loaded = loaded_by(code)
    assert always in loaded
    assert sorted(loaded & HEAVY) == ([always] if always in HEAVY else [])


@pytest.mark.parametrize("command", [("ruff", "check", "."), ("ty", "check")], ids=["ruff", "ty"])
def test_lint_and_types(command):
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]\w*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_the_commands_that_the_papers_name_are_targets():
    said = {
        paper: set(re.findall(r"\bmake ([a-z]\w*)", " ".join(code_of((ROOT / paper).read_text("utf-8")))))
        for paper in ("README.md", "CONTRIBUTING.md")
    }
    assert {"demo", "test"} <= said["README.md"], "README.md names `make demo` and `make test`"
    for paper, names in said.items():
        assert names <= targets(), f"{paper} names make targets that the Makefile lacks: {sorted(names - targets())}"


def code_of(markdown: str) -> list[str]:
    """The fenced and inline code of a page."""
    return re.findall(r"```.*?```|`[^`\n]+`", markdown, re.DOTALL)


# A lock or a page with a registry's address in it works on one network alone.
ADDRESS = re.compile(
    r"https?://\S*(?:pypi|pythonhosted|/simple\b|download\.pytorch|anaconda|artifactory|nexus|devpi)"
    r"|--(?:extra-)?index-url|--find-links|--emit-index|index[-_]url\s*=|\[\[tool\.uv\.index",
    re.IGNORECASE,
)
PAPERS = ("requirements*", "*.lock", "*.md", "*.toml", "*.cfg", "*.sh", "Makefile", ".ci/run")


def papers() -> list[Path]:
    """Every file of ours that could carry an address; environments and runs are not walked."""
    tops = [path for path in ROOT.iterdir() if path.name == ".ci" or path.name[0] != "." and path.name != "runs"]
    every = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*"))]
    ours = [path for path in every if not any(part[0] == "." for part in path.relative_to(ROOT).parts[1:-1])]
    return sorted(path for path in ours if path.is_file() and any(path.match(pattern) for pattern in PAPERS))


def test_no_registry_address_is_written_down():
    assert {"requirements.lock", "README.md", "Makefile", "pyproject.toml", "run"} <= {path.name for path in papers()}
    found = [
        f"{path.relative_to(ROOT)}, line {number}: {line.strip()}"
        for path in papers()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if ADDRESS.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("see https" + "://files.python" + "hosted.org/packages/a", True),
        ("http" + "://mirror.example:8080/root/simple" + "/torch/", True),
        ("--extra-index" + "-url x", True),
        ("index" + "-url = 'x'", True),
        ("see https://github.com/pytorch/torchtitan", False),
        ("from PyPI, by a simple command", False),
    ],
)
def test_registry_addresses_are_seen(line, caught):
    assert bool(ADDRESS.search(line)) is caught
