"""A LLaMA-family transformer by hand: the network, its low-rank layers, and checkpoints on disk.

Covers LLaMA 1/2/3/3.1, Vicuna, TinyLlama, Mistral and Qwen2.5. Layers carry the names of the Hugging Face checkpoints
and RoPE is the half-split one, so a checkpoint loads without renaming or permuting anything.

Shapes: B windows, T tokens, H heads, G kv heads, D head size, m out, n in, k rank.
"""
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
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


class InputError(Exception):
    """Bad input, said in one sentence: what was found, what was expected, what to do. Scripts exit with 2."""


# ---------------------------------------------------------------------------------------------- configuration
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


# ---------------------------------------------------------------------------------------------- the network
def rope(cfg, T, device="cpu"):
    """Rotary angles of positions 0 .. T-1 as (cos, sin), each (T, D) fp32.

    Source: RoFormer, half-split layout; LLaMA 3.1 rescales the low frequencies ('llama3'), 'linear' all of them.
    """
    s = cfg.rope_scaling
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)  # (D/2,)
    if s["rope_type"] == "linear":
        freq = freq / s["factor"]
    elif s["rope_type"] == "llama3":
        turns = freq * s["original_max_position_embeddings"] / (2 * math.pi)     # rotations within the old context
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        freq = freq * torch.lerp(torch.full_like(freq, 1 / s["factor"]), torch.ones_like(freq), keep.clamp(0, 1))
    angle = torch.outer(torch.arange(T, device=device).float(), freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Apply RoPE to x (B, heads, T, D)."""
    cos, sin = (a.to(x.dtype) for a in angles)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def wide(x):
    """x in fp32, or in fp64 when it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x, weight, eps):
    """x / rms(x) · weight; the mean of squares in fp32 at least."""
    scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
    return (wide(x) * scale).to(x.dtype) * weight


def attention(q, k, v):
    """Causal softmax(q kᵀ/√D) v through the fused kernel. q (B, H, T, D); k, v (B, G, T, D); head h reads kv head h·G/H."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# The five operations a block is made of. influence.py passes another set to propagate relevance through the same block.
PLAIN = SimpleNamespace(linear=lambda layer, x: layer(x), norm=rms_norm, silu=F.silu, mul=torch.mul, attention=attention)


class LowRank(nn.Module):
    """y = U(Vx) + b: a weight (m, n) of rank k as two factors, V (k, n) and U (m, k)."""

    def __init__(self, n, m, k, bias=False):
        super().__init__()
        self.V, self.U = nn.Linear(n, k, bias=False), nn.Linear(k, m, bias=bias)

    def forward(self, x):
        return self.U(self.V(x))


LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Layers that read the same input, so that one Gram matrix serves them; it carries the first one's name.
READS = {name: name for name in LAYERS} | {"self_attn.k_proj": "self_attn.q_proj",
                                           "self_attn.v_proj": "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj"}


class Block(nn.Module):
    """One decoder block: x + Attn(norm x), then x + MLP(norm x). Layer `name` of block l is model.layers.{l}.{name}."""

    def __init__(self, cfg, l):
        super().__init__()
        self.cfg = cfg
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        shapes = ((cfg.dim, q), (cfg.dim, kv), (cfg.dim, kv), (q, cfg.dim),
                  (cfg.dim, cfg.hidden), (cfg.dim, cfg.hidden), (cfg.hidden, cfg.dim))
        self.input_layernorm, self.self_attn = nn.RMSNorm(cfg.dim), nn.Module()           # holds a weight; rms_norm computes
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(cfg.dim), nn.Module()
        for name, (n, m) in zip(LAYERS, shapes):
            part, leaf = name.split(".")
            bias = part == "mlp" and "mlp" in cfg.bias or part == "self_attn" and leaf[0] in cfg.bias
            k = cfg.ranks.get(f"model.layers.{l}.{name}")
            self.get_submodule(part).add_module(leaf, LowRank(n, m, k, bias) if k else nn.Linear(n, m, bias=bias))

    def forward(self, x, angles, ops=PLAIN):                                    # x (B, T, dim)
        cfg, att, mlp = self.cfg, self.self_attn, self.mlp
        (B, T, _), split = x.shape, lambda t: t.unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2)
        h = ops.norm(x, self.input_layernorm.weight, cfg.norm_eps)
        q = rotate(split(ops.linear(att.q_proj, h)), angles)                    # (B, H, T, D)
        k = rotate(split(ops.linear(att.k_proj, h)), angles)                    # (B, G, T, D)
        v = split(ops.linear(att.v_proj, h))                                    # (B, G, T, D)
        mixed = ops.attention(q, k, v).transpose(1, 2).reshape(B, T, -1)        # (B, T, H·D)
        x = x + ops.linear(att.o_proj, mixed)
        h = ops.norm(x, self.post_attention_layernorm.weight, cfg.norm_eps)
        gate = ops.silu(ops.linear(mlp.gate_proj, h))                           # (B, T, hidden)
        return x + ops.linear(mlp.down_proj, ops.mul(gate, ops.linear(mlp.up_proj, h)))


class Llama(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.model = cfg, nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab, cfg.dim)
        self.model.layers = nn.ModuleList(Block(cfg, l) for l in range(cfg.n_layers))
        self.model.norm = nn.RMSNorm(cfg.dim)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, ops=PLAIN):
        x = F.embedding(ids, self.model.embed_tokens.weight)                    # (B, T, dim)
        angles = rope(self.cfg, ids.shape[1], ids.device)
        for block in self.model.layers:
            x = block(x, angles, ops)
        return to_logits(x, self.model.norm.weight, self.lm_head, self.cfg, ops)


def to_logits(x, norm, lm_head, cfg, ops=PLAIN):
    """The last block's output (B, T, dim) -> logits (B, T, vocab)."""
    return ops.linear(lm_head, ops.norm(x, norm, cfg.norm_eps))


# ---------------------------------------------------------------------------------------------- checkpoints, in
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path):
    try:
        return dict(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, OSError) as e:
        raise InputError(f"{path} is not readable as a JSON object ({e}); copy it again from where it came") from None


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


# ---------------------------------------------------------------------------------------------- checkpoints, out
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


def sha256(path):
    """SHA-256 (hex) of a file, read through a memory map; of one that is empty or cannot be read, the reason."""
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()
    except (OSError, ValueError) as e:
        return str(e)


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


# ---------------------------------------------------------------------------------------------- running a script
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
    p.add_argument("--ckpt", default=str(Path(__file__).resolve().parent / "demo"),
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
