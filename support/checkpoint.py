"""Checkpoints on disk: config.json checked, tensors read from memory-mapped files, result folders written whole."""
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import Block, Llama
from support.script import InputError, check_space, read_json, sha256

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def parse_config(raw):
    """config.json (a dict; Hugging Face's keys, from LLaMA 1's to `rope_parameters`) -> the shape of the model; `bias` says which
    of q, k, v, o, mlp carry one, `ranks` {layer: k} which layers are low-rank.

    Raises InputError for a missing key or anything this model does not compute.
    """
    def need(*keys, kind=int):
        value = next((raw[key] for key in keys if raw.get(key) is not None), None)
        if not isinstance(value, kind) or value <= 0:
            raise InputError(f"config.json has no '{keys[0]}' above 0 (found {value!r}); use the one that came with the weights")
        return value

    real, arch = (int, float), (raw.get("architectures") or ["nothing"])[0]
    if arch not in ARCHITECTURES:
        raise InputError(f"config.json names the architecture {arch}; supported are {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json has hidden_act '{raw['hidden_act']}'; only 'silu' (SwiGLU) is supported")
    if raw.get("quantization_config"):
        raise InputError("the checkpoint is quantized (quantization_config); point at its fp32, fp16 or bf16 original")
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError(f"config.json has rope_scaling {scaling!r}; expected an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    wanted = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if kind not in wanted:
        raise InputError(f"config.json has rope_scaling '{kind}'; supported are {', '.join(wanted)}")
    if missing := [key for key in wanted[kind] if not isinstance(scaling.get(key), real) or scaling[key] <= 0]:
        raise InputError(f"rope_scaling '{kind}' in config.json lacks {', '.join(missing)} above 0")

    # LLaMA 1 and 2 were published before rope_theta and num_key_value_heads existed: the format defines their absence.
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or (
        10000.0 if "LLAMA" in arch.upper() else need("rope_theta", kind=real))
    heads, dim = need("num_attention_heads"), need("hidden_size")
    context, kv_heads = need("max_position_embeddings", "max_sequence_length"), need("num_key_value_heads", "num_attention_heads")
    if heads % kv_heads:
        raise InputError(f"config.json has {heads} heads on {kv_heads} key/value heads; expected a multiple")
    # Not in the paper: a sliding window. Up to its width it equals full attention, so it bounds the context instead.
    if raw.get("sliding_window") and raw.get("use_sliding_window", arch.startswith("Mistral")):
        context = min(context, need("sliding_window"))
    bias = "qkv" if arch.startswith("Qwen2") else "qkvo" if raw.get("attention_bias") else ""
    return SimpleNamespace(
        vocab=need("vocab_size"), dim=dim, hidden=need("intermediate_size"), n_layers=need("num_hidden_layers"), n_heads=heads,
        n_kv_heads=kv_heads, head_dim=need("head_dim") if raw.get("head_dim") else dim // heads, context=context,
        norm_eps=need("rms_norm_eps", kind=real), rope_theta=float(theta), rope_scaling=dict(scaling, rope_type=kind),
        tied=raw.get("tie_word_embeddings", False),
        bias=(*bias, *(["mlp"] if raw.get("mlp_bias") else [])), ranks=(raw.get("air") or {}).get("ranks", {}))
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_tensors(path):
    """A .safetensors or .bin file, memory-mapped: {name: (shape, dtype, function that reads the tensor)}."""
    try:
        if path.suffix == ".safetensors":
            f = safe_open(path, framework="pt")
            slices = {name: f.get_slice(name) for name in f.keys()}
            return {name: (tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype()), lambda name=name: f.get_tensor(name))
                    for name, s in slices.items()}
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return {name: (tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    except Exception as e:      # truncated, corrupt, a pickle that wants to run code: each library raises its own kinds
        raise InputError(f"{path} cannot be read as a checkpoint ({str(e).strip().split(chr(10))[0][:200]}); expected a whole "
                         f"{path.suffix} file: check its size or copy it again") from None


class Checkpoint:
    """A dense or compressed checkpoint on disk, read tensor by tensor from memory-mapped files.

    `path` is a .safetensors (or .bin) file with config.json beside it, or a folder with one or many shards. Only headers
    are read here; names and shapes are held against config.json. Raises InputError for whatever does not fit.
    """

    def __init__(self, path):
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path} does not exist; expected a .safetensors file or a folder with one")
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            raise InputError(f"{path} is not a .safetensors or .bin file; give one of these, or the folder they are in")
        self.folder = path if path.is_dir() else path.parent
        self.name = self.folder.resolve().name if path.is_dir() or path.stem == "model" else path.stem
        if not (self.folder / "config.json").is_file():
            raise InputError(f"{self.folder} has no config.json; expected the one that came with the weights beside them")
        self.files = [path] if path.is_file() else self._shards()
        self.raw = read_json(self.folder / "config.json")
        self.cfg = parse_config(self.raw)
        self.tensors = {name: tensor for file in self.files for name, tensor in open_tensors(file).items()}
        self._check()
        self.dtype = self.tensors["model.embed_tokens.weight"][1]

    def _shards(self):
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (self.folder / name).is_file():
                return [self.folder / name]
            index = self.folder / (name + ".index.json")
            if index.is_file():
                files = [self.folder / file for file in sorted(set(read_json(index).get("weight_map", {}).values()))]
                if missing := [file.name for file in files if not file.is_file()]:
                    raise InputError(f"{index.name} names {missing[0]}, which is not in {self.folder}; fetch the missing shard")
                return files
        raise InputError(f"{self.folder} has no weights; expected model.safetensors or pytorch_model.bin, or shards and an index")

    def _check(self):
        with torch.device("meta"):
            expected = {name: tuple(w.shape) for name, w in Llama(self.cfg).state_dict().items()}
        # LLaMA 1 and 2 checkpoints carry RoPE's frequencies as buffers, tied ones sometimes a second copy of the embedding.
        spare = {name for name in self.tensors if name.endswith("rotary_emb.inv_freq")}
        if self.cfg.tied:
            expected.pop("lm_head.weight")
            spare.add("lm_head.weight")
        for kind, names in (("lacks", expected.keys() - self.tensors.keys()),
                            ("has, beyond the model of config.json,", self.tensors.keys() - expected.keys() - spare)):
            if names:
                raise InputError(f"{self.files[0]} {kind} {len(names)} tensor{'s' * (len(names) > 1)}, such as {min(names)}; "
                                 "expected exactly those config.json implies: take both from one model, shards as their folder")
        for name, shape in expected.items():
            if self.tensors[name][0] != shape:
                raise InputError(f"{name} has shape {self.tensors[name][0]}, config.json implies {shape}; use matching files")
            if self.tensors[name][1] not in DTYPES.values():
                raise InputError(f"{name} is stored as {self.tensors[name][1]}; expected fp32, fp16 or bf16")
        self.names = list(expected)

    def fingerprint(self):
        """SHA-256 (hex) over config.json and the name, shape and first and last 2,048 numbers of every tensor."""
        digest = hashlib.sha256(json.dumps(self.raw, sort_keys=True).encode())
        for name in self.names:
            w = self.tensors[name][2]().flatten()
            digest.update(f"{name}{self.tensors[name][:2]}".encode() + torch.cat((w[:2048], w[-2048:])).float().numpy().tobytes())
        return digest.hexdigest()

    def extras(self):
        """Tokenizer and generation settings beside the weights, to copy along."""
        names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def tensor(self, name, device="cpu", dtype=None):
        """One weight. Raises InputError when it holds NaN or Inf."""
        w = self.tensors[name][2]()
        if not torch.isfinite(w).all():
            raise InputError(f"{name} in {self.folder} holds NaN or Inf; expected finite weights: copy the checkpoint again")
        return w.to(device, dtype or w.dtype)

    def block(self, l, device="cpu", dtype=None):
        """Block l with its weights on `device`; nothing else of the model is read."""
        with torch.device("meta"):
            block = Block(self.cfg, l)
        block.load_state_dict({name: self.tensor(f"model.layers.{l}.{name}", device, dtype) for name in block.state_dict()},
                              assign=True)
        return block.requires_grad_(False)

    def head(self, device="cpu", dtype=None):
        """(final norm's weight (dim,), lm_head as a Linear (vocab, dim))."""
        lm_head = nn.Linear(self.cfg.dim, self.cfg.vocab, bias=False, device="meta")
        name = "model.embed_tokens.weight" if self.cfg.tied else "lm_head.weight"
        lm_head.weight = nn.Parameter(self.tensor(name, device, dtype), requires_grad=False)
        return self.tensor("model.norm.weight", device, dtype), lm_head

    def model(self, device="cpu", dtype=None):
        """The whole model in memory."""
        with torch.device("meta"):
            model = Llama(self.cfg)
        weights = {name: self.tensor(name, device, dtype) for name in self.names}
        if self.cfg.tied:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False)
