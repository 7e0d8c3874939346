"""Change one key of a config.json at a time and compare with the transformers package, which this needs.

    python tests/config_sweep.py [FAMILY ...]       # default: all four, about ten minutes on one core

Keys: all that the package's configuration of the family knows, all that it takes on the way (rope_scaling, …)
and those of relatives. Values: absent, null, wrong types, other values of the right type. An outcome is one of

    same      both compute, and the logits agree to 1e-4 over the context that we allow
    refused   we raise InputError
    ours      the package fails, and our logits are those of the unedited configuration: the key computes nothing
    DIFFERENT anything else; exit code 1, unless LISTED has the reason
"""
import copy
import dataclasses
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent / "golden")]
from make_golden import SMALL, weights              # noqa: E402
from model import Llama                             # noqa: E402
from support.checkpoint import Checkpoint           # noqa: E402
from support.config import FAMILIES, NEUTRAL, parse_config      # noqa: E402
from support.script import InputError               # noqa: E402

BASES = {
    "llama": dict(SMALL, num_key_value_heads=2),
    "mistral": dict(SMALL, sliding_window=None),
    "qwen2": dict(SMALL, use_sliding_window=False),
    "qwen3": dict(SMALL, use_sliding_window=False, head_dim=8),
}
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
ABSENT = object()
WRONG = (None, True, False, 0, -1, 2.5, "false", "7", [], [3], {}, {"a": 1}, float("nan"), float("inf"), 10**30)
# Values of the right type that differ from the base.
OTHER = {
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"], ["LlamaModel"], ["GraniteForCausalLM"], "Llama"),
    "model_type": ("llama", "mistral", "qwen2", "qwen3", "granite", "air_llama"),
    "hidden_act": ("gelu", "swish", "relu"),
    "rope_theta": (10000, 5e5),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 4.0}, LLAMA3,
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, {"rope_type": "yarn", "factor": 4.0},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, {"full_attention": {"rope_type": "default"}},
        {"rope_type": "default", "factor": 4.0}, {"rope_type": "linear", "factor": "4"}, {"type": "linear",
            "factor": 4.0},
        {"rope_type": "default", "type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}),
    "rope_scaling": (
        {"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}, LLAMA3, dict(LLAMA3,
            low_freq_factor=4.0),
        {"type": "dynamic", "factor": 2.0}, {"factor": 4.0}, {"rope_type": "linear"}, {"rope_type": "linear",
            "factor": -4.0},
        {"rope_type": 3}, dict(LLAMA3, original_max_position_embeddings="16"), {"rope_type": "default"}),
    "sliding_window": (8, 16, 48, 4096),
    "use_sliding_window": (True,),
    "max_window_layers": (0, 1, 2, 28),
    "layer_types": (["full_attention"] * 2, ["full_attention", "sliding_attention"], ["sliding_attention"] * 2,
                    ["full_attention"], ["chunked_attention"] * 2),
    "max_position_embeddings": (16, 32, 4096),
    "max_sequence_length": (16, 128),
    "original_max_position_embeddings": (8, 16, 64),
    "num_attention_heads": (2, 8), "num_key_value_heads": (1, 4), "head_dim": (8, 16, 7), "hidden_size": (64,),
    "num_hidden_layers": (1, 3, 10**9), "vocab_size": (32, 128), "intermediate_size": (24,),
    "rms_norm_eps": (1e-6, 1e-1, 1), "pretraining_tp": (2,), "attention_dropout": (0.5,), "dtype": ("float32",
        "bfloat16"),
    "torch_dtype": ("float16",), "quantization_config": ({"quant_method": "gptq"},), "per_layer_config": ({"0": {}},),
    "embedding_multiplier": (12.0,), "residual_multiplier": (0.2,), "logits_scaling": (8.0,),
        "partial_rotary_factor": (0.5, 1.0),
    "eos_token_id": (3, [3, 4]), "bos_token_id": (3,), "pad_token_id": (3,),
}
LEGACY = ("rope_theta", "rope_scaling", "torch_dtype", "max_sequence_length", "original_max_position_embeddings",
          "is_causal", "model_type", "use_sliding_window", "sliding_window", "attention_bias", "mlp_bias", "head_dim")
# {(family, key): why the outcome may be another}.
LISTED = {}


def keys(family):
    from transformers import CONFIG_MAPPING
    known = [field.name for field in dataclasses.fields(CONFIG_MAPPING[family])]
    return list(dict.fromkeys([*known, *LEGACY, *NEUTRAL]))


def edits(key):
    """(what is shown, value) of every edit of a key."""
    yield "absent", ABSENT
    for value in (*OTHER.get(key, ()), *WRONG):
        yield json.dumps(value), value


def write(folder, config, state):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not (folder / "model.safetensors").exists():
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def theirs(folder, ids):
    """transformers' logits, or the exception as text."""
    from transformers import AutoModelForCausalLM
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model.eval()(ids, use_cache=False).logits
    except Exception as e:
        return f"{type(e).__name__}: {e}".split("\n")[0][:120]


def ours(folder, ids):
    """(our logits, context), or (None, the refusal)."""
    try:
        ckpt = Checkpoint(folder)
        with torch.no_grad():
            return ckpt.model(dtype=torch.float32)(ids), ckpt.cfg.context
    except InputError as e:
        return None, str(e)


def outcome(folder, base_logits, ids):
    found, context = ours(folder, ids)
    if found is None:
        return "refused", context
    expected = theirs(folder, ids)
    n = min(context, ids.shape[1])
    if isinstance(expected, str):
        alike = found.shape == base_logits.shape and torch.equal(found, base_logits)
        return ("ours" if alike else "DIFFERENT"), expected
    if found.shape != expected.shape:
        return "DIFFERENT", f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    gap = (found[:, :n] - expected[:, :n]).abs().max().item()
    return ("same" if gap < 1e-4 else "DIFFERENT"), f"{gap:.1e} apart over {n} tokens"


def sweep(family, only=None):
    """Yield (key, shown value, outcome, detail) of every edit of the family's base configuration."""
    base = BASES[family] | {"model_type": family, "architectures": [FAMILIES[family]]}
    shapes = {name: tuple(w.shape) for name, w in Llama(parse_config(base)).state_dict().items()}
    state = {name: torch.from_numpy(w) for name, w in weights(shapes).items()}
    ids = torch.from_numpy(np.random.RandomState(7).randint(0, 64, size=(1, 48)))
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "edited"
        write(folder, base, state)
        base_logits, _ = ours(folder, ids)
        for key in only or keys(family):
            for shown, value in edits(key):
                config = copy.deepcopy(base)
                config.pop(key, None)
                if value is not ABSENT:
                    config[key] = value
                write(folder, config, state)
                yield key, shown, *outcome(folder, base_logits, ids)


def main():
    import transformers
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    unlisted = 0
    for family in sys.argv[1:] or BASES:
        counts = Counter()
        for key, shown, what, detail in sweep(family):
            counts[what] += 1
            reason = LISTED.get((family, key)) or LISTED.get(("every", key))
            if what == "DIFFERENT":
                unlisted += reason is None
                print(f"{family:<8} {key} = {shown:<28} {reason or 'DIFFERENT'}: {detail}", flush=True)
        print(f"{family}: {dict(counts)}", flush=True)
    sys.exit(unlisted > 0)


if __name__ == "__main__":
    main()
