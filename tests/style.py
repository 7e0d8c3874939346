"""How the code reads, in figures: lines, width, density, comments, functions that fit a slide, and the share of method.

    python tests/style.py                   # a table a group of files; --json FILE writes it

Nodes are those of the syntax tree without load and store marks; a code line is neither blank, comment nor docstring.
A slide holds 25 lines of 90 columns. METHOD names what a reader of the paper needs: the equations, the sweeps, the
network, evaluation and cached attention. The rest of a file is arguments, messages, checks, imports.
"""
import ast
import io
import json
import statistics
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("air.py", "calibrate.py", "influence.py", "model.py", "eval_ppl.py", "generate.py")
METHOD = {
    "air.py": """rank_at profile normalise bend truncated_svd objective als_sweep native_factors Losses air svdllm svd
        fwsvd asvd kfac square_root kfac_air blended statistics
        Inputs Layer layers_of Method METHODS activation_loss solve compress_block""",
    "influence.py": """ScaleGradient epsilon_linear identity_norm identity_silu uniform uniform_mul uniform_attention
        attn_lrp Signal token_metric window_metric SIGNALS
        output_gradient start_gradient noting through_block add_influence add_metric
        block_backward
        backward_sweep""",
    "calibrate.py": "calibration_windows recording add add_inputs embed forward_sweep",
    "model.py": """Config LAYERS READS INPUTS rope rotate wide rms_norm attention PLAIN LowRank projection Block Llama
        to_logits""",
    "generate.py": """filtered Sampling Sampler value_shape Cache Step cached_attention low_rank_attention CachedBlock
        Decoder generate""",
    "eval_ppl.py": "evaluation_windows last_states js_divergence evaluate",
}


def nodes(tree):
    return sum(not isinstance(node, (ast.Load, ast.Store, ast.Del)) for node in ast.walk(tree))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


def parameters(function):
    """How many a caller sees: self, cls and ctx do not count, *args and **kwargs neither."""
    a = function.args
    names = [each.arg for each in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls", "ctx")])


def comments(text):
    """(numbers of the lines that are a comment, numbers of those that end in one)."""
    own, trailing = set(), set()
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            before = lines[token.start[0] - 1][:token.start[1]]
            (trailing if before.strip() else own).add(token.start[0])
    return own, trailing


def docstrings(tree):
    """Numbers of the lines of docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def code_lines(text, tree):
    own, doc = comments(text)[0], docstrings(tree)
    return [i for i, line in enumerate(text.splitlines(), 1) if line.strip() and i not in own and i not in doc]


def fits_a_slide(function, lines):
    return length(function) <= 25 and max(map(len, lines[function.lineno - 1:function.end_lineno])) <= 90


def method_lines(path, tree):
    wanted = METHOD.get(path.name, "").split() if path.parent == ROOT else ()
    total = 0
    for node in tree.body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if set(names) & set(wanted):
            total += length(node)
    return total


def figures(paths):
    """{figure: value} of a group of files."""
    total = dict.fromkeys(("lines", "code", "nonblank", "nodes", "own", "trailing", "doc", "method"), 0)
    widths, sizes, slides = [], [], 0
    for path in paths:
        text = path.read_text("utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        own, trailing = comments(text)
        total["lines"] += len(lines)
        total["code"] += len(code_lines(text, tree))
        total["nonblank"] += sum(bool(line.strip()) for line in lines)
        total["nodes"] += nodes(tree)
        total["own"] += len(own)
        total["trailing"] += len(trailing)
        total["doc"] += sum(bool(lines[i - 1].strip()) for i in docstrings(tree))
        total["method"] += method_lines(path, tree)
        widths += [len(line) for line in lines if line.strip()]
        sizes += [length(each) for each in functions(tree)]
        slides += sum(fits_a_slide(each, lines) for each in functions(tree))
    share = lambda part, whole: round(100 * part / whole, 1)        # noqa: E731
    return {
        "files": len(paths), "lines": total["lines"], "mean width": round(statistics.mean(widths), 1),
        "p90 width": sorted(widths)[int(0.9 * len(widths))],
        "over 100 columns, %": share(sum(width > 100 for width in widths), len(widths)),
        "nodes a code line": round(total["nodes"] / total["code"], 1),
        "functions": len(sizes), "median function": statistics.median(sizes), "longest function": max(sizes),
        "fit a slide, %": share(slides, len(sizes)),
        "comments, own + trailing, %": [share(total[kind], total["nonblank"]) for kind in ("own", "trailing")],
        "docstrings, %": share(total["doc"], total["nonblank"]), "method, %": share(total["method"], total["lines"])}


def main():
    groups = {
        "six scripts": [ROOT / name for name in SCRIPTS],
        "support": sorted((ROOT / "support").glob("*.py")),
        "experiments": sorted((ROOT / "experiments").glob("*.py")),
        "tests": sorted((ROOT / "tests").glob("*.py")),
    }
    groups |= {name: [ROOT / name] for name in SCRIPTS}
    result = {name: figures(paths) for name, paths in groups.items()}
    for name, row in result.items():
        print(name + ": " + ", ".join(f"{key} {value}" for key, value in row.items()))
    if "--json" in sys.argv:
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