SHARD_BYTES = 5e9        # a larger checkpoint is stored as one shard a block


class Folder:
    """Files of tensors under `path`, and manifest.json: the `facts` they were made from, and each finished file's SHA-256.

    A file counts only when the manifest names it, so what a killed run left behind is finished work or nothing.
    Raises InputError when the folder was made from other facts, saying which, and when a file is not what was written.
    """

    def __init__(self, path, facts):
        self.path, self.manifest, self.files = Path(path), Path(path) / "manifest.json", {}
        self.facts = json.loads(json.dumps(facts))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"cannot make the folder {path} ({e.strerror}); name another") from None
        if self.manifest.exists():
            found = read_json(self.manifest)
            if not found.keys() >= {"facts", "files"}:
                raise InputError(f"{self.manifest} was not written by this program; name another folder")
            differ = [f"{key} ({there[:16]} there, {now[:16]} now)" for key, value in self.facts.items()
                      if (there := str(found["facts"].get(key))) != (now := str(value))]
            if differ:
                raise InputError(f"{path} was made with another {', '.join(differ)}; give the same arguments as then, "
                                 "name another folder, or delete it")
            self.files = found["files"]

    def save(self, name, tensors, note=None):
        """Write {key: tensor} as `name` and remember `note` (JSON) with it."""
        tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        self._place(self.path / name, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
        self.files[name] = {"sha256": sha256(self.path / name), "note": note}
        self._list()

    def forget(self, names):
        """Strike the files `names` off the manifest, then delete them."""
        self.files = {name: file for name, file in self.files.items() if name not in names}
        self._list()
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _list(self):
        content = json.dumps({"facts": self.facts, "files": self.files}, indent=1)
        self._place(self.manifest, lambda part: part.write_text(content))

    def _place(self, path, write):
        """write(a path beside it), then move that to `path`: it is there whole or not at all."""
        part = path.with_name(path.name + ".partial")
        write(part)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)

    def load(self, name, device="cpu"):
        """The tensors of file `name`, memory-mapped."""
        path, expected = self.path / name, self.files[name]["sha256"]
        if (found := sha256(path)) != expected:
            raise InputError(f"{path} is not the file that was written (SHA-256 {found}, expected {expected}); "
                             f"delete {self.path} and run again")
        return load_file(path, device=str(device))


