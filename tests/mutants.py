"""Breaks one module in many small ways, and says which of them its tests do not see: python tests/mutants.py _storage

Each mutant has one change: an operator, a constant, a condition, an argument. The tests run on a copy of the checkout, so
that nothing here changes. A mutant that no test kills is printed. mutants.toml has those that are accepted, with the reason, and
the tests of modules that have no file of their own, or more than one.
"""

import argparse
import ast
import collections
import itertools
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple


ROOT = pathlib.Path(__file__).parents[1]
ACCEPTED = pathlib.Path(__file__).with_suffix(".toml")

OPERATORS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr},
    **{ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.MatMult: ast.Mult},
}
# Annotations and messages are not behaviour, and no test should depend on their words.
WITHOUT_BEHAVIOUR = ("annotation", "returns", "type_params")


class Mutant(NamedTuple):
    line: int
    before: str
    after: str
    text: str  # of the whole module

    def __str__(self) -> str:
        return f"{self.line}: {self.before} -> {self.after}"


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    match node:
        case ast.operator() | ast.cmpop() | ast.boolop() if type(node) in OPERATORS:
            yield OPERATORS[type(node)]()
        case ast.UnaryOp(ast.Not() | ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value or 1.0)
        case ast.Constant(str(value)) if value and " " not in value:
            yield ast.Constant(value + "X")
        case ast.If() | ast.IfExp():
            for value in (True, False):
                yield type(node)(ast.Constant(value), node.body, node.orelse)
        case ast.comprehension(ifs=[_, *_]):
            yield ast.comprehension(node.target, node.iter, [], node.is_async)
        case ast.Raise() | ast.AugAssign() | ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.Slice(lower=ast.AST() as lower):
            yield ast.Slice(ast.BinOp(lower, ast.Add(), ast.Constant(1)), node.upper, node.step)
        case ast.Call(function, arguments, keywords):
            if len(arguments) > 1 and not any(isinstance(x, ast.Starred) for x in arguments[:2]):
                yield ast.Call(function, [arguments[1], arguments[0], *arguments[2:]], keywords)
            for i, keyword in enumerate(keywords):
                if keyword.arg:
                    yield ast.Call(function, arguments, keywords[:i] + keywords[i + 1 :])


def places(node: ast.AST, line: int = 0) -> Iterator[tuple[int, ast.AST, str, int | None, ast.AST]]:
    """Every node that may be replaced, with its line, its parent, and its field and index there."""
    line = getattr(node, "lineno", line)
    for field, value in ast.iter_fields(node):
        if field in WITHOUT_BEHAVIOUR or (field == "exc" and isinstance(node, ast.Raise)):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):  # a docstring
                continue
            if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__all__":
                continue
            yield getattr(child, "lineno", line), node, field, i if isinstance(value, list) else None, child
            yield from places(child, line)


def mutants(text: str) -> dict[str, list[Mutant]]:
    """All mutants of a module that can be compiled, by the kind of node that changes."""
    tree, found = ast.parse(text), collections.defaultdict(list)
    for line, parent, field, index, node in places(tree):
        for new in replacements(node):
            before, after = (in_place(parent, field, index, x) for x in (node, new))
            whole = ast.unparse(ast.fix_missing_locations(tree))
            in_place(parent, field, index, node)
            try:
                compile(whole, "mutant", "exec")
            except SyntaxError:
                continue
            found[type(node).__name__].append(Mutant(line, before, after, whole))
    return found


def in_place(parent: Any, field: str, index: int | None, node: ast.AST) -> str:
    """Puts a node where another one is, and returns the text around it."""
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node
    shown = (
        parent if isinstance(node, ast.operator | ast.cmpop | ast.boolop | ast.Constant | ast.comprehension) else node
    )
    text = ast.unparse(ast.fix_missing_locations(shown)).partition("\n")
    return text[0] + (" ..." if text[1] else "")


def sample(found: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """Some mutants. Each kind has its turn, so that no kind crowds out the others."""
    rng = random.Random(seed)
    kinds = [rng.sample(found[kind], len(found[kind])) for kind in sorted(found)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    return sorted(itertools.islice((mutant for mutant in turns if mutant), count))


def test_file(module: str) -> str:
    """Where the tests of a module are."""
    name = {"__main__": "demo"}.get(module, module.replace("/", "_").replace("__", "_").removeprefix("_"))
    return f"tests/test_{name}.py"


def passes(copy: pathlib.Path, tests: list[str], timeout: float | None = None) -> bool:
    """Whether all tests pass in a copy of the checkout. Those that do not end are as good as failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *tests]
    try:
        return subprocess.run(command, cwd=copy, timeout=timeout, capture_output=True, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    """Prints the mutants that survive, and how many there were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="such as _storage or interop/_keras")
    parser.add_argument("tests", nargs="*", help="files or names of pytest's; by default those of the module")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    file = pathlib.Path("rmsprop_jax") / f"{options.module}.py"
    chosen = sample(mutants((ROOT / file).read_text()), options.count, options.seed)
    known = tomllib.loads(ACCEPTED.read_text())
    reasons = {(x["before"], x["after"]): x["reason"] for x in known.get(options.module, [])}
    tests = options.tests or known["tests"].get(options.module, [test_file(options.module)])
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv", "results"))
        start = time.monotonic()
        if not passes(copy, tests):
            sys.exit(f"{' '.join(tests)} fails without a mutant")
        timeout = 60 + 5 * (time.monotonic() - start)
        survivors = []
        for mutant in chosen:
            (copy / file).write_text(mutant.text)
            survives = passes(copy, tests, timeout)
            reason = reasons.get((mutant.before, mutant.after), "no reason is known")
            print("survives, " + reason if survives else "killed", f"| {mutant}", flush=True)
            survivors += [mutant] if survives else []
    unexplained = [mutant for mutant in survivors if (mutant.before, mutant.after) not in reasons]
    print(f"{options.module}: {len(chosen) - len(survivors)} of {len(chosen)} killed by {' '.join(tests)}")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
