"""What a source file imports and calls, under full names, and which of it unpickles or runs text as code."""

import ast

# Modules that nothing here may import: each unpickles, or writes what only unpickling reads.
MODULES = {"pickle", "cPickle", "_pickle", "pickletools", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code"}
# Functions by full name; NumPy's are banned without allow_pickle=False, YAML's except for the safe ones.
CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen",
    "pandas.read_pickle", "jax.numpy.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.jit.load",
    "torch.package.PackageImporter", "torch.hub.load", "torch.hub.load_state_dict_from_url",
    "torch.distributed.checkpoint.load", "torch.distributed.checkpoint.load_state_dict",
    "torch.distributed.checkpoint.FileSystemReader", "safetensors.torch.load_model",
}  # fmt: skip
NUMPY = {"numpy.load", "numpy.lib.npyio.load", "numpy.lib.npyio.NpzFile", "numpy.lib.format.read_array"}
METHODS = {"read_pickle", "to_pickle", "unsafe_load", "load_state_dict_from_url"}  # whatever they are called on


def banned(source: str) -> set[str]:
    """Full names of what the source imports or calls and must not.

    Names are followed through `import a.b as c`, `from a import b as c` and `c = a.b`; a function that is only named,
    to be called elsewhere, counts as called.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
                found |= {alias.name} if top in MODULES else set()
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            taken = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= taken
            found |= CALLS & set(taken.values())
            found |= {node.module} if node.module.partition(".")[0] in MODULES else set()
            if "*" in taken and any(name.startswith(f"{node.module}.") for name in CALLS | NUMPY):
                found.add(taken["*"])
    for node in ast.walk(tree):  # `load = torch.load`
        if isinstance(node, ast.Assign) and (name := _full(node.value, names)):
            names |= {target.id: name for target in node.targets if isinstance(target, ast.Name) and target.id != name}
    safe = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= _imported(node, names)
            found |= {k.arg for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"}
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = _full(node, names)
            if name in CALLS or (name in NUMPY and id(node) not in safe):
                found.add(name)
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                found.add(node.attr)
    return found


def _imported(call: ast.Call, names: dict[str, str]) -> set[str]:
    """A banned module that a call of import_module names."""
    if _full(call.func, names) != "importlib.import_module" or not call.args:
        return set()
    name = call.args[0].value if isinstance(call.args[0], ast.Constant) else ""
    return {name} if str(name).partition(".")[0] in MODULES else set()


def _full(node: ast.AST, names: dict[str, str]) -> str:
    """The full name of a name or of attributes of one; "" of anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := _full(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""
