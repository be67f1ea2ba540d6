"""Nothing in the package unpickles or evaluates what it reads: neither imports nor calls of what can run code that a file brings."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "spectralquant"
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "jsonpickle", "yaml", "ruamel", "code", "codeop", "runpy"}
"""Not `pickletools`, which lists the opcodes of a pickle and runs none."""
CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__",
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load",
    "numpy.load", "numpy.lib.npyio.load", "numpy.fromregex", "pandas.read_pickle", "multiprocessing.reduction.ForkingPickler", "os.system", "os.popen",
}  # fmt: skip
IMPORTS = {"importlib.import_module", "importlib.__import__"}
"""Of a name that is not written there, or is one of MODULES."""
LAZY = {"__init__.py", "evaluation/methods/__init__.py", "integrations/__init__.py", "kernels/compiler.py"}
"""Modules that import once by a name that is not written at the call: of their own files, or of the CUDA bindings."""
SHELL = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}


def banned(source: str) -> list[str]:
    """What may run code of a file in `source`, by the names that it really has, whatever they are called there."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
                found += [alias.name] if alias.name.split(".")[0] in MODULES else []
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found += [f"{node.module}.{alias.name}"] if (node.module or "").split(".")[0] in MODULES or f"{node.module}.{alias.name}" in CALLS else []
    for node in ast.walk(tree):  # `run = torch.load`
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (named := dotted(node.value, names)):
            names.setdefault(node.targets[0].id, named)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load) and dotted(node, names) in CALLS:
            found.append(dotted(node, names))
        elif isinstance(node, ast.Call):
            found += called(node, names)
    return found


def called(node: ast.Call, names: dict[str, str]) -> list[str]:
    """Calls that depend on their arguments."""
    name = dotted(node.func, names)
    given = [a.value if isinstance(a, ast.Constant) else None for a in node.args]
    if name in IMPORTS and (not given or given[0] is None or str(given[0]).split(".")[0] in MODULES):
        return [name]
    if name == "getattr" and len(given) > 1 and f"{dotted(node.args[0], names)}.{given[1]}" in CALLS:
        return [f"{dotted(node.args[0], names)}.{given[1]}"]
    if name in SHELL and any(k.arg == "shell" for k in node.keywords):
        return [name]
    return [f"{k.arg} of {name}" for k in node.keywords if k.arg in ("allow_pickle", "weights_only")]


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full name of what `node` names, or ""."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (base := dotted(node.value, names)):
        return f"{base}.{node.attr}"
    return ""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    once = path.relative_to(ROOT).as_posix() in LAZY
    assert banned(path.read_text(encoding="utf-8")) == ["importlib.import_module"] * once


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import marshal", "import yaml", "from joblib import load", "import dill.session",
        "import torch\ntorch.load(f)", "import torch as t\nt.load(f)", "from torch import load", "from torch import load as l\nl(f)",
        "import torch.serialization\ntorch.serialization.load(f)", "from torch import serialization as s\ns.load(f)", "import torch\nrun = torch.load\nrun(f)",
        "import torch\nmap(torch.load, files)", "import torch\ngetattr(torch, 'load')(f)", "import torch\nx.save(y, torch.save)", "eval('1')",
        "list(map(eval, lines))", "exec(text)", "__import__('os')", "import builtins\nbuiltins.eval(x)", "compile(x, '', 'exec')",
        "import importlib\nimportlib.import_module('pickle')", "from importlib import import_module as i\ni(name)", "import numpy as np\nnp.load(f)",
        "import anything\nanything.read(f, allow_pickle=True)", "import os\nos.system(x)", "import subprocess\nsubprocess.run(x, shell=True)",
        "def f():\n    import pickle\n    return pickle", "import torch\ntorch.jit.load(f)",
    ],
)  # fmt: skip
def test_walking_is_not_fooled(source: str) -> None:
    assert banned(source)


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(f)", "model.eval()", "self.load(path)", "from safetensors.torch import load_file\nload_file(f)", "import re\nre.compile('x')",
        "import torch\ntorch.compile(model)", "import pickletools\npickletools.genops(x)", "from importlib.util import find_spec\nfind_spec('x')",
        "import subprocess\nsubprocess.run(['x'])", "evaluate(x)",
    ],
)  # fmt: skip
def test_walking_sees_no_ghosts(source: str) -> None:
    assert not banned(source)
