"""Weights of few bits on disk: codes packed into bytes, and what turns them back.

A weight (rows, columns) lies under three names: NAME.codes (rows, bytes) uint8, a row's
codes one after another, lowest bit first; NAME.scales (rows, groups); NAME.zeros (rows,
groups) uint8, the code of 0. w = (code − zero) · scale, a group of columns sharing both.
"""
from typing import NamedTuple

import numpy as np
import torch

PARTS = (".codes", ".scales", ".zeros")
WIDTHS = (8, 4, 3, 2)           # bits a code


# ------------------------------------------------------------ the grid
class Grid(NamedTuple):
    """Where codes lie: w = (code − zero) · scale."""

    scale: torch.Tensor         # (rows, 1), in the dtype it is stored in
    zero: torch.Tensor          # (rows, 1), a code
    top: int                    # the largest code

    def codes(self, w):
        """The nearest codes of w (rows, columns), fp32."""
        exact = w / self.scale.float() + self.zero
        return exact.round().clamp(0, self.top)

    def values(self, codes):
        return (codes - self.zero) * self.scale.float()


def grid_of(w, bits, dtype):
    """Each row's Grid from its least to its largest number, 0 always one of its values.

    Asymmetric min/max, as both roundings use it; w (rows, columns) fp32.
    """
    top = 2**bits - 1
    low = w.amin(1, keepdim=True).clamp_max(0)
    high = w.amax(1, keepdim=True).clamp_min(0)
    step = (high - low) / top
    # Below its least normal number (6e-5 in fp16) a dtype holds multiples of `unit` alone:
    # rounded up, never to 0, so that the grid reaches the row's ends.
    held = torch.finfo(dtype)
    unit = held.smallest_normal * held.eps
    step = torch.where(step < held.smallest_normal, (step / unit).ceil() * unit, step)
    scale = step.to(dtype)
    scale[scale == 0] = 1                                       # a row of zeros
    zero = (-low / scale.float()).round().clamp(0, top)
    return Grid(scale, zero, top)


# ------------------------------------------------------------ bytes
def pack(codes, bits):
    """Codes (rows, columns) below 2^bits -> bytes (rows, ⌈columns·bits/8⌉) uint8."""
    numbers = codes.cpu().numpy().astype(np.uint8)
    places = np.arange(bits, dtype=np.uint8)
    # Each code's bits, the lowest first   (rows, columns, bits)
    each = numbers[..., None] >> places & 1
    # A row of them one after another, eight a byte
    flat = each.reshape(len(each), -1)
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little"))


def unpack(packed, bits, columns):
    """The codes (rows, columns) uint8 of `pack`."""
    flat = np.unpackbits(packed.numpy(), axis=1, count=columns * bits, bitorder="little")
    each = flat.reshape(len(flat), columns, bits)
    places = np.arange(bits, dtype=np.uint8)
    numbers = (each << places).sum(-1, dtype=np.uint8)
    return torch.from_numpy(numbers)


def widen(per_group, group, columns):
    """(rows, groups) -> (rows, columns), each value for `group` columns; 0: for all."""
    return per_group.repeat_interleave(min(group or columns, columns), dim=1)[:, :columns]


def dequantize(codes, scales, zeros, group):
    """w = (code − zero) · scale, fp32; codes (rows, columns), scales and zeros (rows,
    groups)."""
    columns = codes.shape[1]
    zero = widen(zeros.float(), group, columns)
    scale = widen(scales.float(), group, columns)
    return (codes.float() - zero) * scale


def unpacked(parts, bits, group, columns):
    """The weight (rows, columns) of what lies under PARTS, in the scales' dtype."""
    packed, scales, zeros = parts
    codes = unpack(packed, bits, columns)
    return dequantize(codes, scales, zeros, group).to(scales.dtype)


def packed_bytes(columns, bits, group, itemsize):
    """What a row takes on disk, `itemsize` bytes a scale."""
    codes = -(-columns * bits // 8)
    groups = -(-columns // group) if group else 1
    return codes + groups * (itemsize + 1)


def packed_tensors(name, codes, scales, zeros, bits):
    """{name: tensor} of a weight as it is stored."""
    stored = pack(codes, bits), scales, zeros.to(torch.uint8)
    return {name + part: tensor for part, tensor in zip(PARTS, stored)}
