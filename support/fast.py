"""The costly steps again, with less work and less memory traffic: same signatures, same results.

Read `truncated_svd` and `als_sweep` in air.py and the block in model.py first; tests/test_fast.py and
tests/test_generate.py hold these to them.
"""
import torch
import torch.nn.functional as F

from model import LowRank


# -------------------------------------------------------------------------------- the solve
def truncated_svd(W, k, outliers=32, iterations=4):
    """Eq. 3's best rank-k U (m, k), sigma (k,), Vh (k, n) of W (m, n), fp32, by WᵀW's eigenvectors.

    Half the work of an SVD, but squaring W squares its condition: relative to λ₁, eigenvalues are
    good to fp32's 1e-7. A few directions of huge energy, usual in W' = WS, would drown those at
    rank k. So they are taken out first, by subspace iteration on W itself, and where what is left is
    still too uneven, the ordinary SVD does it.
    """
    m, n = W.shape
    if m < n:
        U, sigma, Vh = truncated_svd(W.T, k)
        return Vh.T, sigma, U.T
    A, V = huge_directions(W, k, outliers, iterations)
    p = V.shape[1]
    rest = torch.addmm(W, A, V.T, alpha=-1) if p else W                     # (m, n)
    energy, Q = torch.linalg.eigh(lower_square(rest))                       # ascending
    if energy[p - k] < 1e-4 * energy[-1]:
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :k], sigma[:k], Vh[:k]
    Q = Q[:, p - k:].flip(1) if p < k else Q[:, :0]
    Q = Q - V @ (V.T @ Q)
    A = torch.cat((A.flip(1), rest @ Q), dim=1)                             # (m, k) = Uσ
    V = torch.cat((V.flip(1), Q), dim=1)                                    # (n, k)
    sigma = A.norm(dim=0)
    return A / sigma.clamp_min(torch.finfo(W.dtype).tiny), sigma, V.T.contiguous()


def huge_directions(W, k, outliers, iterations):
    """(WV (m, p), V (n, p)): W's leading right singular vectors as far as they have converged."""
    n = W.shape[1]
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(n, min(outliers, n), generator=generator).to(W)
    for _ in range(iterations):
        V = torch.linalg.qr(W.T @ (W @ V)).Q
    A = W @ V
    energy, R = torch.linalg.eigh(A.T @ A)
    R = R[:, energy > 8 * energy[0]][:, :k]                 # converged to 8^-iterations
    return A @ R, V @ R


