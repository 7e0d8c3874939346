"""Shared by the tests: random checkpoints of any shape on disk, and the authors' numbers where they are at hand."""
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "tests" / "golden"))

import air                                                  # noqa: E402
from make_golden import SMALL, weights                      # noqa: E402
from model import Llama                       # noqa: E402
from support.config import parse_config                       # noqa: E402
from support.progress import Progress                       # noqa: E402
from support.script import run                       # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count()))
GPU = torch.cuda.is_available()
if GPU:
    # What is tested runs on the CPU in fp32, as everywhere; only tests that ask for `gpu` see the GPU.
    torch.cuda.is_available = lambda: False
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
TINY = dict(SMALL, architectures=["LlamaForCausalLM"], model_type="llama")  # 2 blocks, dim 32, 4 heads on 2 kv heads


def write_checkpoint(folder, config=TINY, dtype=torch.float32, seed=0, **changes):
    """A random checkpoint in `folder` (config.json, model.safetensors); returns the folder."""
    config = config | changes
    if "architectures" in changes and "model_type" not in changes:
        config["model_type"] = changes["architectures"][0].removesuffix("ForCausalLM").lower()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in Llama(parse_config(config)).state_dict().items()}
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    state = {name: torch.from_numpy(w).to(dtype) for name, w in weights(shapes, seed).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_gpu_elsewhere():
    """Nor do the processes that tests start see it. Not while tests are collected: workers that run them side by side
    would inherit it, and skip every test of the GPU."""
    if GPU:
        torch.cuda.init()
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def gpu(monkeypatch):
    """The GPU, which is seen while the test runs; without one the test is skipped."""
    if not GPU:
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_listens(monkeypatch):
    """A test begins as a run does: no Progress of another one shows what it says."""
    monkeypatch.setattr(Progress, "running", None)


@pytest.fixture
def tiny(tmp_path):
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture
def windows():
    """6 windows of 24 token ids of the tiny model's vocabulary."""
    return torch.from_numpy(np.random.RandomState(1).randint(0, 64, size=(6, 24)).astype(np.int64))


@pytest.fixture(scope="session")
def official():
    folder = SHARED / "oracles" / "official_a"
    if not folder.exists():
        pytest.skip("the authors' numbers are not at ../shared/oracles/official_a")
    return folder, np.load(folder / "official.npz")


def script(name, *arguments, cwd=None, env=None):
    """Run a script of the repository as a user would; returns the finished process, output as text."""
    return subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, env={"OMP_NUM_THREADS": "2"} | os.environ | (env or {}))


def in_process(name, *arguments):
    """As `script`, without another interpreter: (returncode, stdout, stderr) of a module's main()."""
    module = importlib.import_module(name.replace("/", "."))
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(module.main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, Progress.running = argv, None
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def air_main(monkeypatch, *arguments):
    """air.main() in this process, where a fault can be planted; raises what it raises."""
    monkeypatch.setattr(sys, "argv", ["air.py", *map(str, arguments)])
    air.main()


def distance(a, b):
    """‖a − b‖ / ‖b‖ in Frobenius norm, for arrays or tensors."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)
