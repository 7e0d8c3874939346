"""What a script needs: errors in one sentence, arguments, device, disk, JSON, exit."""
import argparse
import ast
import hashlib
import json
import math
import mmap
import os
import re
import resource
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from support.progress import Progress

try:
    import fcntl
except ImportError:             # not a Unix: folders are then not held against other runs
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]
# What stands below this line of a script arranges and prints; it computes nothing that is
# kept.
COMMAND = "--- the command\n"


# What torch.distributed raises of its own, where this PyTorch has it.
DISTRIBUTED = getattr(torch.distributed, "DistError", ())


class InputError(Exception):
    """Bad input in one sentence: what was found, what was expected, what to do.

    Exit code 2.
    """


class TooLarge(InputError):
    """What would not fit in the memory that is free."""


# ------------------------------------------------------------ arguments, device
class Parser(argparse.ArgumentParser):
    """argparse's, with a script's docstring as it is.

    Raises InputError, in place of the usage of all options, for arguments that it does not
    understand, and for an option that is empty, as an unset variable of the shell leaves
    it, and would be taken for one that is not there.
    """

    def __init__(self, doc):
        super().__init__(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None):
        found = super().parse_args(args)
        for action in self._actions:
            if getattr(found, action.dest, None) == "" != action.default:
                name = "/".join(action.option_strings) or action.dest
                raise InputError(f"{name} is empty; expected a value, or leave it out")
        return found

    def error(self, message):
        raise InputError(f"{message}; --help says what is expected")


