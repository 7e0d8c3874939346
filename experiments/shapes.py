"""Published model shapes, and models of such a shape with random weights.

Speed and memory do not depend on the values.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from air import rank_at
from model import LAYERS, Block, Llama
from support.config import parse_config


def shape(dim, hidden, layers, heads, kv_heads, **more):
    """The config.json of a LLaMA 2; `more` replaces its keys or adds to them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 32000,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return config | more


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
           "max_position_embeddings": 32768, "sliding_window": 4096}
SHAPES = {      # name: config.json
    "llama-7b": shape(4096, 11008, 32, 32, 32, rms_norm_eps=1e-6),
    "tinyllama": shape(2048, 5632, 22, 32, 4),
    "mistral-7b": shape(4096, 14336, 32, 32, 8, **MISTRAL),
    "demo": shape(256, 768, 6, 8, 4, vocab_size=2048, max_position_embeddings=512),
}


def at_rate(config, rate):
    """`config` with every decomposed layer at air.py's rank for it; rate None: dense."""
    config = {key: value for key, value in config.items() if key != "air"}
    if rate is None:
        return config
    cfg = parse_config(config)
    with torch.device("meta"):
        block = Block(cfg, 0)
    sizes = {name: block.get_submodule(name).weight.shape for name in LAYERS}
    ranks = {f"model.layers.{l}.{name}": rank_at(rate, *sizes[name])
             for l in range(cfg.n_layers) for name in LAYERS}
    return config | {"air": {"rate": rate, "ranks": ranks}}


def random_model(config, device="cpu", dtype=torch.float32, seed=0):
    """A Llama of config.json `config` (a dict, `air` section included), weights normal with
    the variance 1/n, norms 1.

    Quick, since it is made for measuring: all matrices repeat one stream of 2²⁰ + 7 normal
    numbers, out of step with their rows. The forward pass has no denormal, infinite or
    constant activations, but the singular values mean nothing.
    """
    with torch.device("meta"):
        model = Llama(parse_config(config)).requires_grad_(False)
    model = model.to(dtype).to_empty(device=device)
    # Leaving the meta device made two weights of a tied one.
    if model.cfg.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(2**20 + 7, generator=generator).to(device)
    for name, w in model.named_parameters():
        if w.dim() == 1:
            w.fill_(1)
        else:
            scale = 1 if "embed" in name else w.shape[1] ** -0.5
            repeat(w, (stream * scale).to(dtype))
    return model


def repeat(w, stream):
    """Fill w with `stream`, again and again."""
    whole = w.numel() // len(stream) * len(stream)
    flat = w.view(-1)
    flat[:whole].view(-1, len(stream)).copy_(stream)
    flat[whole:].copy_(stream[:w.numel() - whole])
