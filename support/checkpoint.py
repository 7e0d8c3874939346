"""Checkpoints on disk: tensors memory-mapped and held against config.json, results
written."""
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import Block, Llama
from support.config import parse_config, quantized_of
from support.packed import PARTS, packed_bytes, unpacked
from support.script import (Hold, InputError, check_readable, check_space, denied,
                            may_write, read_json, sha256, usual_mode, write_whole)

# ------------------------------------------------------------ in
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What is copied along with a result.
BESIDE = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json",
          "merges.txt", "added_tokens.json", "special_tokens_map.json",
          "chat_template.jinja", "generation_config.json")


class Stored(NamedTuple):
    """A tensor in a file; in a result not yet written, in memory."""

    shape: tuple
    dtype: torch.dtype          # or the name of one that is not supported
    read: Callable              # () -> the tensor


def open_safetensors(path):
    f = safe_open(path, framework="pt")
    found = {}
    for name in f.keys():
        entry = f.get_slice(name)
        dtype = DTYPES.get(entry.get_dtype(), entry.get_dtype())
        shape = tuple(entry.get_shape())
        found[name] = Stored(shape, dtype, lambda name=name: f.get_tensor(name))
    return found


def packed(name, parts, shape, bits, group):
    """The Stored of a weight (rows, columns) whose `parts` are Stored as support/packed.py
    says. Raises InputError for parts of other shapes."""
    rows, columns = shape
    groups = -(-columns // group) if group else 1
    wanted = (rows, -(-columns * bits // 8)), (rows, groups), (rows, groups)
    found = tuple(each.shape for each in parts)
    if found != wanted:
        raise InputError(f"{name} is packed in shapes {found}; config.json implies {wanted} "
                         f"at {bits} bits: use matching files")
    return Stored(shape, parts[1].dtype,
                  lambda: unpacked([each.read() for each in parts], bits, group, columns))


def in_memory(tensors):
    """{name: tensor} -> {name: Stored}."""
    return {name: Stored(tuple(w.shape), w.dtype, lambda w=w: w)
            for name, w in tensors.items()}


def weights_in(saved, path="", depth=6):
    """{where: {name: tensor}} of a .bin file's dicts that hold weights.

    An optimizer's state, deeper down, has no names that end in .weight.
    """
    if not isinstance(saved, dict) or not depth:
        return {}
    tensors = {str(name): w.detach() for name, w in saved.items()
               if isinstance(w, torch.Tensor)}
    if any(name.endswith(".weight") for name in tensors):
        return {path: tensors}
    found = {}
    for key, value in saved.items():
        found |= weights_in(value, f"{path}/{key}".strip("/"), depth - 1)
    return found


def open_bin(path):
    """{name: Stored} of a file that torch.save wrote, its weights bare or within dicts.

    Raises InputError where it holds none or several.
    """
    # The format before 2020 cannot be memory-mapped: it is no zip file.
    zipped = zipfile.is_zipfile(path)
    saved = torch.load(path, weights_only=True, map_location="cpu", mmap=zipped)
    found = weights_in(saved)
    usual = [where for where in found
             if where.split("/")[0] in ("model", "state_dict", "model_state_dict", "module")]
    if len(found) > 1 and len(usual) == 1:      # beside others, such as their average
        found = {usual[0]: found[usual[0]]}
    if len(found) != 1:
        keys = list(found or saved) if isinstance(saved, dict) else [type(saved).__name__]
        raise InputError(f"{path} holds {len(found)} sets of weights (found "
                         f"{', '.join(map(str, keys[:3]))}); expected one, of tensors under "
                         "the names of a Hugging Face checkpoint")
    return in_memory(*found.values())


def open_tensors(path):
    """{name: Stored} of a .safetensors or .bin file, memory-mapped. Raises InputError."""
    check_readable(path)
    try:
        if path.suffix == ".safetensors":
            return open_safetensors(path)
        return open_bin(path)
    except InputError:
        raise
    except Exception as e:
        # Truncated, corrupt, code in a pickle: each library has its own errors.
        reason = str(e).strip().split("\n")[0][:200]
        if reason.startswith("Weights only load failed"):
            kind = re.search(r"GLOBAL (\S+)|class \S*?([\w.]+)", str(e))
            named = f", such as {kind[1] or kind[2]}" if kind else ""
            raise InputError(f"{path} holds Python objects besides tensors{named}, which "
                             "could run code and are not loaded; save its state dict "
                             "alone, best as .safetensors") from None
        raise InputError(f"{path} cannot be read as a checkpoint ({reason}); expected a "
                         f"whole {path.suffix} file: check its size "
                         "or copy it again") from None


# What training puts around a model, whose parts of a tensor's name say nothing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
EMBEDDING = "embed_tokens.weight"
EMBEDDED = "model." + EMBEDDING


def plain_names(tensors):
    """{name: Stored} under the names of model.py, whatever a training put before them.

    What stands before "embed_tokens" stands before all names; of a base model nothing.
    Two that would be one are left as they are.
    """
    bare = [".".join(part for part in name.split(".") if part not in WRAPPERS)
            for name in tensors]
    inner = next((name for name in bare if name.endswith(EMBEDDING)), EMBEDDED)
    inner = inner.removesuffix(EMBEDDING)                   # such as "model.model."
    outer = inner.removesuffix("model.")                    # such as "model."
    plain = {}
    for name, stored in zip(bare, tensors.values()):
        if name == outer + "lm_head.weight":
            plain["lm_head.weight"] = stored
        elif name.startswith(inner):
            plain["model." + name.removeprefix(inner)] = stored
        else:
            plain[name] = stored
    return plain if len(plain) == len(tensors) else tensors


def shards(folder):
    """The files that hold a folder's weights, and {name: file} where an index says in which
    one a tensor is. Raises InputError where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        check_readable(folder / name)
        if (folder / name).is_file():
            return [folder / name], {}
        index = folder / (name + ".index.json")
        check_readable(index)
        if index.is_file():
            where = read_json(index).get("weight_map")
            plain = isinstance(where, dict) and all(
                isinstance(file, str) and Path(file).name == file
                for file in where.values())
            if not where or not plain:
                raise InputError(f"{index} has no weight_map that names its shards; "
                                 "copy it again from where it came")
            names = sorted(set(where.values()))
            missing = [file for file in names if not (folder / file).is_file()]
            if missing:
                raise InputError(f"{index.name} names {missing[0]}, which is not in "
                                 f"{folder}; fetch the missing shard")
            return [folder / file for file in names], where
    raise InputError(f"{folder} has no weights; expected model.safetensors or "
                     "pytorch_model.bin, or shards and an index")


SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def name_of(path):
    """What a checkpoint is called: its file, its folder, or its repository on a hub."""
    if path.is_file() and path.stem not in ("model", "pytorch_model"):
        return path.stem
    folder = (path if path.is_dir() else path.parent).resolve()
    # …/models--ORGANISATION--NAME/snapshots/<40 hex digits>
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name or "model"


class Checkpoint:
    """A dense or compressed checkpoint on disk, memory-mapped and read tensor by tensor.

    `path` is a .safetensors (or .bin) file with config.json beside it, or a folder with
    one or many shards. Only headers are read here; names and shapes are held against
    config.json. Raises InputError for whatever does not fit.
    """

    def __init__(self, path):
        path = Path(path)
        check_readable(path)
        if not path.exists():
            raise InputError(f"{path} does not exist; "
                             "expected a .safetensors file or a folder with one")
        if path.is_file() and path.suffix not in SUFFIXES:
            raise InputError(f"{path} is not a .safetensors or .bin file (or .pt, .pth); "
                             "give one of these, or the folder they are in")
        self.folder = path if path.is_dir() else path.parent
        self.path = path.resolve()
        self.name = name_of(path)
        self.printed = None                             # (tensors, their `fingerprint`)
        check_readable(self.folder / "config.json")
        if not (self.folder / "config.json").is_file():
            raise InputError(f"{self.folder} has no config.json; "
                             "expected the one that came with the weights beside them")
        self.files, index = ([path], {}) if path.is_file() else shards(self.folder)
        self.raw = read_json(self.folder / "config.json")
        self.cfg = parse_config(self.raw)
        self.tensors = {}                               # {name: Stored}
        for file in self.files:
            # Of a tensor that is in two shards the index says which counts.
            self.tensors |= {name: stored for name, stored in open_tensors(file).items()
                             if index.get(name, file.name) == file.name}
        self.tensors = plain_names(self.tensors)
        self.names = list(self.check())
        # Of most numbers in the blocks; factors are stored in it.
        sizes = Counter()
        for name in self.names:
            stored = self.tensors[name]
            sizes[stored.dtype] += math.prod(stored.shape) if ".layers." in name else 0
        self.dtype = max(sizes, key=sizes.get)

    def check(self):
        """Hold the files' tensors against config.json: {name: shape}, as it implies.

        Raises InputError where they differ.
        """
        # Before a model of a mistyped number of blocks is built.
        last = f"model.layers.{self.cfg.n_layers - 1}.input_layernorm.weight"
        self.check_names("lacks", {last} - self.tensors.keys())
        try:
            with torch.device("meta"):
                state = Llama(self.cfg).state_dict()
        except RuntimeError as e:
            raise InputError(f"{self.folder / 'config.json'} implies a model that cannot be "
                             f"built ({e}); expected the one that came with the "
                             "weights") from None
        expected = {name: tuple(w.shape) for name, w in state.items()}
        # LLaMA 1 and 2 carry RoPE's frequencies as buffers, tied models sometimes the
        # embedding twice.
        spare = {name for name in self.tensors if name.endswith("rotary_emb.inv_freq")}
        if self.cfg.tied:
            expected.pop("lm_head.weight")
            spare.add("lm_head.weight")
            if EMBEDDED not in self.tensors and "lm_head.weight" in self.tensors:
                self.tensors[EMBEDDED] = self.tensors.pop("lm_head.weight")
            self.check_tied()
        self.unpack(expected)
        self.check_names("lacks", expected.keys() - self.tensors.keys())
        self.check_names("has, beyond the model of config.json,",
                         self.tensors.keys() - expected.keys() - spare)
        for name, shape in expected.items():
            stored = self.tensors[name]
            if stored.shape != shape:
                raise InputError(f"{name} has shape {stored.shape}, config.json implies "
                                 f"{shape}; use matching files")
            self.check_dtype(name)
        return expected

    def check_dtype(self, name):
        dtype = self.tensors[name].dtype
        if dtype not in DTYPES.values():
            raise InputError(f"{name} is stored as {dtype}; expected fp32, fp16 or bf16")

    def unpack(self, expected):
        """Put weights that enhance/quantize.py packed under their own names; `expected`
        {name: shape}. Each is unpacked when it is read. Raises InputError for parts of
        other shapes."""
        quantized = quantized_of(self.raw)
        if quantized is None:
            return
        for name, shape in expected.items():
            if name + PARTS[0] in self.tensors:
                self.check_names("lacks", {name + part for part in PARTS} - self.tensors.keys())
                parts = [self.tensors.pop(name + part) for part in PARTS]
                self.tensors[name] = packed(name, parts, shape, *quantized)

    def check_tied(self):
        """Raise InputError for a head beside the embedding that it should equal."""
        both = [name for name in (EMBEDDED, "lm_head.weight") if name in self.tensors]
        for name in both:
            self.check_dtype(name)
        if len(both) == 2 and not torch.equal(*(self.tensors[name].read() for name in both)):
            raise InputError(f"config.json in {self.folder} has tie_word_embeddings true, "
                             "but lm_head.weight is not model.embed_tokens.weight; set "
                             "it to false to use the head, or delete the head")

    def check_names(self, verb, names):
        if names:
            plural = "s" * (len(names) > 1)
            found = ", ".join(list(self.tensors)[:3]) or "none"
            raise InputError(f"{self.files[0]} {verb} {len(names)} tensor{plural}, such "
                             f"as {min(names)} (found are {found}, …); expected exactly "
                             "those config.json implies: take both from one model, "
                             "shards as their folder")

    def fingerprint(self):
        """SHA-256 (hex) of config.json and of every tensor: name, shape, dtype and numbers.

        Reads all of it, a second a GB or so; once for the same tensors.
        """
        if self.printed is None or self.printed[0] is not self.tensors:
            digest = hashlib.sha256(json.dumps(self.raw, sort_keys=True).encode())
            for name in self.names:
                stored = self.tensors[name]
                digest.update(f"{name}{stored[:2]}".encode())
                digest.update(stored.read().contiguous().flatten().view(torch.uint8).numpy())
            self.printed = self.tensors, digest.hexdigest()
        return self.printed[1]

    def parameters(self):
        """How many there are, from the shapes in the files."""
        return sum(torch.Size(self.tensors[name].shape).numel() for name in self.names)

    def extras(self):
        """Paths of tokenizer and generation settings beside the weights, to copy."""
        paths = [self.folder / name for name in BESIDE]
        for path in paths:
            check_readable(path)
        return [path for path in paths if path.is_file()]

    def rest(self, l, without=()):
        """{name: tensor} of block l as they are, but for the layers in `without`.

        l = n_layers: what belongs to no block.
        """
        rest = {}
        for name in self.names:
            in_block = name.startswith(f"model.layers.{l}.")
            in_none = not name.startswith("model.layers.")
            wanted = in_block if l < self.cfg.n_layers else in_none
            if wanted and name.rpartition(".")[0] not in without:
                rest[name] = self.tensor(name)
        return rest

    def tensor(self, name, device="cpu", dtype=None):
        """One weight. Raises InputError when it holds NaN or Inf."""
        w = self.tensors[name].read()
        if not torch.isfinite(w).all():
            raise InputError(f"{name} in {self.folder} holds NaN or Inf; "
                             "expected finite weights: copy the checkpoint again")
        return w.to(device, dtype or w.dtype)

    def block(self, l, device="cpu", dtype=None):
        """Block l with its weights on `device`; nothing else of the model is read."""
        with torch.device("meta"):
            block = Block(self.cfg, l)
        at = f"model.layers.{l}."
        weights = {name: self.tensor(at + name, device, dtype)
                   for name in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        return block.requires_grad_(False)

    def head(self, device="cpu", dtype=None):
        """What to_logits takes: (final norm's weight (dim,), lm_head).

        lm_head is a Linear (vocab, dim).
        """
        lm_head = nn.Linear(self.cfg.dim, self.cfg.vocab, bias=False, device="meta")
        name = "model.embed_tokens.weight" if self.cfg.tied else "lm_head.weight"
        weight = self.tensor(name, device, dtype)
        lm_head.weight = nn.Parameter(weight, requires_grad=False)
        return self.tensor("model.norm.weight", device, dtype), lm_head

    def model(self, device="cpu", dtype=None):
        """The whole model in memory."""
        with torch.device("meta"):
            model = Llama(self.cfg)
        weights = {name: self.tensor(name, device, dtype) for name in self.names}
        if self.cfg.tied:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, assign=True)
        # Assigned one by one they are two parameters of one storage.
        if self.cfg.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.requires_grad_(False)


# ------------------------------------------------------------ out
# What a run leaves that is killed before its first part counts.
FIRST_PARTS = r"(model-block-\d+|training\S*)\.safetensors(\.partial)?|manifest\.json\.partial"
SHARD_BYTES = 5e9       # a larger checkpoint is stored as one shard a block


def written_bytes(result, states=0):
    """The most that lies on disk while a result of `result` bytes is written: its parts, and
    beside them the `states` of a training or, later, the one file that is made of them."""
    return result + max(states, result if result <= SHARD_BYTES else 0)


def part_of(l):
    """The file of an unfinished output that holds block l.

    l = n_layers: what belongs to no block.
    """
    return f"model-block-{l:03}.safetensors"


def result_bytes(ckpt, cut, grid=None):
    """What a result takes on disk, with room for its config.json and manifest.

    cut {layer: (m, n, rank)} of the layers that are decomposed; grid {"bits", "group"}: of
    codes that the factors of `ckpt` are written as.
    """
    saved = sum(m * n - k * (m + n) for m, n, k in cut.values())
    stored = [ckpt.tensors[name] for name in ckpt.names]
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in stored)
    size -= saved * ckpt.dtype.itemsize
    written_as_codes = ckpt.cfg.ranks if grid else ()
    for layer in written_as_codes:
        for which in "VU":
            rows, columns = ckpt.tensors[f"{layer}.{which}.weight"].shape
            size -= rows * columns * ckpt.dtype.itemsize
            size += rows * packed_bytes(columns, grid["bits"], grid["group"], ckpt.dtype.itemsize)
    return size + 2**22


class TensorFolder:
    """Files of tensors under `path`, and manifest.json, which says what counts of them.

    It holds the `facts` they were made from, and each finished file's SHA-256. A file
    counts only when the manifest names it, so what a killed run left behind is finished
    work or nothing. Raises InputError when the folder was made from other facts, saying
    which, and when a file is not what was written.
    """

    def __init__(self, path, facts):
        self.path = Path(path)
        self.manifest = self.path / "manifest.json"
        self.facts = json.loads(json.dumps(facts))
        self.files = {}                         # {name: {"sha256": …, "note": …}}
        self.note = None                        # of the whole (JSON)
        self.hold = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"cannot make the folder {path} ({e.strerror}); "
                             "name another") from None
        self.read()

    def keep_others_out(self):
        """Hold the folder against other runs; what one has written by now is read again.

        Raises InputError where another run holds it or this user may not write there.
        """
        if not may_write(self.path):
            raise denied(self.path, "written")
        self.hold = Hold(self.path)
        self.read()

    def release(self):
        if self.hold:
            self.hold.release()

    def read(self):
        check_readable(self.path)
        if self.manifest.exists():
            found = read_json(self.manifest)
            self.check_facts(found)
            self.files = found["files"]
            self.note = found.get("note")

    def check_facts(self, found):
        """Raise InputError for a manifest that is another's or names other facts."""
        if not found.keys() >= {"facts", "files"}:
            raise InputError(f"{self.manifest} was not written by this program; "
                             "name another folder")
        differ = []
        for key, value in self.facts.items():
            there = str(found["facts"].get(key))
            now = str(value)
            if there != now:
                differ.append(f"{key} ({there[:16]} there, {now[:16]} now)")
        if differ:
            raise InputError(f"{self.path} was made with another {', '.join(differ)}; "
                             "give the same arguments as then, name another folder, "
                             "or delete it")

    def save(self, name, tensors, note=None):
        """Write {key: tensor} as `name` and remember `note` (JSON) with it."""
        tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        # A .bin file may hold one storage under two names, a .safetensors file may not.
        places = Counter(t.data_ptr() for t in tensors.values())
        tensors = {key: t.clone() if places[t.data_ptr()] > 1 else t for key, t in tensors.items()}
        partial = self.path / (name + ".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        usual_mode(partial)
        with open(partial, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(partial, self.path / name)
        self.files[name] = {"sha256": sha256(self.path / name), "note": note}
        self.write_manifest()

    def save_state(self, stem, step, tensors, note):
        """`save` under a name of its own, then delete the state before it: one of the two is
        whole whenever a run is killed."""
        before = [name for name in self.files if name.startswith(f"{stem}.")]
        self.save(f"{stem}.{step}.safetensors", tensors, note)
        self.forget(before)

    def latest(self, stem):
        """(note, {key: tensor}) of the state that was saved last; None where none was."""
        states = [name for name in self.files if name.startswith(f"{stem}.")]
        return (self.files[states[-1]]["note"], self.load(states[-1])) if states else None

    def remember(self, note):
        """A note (JSON) of the whole, for the run that goes on."""
        self.note = note
        self.write_manifest()

    def forget(self, names):
        """Strike the files `names` off the manifest, then delete them."""
        left = [name for name in self.files if name not in names]
        self.files = {name: self.files[name] for name in left}
        self.write_manifest()
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def write_manifest(self):
        content = {"facts": self.facts, "files": self.files, "note": self.note}
        write_whole(self.manifest, json.dumps(content, indent=1))

    def load(self, name, device="cpu"):
        """The tensors of file `name`, memory-mapped."""
        path = self.path / name
        check_readable(path)
        expected = self.files[name]["sha256"]
        found = sha256(path)
        if found != expected:
            raise InputError(f"{path} is not the file that was written (SHA-256 {found}, "
                             f"expected {expected}); delete {self.path} and run again")
        return load_file(path, device=str(device))


class Writer:
    """Writes a checkpoint folder part by part; the target appears when it is whole.

    Parts lie beside the target. Use as a context manager. Leaving it through an
    exception, Ctrl-C included, removes what was written, unless `keep`: then a later run
    with the same `facts` goes on from the finished parts, named in `done` with their
    notes. An existing target is refused unless `overwrite`, and replaced only when it is
    itself a compressed checkpoint. Raises InputError before any work for a target that
    cannot be written or a disk with less than `need` bytes free.
    """

    def __init__(self, out, need, overwrite=False, facts=None, keep=False):
        self.out = Path(out).resolve()
        self.keep = keep
        self.partial = self.out.parent / (self.out.name + ".partial")
        self.hold = None
        try:
            if self.partial.is_dir():
                self.hold = Hold(self.partial)
                self.put_back()
            self.check_target(out, overwrite)
            self.clear()
            check_space((self.partial, need))
            self.hold = self.hold or Hold(self.partial)
            self.folder = TensorFolder(self.partial, (facts or {}) | {"kept": keep})
            for name in self.folder.files:
                self.folder.load(name)      # refuses a damaged part now, not at the end
        except OSError as e:
            self.leave()
            raise InputError(f"cannot write to {e.filename or self.out.parent} "
                             f"({e.strerror}); name another folder") from None
        except InputError:
            self.leave()
            raise
        self.done = {name: file["note"] for name, file in self.folder.files.items()}

    def put_back(self):
        """Put a target in its place again that a run, killed then, had moved aside."""
        old = self.partial / "old"
        ours = (self.partial / "manifest.json").exists()
        if ours and old.is_dir() and not self.out.exists():
            os.replace(old, self.out)

    def clear(self):
        """Remove what a run that was killed left, unless this one goes on from there. Raises
        InputError for a folder that no run left."""
        path = self.partial / "manifest.json"
        found = read_json(path) if path.exists() else {}
        manifest = found.keys() >= {"facts", "files"}
        # Parts that were not to be kept are none to go on from.
        kept = manifest and found["facts"].get("kept")
        if self.hold and not (self.keep and kept):
            others = [path.name for path in self.partial.iterdir()
                      if not (manifest or re.fullmatch(FIRST_PARTS, path.name))]
            if others:
                raise InputError(f"{self.partial} holds {min(others)}, which no run wrote; parts "
                                 "are written there: name another --out, or move it")
            for left in self.partial.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()

    def leave(self):
        """Let go of the folder of parts, and remove it where it is empty."""
        if self.hold:
            with suppress(OSError):
                self.partial.rmdir()
            self.hold.release()

    def check_target(self, out, overwrite):
        """Raise InputError for a target, or parts beside it, that are not to be lost."""
        if self.out.exists() and not overwrite:
            raise InputError(f"{out} already exists; name another --out, "
                             "or add --overwrite to replace it")
        config = self.out / "config.json"
        ours = config.is_file() and "air" in read_json(config)
        if self.out.exists() and not ours:
            raise InputError(f"{out} is not a compressed checkpoint, so --overwrite "
                             "leaves it alone; name another --out")
        if ours and not may_write(self.out):
            raise denied(out, "replaced")
        manifest = self.partial / "manifest.json"
        kept = manifest.exists() and read_json(manifest).get("facts", {}).get("kept")
        if kept and not self.keep:
            raise InputError(f"{self.partial} holds finished parts of a run: of air.py, then "
                             "add --stats to go on (or its --anchor), or of enhance/, then run "
                             "that again; or delete it")

    def add(self, part, tensors, note=None):
        """Write {name: tensor} to disk as one part, a shard to be.

        Raises RuntimeError for a number that is not finite.
        """
        for name, w in tensors.items():
            if not torch.isfinite(w).all():
                raise RuntimeError(f"{name} is not finite in {w.dtype}, the "
                                   "checkpoint's own; start from its bf16 or fp32 form")
        self.folder.save(part, tensors, note)
        self.done[part] = note

    def assemble(self):
        """The folder to be the target: all parts in one file, or shards and an index."""
        parts = {part: self.folder.load(part) for part in sorted(self.done)}
        for left in ("whole", "old"):               # by a run that was killed in here
            shutil.rmtree(self.partial / left, ignore_errors=True)
        total = sum(w.nbytes for part in parts.values() for w in part.values())
        if total <= SHARD_BYTES:
            target = self.partial / "whole"
            target.mkdir()
            state = {name: w for part in parts.values() for name, w in part.items()}
            path = target / "model.safetensors"
            save_file(state, path, metadata={"format": "pt"})
            usual_mode(path)
            return target
        where = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        path = self.partial / "model.safetensors.index.json"
        write_whole(path, json.dumps(index, indent=1))
        return self.partial

    def finish(self, config, copies=()):
        """Add the index, config.json and `copies` of paths, then move it into place."""
        target = self.assemble()
        write_whole(target / "config.json", json.dumps(config, indent=1) + "\n")
        for path in copies:
            shutil.copyfile(path, target / path.name)   # not its mode: it may be read-only
        # Two renames: at no moment is there a half-written target.
        if self.out.exists():
            os.replace(self.out, self.partial / "old")
        os.replace(target, self.out)
        (self.out / "manifest.json").unlink(missing_ok=True)
        for left in (self.partial, self.out / "old"):
            shutil.rmtree(left, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.put_back()                     # what an exception left moved aside
        if not (self.keep and self.folder.files):
            shutil.rmtree(self.partial, ignore_errors=True)
        self.leave()