def lower_square(W, parts=8):
    """WᵀW (n, n), the blocks on and below the diagonal only: the triangle that eigh reads."""
    n = W.shape[1]
    G = torch.zeros(n, n, dtype=W.dtype, device=W.device)
    step = -(-n // parts)
    for j in range(0, n, step):
        G[j:, j:j + step] = W[:, j:].T @ W[:, j:j + step]
    return G


BLOCK = 8           # ranks that share one pass over the large matrices


def als_sweep(Wp, P, U, sigma, Vh, ranks):
    """Algorithm 1, lines 4-9, as air.als_sweep, a third of the passes over m×n matrices.

    With a = σu and the weighted residual M = P ⊙ (W' − UΣVᵀ), E_r = residual + a vᵀ turns Eq. 5
    into v + (aᵀM)/((a²)ᵀP) and Eq. 6 into a + (M'v)/(Pv²), M' being M after the step in v. BLOCK
    ranks at a time share one M: see `update_block`.
    """
    A, V = U * sigma, Vh.clone()
    M = P * (Wp - A @ V)
    ranks = list(ranks)
    for i in range(0, len(ranks), BLOCK):
        update_block(M, P, A, V, ranks[i:i + BLOCK])
    sigma = A.norm(dim=0)                                   # Eq. 27
    return A / sigma.clamp_min(torch.finfo(A.dtype).tiny), sigma, V


def update_block(M, P, A, V, ranks):
    """Update the columns `ranks` of A (m, k) = Uσ and rows of V (k, n), one by one, and M, in place.

    M stays as it was at the start of the block. What ranks s already updated have changed in it,
    P ⊙ Σ(a'vᵀ' − avᵀ), enters through products with P alone: aᵀ(P ⊙ a_s v_sᵀ) = ((a ∘ a_s)ᵀP) ∘ v_s
    and (P ⊙ a_s v_sᵀ)v = a_s ∘ (P(v_s ∘ v)), several of them in one pass over P.
    """
    tiny = torch.finfo(A.dtype).tiny
    a, v, b = A[:, ranks].T.contiguous(), V[ranks], len(ranks)      # (b, m), (b, n): before
    a_new, v_new = torch.empty_like(a), torch.empty_like(v)         # after
    later, s = torch.tril_indices(b, b)
    old = torch.zeros(b, b, P.shape[1], dtype=P.dtype, device=P.device)
    old[later, s] = (a[later] * a[s]) @ P                           # (a_j ∘ a_s)ᵀP for s <= j
    top = a @ M                                                     # a_jᵀM, kept up to date  (b, n)
    for j in range(b):
        # Eq. 5: v = v + (aᵀM) / ((a²)ᵀP)
        v_new[j] = v[j] + top[j] / old[j, j].clamp_min(tiny)
        # Everything that multiplies P in Eq. 6, in one pass: P(v'_s ∘ v'_j), then P(v_s ∘ v'_j).
        Pv = P @ (torch.cat((v_new[:j + 1], v[:j + 1])) * v_new[j]).T           # (m, 2j + 2)
        after, before = Pv[:, :j + 1], Pv[:, j + 1:]
        change = (a_new[:j].T * after[:, :j]).sum(1) - (a[:j].T * before[:, :j]).sum(1)
        # Eq. 6: ũ = a + (M'v) / (P v²)
        own = a[j] * (after[:, j] - before[:, j])
        a_new[j] = a[j] + (M @ v_new[j] - change - own) / after[:, j].clamp_min(tiny)
        # What this rank's step changes for the ranks of the block that are still to come.
        if j + 1 < b:
            now = (a[j + 1:] * a_new[j]) @ P
            top[j + 1:] += old[j + 1:, j] * v[j] - now * v_new[j]
    # Algorithm 1, line 8, for the whole block.
    M.addcmul_(P, torch.cat((a_new, -a)).T @ torch.cat((v_new, v)), value=-1)
    A[:, ranks], V[ranks] = a_new.T, v_new


# -------------------------------------------------------------------------------- stored matrices
FEW = 32            # rows up to which a matrix is multiplied slice by slice on a CPU


class Matrix:
    """Weights w_i (m_i, n) that read the same input, stored as one (m, n): x -> [x w_iᵀ (…, m_i)].

    The weights given become views of it: nothing is held twice, and their model still computes the
    same. On a CPU MKL multiplies few fp32 rows of x on one thread, which cannot draw the memory's
    bandwidth; as a batch, one slice of w a thread, it uses all. A tall matrix is stored column after
    column there: short rows are slow to sum.
    """

    def __init__(self, *weights):
        like, n = weights[0], weights[0].shape[1]
        sliced = like.dtype == torch.float32 and like.device.type == "cpu"
        threads = torch.get_num_threads()
        self.sizes = [len(w) for w in weights]
        padding = -sum(self.sizes) % threads if sliced else 0       # so that all slices are equal
        self.sizes.append(padding)
        m = sum(self.sizes)
        tall = sliced and m >= 2 * n
        self.w = like.new_zeros(n, m).T if tall else like.new_zeros(m, n)
        # (threads, n, m/threads): a slice a thread
        self.slices = self.w.unflatten(0, (threads, -1)).mT if sliced else None
        for weight, part in zip(weights, self.w.split(self.sizes)):
            weight.data = part.copy_(weight)

    def __call__(self, x):
        rows = x.numel() // x.shape[-1]
        if self.slices is None or rows > FEW:
            y = F.linear(x, self.w)
        else:
            flat = x.reshape(1, rows, -1).expand(len(self.slices), -1, -1)
            y = torch.bmm(flat, self.slices)                        # (threads, rows, m/threads)
            y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
        if y.shape[-1] == self.sizes[0]:
            return [y]
        return y.split(self.sizes, dim=-1)[:-1]


class SharedInput:
    """Layers that read the same input: one product with their inner factors, one with each outer.

    The inner factor of a low-rank layer is V, of a dense one W; the outer is U, or nothing.
    `fuse` False: one product with each inner factor.
    """

    def __init__(self, *layers, fuse=True):
        inner = [(layer.V if isinstance(layer, LowRank) else layer).weight for layer in layers]
        outer = [layer.U if isinstance(layer, LowRank) else layer for layer in layers]
        self.V = [Matrix(*inner)] if fuse else [Matrix(weight) for weight in inner]
        self.U = [Matrix(layer.weight) if layer.weight is not w else None
                  for layer, w in zip(outer, inner)]
        self.bias = [layer.bias for layer in outer]

    def inner(self, x):
        """x (…, n) -> [Vx of a low-rank layer, Wx of a dense one]."""
        return [z for matrix in self.V for z in matrix(x)]

    def outer(self, i, z):
        """What is left of layer i: Uz + b of a low-rank one, z + b of a dense one."""
        if self.U[i] is not None:
            z = self.U[i](z)[0]
        return z if self.bias[i] is None else z + self.bias[i]

    def __call__(self, x):
        return [self.outer(i, z) for i, z in enumerate(self.inner(x))]


def align(model, multiple=8):
    """Pad the ranks of a model's low-rank layers with zeros: the same products, aligned rows.

    CUDA's fast 16-bit kernels need them aligned. v_proj keeps its rank, the width of the cache.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LowRank) or name.endswith("v_proj"):
            continue
        padding = -len(layer.V.weight) % multiple
        layer.V.weight.data = F.pad(layer.V.weight, (0, 0, 0, padding))         # (k + padding, n)
        layer.U.weight.data = F.pad(layer.U.weight, (0, padding))               # (m, k + padding)


# -------------------------------------------------------------------------------- a step on CUDA
SPAN = 256          # a captured step attends to a multiple of this many columns


class Graphs:
    """A decoding step on CUDA, captured once for every SPAN columns and then replayed.

    body(span): the step over the first `span` of `width` columns, the same kernels on the same
    tensors at every call. The first step of a span runs as it is and warms up what capturing needs.
    """

    def __init__(self, body, width):
        self.body, self.width = body, width
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __len__(self):
        return len(self.graphs)

    def step(self, span):
        span = min(-(-span // SPAN) * SPAN, self.width)
        if span in self.graphs:
            self.graphs[span].replay()
            return
        self.body(span)
        self.graphs[span] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[span], pool=self.pool):
            self.body(span)                             # recorded for the next ones, not run
