"""Published model shapes, and models of such a shape with random weights: speed and memory do not depend on the values."""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from air import rank_at                                                            # noqa: E402
from model import LAYERS, Block, Llama                               # noqa: E402
from support.checkpoint import parse_config                               # noqa: E402


def shape(dim, hidden, layers, heads, kv_heads, vocab=32000, context=2048, arch="Llama", **more):
    return {"architectures": [f"{arch}ForCausalLM"], "model_type": arch.lower(), "hidden_act": "silu", "vocab_size": vocab,
            "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": False, **more}


SHAPES = {      # name: config.json
    "llama-7b": shape(4096, 11008, 32, 32, 32, rms_norm_eps=1e-6),
    "tinyllama": shape(2048, 5632, 22, 32, 4),
    "mistral-7b": shape(4096, 14336, 32, 32, 8, context=32768, arch="Mistral", sliding_window=4096),
    "demo": shape(256, 768, 6, 8, 4, vocab=2048, context=512),
}


def at_rate(config, rate):
    """`config` with every decomposed layer at the rank air.py gives it at `rate`; None leaves it dense."""
    config = {key: value for key, value in config.items() if key != "air"}
    if rate is None:
        return config
    cfg = parse_config(config)
    with torch.device("meta"):
        sizes = {name: Block(cfg, 0).get_submodule(name).weight.shape for name in LAYERS}
    ranks = {f"model.layers.{l}.{name}": rank_at(rate, *sizes[name]) for l in range(cfg.n_layers) for name in LAYERS}
    return config | {"air": {"rate": rate, "ranks": ranks}}


def random_model(config, device="cpu", dtype=torch.float32, seed=0):
    """A Llama of config.json `config` (a dict, `air` section included), weights normal with the variance 1/n, norms 1.

    Quick, since it is made for measuring: all matrices repeat one stream of 2²⁰ + 7 normal numbers, out of step with their
    rows. The forward pass has no denormal, infinite or constant activations, but the singular values mean nothing.
    """
    with torch.device("meta"):
        model = Llama(parse_config(config))
    stream = torch.randn(2 ** 20 + 7, generator=torch.Generator().manual_seed(seed)).to(device)
    for name, module in list(model.named_modules()):
        for key, w in list(module.named_parameters(recurse=False)):
            new = torch.ones(w.shape, device=device, dtype=dtype)
            if w.dim() == 2:
                scaled = (stream * (1 if "embed" in name else w.shape[1] ** -0.5)).to(dtype)
                whole = w.numel() // len(scaled) * len(scaled)
                new.view(-1)[:whole].view(-1, len(scaled)).copy_(scaled)
                new.view(-1)[whole:].copy_(scaled[:w.numel() - whole])
            setattr(module, key, torch.nn.Parameter(new, requires_grad=False))
    if model.cfg.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
