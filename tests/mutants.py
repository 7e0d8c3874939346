"""Plant the mistakes an implementer of the paper makes, one at a time, and see the tests fail.

    python tests/mutants.py            # a few minutes; exit code 1 if a mistake goes unnoticed

Works on a copy of the repository; tests that need ../shared do not run there, so what is caught is caught anywhere.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = [     # what, file, correct text, mistake, the tests that look
    ("δ dropped", "air.py", "1 + delta * I ", "1 + I ", "test_air"),
    ("S transposed", "air.py", "W @ S.to(W.dtype), 1 +", "W @ S.T.to(W.dtype), 1 +", "test_air"),
    ("sweep order reversed", "air.py", 'range(k) if order == "forward"', 'range(k) if order != "forward"', "test_air"),
    ("u for u² in Eq. 5's denominator", "air.py", "a.square() @ P", "a @ P", "test_air"),
    ("uniform rule not halved", "influence.py", "ScaleGradient.apply(product, 0.5)", "product", "test_influence"),
    ("RMSNorm's rsqrt not held constant", "influence.py", "+ eps).detach()", "+ eps)", "test_influence"),
    ("K/V heads not grouped", "model.py", "k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)",
     "k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)", "test_model"),
    ("SiLU's own derivative", "influence.py", "torch.sigmoid(x).detach()", "torch.sigmoid(x)", "test_influence"),
    ("magnitude of the sum over windows", "influence.py", '"wxg": lambda W, g: (W * g).abs()', '"wxg": lambda W, g: W * g', "test_influence"),
    ("v² not squared in Eq. 6", "air.py", "P @ v_new.square()", "P @ v_new", "test_air"),
    ("S⁻¹ forgotten", "air.py", "torch.linalg.solve_triangular(S, Vh.to(S.dtype), upper=False, left=False)", "Vh", "test_air"),
    ("the block's own corrections forgotten", "support/fast.py", "M @ v_new[j] - change -", "M @ v_new[j] -", "test_fast"),
    ("huge directions left in the square", "support/fast.py", "R = R[:, energy > 8 * energy[0]][:, :k]", "R = R[:, :0]", "test_fast"),
    ("finished work recognised by its presence", "support/checkpoint.py", "self.files = found[\"files\"]",
     "self.files = {f.name: {'sha256': None, 'note': None} for f in self.path.glob('*.safetensors')}", "test_large"),
    ("each process keeps its own sums", "support/large.py", "dist.all_reduce(stats[key])", "pass", "test_large"),
    ("values' bias added once a column", "generate.py", "y + part.qkv.bias[2].view", "y + span * part.qkv.bias[2].view",
     "test_generate"),
    ("padding seen", "generate.py", "seen & (every >= self.start[:, None, None])", "seen", "test_generate"),
    ("a padded row's positions off by one", "generate.py", "(columns - self.start[:, None])",
     "(columns - self.start[:, None] + 1)", "test_generate"),
    ("U_k of the next kv head", "generate.py", "torch.bmm(mixed, part.U)", "torch.bmm(mixed, part.U.roll(1, 0))",
     "test_generate"),
    ("the token that crosses top_p dropped", "generate.py", "probs.cumsum(-1) - probs < top_p", "probs.cumsum(-1) < top_p",
     "test_generate"),
    ("penalty rewards likely tokens", "generate.py", "logits / self.penalty, logits", "logits * self.penalty, logits",
     "test_generate"),
    ("all rows draw the same numbers", "generate.py", "manual_seed(seed + b)", "manual_seed(seed)", "test_generate"),
    ("EOS counted", "generate.py", "if left[b] and token not in eos else", "if left[b] else", "test_generate"),
    ("half-split RoPE interleaved", "model.py", "a, b = x.chunk(2, dim=-1)", "a, b = x[..., ::2], x[..., 1::2]", "test_model"),
]


def main():
    unnoticed = 0
    for what, file, right, wrong, tests in MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "repository"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "data", "__pycache__"))
            source = (copy / file).read_text("utf-8")
            assert source.count(right) == 1, f"'{right}' stands {source.count(right)} times in {file}; mend the mutant"
            (copy / file).write_text(source.replace(right, wrong), "utf-8")
            done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{tests}.py"],
                                  cwd=copy, capture_output=True, text=True)
            caught = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), None)
            unnoticed += done.returncode != 1 or not caught
            print(f"{what:<36} {caught or 'NOT NOTICED'}", flush=True)
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
