"""Tokens a second: decoding and prompts, dense and compressed, beside other programs.

    python experiments/decode.py --ckpt data/smollm2            # SmolLM2-135M's shape
    python experiments/decode.py --shape tinyllama --batches 1
    python experiments/decode.py --ckpt out/smollm2-kfac-0.6    # its ranks

Random weights of the shape, random prompts, greedy, no end of text. All sides take turns
in one process (A B C A B C …) after one turn that warms up; a table shows medians and
quartiles over the rounds, ratios are taken round by round. transformers (its `generate`)
and llama.cpp (the package llama-cpp-python) join in where they are installed, with the same
dense weights. Writes experiments/results/decode-SHAPE-DEVICE.json (--out: another name).
"""
import importlib
import importlib.metadata
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.report import table
from experiments.shapes import SHAPES, at_rate, random_model
from experiments.table11 import machine, save, timed
from generate import Decoder
from support.config import dense_config, parse_config
from support.fast import compiled
from support.script import ROOT, InputError, Parser, check_results, read_json, run

GGUF_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


# ------------------------------------------------------------ sides
# A side is a function (prompts, n) -> (seconds of the prompt and the first token, [seconds of
# each later one]).
def ours(model, **switches):
    """generate.py; but for the steps that capture a graph (CUDA), which a long text has few of."""
    decoder = Decoder(model, **switches)

    def side(prompts, n):
        first, steps = timed(decoder, prompts, n)
        return first, [seconds for seconds, captured in steps if not captured]
    return side


def apart(moments):
    """What a side returns, of the start's and each new token's moment."""
    first, *later = [b - a for a, b in zip(moments, moments[1:])]
    return first, later


def transformers_model(config, model):
    """Transformers' own of a config.json, with the weights of our dense `model`."""
    package = importlib.import_module("transformers")
    settings = package.AutoConfig.for_model(**config | {"eos_token_id": None})
    with torch.device("meta"):
        theirs = package.AutoModelForCausalLM.from_config(settings)
    theirs.load_state_dict(model.state_dict(), assign=True)
    # RoPE's frequencies are no weights: made again, on the device.
    device = model.lm_head.weight.device
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(settings).to(device)
    theirs.generation_config.eos_token_id = None
    return theirs


def transformers_side(config, model):
    """`generate` of transformers."""
    theirs = transformers_model(config, model)

    def side(prompts, n):
        marks = []

        def stop(ids, scores, **_):
            if ids.is_cuda:
                torch.cuda.synchronize()            # asked before the token is there
            marks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        ids = torch.tensor(prompts, device=theirs.device)
        start = time.perf_counter()
        with torch.no_grad():
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                            do_sample=False, stopping_criteria=[stop])
        return apart([start, *marks])
    return side


def llama_cpp_side(config, model, folder):
    """llama.cpp with the weights of our dense `model`, one prompt at a time."""
    package = importlib.import_module("llama_cpp")
    path = write_gguf(Path(folder, "model.gguf"), config, model)
    engine = package.Llama(str(path), n_ctx=config["max_position_embeddings"], verbose=False,
                           n_threads=torch.get_num_threads(), n_batch=512)

    def side(prompts, n):
        engine.reset()
        marks = [time.perf_counter()]
        for _, _ in zip(range(n), engine.generate(prompts[0], temp=0.0)):
            marks.append(time.perf_counter())
        return apart(marks)
    return side


NAMES = {       # ours: GGUF's
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}


def gguf_name(name):
    """Of a tensor, in GGUF's words."""
    for own, theirs in NAMES.items():
        name = name.replace(own, theirs)
    return name


