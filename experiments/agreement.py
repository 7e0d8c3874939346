"""How closely this repository agrees with the authors' released code and with the transformers package.

    python experiments/agreement.py ../shared/oracles/official_a

The folder holds a small checkpoint and official.npz, the numbers of the authors' code for it; the golden logits of the
transformers package are in tests/golden. Writes experiments/results/agreement.json: the largest distance over all layers,
relative in Frobenius norm, of logits absolute.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import distance, write_checkpoint                                   # noqa: E402
from model import LAYERS, READS                                       # noqa: E402
from support.checkpoint import Checkpoint                                       # noqa: E402


def main():
    folder, worst = Path(sys.argv[1]), {}
    numbers = np.load(folder / "official.npz")

    def note(what, value):
        worst[what] = max(worst.get(what, 0.0), float(value))
    with tempfile.TemporaryDirectory() as tmp:
        np.save(f"{tmp}/w.npy", numbers["windows"])
        for out, options in (("air_unit", ()), ("air_max100", ("--scale", "max100")), ("svd_llm_w", ("--method", "svdllm")),
                             ("wxg", ("--signal", "wxg")), ("fisher", ("--signal", "fisher"))):
            subprocess.run([sys.executable, ROOT / "air.py", "--ckpt", folder, "--calib", f"{tmp}/w.npy", "--text", "none", *options,
                            "--stats", f"{tmp}/stats", "--out", f"{tmp}/{out}", "--quiet", "--device", "cpu"], check=True,
                           stdout=subprocess.DEVNULL)
        for l in range(Checkpoint(folder).cfg.n_layers):
            stats = {k: x for kind in ("gram", "lrp", "wxg", "fisher")
                     for k, x in load_file(f"{tmp}/stats/block_{l:03}.{kind}.safetensors").items()}
            for name in LAYERS:
                layer = f"model.layers.{l}.{name}"
                note("gram", distance(stats[f"{READS[name]}.gram"], numbers[f"gram/{layer}"]))
                for ours, theirs in (("lrp", "lrp"), ("wxg", "weightxgrad"), ("fisher", "fisher")):
                    note(ours, distance(stats[f"{name}.{ours}"], numbers[f"{theirs}/{layer}"]))
                for out in ("svd_llm_w", "air_unit", "air_max100"):
                    w = load_file(f"{tmp}/{out}/model.safetensors")
                    note(out, distance(w[layer + ".U.weight"] @ w[layer + ".V.weight"], numbers[f"{out}/{layer}"]))
        logits = Checkpoint(folder).model()(torch.from_numpy(numbers["windows"][:1]).long())[0]
        note("logits", np.abs(logits.numpy() - numbers["logits_window0"]).max())
        for path in sorted((ROOT / "tests" / "golden").glob("*.npz")):
            golden = np.load(path)
            ckpt = Checkpoint(write_checkpoint(Path(tmp) / path.stem, json.loads(str(golden["config"]))))
            logits = ckpt.model()(torch.from_numpy(golden["ids"].astype(np.int64)))
            note(f"golden {path.stem}", np.abs(logits.numpy() - golden["logits"]).max())
    (ROOT / "experiments" / "results" / "agreement.json").write_text(json.dumps(worst, indent=1) + "\n")
    print("\n".join(f"{what:<36} {value:.1e}" for what, value in worst.items()))


if __name__ == "__main__":
    main()
