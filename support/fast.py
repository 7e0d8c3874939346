"""The two costly steps of air.py again, for wide layers: the same results with less work and less memory traffic.

Read `truncated_svd` and `als_sweep` in air.py first; these have their signatures, and tests/test_fast.py holds them together.
"""
import torch
import torch.nn.functional as F

from model import LowRank


def truncated_svd(W, k, outliers=32, iterations=4):
    """Eq. 3's best rank-k factors U (m, k), sigma (k,), Vh (k, n) of W (m, n), fp32, from the eigenvectors of WᵀW.

    Half the work of an SVD, but squaring W squares its condition: relative to λ₁, eigenvalues are good to fp32's 1e-7. A few
    directions of huge energy, usual in W' = WS, would drown those at rank k. So they are taken out first by subspace
    iteration on W itself, and where what is left is still too uneven, the ordinary SVD does it.
    """
    m, n = W.shape
    if m < n:
        U, sigma, Vh = truncated_svd(W.T, k)
        return Vh.T, sigma, U.T
    V = torch.randn(n, min(outliers, n), generator=torch.Generator().manual_seed(0)).to(W)
    for _ in range(iterations):
        V = torch.linalg.qr(W.T @ (W @ V)).Q
    A = W @ V
    energy, R = torch.linalg.eigh(A.T @ A)
    R = R[:, energy > 8 * energy[0]][:, :k]                         # the converged ones, to 8^-iterations
    A, V, p = A @ R, V @ R, R.shape[1]                              # (m, p), (n, p)
    rest = torch.addmm(W, A, V.T, alpha=-1) if p else W             # (m, n)
    G, step = torch.zeros(n, n, dtype=W.dtype, device=W.device), -(-n // 8)
    for j in range(0, n, step):                                     # the lower triangle of restᵀrest, which is all eigh reads
        G[j:, j:j + step] = rest[:, j:].T @ rest[:, j:j + step]
    energy, Q = torch.linalg.eigh(G)                                # ascending
    if energy[p - k] < 1e-4 * energy[-1]:
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :k], sigma[:k], Vh[:k]
    Q = Q[:, p - k:].flip(1) if p < k else Q[:, :0]
    Q = Q - V @ (V.T @ Q)
    A, V = torch.cat((A.flip(1), rest @ Q), 1), torch.cat((V.flip(1), Q), 1)        # (m, k), (n, k)
    sigma = A.norm(dim=0)
    return A / sigma.clamp_min(torch.finfo(W.dtype).tiny), sigma, V.T.contiguous()


def als_sweep(Wp, P, U, sigma, Vh, ranks, block=8):
    """Algorithm 1, lines 4-9, as air.als_sweep, for `block` ranks at a time: a third of the passes over m×n matrices.

    M = P ⊙ (W' − UΣVᵀ) stays as it was at the start of a block. What ranks s already updated in the block have changed,
    M − P ⊙ Σ(a'vᵀ' − avᵀ), enters through products with P alone: aᵀ(P ⊙ a_s v_sᵀ) = ((a ∘ a_s)ᵀP) ∘ v_s, and
    (P ⊙ a_s v_sᵀ)v = a_s ∘ (P(v_s ∘ v)), several of them in one pass over P.
    """
    A, V, tiny = U * sigma, Vh.clone(), torch.finfo(Wp.dtype).tiny
    M, ranks = P * (Wp - A @ V), list(ranks)
    for some in (ranks[i:i + block] for i in range(0, len(ranks), block)):
        a, v, b = A[:, some].T.contiguous(), V[some], len(some)     # (b, m), (b, n): before; a_new, v_new: after
        a_new, v_new = torch.empty_like(a), torch.empty_like(v)
        pairs = torch.tril_indices(b, b)
        old = torch.zeros(b, b, Wp.shape[1], dtype=P.dtype, device=P.device)
        old[pairs[0], pairs[1]] = (a[pairs[0]] * a[pairs[1]]) @ P   # (a_j ∘ a_s)ᵀP for s <= j
        top = a @ M                                                 # a_jᵀM, kept up to date below   (b, n)
        for j in range(b):
            # Eq. 5: v = v + (aᵀM) / ((a²)ᵀP)
            v_new[j] = v[j] + top[j] / old[j, j].clamp_min(tiny)
            # Eq. 6: ũ = a + (M'v) / (P v²), everything that multiplies P in one pass
            Pv = P @ (torch.cat((v_new[:j + 1], v[:j + 1])) * v_new[j]).T           # (m, 2j + 2)
            change = (a_new[:j].T * Pv[:, :j]).sum(1) - (a[:j].T * Pv[:, j + 1:2 * j + 1]).sum(1)
            a_new[j] = a[j] + (M @ v_new[j] - change - a[j] * (Pv[:, j] - Pv[:, 2 * j + 1])) / Pv[:, j].clamp_min(tiny)
            if j + 1 < b:
                top[j + 1:] += old[j + 1:, j] * v[j] - ((a[j + 1:] * a_new[j]) @ P) * v_new[j]
        M.addcmul_(P, torch.cat((a_new, -a)).T @ torch.cat((v_new, v)), value=-1)   # Algorithm 1, line 8, for the block
        A[:, some], V[some] = a_new.T, v_new
    sigma = A.norm(dim=0)
    return A / sigma.clamp_min(tiny), sigma, V