def write_gguf(path, config, model):
    """A dense Llama as a GGUF file without a vocabulary, in its dtype; returns `path`.

    For timing alone: q and k keep the order of their rows, which llama.cpp rotates otherwise.
    """
    gguf = importlib.import_module("gguf")
    cfg = model.cfg
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(cfg.context)
    writer.add_embedding_length(cfg.dim)
    writer.add_block_count(cfg.n_layers)
    writer.add_feed_forward_length(cfg.hidden)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab)
    writer.add_tokenizer_model("none")
    for name, w in model.state_dict().items():
        if name == "lm_head.weight" and cfg.tied:
            continue
        kind = gguf.GGMLQuantizationType[GGUF_TYPES[w.dtype] if w.dim() > 1 else "F32"]
        data = gguf.quants.quantize(w.float().cpu().numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def there(package):
    return importlib.util.find_spec(package) is not None


def compiles():
    """Whether --compile can work here: a compiler, a torch that is new enough."""
    try:
        compiled(len)
    except InputError:
        return False
    return True


def sides_of(config, small, device, dtype, folder, wanted=""):
    """{name: side} of what is installed here, or of those `wanted` ("a; b"); the dense
    ones have the same weights. config, small: config.json, dense and compressed. Raises
    InputError for a side that is not here."""
    rate = small["air"]["rate"]

    def made(config, **switches):
        return ours(random_model(config, device, dtype), **switches)

    def theirs(side, *more):
        return side(config, random_model(config, device, dtype), *more)
    makers = {"dense": lambda: made(config), f"{rate:g}": lambda: made(small)}
    if compiles():
        makers["dense, compiled"] = lambda: made(config, compile=True)
        makers[f"{rate:g}, compiled"] = lambda: made(small, compile=True)
    if there("transformers"):
        makers["transformers"] = lambda: theirs(transformers_side)
    if there("llama_cpp") and there("gguf") and device.type == "cpu":
        makers["llama.cpp"] = lambda: theirs(llama_cpp_side, folder)
    names = [name.strip() for name in wanted.split(";")] if wanted else list(makers)
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise InputError(f"--sides has {unknown[0]!r}; here are {'; '.join(makers)}")
    return {name: makers[name]() for name in names}


# ------------------------------------------------------------ turns
def in_turn(sides, prompts, n, rounds):
    """{side: ([seconds of the prompt and the first token], [of each later one])}, one number
    a round; a round that warms up is not counted."""
    log = {name: ([], []) for name in sides}
    for i in range(rounds + 1):
        for name, side in sides.items():
            first, later = side(prompts, n)
            if i:
                log[name][0].append(first)
                log[name][1].append(statistics.mean(later) if later else math.nan)
    return log


def rows_of(sides, what, common, rounds):
    """A row a side for `what` (batch, tokens of a prompt, new tokens)."""
    batch, length, n = what
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(common["vocab"], (batch, length), generator=generator).tolist()
    able = {name: side for name, side in sides.items() if batch == 1 or name != "llama.cpp"}
    log = in_turn(able, prompts, n, rounds)
    rows = []
    for name, (first, later) in log.items():
        rows.append(common | {"side": name, "batch": batch, "prompt": length, "tokens": n,
                              "prompt_per_s": [batch * length / s for s in first],
                              "tokens_per_s": [batch / s for s in later]})
        speed = statistics.median(rows[-1]["tokens_per_s" if n > 1 else "prompt_per_s"])
        print(f"{common['dtype']}  batch {batch}  prompt {length}  {name:<16} {speed:,.1f} /s",
              file=sys.stderr, flush=True)
    return rows


# ------------------------------------------------------------ the table
def quartiles(numbers):
    """Median (lower–upper quartile)."""
    if len(numbers) < 2:
        return f"{numbers[0]:,.1f}"
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return f"{middle:,.1f} ({low:,.1f}–{high:,.1f})"


def against(row, rows, base, key):
    """Median of a row's ratios to the side `base`'s, round by round."""
    other = [each for each in rows if each["side"] == base]
    if not other:
        return ""
    return f"{statistics.median(a / b for a, b in zip(row[key], other[0][key])):.2f}"


def markdown(rows):
    """A line a side, for each dtype, batch and prompt."""
    lines = []
    for place in dict.fromkeys((r["dtype"], r["batch"], r["prompt"], r["tokens"]) for r in rows):
        same = [r for r in rows if (r["dtype"], r["batch"], r["prompt"], r["tokens"]) == place]
        dtype, batch, length, n = place
        key = "tokens_per_s" if n > 1 else "prompt_per_s"
        for row in same:
            twin = "dense, compiled" if "compiled" in row["side"] else "dense"
            what = f"batch {batch}" if n > 1 else f"prompt of {length}"
            lines.append([dtype, what, row["side"], quartiles(row[key]),
                          against(row, same, twin, key),
                          against(row, same, "transformers", key)])
    return table(["", "", "", "tokens/s", "of dense", "of transformers"], lines, left=3)


# ------------------------------------------------------------ the command
def parse_arguments():
    p = Parser(__doc__)
    p.add_argument("--shape", choices=SHAPES, default="demo")
    p.add_argument("--ckpt", help="a checkpoint's folder: its shape instead of --shape, and of "
                   "a result of air.py its ranks instead of uniform ones at --rate")
    p.add_argument("--rate", type=float, default=0.6, help="(default 0.6)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtypes", default="float32,bfloat16")
    p.add_argument("--batches", default="1,4,16,64")
    p.add_argument("--prompts", default="128,1024,2048", help="tokens of a prompt, batch 1")
    p.add_argument("--tokens", type=int, default=32, help="new tokens a turn (default 32)")
    p.add_argument("--sides", default="", help="those of one run, such as 'dense; 0.6', where "
                   "all do not fit in memory (default: all)")
    p.add_argument("--rounds", type=int, default=5, help="(default 5)")
    p.add_argument("--out", help="name of the JSON (default: in experiments/results)")
    return p.parse_args()


def numbers(option, text):
    """[int] of an option such as 1,4,16; "" has none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"{option} is {text}; expected numbers such as 1,4,16")
    return [int(part) for part in parts]


def check_arguments(args):
    """Raise InputError for an option out of its range."""
    if args.tokens < 2 or args.rounds < 1:
        raise InputError("--tokens is to be 2 or more and --rounds 1 or more")
    if not 0 < args.rate < 1:
        raise InputError(f"--rate is {args.rate}; expected above 0 and below 1")
    for dtype in args.dtypes.split(","):
        if dtype not in ("float32", "float16", "bfloat16"):
            raise InputError(f"--dtypes has {dtype!r}; expected float32, bfloat16 or float16")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, and there is no CUDA GPU here")
    check_results(args.out, "rows")


def versions():
    """{package: version} of those that join in."""
    return {name: importlib.metadata.version(name) for name in ("transformers",
            "llama-cpp-python") if there(name.removesuffix("-python").replace("-", "_"))}


def shapes_of(args):
    """(config.json of the dense sides, of the compressed ones, a name)."""
    if not args.ckpt:
        config = SHAPES[args.shape]
        return config, at_rate(config, args.rate), args.shape
    raw = read_json(Path(args.ckpt) / "config.json")
    name = Path(args.ckpt).resolve().name
    section = raw.get("air", {})
    if not section.keys() >= {"rate", "ranks"}:
        return at_rate(raw, None), at_rate(raw, args.rate), name
    config = dense_config(raw)
    return config, config | {"air": {key: section[key] for key in ("rate", "ranks")}}, name


def main():
    args = parse_arguments()
    check_arguments(args)
    config, small, name = shapes_of(args)
    cfg = parse_config(config)
    rate = small["air"]["rate"]
    batches = [(batch, 32, args.tokens) for batch in numbers("--batches", args.batches)]
    prompts = [(1, min(length, cfg.context - 1), 1)
               for length in numbers("--prompts", args.prompts)]
    if 32 + args.tokens > cfg.context:
        raise InputError(f"--tokens is {args.tokens}; behind a prompt of 32 at most "
                         f"{cfg.context - 32} fit in the context of {name}")
    rows = []
    path = Path(args.out or ROOT / "experiments/results" / f"decode-{name}-{args.device}.json")
    device = torch.device(args.device)
    for dtype in args.dtypes.split(","):
        common = {"shape": name, "dtype": dtype, "rate": rate, "vocab": cfg.vocab}
        common |= machine(args.device) | versions()
        with tempfile.TemporaryDirectory() as folder:
            sides = sides_of(config, small, device, getattr(torch, dtype), folder,
                             args.sides)
            for what in batches + prompts:
                rows += rows_of(sides, what, common, args.rounds)
                save(path, rows, say=False)         # a killed run keeps what it measured
            del sides
    save(path, rows)
    print(markdown(rows))


if __name__ == "__main__":
    run(main)
