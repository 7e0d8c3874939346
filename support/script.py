"""What every script needs around its work: errors in one sentence, arguments, the device, disks, JSON, exit codes."""
import argparse
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError


class InputError(Exception):
    """Bad input, said in one sentence: what was found, what was expected, what to do. Scripts exit with 2."""


def read_json(path):
    try:
        return dict(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, OSError) as e:
        raise InputError(f"{path} is not readable as a JSON object ({e}); copy it again from where it came") from None


def sha256(path):
    """SHA-256 (hex) of a file, read through a memory map; of one that is empty or cannot be read, the reason."""
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()
    except (OSError, ValueError) as e:
        return str(e)


def pick_device(device, dtype):
    """Names -> (torch.device, torch.dtype, why): CUDA and bf16 where there is a GPU, else CPU and fp32.

    Raises InputError when CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but this PyTorch sees no CUDA GPU; use --device cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    why = "asked for" if dtype else f"default on {device}"
    return torch.device(device), getattr(torch, dtype or {"cuda": "bfloat16", "cpu": "float32"}[device]), why


def check_target(path):
    """Raise InputError, before any work, for a file that could not be written at its end."""
    path = Path(path).resolve() if path else None
    if path and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise InputError(f"cannot write {path}; expected a file name in a folder that exists and can be written")


def parser(doc):
    """An argument parser with what every script takes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=str(Path(__file__).resolve().parents[1] / "demo"),
                   help="a .safetensors file with config.json beside it, or a folder (default: the bundled demo)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    return p


def free_bytes(device):
    """Memory that can still be had on `device`, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def check_space(*needs):
    """Raise InputError when a disk has too little space for its `needs`, (folder, bytes) each, beside what lies there already."""
    disks = {}
    for folder, need in needs:
        there = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        at = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.exists())
        disk = at.stat().st_dev
        disks[disk] = disks.get(disk, 0) + max(0, need - there)
        if (free := shutil.disk_usage(at).free) < disks[disk]:
            raise InputError(f"{at} has {free / 1e9:.2f} GB free, {disks[disk] / 1e9:.2f} GB are needed; make space or use "
                             "another disk")


def write_json(path, values):
    """Write {key: value} to `path`; a number that is not finite becomes null. No path, no file."""
    if path:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        Path(path).write_text(json.dumps(finite, indent=1) + "\n")


def run(main):
    """Call main(); a known error becomes one sentence on stderr and an exit code: 2 bad input, 1 failed run, 130 Ctrl-C."""
    try:
        return main()
    except InputError as e:
        code, message = 2, e
    except KeyboardInterrupt:
        code, message = 130, "interrupted; nothing incomplete was left where results go"
    except torch.OutOfMemoryError as e:
        code, message = 1, f"out of GPU memory ({str(e).split('.')[0]}); try --dtype bfloat16, fewer tokens, --device cpu"
    except (OSError, SafetensorError, MemoryError, RuntimeError) as e:
        code, message = 1, f"the run failed and left nothing incomplete: {(str(e) or type(e).__name__).splitlines()[0]}"
        if re.search("gloo|nccl", str(e), re.I):
            message = "another process of this run ended; its reason is in its own message"
        elif isinstance(e, RuntimeError) and not re.search("allocate memory|not finite", str(e)):
            raise
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