FEW = 32            # rows up to which a matrix is multiplied slice by slice on a CPU


class Matrix:
    """Weights w_i (m_i, n) that read the same input, stored as one matrix (m, n): x (..., n) -> [x w_iᵀ (..., m_i)].

    The weights given become views of it: nothing is held twice, and their model still computes the same. On a CPU MKL
    multiplies few fp32 rows of x on one thread, which cannot draw the memory's bandwidth; as a batch, one slice of w a thread,
    it uses all. A tall matrix is stored column after column there: short rows are slow to sum."""

    def __init__(self, *weights):
        n, m, threads = weights[0].shape[1], sum(map(len, weights)), torch.get_num_threads()
        fp32 = weights[0].dtype == torch.float32 and weights[0].device.type == "cpu"
        self.sizes = [*map(len, weights), -m % threads if fp32 else 0]
        m, new = sum(self.sizes), weights[0].new_zeros
        self.w = new(n, m).T if fp32 and m >= 2 * n else new(m, n)
        self.slices = self.w.unflatten(0, (threads, -1)).mT if fp32 else None           # (threads, n, m/threads)
        for weight, part in zip(weights, self.w.split(self.sizes)):
            weight.data = part.copy_(weight)

    def __call__(self, x):
        rows = x.numel() // x.shape[-1]
        if self.slices is None or rows > FEW:
            y = F.linear(x, self.w)
        else:
            y = torch.bmm(x.reshape(1, rows, -1).expand(len(self.slices), -1, -1), self.slices)             # (threads, rows, ...)
            y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return [y] if y.shape[-1] == self.sizes[0] else y.split(self.sizes, dim=-1)[:-1]


def align(layer, multiple=8):
    """Pad a low-rank layer's rank with zeros: the same product, its rows aligned as CUDA's fast 16-bit kernels need."""
    pad = -len(layer.V.weight) % multiple
    layer.V.weight.data = F.pad(layer.V.weight, (0, 0, 0, pad))                         # (k + pad, n)
    layer.U.weight.data = F.pad(layer.U.weight, (0, pad))                               # (m, k + pad)


class Reads:
    """Layers that read the same input: one product with their first factors (V, or W of a dense layer), then one with each U.
    `fuse` False: one product with each first factor."""

    def __init__(self, *layers, fuse=True):
        first, last = zip(*[(layer.V, layer.U) if isinstance(layer, LowRank) else (layer, layer) for layer in layers])
        self.V = [Matrix(*(layer.weight for layer in group)) for group in ([first] if fuse else zip(first))]
        self.U = [None if a is b else Matrix(b.weight) for a, b in zip(first, last)]
        self.bias = [layer.bias for layer in last]

    def first(self, x):                                 # (..., n) -> [Vx of a low-rank layer, Wx of a dense one]
        return [z for V in self.V for z in V(x)]

    def second(self, i, z):                             # what is left of layer i: Uz + b of a low-rank one, z + b of a dense one
        z = self.U[i](z)[0] if self.U[i] else z
        return z if self.bias[i] is None else z + self.bias[i]

    def __call__(self, x):
        return [self.second(i, z) for i, z in enumerate(self.first(x))]
