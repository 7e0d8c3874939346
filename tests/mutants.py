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
    ("δ dropped", "air.py", "P = 1 + delta * I\n", "P = 1 + I\n", "test_air"),
    ("S transposed", "air.py", "Wp = W @ S.to(W.dtype)", "Wp = W @ S.T.to(W.dtype)", "test_air"),
    ("sweep order reversed", "air.py", 'if order == "backward" else range(k)',
     'if order != "backward" else range(k)', "test_air"),
    ("r's own component left out of E_r", "air.py", "E = Wp - Wk + old", "E = Wp - Wk", "test_air"),
    ("u for u² in Eq. 5's denominator", "air.py", "u.square() @ P", "u @ P", "test_air"),
    ("v² not squared in Eq. 6", "air.py", "P @ v.square()", "P @ v", "test_air"),
    ("W'_k not kept current", "air.py", "Wk += s * torch.outer(u, v) - old", "Wk += 0 * old", "test_air"),
    ("S⁻¹ forgotten", "air.py", "Vh = torch.linalg.solve_triangular(S, Vh, upper=False, left=False).to(U.dtype)",
     "Vh = Vh.to(U.dtype)", "test_air"),
    ("uniform rule not halved", "influence.py", "ScaleGradient.apply(product, 0.5)", "product", "test_influence"),
    ("RMSNorm's rsqrt not held constant", "influence.py", "+ eps).detach()", "+ eps)", "test_influence"),
    ("SiLU's own derivative", "influence.py", "torch.sigmoid(x).detach()", "torch.sigmoid(x)", "test_influence"),
    ("magnitude of the sum over windows", "influence.py", '"wxg": Signal("loss", PLAIN, lambda W, g: (W * g).abs())',
     '"wxg": Signal("loss", PLAIN, lambda W, g: W * g)', "test_influence"),
    ("K/V heads not grouped", "model.py",
     "k = k.repeat_interleave(groups, dim=1)\n        v = v.repeat_interleave(groups, dim=1)",
     "k = k.repeat(1, groups, 1, 1)\n        v = v.repeat(1, groups, 1, 1)", "test_model"),
    ("half-split RoPE interleaved", "model.py", "a, b = x.chunk(2, dim=-1)",
     "a, b = x[..., ::2], x[..., 1::2]", "test_model"),
    ("the block's own corrections forgotten", "support/fast.py", "step = M @ v_new[j] - change - own",
     "step = M @ v_new[j] - own", "test_fast"),
    ("huge directions left in the square", "support/fast.py", "R = R[:, energy > 8 * energy[0]][:, -k:]",
     "R = R[:, :0]", "test_fast"),
    ("finished work recognised by its presence", "support/checkpoint.py", 'self.files = found["files"]',
     "self.files = {f.name: {'sha256': None, 'note': None} for f in self.path.glob('*.safetensors')}", "test_large"),
    ("each process keeps its own sums", "support/large.py", "dist.all_reduce(stats[key])", "pass", "test_large"),
    ("old statistics for an edited rule", "support/large.py", '"code": code_digest(*SWEEPS)',
     '"code": ""', "test_large"),
    ("tied weights loaded as two", "support/checkpoint.py", "model.lm_head.weight = model.model.embed_tokens.weight",
     "pass", "test_generate"),
    ("values' bias added once a column", "generate.py", "y = y + bias.view(",
     "y = y + k.shape[2] * bias.view(", "test_generate"),
    ("padding seen", "generate.py", "begun = every >= self.start[:, None, None]",
     "begun = every >= 0", "test_generate"),
    ("a padded row's positions off by one", "generate.py", "(columns - self.start[:, None])",
     "(columns - self.start[:, None] + 1)", "test_generate"),
    ("U_k of the next kv head", "generate.py", "matmul(mixed.flatten(1, 2), U)",
     "matmul(mixed.flatten(1, 2), U.roll(1, 0))", "test_generate"),
    ("the token that crosses top_p dropped", "generate.py", "before = probs.cumsum(-1) - probs",
     "before = probs.cumsum(-1)", "test_generate"),
    ("penalty rewards likely tokens", "generate.py", "logits / penalty, logits",
     "logits * penalty, logits", "test_generate"),
    ("all rows draw the same numbers", "generate.py", "manual_seed(sampling.seed + b)",
     "manual_seed(sampling.seed)", "test_generate"),
    ("EOS counted", "generate.py", "if not left[b] or token in eos:", "if not left[b]:", "test_generate"),
    ("the ridge a share of the mean diagonal", "air.py", "S.diagonal().add_(shift * own)",
     "S.diagonal().add_(shift * own.mean())", "test_air"),
    ("tokens of the last batch only", "calibrate.py", 'add(stats, f"{name}.tokens", torch.tensor',
     'stats.update({f"{name}.tokens": 0}); add(stats, f"{name}.tokens", torch.tensor', "test_calibrate"),
    ("q normalised by k's weight", "model.py", "q = ops.norm(q, att.q_norm.weight",
     "q = ops.norm(q, att.k_norm.weight", "test_model"),
    ("q and k cached without their norms", "generate.py", "if self.q_norm is not None:", "if False:", "test_generate"),
    ("RoPE given twice, the first taken", "support/config.py", "if value != found[first]:", "if False:", "test_config"),
    ("a head dropped in silence", "support/checkpoint.py", "self.check_tied()", "pass", "test_config"),
    ("a space before every stretch", "support/tokenizer.py", "first = self.legacy or begin == 0", "first = True",
     "test_tokenizer"),
    ("end of text by config.json alone", "support/tokenizer.py",
     'for name in ("config.json", "generation_config.json"):', 'for name in ("config.json",):', "test_tokenizer"),
    ("a byte order mark kept", "support/texts.py", 'content.decode("utf-8-sig")', 'content.decode("utf-8")',
     "test_texts"),
    ("a result by the source's name", "support/config.py", '"model_type": RESULT + kind', '"model_type": kind',
     "test_export"),
    ("files for their owner only", "support/script.py", "os.chmod(path, 0o666 & ~umask)", "pass", "test_disk"),
    ("two runs into one folder", "support/script.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
     "test_disk"),
    ("L not transposed", "air.py", "Wp = (L.T @ W.to(L.dtype)", "Wp = (L @ W.to(L.dtype)", "test_air"),
    ("L⁻ᵀ forgotten", "air.py", "U = torch.linalg.solve_triangular(L.T, U.to(L.dtype), upper=True).to(W.dtype)", "pass",
     "test_air"),
    ("the gradient overwritten before B", "influence.py", "        add_influence(stats, block, found[0], signal)\n",
     "        g[d:d + 1] = g_in\n        add_influence(stats, block, found[0], signal)\n", "test_influence"),
    ("GFWSVD's factors exchanged", "influence.py", '{"A": G.T @ G, "B": G @ G.T}', '{"A": G @ G.T, "B": G.T @ G}',
     "test_influence"),
    ("a slope's sign", "support/ranks.py", '(".weight")] = -slope', '(".weight")] = slope', "test_ranks"),
    ("the dense weight changed in place", "support/ranks.py",
     "D = W - small.tensor(weight, device, torch.float32)", "D = W.sub_(small.tensor(weight, device, torch.float32))",
     "test_ranks"),
    ("energy not by its cost", "support/ranks.py", "scales[layer] / whole.cost", "scales[layer]", "test_ranks"),
    ("a worse step taken", "support/ranks.py", "        if new < ppl:\n", "        if True:\n", "test_ranks"),
    ("rotated pairs left side by side", "experiments/smollm2.py", "            w = halves_together(w, heads[layer])\n",
     "            pass\n", "test_smollm2"),
    ("a ridge too slow to fall", "air.py", "0.1 * (n / tokens)**1.5", "0.1 * (n / tokens)", "test_air"),
    ("the dense stream's own inputs", "air.py", "(W.to(C.dtype) @ C).T", "(W.to(C.dtype) @ C.T).T", "test_air"),
    ("another block's gradients", "support/anchored.py", "collected.pop(l, {})", "collected.get(0, {})", "test_air"),
    ("the shares of both streams exchanged", "support/anchored.py", "torch.lerp(x_hat, x, self.share)",
     "torch.lerp(x, x_hat, self.share)", "test_air"),
    ("refined to what the dense block makes of the compressed stream", "enhance/refine.py",
     "        advance(dense.block(", "        y.copy_(x)\n        advance(dense.block(", "test_enhance"),
    ("held-out windows that were learnt from", "support/task.py", "held[apart][:n]", "held[:n]", "test_enhance"),
    ("a block quantized behind the unquantized", "enhance/quantize.py", "        advance(block, h, angles)",
     "        advance(task.ckpt.block(l, task.device, task.dtype), h, angles)", "test_enhance"),
    ("a fingerprint of the tensors' beginnings", "support/checkpoint.py", ".flatten().view(torch.uint8)",
     ".flatten()[:2048].view(torch.uint8)", "test_large"),
    ("statistics before what is decomposed", "air.py", "            stats.replace(", "            (lambda *_: None)(",
     "test_air"),
    ("anchored by the compressed stream", "support/anchored.py", "x = self.inputs(self.block, self.dense[i:i + batch]",
     "x = self.inputs(self.compressed, self.dense[i:i + batch]", "test_air"),
    ("the last epoch kept, not the best", "enhance/refine.py", 'if error < found["after"]:', "if True:",
     "test_enhance"),
    ("a micro-batch counts as a batch", "enhance/refine.py", "(block, x, y) * (len(x) / len(pairs.x))", "(block, x, y)",
     "test_enhance"),
    ("prompts learnt", "enhance/lora.py", "ids = hide(whole[:len(prompt)])", "ids = list(whole[:len(prompt)])",
     "test_enhance"),
    ("α not over r", "enhance/lora.py", "self.scale = alpha / rank", "self.scale = alpha", "test_enhance"),
    ("the teacher's logits, not their logarithms", "enhance/retrain.py", "    wanted = wanted.log_softmax(-1)\n",
     "    pass\n", "test_enhance"),
    ("GPTQ's error not over T_jj", "enhance/quantize.py", "/ T[j, j]", "/ 1", "test_enhance"),
    ("the lower factor of H⁻¹", "enhance/quantize.py", "torch.linalg.cholesky(H)), upper=True)",
     "torch.linalg.cholesky(H)))", "test_enhance"),
    ("codes highest bit first", "support/packed.py", 'np.packbits(flat, axis=1, bitorder="little")',
     'np.packbits(flat, axis=1, bitorder="big")', "test_enhance"),
    ("0 off the grid", "support/packed.py", "high = w.amax(1, keepdim=True).clamp_min(0)",
     "high = w.amax(1, keepdim=True)", "test_enhance"),
    ("a stream turned the wrong way", "peers/slicegpt.py", "after.mT @ P}", "P.mT @ after}", "test_peers"),
    ("a mean over fewer directions", "peers/slicegpt.py", "weight.double() * (d / s) ** 0.5", "weight.double()",
     "test_peers"),
    ("the weakest directions", "peers/slicegpt.py", "vectors.flip(1)[:, :s]", "vectors[:, :s]", "test_peers"),
    ("ranks measured again after a kill", "air.py", "and bool(left) and not self.measured", "and bool(left)",
     "test_ranks"),
    ("both sets of statistics planned as one", "air.py", 'same=signal == "kfac"', "same=True", "test_ranks"),
    ("a half put back", "peers/blockpruner.py", "if each not in self.removed:", "if True:", "test_peers"),
    ("the most missed half goes", "peers/blockpruner.py", "min(losses, key=losses.get)", "max(losses, key=losses.get)",
     "test_peers"),
    ("masks pass nothing back", "peers/acip.py", "return relaxed + ((p > 0).float() - relaxed).detach()",
     "return (p > 0).float()", "test_peers"),
    ("the earliest cut is worth most", "peers/acip.py", "self.cut_at / (self.step + 1) - 1)",
     "-self.cut_at / (self.step + 1))", "test_peers"),
    ("an adapter at full scale", "peers/acip.py", "layer.scale * layer.B", "layer.B", "test_peers"),
    ("a choice sees the one before it", "experiments/choices.py", "seen[b, at, :C] = True",
     "seen[b, at, :start] = True", "test_reasoning"),
    ("choices one after another", "experiments/choices.py", "positions[b, at] = C + torch.arange(n)",
     "positions[b, at] = start + torch.arange(n)", "test_reasoning"),
    ("the white space stays before a choice", "experiments/choices.py", "kept = context.rstrip()", "kept = context",
     "test_reasoning"),
    ("characters with the blank", "experiments/tasks.py", "list(map(len, choices)) if normed",
     "[len(choice) + 1 for choice in choices] if normed", "test_reasoning"),
    ("compiled anew for every span", "generate.py", "            of_any_size(seen, 0)\n", "", "test_generate"),
    ("compiled anew for a longer cache", "generate.py", "of_any_size(cache.k, 2)", "of_any_size(cache.k, 3)",
     "test_generate"),
    ("a compiled sum over the wrong numbers", "support/fast.py", "wide(b)[..., None, :, :]).sum(-2)",
     "wide(b)[..., None, :1, :]).sum(-2)", "test_generate"),
    ("gate and up exchanged", "experiments/decode.py", '"mlp.gate_proj": "ffn_gate"', '"mlp.gate_proj": "ffn_up"',
     "test_generate"),
]


def main():
    unnoticed = 0
    for what, file, right, wrong, tests in MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "repository"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "out", "data", "__pycache__"))
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
