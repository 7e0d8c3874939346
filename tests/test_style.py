"""The rules of the code, read from syntax trees: width, length, parameters, density, one thing a line, imports."""

import ast

import pytest
from mutants import MUTANTS
from style import ROOT, SCRIPTS, code_lines, comments, figures, functions, length, nodes, parameters

FILES = [ROOT / name for name in SCRIPTS] + [
    path
    for folder in ("support", "enhance", "peers", "experiments")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
]
# Each imports only from those before it; experiments stand above all.
ORDER = [
    "support.progress",
    "support.script",
    "model",
    "support.fast",
    "support.packed",
    "support.config",
    "support.checkpoint",
    "support.texts",
    "support.tokenizer",
    "calibrate",
    "influence",
    "eval_ppl",
    "support.large",
    "support.ranks",
    "support.report",
    "support.export",
    "generate",
    "support.anchored",
    "air",
    "support.task",
    "support.learning",
    "support.even",
    "support.result",
    "enhance.refine",
    "enhance.retrain",
    "enhance.lora",
    "enhance.quantize",
    "support.peers",
    "peers.slicegpt",
    "peers.blockpruner",
    "peers.acip",
    "support.modeling_air",     # last: it is read by other tools, never here
]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def read(path):
    text = path.read_text("utf-8")
    return text, ast.parse(text)


@every_file
def test_lines_and_functions_are_short(path):
    text, tree = read(path)
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert wide == []
    long = [f"{f.name} {length(f)}" for f in functions(tree) if length(f) > (50 if f.name == "main" else 40)]
    assert long == []
    assert [f"{f.name} {parameters(f)}" for f in functions(tree) if parameters(f) > 6] == []
    limit = 10.5 if path.name == "fast.py" else 9
    assert nodes(tree) / len(code_lines(text, tree)) <= limit


def within(node, kind):
    return [each for each in ast.walk(node) if isinstance(each, kind)]


def swap(node):
    return ast.unparse(node.targets[0]) == ast.unparse(ast.Tuple(node.value.elts[::-1]))


def one_component(elements):
    """U[:, r], sigma[r], Vh[r]: the same place in several arrays, which is one thing."""
    indices = [names_in(each.slice) for each in elements.elts if isinstance(each, ast.Subscript)]
    return len(indices) == len(elements.elts) and bool(set.intersection(*indices))


@every_file
def test_one_thing_a_line(path):
    found = []
    for node in ast.walk(read(path)[1]):
        if isinstance(node, ast.Assign):
            pairs = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
            if pairs and not (swap(node) or one_component(node.targets[0]) or one_component(node.value)):
                found.append((node.lineno, "several things assigned at once"))
            if isinstance(node.value, ast.Lambda) and isinstance(node.targets[0], ast.Name):
                found.append((node.lineno, "a lambda with a name"))
        if isinstance(node, ast.IfExp):
            if within(node.body, ast.IfExp) or within(node.orelse, ast.IfExp):
                found.append((node.lineno, "a ternary in a ternary"))
            if node.end_lineno > node.lineno:
                found.append((node.lineno, "a ternary over several lines"))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) and within(
            node, ast.NamedExpr
        ):
            found.append((node.lineno, "a walrus in a comprehension"))
        if isinstance(node, ast.For) and isinstance(node.iter, ast.IfExp):
            found.append((node.lineno, "for … in (… if … else …)"))
    assert found == []


def own_nodes(function):
    """The nodes of a function, without those of functions and comprehensions inside, whose names are their own."""
    stack = list(ast.iter_child_nodes(function))
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(
            node, (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        ):
            stack += ast.iter_child_nodes(node)


def names_in(node):
    return {each.id for each in within(node, ast.Name)}


@every_file
def test_no_loop_variable_rebinds_a_parameter_or_a_local(path):
    """Two loops may share a variable; a variable that was anything else before the loop is lost in it."""
    found = []
    for function in functions(read(path)[1]):
        a = function.args       # "_" is nobody's
        taken = {each.arg: 0 for each in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
        for node in own_nodes(function):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.With, ast.NamedExpr)):
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                for name in set().union(*(names_in(target) for target in targets if target is not None)):
                    stored = [each for target in targets if target is not None for each in within(target, ast.Name)
                              if each.id == name and isinstance(each.ctx, ast.Store)]
                    if stored:
                        taken.setdefault(name, node.lineno)
        for loop in (node for node in own_nodes(function) if isinstance(node, ast.For)):
            found += [
                (function.name, name, loop.lineno)
                for name in (names_in(loop.target) & taken.keys()) - {"_"}
                if taken[name] < loop.lineno
            ]
    assert found == []


def test_the_shadowing_test_sees_what_it_is_for(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def plan(need):\n    for need, where in ():\n        pass\n    return need\n")
    with pytest.raises(AssertionError):
        test_no_loop_variable_rebinds_a_parameter_or_a_local(bad)


def imported(path):
    """Modules of the project that a file imports."""
    found = set()
    for node in within(read(path)[1], (ast.Import, ast.ImportFrom)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module == "support":
            found |= {f"support.{alias.name}" for alias in node.names}
        else:
            found.add(node.module)
    return found & set(ORDER)


def test_imports_point_one_way():
    for i, module in enumerate(ORDER):
        path = ROOT / (module.replace(".", "/") + ".py")
        assert imported(path) <= set(ORDER[:i]), module
    modules = {
        str(path.relative_to(ROOT))[:-3].replace("/", ".") for path in FILES if path.parent.name != "experiments"
    }
    assert modules == set(ORDER)
    for path in FILES[:len(ORDER)]:
        assert "experiments" not in {
            module.split(".")[0] for node in within(read(path)[1], ast.ImportFrom) for module in [node.module]
        }
    assert {path.name for path in ROOT.glob("*.py")} == set(SCRIPTS)


def test_the_six_scripts_are_mostly_method_and_narrated():
    found = figures([ROOT / name for name in SCRIPTS])
    assert found["method, %"] >= 50
    assert found["nodes a code line"] <= 8
    assert found["fit a slide, %"] >= 55
    assert sum(found["comments, own + trailing, %"]) >= 10


@pytest.mark.parametrize("folder,most", (("enhance", 200), ("peers", 220)))
def test_what_is_stacked_and_what_is_compared_are_read_at_one_sitting(folder, most):
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in (ROOT / folder).glob("*.py")}
    assert len(lines) >= 3 and max(lines.values()) <= most, lines


def test_als_sweep_fits_in_its_25_lines():
    text, tree = read(ROOT / "air.py")
    sweep = next(f for f in functions(tree) if f.name == "als_sweep")
    lines = code_lines(text, tree)
    assert sum(sweep.lineno <= i <= sweep.end_lineno for i in lines) <= 25
    own, trailing = comments(text)
    told = "\n".join(text.splitlines()[i - 1] for i in sorted(own | trailing) if sweep.lineno <= i <= sweep.end_lineno)
    assert all(
        tag in told
        for tag in ("line 3", "line 4", "line 5", "Eq. 15", "line 6", "Eq. 5", "line 7", "Eq. 6", "Eq. 27", "line 8")
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_planted_mistakes_fit_the_code(mutant):
    """tests/mutants.py replaces text that stands once; whether tests notice takes minutes, and is its own run."""
    _, file, right, wrong, tests = mutant
    assert (ROOT / file).read_text("utf-8").count(right) == 1 and wrong != right
    assert (ROOT / "tests" / f"{tests}.py").exists()


def test_paths_of_one_machine_stay_out():
    for path in FILES:
        assert "/home/" not in read(path)[0] and "/root/" not in read(path)[0]
