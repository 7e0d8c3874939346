"""The costly steps again, with less work and less memory traffic, and the same results.

Signatures are the same, too. Read `truncated_svd` and `als_sweep` in air.py and the block
in model.py first; tests/test_fast.py and tests/test_generate.py hold these to them.
"""
import os
import shutil

import torch
import torch.nn.functional as F

from model import LowRank, wide
from support.script import InputError

FROM = 512          # the width of a weight's narrower side from which all this pays


# ------------------------------------------------------------ the solve
def truncated_svd(W, k, outliers=32, iterations=4):
    """Eq. 3's best rank-k U (m, k), sigma (k,), Vh (k, n) of W (m, n), fp32.

    They come from WᵀW's eigenvectors. Half the work of an SVD, but squaring W squares its
    condition: relative to λ₁, eigenvalues are good to fp32's 1e-7. A few directions of
    huge energy, usual in W' = WS, would drown those at rank k. So they are taken out
    first, by subspace iteration on W itself, and where what is left is still too uneven,
    W is squared in fp64, which takes as long as an SVD.
    """
    m, n = W.shape
    if m < n:
        U, sigma, Vh = truncated_svd(W.T, k, outliers, iterations)
        return Vh.T, sigma, U.T
    A, V = huge_directions(W, k, outliers, iterations)
    p = V.shape[1]
    rest = torch.addmm(W, A, V.T, alpha=-1) if p else W             # (m, n)
    energy, Q = eigenvectors(lower_square(rest))                    # ascending
    if energy[p - k] < 1e-4 * energy[-1]:
        exact = W.double()
        _, Q = eigenvectors(lower_square(exact))
        V = Q[:, -k:].flip(1)                                       # (n, k)
        A = exact @ V                                               # (m, k) = Uσ
    else:
        # The k − p strongest of what is left, orthogonal to V.
        Q = Q[:, p - k:].flip(1) if p < k else Q[:, :0]
        Q = Q - V @ (V.T @ Q)
        A = torch.cat((A.flip(1), rest @ Q), dim=1)
        V = torch.cat((V.flip(1), Q), dim=1)
    sigma = A.norm(dim=0)
    U = A / sigma.clamp_min(torch.finfo(W.dtype).tiny)
    return U.to(W.dtype), sigma.to(W.dtype), V.T.contiguous().to(W.dtype)


def huge_directions(W, k, outliers, iterations):
    """(WV (m, p), V (n, p)): W's leading right singular vectors, those that converged."""
    n = W.shape[1]
    width = min(outliers, n)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(n, width, generator=generator).to(W)
    for _ in range(iterations):
        product = W.T @ (W @ V)
        V = torch.linalg.qr(product).Q
    A = W @ V
    energy, R = eigenvectors(A.T @ A)
    R = R[:, energy > 8 * energy[0]][:, -k:]                 # converged to 8^-iterations
    return A @ R, V @ R


def eigenvectors(G):
    """torch.linalg.eigh of G (n, n): energies, ascending, and vectors.

    On a GPU it takes Jacobi's method for fp32 up to 512 wide, whose vectors are orthogonal to
    2e-4 alone (H200; wider ones, and all in fp64, to rounding).
    """
    if G.is_cuda and len(G) <= 512:
        return (each.to(G.dtype) for each in torch.linalg.eigh(G.double()))
    return torch.linalg.eigh(G)