class Writer:
    """Writes a checkpoint folder part by part, beside the target; the target appears only when it is whole.

    Use as a context manager. Leaving it through an exception, Ctrl-C included, removes what was written, unless `keep`:
    then a later run with the same `facts` goes on from the finished parts, named in `done` with their notes. An existing
    target is refused unless `overwrite`, and replaced only when it is itself a compressed checkpoint.
    Raises InputError before any work for a target that cannot be written or a disk with less than `need` bytes free.
    """

    def __init__(self, out, need, overwrite=False, facts=None, keep=False):
        self.out, self.keep = Path(out).resolve(), keep
        if self.out.exists() and not overwrite:
            raise InputError(f"{out} already exists; name another --out, or add --overwrite to replace it")
        config = self.out / "config.json"
        if self.out.exists() and not (config.is_file() and "air" in read_json(config)):
            raise InputError(f"{out} is not a compressed checkpoint, so --overwrite leaves it alone; name another --out")
        self.partial = self.out.with_name(self.out.name + ".partial")
        manifest = self.partial / "manifest.json"
        if not keep and manifest.exists() and read_json(manifest).get("facts", {}).get("kept"):
            raise InputError(f"{self.partial} holds finished blocks of a run with --stats; add --stats to go on, or delete it")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if not (keep and manifest.exists()):
                shutil.rmtree(self.partial, ignore_errors=True)     # left by a run that was killed
            check_space((self.partial, need + (need if need <= SHARD_BYTES else 0)))    # a small one is copied into one file
            self.folder = Folder(self.partial, (facts or {}) | {"kept": keep})
        except OSError as e:
            raise InputError(f"cannot write to {self.out.parent} ({e.strerror}); name another --out") from None
        for name in self.folder.files:
            self.folder.load(name)                                  # refuses a damaged part now, not at the end
        self.done = {name: file["note"] for name, file in self.folder.files.items()}

    def add(self, part, tensors, note=None):
        """Write {name: tensor} to disk as one part, a shard to be. Raises RuntimeError for a number that is not finite."""
        for name, w in tensors.items():
            if not torch.isfinite(w).all():
                raise RuntimeError(f"{name} is not finite in {w.dtype}, the checkpoint's own; start from its bf16 or fp32 form")
        self.folder.save(part, tensors, note)
        self.done[part] = note

    def finish(self, config, copies=()):
        """Add the index, config.json and copies of `copies` (paths), then move all of it into place."""
        parts = {part: self.folder.load(part) for part in sorted(self.done)}
        total = sum(w.numel() * w.element_size() for part in parts.values() for w in part.values())
        target = self.partial / "whole" if total <= SHARD_BYTES else self.partial
        for left in ("whole", "old"):                # by a run that was killed in here
            shutil.rmtree(self.partial / left, ignore_errors=True)
        target.mkdir(exist_ok=True)
        if total <= SHARD_BYTES:
            state = {name: w for part in parts.values() for name, w in part.items()}
            save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        else:
            where = {name: file for file, part in parts.items() for name in part}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for path in copies:
            shutil.copy(path, target)
        if self.out.exists():                        # two renames: at no moment is there a half-written target
            os.replace(self.out, self.partial / "old")
        os.replace(target, self.out)
        (self.out / "manifest.json").unlink(missing_ok=True)
        for left in (self.partial, self.out / "old"):
            shutil.rmtree(left, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.keep:
            shutil.rmtree(self.partial, ignore_errors=True)
