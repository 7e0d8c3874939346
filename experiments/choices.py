"""Log-probabilities of the choices of a question, whose context is read once for all.

A row of a batch is a context and, behind it, its continuations, each of which sees the context
and itself. Tokens are taken as the field's harness takes them (lm_eval 0.4).

Shapes: B rows, T tokens a row, D the width of a head.
"""
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import PLAIN, rope, to_logits

BATCH = 4096                    # tokens, padding included


# ------------------------------------------------------------ requests
class Group(NamedTuple):
    """Continuations of one context, as token ids: one prefill serves them all."""

    context: tuple
    continuations: tuple        # of tuples

    @property
    def size(self):
        """Tokens in its row: the last of a continuation is only predicted."""
        return len(self.context) + sum(len(each) - 1 for each in self.continuations)


def encoded(context, continuation, tokenizer):
    """(ids, ids): the continuation's are those of the whole beyond those of the context.

    White space that ends the context belongs to the continuation, as in the harness.
    """
    kept = context.rstrip()
    whole = tokenizer.bos + tokenizer.encode(context + continuation)
    first = tokenizer.bos + tokenizer.encode(kept)
    return tuple(first), tuple(whole[len(first):])


def groups_of(row, tokenizer, limit):
    """A row's [Group], and for each choice where its score is: [(group, place)].

    What is longer than `limit` tokens loses its beginning, each choice for itself.
    """
    together = defaultdict(list)
    for i, request in enumerate(row.requests):
        context, continuation = encoded(*request, tokenizer)
        over = len(context) + len(continuation) - limit - 1
        together[context[max(0, over):]].append((i, continuation))
    groups = []
    places = [None] * len(row.requests)
    for shared, members in together.items():
        for place, (i, _) in enumerate(members):
            places[i] = (len(groups), place)
        groups.append(Group(shared, tuple(each for _, each in members)))
    return groups, places


# ------------------------------------------------------------ scores
def layout(groups):
    """A batch of groups, a row each: (ids, positions, seen), (B, T), (B, T), (B, 1, T, T).

    A row is the context and, behind it, every continuation but its last token. Each
    continuation sees the context and itself; padding sees itself alone.
    """
    T = max(group.size for group in groups)
    ids = torch.zeros(len(groups), T, dtype=torch.long)
    positions = torch.zeros(len(groups), T, dtype=torch.long)
    seen = torch.eye(T, dtype=torch.bool).repeat(len(groups), 1, 1)
    for b, (context, continuations) in enumerate(groups):
        C = len(context)
        ids[b, :C] = torch.tensor(context)
        positions[b, :C] = torch.arange(C)
        seen[b, :C, :C] = torch.ones(C, C, dtype=torch.bool).tril()
        start = C
        for each in continuations:
            n = len(each) - 1
            at = slice(start, start + n)
            ids[b, at] = torch.tensor(each[:-1], dtype=torch.long)
            positions[b, at] = C + torch.arange(n)
            seen[b, at, :C] = True
            seen[b, at, at] = torch.ones(n, n, dtype=torch.bool).tril()
            start += n
    return ids, positions, seen[:, None]


def states(model, ids, positions, seen):
    """The last block's output (B, T, dim) of rows laid out so."""
    tables = rope(model.cfg, int(positions.max()) + 1, ids.device)
    angles = [each[positions].unsqueeze(1) for each in tables]          # (B, 1, T, D)

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    ops = SimpleNamespace(**vars(PLAIN) | {"attention": attention})
    x = F.embedding(ids, model.model.embed_tokens.weight)
    for block in model.model.layers:
        x = block(x, angles, ops)
    return x


@torch.no_grad()
def scores(model, groups):
    """Log-probabilities of every group's continuations, nats: [[one a continuation]]."""
    device = model.lm_head.weight.device
    x = states(model, *(each.to(device) for each in layout(groups)))
    head = (model.model.norm.weight, model.lm_head)
    found = []
    for b, (context, continuations) in enumerate(groups):
        row = []
        start = len(context)
        for each in continuations:
            # Its first token is predicted by the context's last one.
            n = len(each) - 1
            at = [len(context) - 1, *range(start, start + n)]
            logits = to_logits(x[b, at], head, model.cfg).float()
            target = torch.tensor(each, device=device)
            row.append(-F.cross_entropy(logits, target, reduction="sum").item())
            start += n
        found.append(row)
    return found


def batches_of(groups):
    """Groups of about one length together, BATCH tokens at most; the longest first."""
    batches = []
    for group in sorted(groups, key=lambda group: -group.size):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].size > BATCH:
            batches.append([])
        batches[-1].append(group)
    return batches