def lower_square(W, parts=8):
    """WᵀW (n, n), only its blocks on and below the diagonal: the triangle eigh reads."""
    n = W.shape[1]
    G = torch.zeros(n, n, dtype=W.dtype, device=W.device)
    step = -(-n // parts)
    for j in range(0, n, step):
        columns = slice(j, j + step)
        G[j:, columns] = W[:, j:].T @ W[:, columns]
    return G


BLOCK = 8           # ranks that share one pass over the large matrices


def als_sweep(Wp, P, U, sigma, Vh, ranks):
    """Algorithm 1, lines 3-9, as air.als_sweep, a third of the passes over m×n matrices.

    With a = σu and the weighted residual M = P ⊙ (W' − UΣVᵀ), E_r = residual + a vᵀ turns
    Eq. 5 into v + (aᵀM)/((a²)ᵀP) and Eq. 6 into a + (M'v)/(Pv²), M' being M after the
    step in v. BLOCK ranks at a time share one M: see `update_block`.
    """
    A = U * sigma
    V = Vh.clone()
    M = P * (Wp - A @ V)
    ranks = list(ranks)
    for i in range(0, len(ranks), BLOCK):
        block = ranks[i:i + BLOCK]
        update_block(M, P, A, V, block)
    sigma = A.norm(dim=0)                                   # Eq. 27
    tiny = torch.finfo(A.dtype).tiny
    return A / sigma.clamp_min(tiny), sigma, V


def update_block(M, P, A, V, ranks):
    """Update the columns `ranks` of A (m, k) = Uσ and rows of V (k, n), one by one.

    This and M's update are in place. M stays as it was at the start of the block. What
    ranks s already updated have changed in it, P ⊙ Σ(a'v'ᵀ − avᵀ), enters through
    products with P alone: aᵀ(P ⊙ a_s v_sᵀ) = ((a ∘ a_s)ᵀP) ∘ v_s and (P ⊙ a_s v_sᵀ)v =
    a_s ∘ (P(v_s ∘ v)), several of them in one pass over P.
    """
    tiny = torch.finfo(A.dtype).tiny
    b = len(ranks)
    a = A[:, ranks].T.contiguous()                          # (b, m): before
    v = V[ranks]                                            # (b, n)
    alive = (a != 0).any(dim=1).to(a.dtype)                 # a component of σ = 0 stays 0
    a_new = torch.empty_like(a)                             # after
    v_new = torch.empty_like(v)
    later, s = torch.tril_indices(b, b)
    old = torch.zeros(b, b, P.shape[1], dtype=P.dtype, device=P.device)
    old[later, s] = (a[later] * a[s]) @ P                   # (a_j ∘ a_s)ᵀP for s <= j
    top = a @ M                                             # a_jᵀM (b, n), kept current
    for j in range(b):
        # Eq. 5: v = v + (aᵀM) / ((a²)ᵀP)
        v_new[j] = v[j] + top[j] / old[j, j].clamp_min(tiny)
        # What multiplies P in Eq. 6, in one pass: P(v'_s ∘ v'_j), then P(v_s ∘ v'_j).
        both = torch.cat((v_new[:j + 1], v[:j + 1]))
        Pv = P @ (both * v_new[j]).T                        # (m, 2j + 2)
        after, before = Pv.split(j + 1, dim=1)
        # M'v is Mv less what the ranks before this one changed, and its own step in v.
        change = (a_new[:j].T * after[:, :j] - a[:j].T * before[:, :j]).sum(1)
        own = a[j] * (after[:, j] - before[:, j])
        step = M @ v_new[j] - change - own
        # Eq. 6: ũ = a + (M'v) / (P v²)
        a_new[j] = alive[j] * (a[j] + step / after[:, j].clamp_min(tiny))
        # What this rank's step changes for the ranks of the block that are still to come.
        if j + 1 < b:
            now = (a[j + 1:] * a_new[j]) @ P
            top[j + 1:] += old[j + 1:, j] * v[j] - now * v_new[j]
    # Algorithm 1, line 8, for the whole block.
    M.addcmul_(P, torch.cat((a_new, -a)).T @ torch.cat((v_new, v)), value=-1)
    A[:, ranks] = a_new.T
    V[ranks] = v_new


# ------------------------------------------------------------ stored matrices
FEW = 32            # rows up to which a matrix is multiplied slice by slice on a CPU


class Matrix:
    """Weights w_i (m_i, n) of one input, stored as one (m, n): x -> [x w_iᵀ (…, m_i)].

    The weights given become views of it: nothing is held twice, and their model still
    computes the same. On a CPU MKL multiplies few fp32 rows of x on one thread, which
    cannot draw the memory's bandwidth; as a batch, one slice of w a thread, it uses all.
    A tall matrix is stored column after column there: short rows are slow to sum. In bf16
    F.linear arranges w anew at every call; for a single row `mv` does not.
    """

    def __init__(self, *weights):
        like = weights[0]
        n = like.shape[1]
        host = like.device.type == "cpu"
        sliced = host and like.dtype == torch.float32
        self.single = host and like.dtype == torch.bfloat16     # one row goes through mv
        threads = torch.get_num_threads()
        self.sizes = [len(w) for w in weights]
        # Rows of zeros, so that all slices are equal.
        padding = -sum(self.sizes) % threads if sliced else 0
        self.sizes.append(padding)
        m = sum(self.sizes)
        tall = sliced and m >= 2 * n
        self.w = like.new_zeros(n, m).T if tall else like.new_zeros(m, n)
        # (threads, n, m/threads): a slice a thread
        self.slices = self.w.unflatten(0, (threads, -1)).mT if sliced else None
        parts = self.w.split(self.sizes)
        for weight, part in zip(weights, parts):
            weight.data = part.copy_(weight)

    def __call__(self, x):
        rows = x.numel() // x.shape[-1]
        if self.single and rows == 1:
            y = torch.mv(self.w, x.flatten()).view(*x.shape[:-1], -1)
        elif self.slices is None or rows > FEW:
            y = F.linear(x, self.w)
        else:
            flat = x.reshape(1, rows, -1)
            flat = flat.expand(len(self.slices), -1, -1)
            y = torch.bmm(flat, self.slices)                # (threads, rows, m/threads)
            y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
        if y.shape[-1] == self.sizes[0]:
            return [y]
        return y.split(self.sizes, dim=-1)[:-1]


class Weight:
    """A weight (m, n) as it is stored, for a compiled step: x (…, n) -> [x wᵀ (…, m)].

    There one row is multiplied by a sum, which fuses with what stands around it.
    """

    def __init__(self, weight):
        self.w = weight.detach()

    def __call__(self, x):
        if x.numel() > x.shape[-1] or not torch.compiler.is_compiling():
            return [F.linear(x, self.w)]
        y = (wide(self.w) * wide(x)[..., None, :]).sum(-1)
        return [y.to(x.dtype)]


class SharedInput:
    """Layers of one input: one product with their inner factors, one with each outer.

    The inner factor of a low-rank layer is V, of a dense one W; the outer is U, or
    nothing. `fuse` False: one product with each inner factor. `store`: Matrix or Weight.
    """

    def __init__(self, *layers, fuse=True, store=Matrix):
        first = [layer.V if isinstance(layer, LowRank) else layer for layer in layers]
        last = [layer.U if isinstance(layer, LowRank) else layer for layer in layers]
        inner = [layer.weight for layer in first]
        if fuse:
            self.V = [store(*inner)]
        else:
            self.V = [store(weight) for weight in inner]
        self.U = []
        for V, U in zip(first, last):
            # A dense layer is all inner.
            self.U.append(None if U.weight is V.weight else store(U.weight))
        self.bias = [layer.bias for layer in last]

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
    """Pad the ranks of a model's low-rank layers with zeros: same products, aligned rows.

    CUDA's fast 16-bit kernels need them aligned; a cached value of rank r grows with v_proj's.
    """
    for layer in model.modules():
        if isinstance(layer, LowRank):
            V = layer.V.weight
            U = layer.U.weight
            padding = -len(V) % multiple
            V.data = F.pad(V, (0, 0, 0, padding))               # (k + padding, n)
            U.data = F.pad(U, (0, padding))                     # (m, k + padding)


# ------------------------------------------------------------ a compiled step
def compiled(function):
    """`function` as torch.compile makes it at its first call.

    Raises InputError where there is no C++ compiler, or where it fails.
    """
    from torch._dynamo.exc import TorchDynamoException      # a second; only where it is used
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.partition(" ")[0]) is None:
        raise InputError(f"--compile needs a C++ compiler, found no {compiler}; install "
                         "one, name it in CXX, or leave --compile out")
    # Each decoder's own; another number of rows is compiled once more.
    how = {"isolate_recompiles": True, "recompile_limit": 64}
    try:
        fast = torch.compile(function, fullgraph=True, **how)
    except TypeError:
        raise InputError(f"--compile needs torch 2.13 or later, found {torch.__version__}; "
                         "leave --compile out") from None

    def run(*args):
        try:
            return fast(*args)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"torch.compile failed ({reason}); it needs a C++ compiler, "
                             "Python's headers and a path of torch's own without spaces; "
                             "leave --compile out") from error
    return run