def parser(doc):
    """The Parser that every script adds to; `doc` is the script's docstring."""
    p = Parser(doc)
    p.add_argument("--ckpt", default=str(ROOT / "demo"),
                   help="a .safetensors file with config.json beside it, "
                        "or a folder (default: demo)")
    p.add_argument("--device", choices=("cpu", "cuda"),
                   help="default: cuda where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                   help="default: bfloat16 on a GPU, float32 on a CPU")
    return p


def pick_device(device, dtype):
    """Names or None -> (torch.device, torch.dtype, why).

    None is a GPU and bf16 if there is one, else the CPU and fp32. Raises InputError when
    CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("--device cuda was asked for, but this PyTorch sees no CUDA "
                         "GPU; use --device cpu")
    if device is None:
        device = "cuda" if available else "cpu"
    why = "asked for" if dtype else f"default on {device}"
    if dtype is None:
        dtype = "bfloat16" if device == "cuda" else "float32"
    return torch.device(device), getattr(torch, dtype), why


def pick_blocks(text, n):
    """--layers 'A:B' -> range(A, B) within 0:n.

    Raises InputError for anything else or an empty range.
    """
    match = re.fullmatch("([0-9]*):([0-9]*)", text)
    picked = range(int(match[1] or 0), int(match[2] or n)) if match else ()
    if not picked or picked[-1] >= n:
        raise InputError(f"--layers is '{text}'; expected A:B for blocks A to B-1, "
                         f"within 0:{n}")
    return picked


# ------------------------------------------------------------ memory and disk
def free_bytes(device):
    """Memory that can still be had on `device`, in bytes; None where that is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as f:
            available = next(line for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min(1024 * int(available.split()[1]), container_bytes())


def container_bytes(folder=Path("/sys/fs/cgroup")):
    """What a container's limit (cgroup v2) leaves, in bytes; ∞ without one. Pages of files
    can be had."""
    try:
        limit, used, statistics = ((folder / f"memory.{name}").read_text()
                                   for name in ("max", "current", "stat"))
        files = next(line for line in statistics.splitlines() if line.startswith("file "))
        return int(limit) - int(used) + int(files.split()[1])
    except (OSError, ValueError, StopIteration):        # "max": there is no limit
        return math.inf


def denied(path, what="read"):
    """The InputError for a path that permissions keep from being read or written."""
    return InputError(f"{path} cannot be {what}: permission denied; let this user do so "
                      "(chmod, chown), there and in the folders above, or name another")


def check_readable(path):
    """Raise InputError for a file that may not be read or a folder not to be entered.

    What is not there is left to those who look for it.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            os.stat(os.path.join(path, "."))
        elif stat.S_ISREG(mode):
            open(path, "rb").close()
    except PermissionError:
        raise denied(path) from None
    except OSError:
        pass


def may_write(path):
    """Whether this user may write a file, or into a folder."""
    wanted = os.W_OK | os.X_OK if os.path.isdir(path) else os.W_OK
    return os.access(path, wanted, effective_ids=os.access in os.supports_effective_ids)


def check_writable(path):
    """Raise InputError, before any work, for a file that could not be written later."""
    if path is None:
        return
    path = Path(path)
    try:
        # A file is written beside its place and moved there; a device is written to.
        device = path.exists() and not path.is_file() and not path.is_dir()
        where = path if device else path.resolve().parent
        if path.is_dir() or not where.exists():
            raise InputError(f"cannot write {path}; expected a file name in a folder "
                             "that exists")
    except PermissionError:
        raise denied(path, "written") from None
    if not may_write(where):
        raise denied(where, "written")
    if path.exists() and not may_write(path):
        raise denied(path, "written")


def check_results(path, mark="ppl"):
    """check_writable for a file of results, and InputError for one that is there and holds
    something else, an input maybe, which would be lost. mark: what a key of results begins
    with."""
    check_writable(path)
    if path is None:
        return
    path = Path(path)
    if not path.is_file() or not path.stat().st_size or stream_of(path):
        return
    try:
        found = read_json(path)
    except InputError:
        found = {}
    if not any(key.startswith(mark) for key in found):
        raise InputError(f"{path} is there and holds no results, which would replace it; name "
                         "another file")


class Hold:
    """A folder held against other runs until it is let go; a killed run lets go, too.

    Raises InputError where another run holds it; OSError where it cannot be made.
    """

    def __init__(self, path):
        self.held = None                # a file descriptor; None: this system has no locks
        while fcntl and self.held is None:
            Path(path).mkdir(parents=True, exist_ok=True)
            self.held = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise InputError(f"another run is at work in {path}; wait for its end, or "
                                 "name another folder") from None
            except OSError:             # such as a network disk: nothing is held
                return self.release()
            # The run that held it may have just moved it away.
            if not same_folder(self.held, path):
                self.release()

    def release(self):
        if self.held is not None:
            os.close(self.held)
            self.held = None

    __del__ = release


def same_folder(descriptor, path):
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def check_seed(seed):
    """Raise InputError for a number that is too large for PyTorch's generators, or below 0:
    Python's take that for its opposite."""
    if not 0 <= seed < 2**62:
        raise InputError(f"--seed is {seed}; expected 0 or more, fewer than 19 digits")


def check_apart(out, **others):
    """Raise InputError for a path inside the output folder, which is replaced whole."""
    out = Path(out).resolve()
    for name, path in others.items():
        if path and out in (Path(path).resolve(), *Path(path).resolve().parents):
            raise InputError(f"--{name} {path} lies inside --out {out}, which is "
                             f"replaced as a whole; give another --{name}")


def check_spared(out, **read):
    """The same for what a run reads, where --out is a checkpoint; that may be the --ckpt."""
    if (Path(out) / "config.json").is_file():
        there = {name: path for name, path in read.items() if path and Path(path).exists()}
        check_apart(out, **{name: path for name, path in there.items()
                            if not Path(path).samefile(out)})


def peak_memory():
    """The process's highest resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def finished_bytes(folder, kinds=None):
    """Of the files that our manifests name, in a folder or in a process's folder (0of1) there;
    of `kinds`, words of their names between dots, all where None."""
    total = 0
    for manifest in (*folder.glob("manifest.json"), *folder.glob("*of*/manifest.json")):
        try:
            found = read_json(manifest)
        except InputError:                              # another program's
            continue
        if not found.keys() >= {"facts", "files"}:
            continue
        for name in found["files"]:
            path = manifest.parent / name
            if path.is_file() and (kinds is None or kinds & set(name.split("."))):
                total += path.stat().st_size
    return total


def check_space(*needs):
    """Raise InputError when a disk lacks space for its `needs`, (folder, bytes) each, with a
    third where not all that lies there is of use: the `kinds` that are.

    What an earlier run has finished in a folder is not asked for again.
    """
    disks = {}                              # {device number: bytes needed on it}
    for place, need, *kinds in needs:
        folder = Path(place)
        there = finished_bytes(folder, *kinds)
        # The folder may not exist yet: its disk is that of the nearest parent that does.
        parents = (folder.resolve(), *folder.resolve().parents)
        nearest = next(path for path in parents if path.exists())
        # Needs on one disk add up.
        disk = nearest.stat().st_dev
        disks[disk] = disks.get(disk, 0) + max(0, need - there)
        free = shutil.disk_usage(nearest).free
        if free < disks[disk]:
            raise InputError(f"{nearest} has {free / 1e9:.3f} GB free, "
                             f"{disks[disk] / 1e9:.3f} GB are needed; "
                             "make space or use another disk")


# ------------------------------------------------------------ files
def read_json(path):
    """The JSON object in a file; InputError for anything else."""
    check_readable(path)
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, OSError, RecursionError) as e:
        raise InputError(f"{path} is not readable as a JSON object ({e}); "
                         "copy it again from where it came") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object (found {str(found)[:40]!r}); "
                         "copy it again from where it came")
    return found


def finite(value):
    """A JSON value in which numbers that are not finite became null: JSON has none."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def usual_mode(path):
    """Give a file the mode that umask leaves; safetensors makes them the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):             # a disk without modes
        os.chmod(path, 0o666 & ~umask)


def write_whole(path, content):
    """Write a file, of text or bytes, so that it is there whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        # On disk before its name is: a power cut leaves the old file or the new one.
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def stream_of(path):
    """Which of stdout and stderr writes to the file `path`; None: neither."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        except (OSError, ValueError, AttributeError):       # one has no file, or is closed
            pass
    return None


def write_result(path, content):
    """Write to where a user says, /dev/stdout and its like too, which are not replaced, nor
    is the file that the shell has put in their place."""
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    stream = stream_of(path)
    if stream:
        stream.flush()
        stream.buffer.write(content)
        stream.buffer.flush()
    elif path.exists() and not path.is_file():
        with open(path, "wb") as f:
            f.write(content)
    else:
        # A link's file is written, and the link stays.
        write_whole(path.resolve(), content)


def write_json(path, values):
    """Write {key: value} to `path` as JSON; None: no file."""
    if path is not None:
        write_result(path, json.dumps(finite(values), indent=1) + "\n")


def sha256(path):
    """SHA-256 (hex) of a file, memory-mapped; the reason where that cannot be.

    An empty file and an unreadable one have none.
    """
    try:
        with (open(path, "rb") as f,
              mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content):
            return hashlib.sha256(content).hexdigest()
    except (OSError, ValueError) as e:
        return str(e)


def code_digest(*files):
    """SHA-256 (hex) of what the repository's `files` compute: their syntax trees.

    Comments, docstrings, layout and what stands below "the command" do not count: an
    edited rule gives another digest, an edited message does not.
    """
    digest = hashlib.sha256()
    for file in files:
        source, _, _ = (ROOT / file).read_text("utf-8").partition(COMMAND)
        tree = ast.parse(source)
        # Comments and layout are not in the tree; docstrings are, and go.
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if documented and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


# ------------------------------------------------------------ running
def failure(error):
    """(exit code, sentence) of an error that a user can do something about, or None."""
    text = str(error) or type(error).__name__
    if isinstance(error, InputError):
        return 2, text
    if isinstance(error, PermissionError) and error.filename:
        return 2, str(denied(error.filename, "read or written"))
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; nothing incomplete was left where results go"
    if isinstance(error, torch.OutOfMemoryError):
        return 1, (f"out of GPU memory ({text.split('.')[0]}); "
                   "try --dtype bfloat16, fewer tokens, --device cpu")
    if not isinstance(error, (OSError, SafetensorError, MemoryError, RuntimeError)):
        return None
    if isinstance(error, DISTRIBUTED) or re.search("gloo|nccl", text, re.I):
        return 1, "another process of this run ended; its reason is in its own message"
    foreseen = re.search("allocate memory|not finite", text)
    if isinstance(error, RuntimeError) and not foreseen:
        return None
    return 1, f"the run failed and left nothing incomplete: {text.splitlines()[0]}"


def run(main):
    """Call main(); a known error becomes one sentence on stderr and an exit code.

    2: bad input, 1: a failed run, 130: Ctrl-C. Any other error is a mistake here: a
    traceback.
    """
    # What the terminal's encoding lacks is escaped, not a failure, in --help, too.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except BaseException as error:
        known = failure(error)
        if known is None:
            raise
        code, message = known
    if Progress.running:
        Progress.running.erase()
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