def matmul(a, b):
    """a (…, m, n) @ b (…, n, p); while it is compiled a sum, which fuses with the rest."""
    if not torch.compiler.is_compiling():
        return a @ b
    return (wide(a)[..., None] * wide(b)[..., None, :, :]).sum(-2).to(a.dtype)


def of_any_size(tensor, *dimensions):
    """A tensor that is to be compiled once for all sizes of its `dimensions`."""
    for i in dimensions:
        torch._dynamo.maybe_mark_dynamic(tensor, i)


def of_any_rank(layers):
    """A SharedInput whose ranks differ from block to block."""
    for V, U in zip(layers.V, layers.U):
        if U is not None:
            of_any_size(V.w, 0)
            of_any_size(U.w, 1)


# ------------------------------------------------------------ a step on CUDA
SPAN = 256          # a captured step attends to a multiple of this many columns


class Graphs:
    """A decoding step on CUDA, captured once for every SPAN columns and then replayed.

    body(span): the step over the first `span` of `width` columns, the same kernels on the
    same tensors at every call. The first step of a span runs as it is and warms up what
    capturing needs.
    """

    def __init__(self, body, width):
        self.body = body
        self.width = width
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __len__(self):
        return len(self.graphs)

    def step(self, span):
        """Run the step over `span` columns, or what that is rounded up to."""
        spans = -(-span // SPAN)
        span = min(spans * SPAN, self.width)
        if span in self.graphs:
            self.graphs[span].replay()
            return
        self.body(span)
        self.graphs[span] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[span], pool=self.pool):
            self.body(span)                         # recorded for the next ones, not run
