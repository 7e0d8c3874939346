"""air.py's mathematics against brute force in float64, the paper's identities and the authors' numbers."""
import numpy as np
import pytest
import torch

import air as A
from calibrate import embed
from conftest import ROOT, TINY, air_main, distance, in_process, write_checkpoint
from model import LAYERS, READS
from support.checkpoint import Checkpoint
from support.script import InputError


def problem(m=12, n=10, tokens=40, seed=0):
    """Random W (m, n), activations X (n, tokens), S, and a spread-out influence of unit mean; float64."""
    g = torch.Generator().manual_seed(seed)
    W, X = (
        torch.randn(m, n, generator=g).double(),
        torch.randn(n, n, generator=g).double() @ torch.randn(n, tokens, generator=g).double(),
    )
    I = torch.rand(m, n, generator=g).double() ** 4
    return W, X, A.profile(X @ X.T)[0], I / I.mean()


def by_regressions(Wp, P, U, sigma, Vh, ranks):
    """The sweep by brute force: every number of v_r, then of ũ_r, solves a weighted regression of its own."""
    U, sigma, Vh = U.clone(), sigma.clone(), Vh.clone()
    solve = lambda a, b, p: torch.linalg.lstsq((p.sqrt() * a)[:, None], p.sqrt() * b).solution[0]           # noqa: E731
    for r in ranks:
        others = [s for s in range(len(sigma)) if s != r]
        E = Wp - (U[:, others] * sigma[others]) @ Vh[others]
        Vh[r] = torch.stack([solve(sigma[r] * U[:, r], E[:, j], P[:, j]) for j in range(E.shape[1])])
        u = torch.stack([solve(Vh[r], E[i], P[i]) for i in range(E.shape[0])])
        sigma[r], U[:, r] = u.norm(), u / u.norm()
    return U, sigma, Vh


# ---- Eq. 1


def test_profile_is_a_lower_cholesky_factor():
    W, X, S, _ = problem()
    assert torch.allclose(S @ S.T, X @ X.T) and torch.equal(S, S.tril())
    assert A.profile(X @ X.T)[1] == 0
    assert torch.allclose((W @ S).norm(), (W @ X).norm())                   # ‖WS‖ = ‖WX‖


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_profile_repairs_relative_to_the_diagonal(scale):
    X = torch.randn(10, 4).double()
    gram = scale * X @ X.T                                                  # rank 4 of 10
    S, shift = A.profile(gram)
    assert 0 < shift < 1e-6
    assert torch.allclose(S @ S.T, gram + shift * gram.diagonal().diag(), rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("ridge", [0.0, 0.03])
@pytest.mark.parametrize("tokens", [4, 40])
def test_profile_knows_no_units(tokens, ridge):
    """Channels measured in other units: S follows, so the repair drowns none (real models' differ by 1e6 and more)."""
    X, units = torch.randn(10, tokens).double(), torch.logspace(-6, 6, 10).double()
    S, shift = A.profile(X @ X.T, ridge)
    scaled, same = A.profile((units[:, None] * X) @ (units[:, None] * X).T, ridge)
    assert same == shift and shift >= ridge
    assert torch.allclose(scaled / units[:, None], S, rtol=1e-6, atol=1e-7)


def test_ridge_is_a_share_of_the_own_diagonal():
    X = torch.randn(10, 40).double() * torch.logspace(-3, 3, 10)[:, None].double()
    S, shift = A.profile(X @ X.T, 0.5)
    expected = X @ X.T
    for j in range(10):
        expected[j, j] *= 1.5
    assert shift == 0.5 and torch.allclose(S @ S.T, expected)


def few_tokens(seed, n=96, m=64, tokens=64):
    """(W, ΣXXᵀ of fewer tokens than inputs, a skewed I, fresh X): channels of many energies, mixed and correlated."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) * torch.logspace(0, -2, n)
    energy = torch.logspace(-1, 1, n)[torch.randperm(n, generator=g), None]
    X, fresh = (energy * (mix @ torch.randn(n, t, generator=g)) for t in (tokens, 2000))
    W, I = torch.randn(m, n, generator=g) / energy.T, torch.rand(m, n, generator=g) ** 4
    return W, X @ X.T, I / I.mean(), fresh


@pytest.mark.parametrize("seed", range(3))
def test_the_ridge_keeps_few_tokens_from_being_magnified(seed):
    """Without it the weighted fit leaves errors where there is no energy, and S⁻¹ magnifies them on other tokens."""
    W, gram, I, fresh = few_tokens(seed)

    def error(ridge, delta):
        U, V, losses = A.air(W, A.profile(gram, ridge)[0], I, 38, delta)
        assert losses.after <= losses.before * 1.00001                       # "improved", in either case
        return ((W - U @ V) @ fresh).norm()
    assert error(0.0, 2.0) > 1.4 * error(0.0, 0.0)
    assert error(0.003, 2.0) < 1.15 * error(0.0, 0.0)
    assert error(0.003, 0.0) < 1.01 * error(0.0, 0.0)                       # SVD-LLM(W) does not lose by it


def test_the_ridge_follows_the_tokens(tiny, windows):
    ckpt = Checkpoint(tiny)
    sweep = A.statistics(ckpt, windows, torch.device("cpu"), torch.float32, range(2))
    ranks = A.pick_ranks(ckpt, range(2), 0.5)
    for l, stats in sweep:
        for ridge in (None, 0.0, 0.25):
            for layer in A.layers_of(ckpt, l, stats, ranks, "cpu", ridge):
                n = layer.W.shape[1]
                expected = 0.1 * (n / 144) ** 1.5 if ridge is None else ridge
                gram = layer.inputs.gram
                assert torch.allclose(layer.S @ layer.S.T, gram + expected * gram.diagonal().diag())
                assert layer.inputs.repair == 0


def test_profile_of_what_is_not_finite_ends():
    with pytest.raises(RuntimeError, match="not finite"):
        A.profile(torch.full((3, 3), torch.nan))


def test_profile_repairs_an_input_that_is_always_zero():
    X = torch.randn(6, 40).double()
    X[2] = 0
    S, shift = A.profile(X @ X.T)
    assert shift > 0 and torch.isfinite(torch.linalg.inv(S)).all()
    assert torch.isfinite(A.profile(torch.zeros(4, 4))[0]).all()


# ---- Eq. 3


def test_svdllm_error_is_the_dropped_singular_values():
    """‖(W − Ŵ)X‖² = Σ_{r>=k} σ_r(WS)², and no rank-k matrix does better (here: a thousand random ones near it)."""
    W, X, S, _ = problem()
    U, V = A.svdllm(W, S, 4)
    error = ((W - U @ V) @ X).square().sum()
    assert torch.allclose(error, torch.linalg.svdvals(W @ X)[4:].square().sum())
    for i in range(1000):
        g = torch.Generator().manual_seed(i)
        other = (U + 0.01 * torch.randn(U.shape, generator=g)) @ (V + 0.01 * torch.randn(V.shape, generator=g))
        assert ((W - other) @ X).square().sum() > error


@pytest.mark.parametrize("shape", [(12, 10), (7, 10)])
def test_full_rank_reconstructs_the_weight(shape):
    W, _, S, I = problem(*shape)
    k = min(shape)
    for U, V in (
        A.svdllm(W, S, k),
        A.svd(W, k),
        A.fwsvd(W, I, k),
        A.fwsvd(W, I, k, "out"),
        A.asvd(W, I[0], k),
        A.air(W, S, I, k)[:2],
    ):
        assert U.shape == (shape[0], k) and V.shape == (k, shape[1])
        assert distance(U @ V, W) < 1e-10


# ---- Eqs. 4, 5, 6


def test_delta_zero_and_uniform_influence_equal_svdllm():
    W, _, S, I = problem()
    U, V = A.svdllm(W, S, 4)
    for other in (
        A.air(W, S, I, 4, delta=0.0),
        A.air(W, S, torch.ones_like(I), 4, delta=2.0),
        A.air(W, S, I, 4, orders=()),
    ):
        assert distance(other[0] @ other[1], U @ V) < 1e-10
    assert distance(A.air(W, S, I, 4)[0] @ A.air(W, S, I, 4)[1], U @ V) > 1e-2          # and with influence it moves


def test_objective_is_equation_4():
    W, _, S, I = problem()
    U, sigma, Vh = A.truncated_svd(W @ S, 4)
    approx, total = (U * sigma @ Vh).tolist(), 0.0
    for i in range(12):
        for j in range(10):
            total += (1 + 2 * I[i, j].item()) * ((W @ S)[i, j].item() - approx[i][j]) ** 2
    assert A.objective(W @ S, 1 + 2 * I, U, sigma, Vh) == pytest.approx(total)


@pytest.mark.parametrize("r", [0, 2, 3])
def test_each_update_is_a_weighted_least_squares_solution(r):
    """Eq. 5 column by column, Eq. 6 row by row: solve the small weighted regressions by lstsq."""
    W, _, S, I = problem()
    Wp, P = W @ S, 1 + 2 * I
    U, sigma, Vh = A.truncated_svd(Wp, 4)
    U2, sigma2, Vh2 = A.als_sweep(Wp, P, U, sigma, Vh, [r])
    E = Wp - (U * sigma) @ Vh + sigma[r] * torch.outer(U[:, r], Vh[r])
    v = torch.stack(
        [
            torch.linalg.lstsq((P[:, j].sqrt() * sigma[r] * U[:, r])[:, None], P[:, j].sqrt() * E[:, j]).solution[0]
            for j in range(10)
        ]
    )
    u = torch.stack([torch.linalg.lstsq((P[i].sqrt() * v)[:, None], P[i].sqrt() * E[i]).solution[0] for i in range(12)])
    assert torch.allclose(Vh2[r], v) and torch.allclose(U2[:, r] * sigma2[r], u)
    assert sigma2[r] == pytest.approx(u.norm().item())
    others = [s for s in range(4) if s != r]
    assert torch.allclose((U2 * sigma2)[:, others], (U * sigma)[:, others]) and torch.equal(Vh2[others], Vh[others])


@pytest.mark.parametrize("order", ["backward", "forward"])
def test_sweep_equals_regressions_one_number_at_a_time(order):
    W, _, S, I = problem(30, 20)
    Wp, P = W @ S, 1 + 2 * I
    start, ranks = A.truncated_svd(Wp, 8), range(7, -1, -1) if order == "backward" else range(8)
    U, sigma, Vh = by_regressions(Wp, P, *start, ranks)
    U2, sigma2, Vh2 = A.als_sweep(Wp, P, *start, ranks)
    assert distance(U2, U) < 1e-9 and distance(sigma2, sigma) < 1e-9 and distance(Vh2, Vh) < 1e-9
    Uk, Vk, losses = A.air(W, S, I, 8, 2.0, (order,))
    assert distance(Uk @ Vk @ S, (U * sigma) @ Vh) < 1e-9                    # and air() does it in this order
    if order == "backward":
        assert distance(A.air(W, S, I, 8)[0], Uk) == 0
        assert distance(A.air(W, S, I, 8, orders=("forward",))[0], Uk) > 1e-3
    assert losses[1] == pytest.approx(A.objective(Wp, P, *start)) and losses[2] == pytest.approx(
        A.objective(Wp, P, U, sigma, Vh)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_falls_at_every_step(seed):
    """Proposition 3.1, for two sweeps, with influence over six orders of magnitude."""
    W, _, S, _ = problem(seed=seed)
    P = 1 + 2 * torch.exp(torch.randn(12, 10, generator=torch.Generator().manual_seed(seed)).double() * 3)
    Wp, state = W @ S, A.truncated_svd(W @ S, 5)
    losses = [A.objective(Wp, P, *state)]
    for r in [4, 3, 2, 1, 0] * 2:
        state = A.als_sweep(Wp, P, *state, [r])
        losses.append(A.objective(Wp, P, *state))
    assert all(b <= a * (1 + 1e-12) for a, b in zip(losses, losses[1:])) and losses[5] < losses[0] * 0.99


def test_rank_beyond_the_matrix_rank_stays_finite():
    W = torch.randn(12, 2).double() @ torch.randn(2, 10).double()
    _, _, S, I = problem()
    U, V, _ = A.air(W, S, I, 5)
    assert torch.isfinite(U).all() and torch.isfinite(V).all() and distance(U @ V, W) < 1e-6


def test_native_factors_share_the_singular_values():
    W, _, S, _ = problem()
    U, sigma, Vh = A.truncated_svd(W @ S, 4)
    Uk, Vk = A.native_factors(U, sigma, Vh, S)
    assert torch.allclose(Uk, U * sigma.sqrt()) and torch.allclose(Vk @ S, sigma.sqrt()[:, None] * Vh)


# ---- influence scaling, the other methods, ranks


def test_normalise(official):
    _, numbers = official
    for l in range(2):
        for name in LAYERS:
            layer = f"model.layers.{l}.{name}"
            raw = torch.from_numpy(numbers[f"lrp/{layer}"])
            assert distance(A.normalise(raw), numbers[f"influence_unit/{layer}"]) < 1e-5
            assert distance(A.normalise(raw, "max100"), numbers[f"influence_max100/{layer}"]) < 1e-4


def test_normalise_of_nothing_stays_finite():
    for scale in ("mean", "max100"):
        assert torch.isfinite(A.normalise(torch.zeros(3, 4), scale)).all()
        assert torch.isfinite(A.normalise(torch.ones(3, 4), scale)).all()


def test_fwsvd_and_asvd_minimise_their_own_weighted_errors():
    """FWSVD: √F on inputs (columns) or outputs; ASVD: (mean |x|)^0.5. Each beats plain SVD by its own measure."""
    W, X, _, I = problem()
    mean_abs = X.abs().mean(1)
    plain = A.svd(W, 4)
    for (U, V), weigh in ((A.fwsvd(W, I, 4), lambda D: D * (I.sum(0) + 1e-5).sqrt()),
                          (A.fwsvd(W, I, 4, "out"), lambda D: D * (I.sum(1) + 1e-5).sqrt()[:, None]),
                          (A.asvd(W, mean_abs, 4), lambda D: D * (mean_abs ** 0.5 + 1e-6))):
        error = weigh(W - U @ V).square().sum()
        assert torch.allclose(error, torch.linalg.svdvals(weigh(W))[4:].square().sum())
        assert error < weigh(W - plain[0] @ plain[1]).square().sum()


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_rank_keeps_at_most_the_rate(rate):
    for m, n in ((4096, 4096), (11008, 4096), (256, 128)):
        k = A.rank_at(rate, m, n)
        assert k * (m + n) <= rate * m * n + 1e-6 and rate * m * n < (k + 1) * (m + n)
    assert A.rank_at(0.57, 200, 200) == 57 and A.rank_at(0.6, 4096, 4096) == 1228  # Section 4.2


@pytest.mark.parametrize("scale", ["unit", "max100"])
def test_reconstructions_equal_the_authors(official, scale):
    from safetensors.torch import load_file
    folder, numbers = official
    weights = load_file(folder / "model.safetensors")
    for key in numbers.files:
        if key.startswith("rank/"):
            layer, k = key[5:], int(numbers[key])
            W = weights[layer + ".weight"]
            S, shift = A.profile(torch.from_numpy(numbers[f"gram/{layer}"]))
            U, V = A.svdllm(W, S, k)
            assert shift == 0 and distance(U @ V, numbers[f"svd_llm_w/{layer}"]) < 1e-4
            U, V, losses = A.air(W, S, torch.from_numpy(numbers[f"influence_{scale}/{layer}"]), k)
            assert A.rank_at(0.6, *W.shape) == k and distance(U @ V, numbers[f"air_{scale}/{layer}"]) < 2e-3
            assert np.allclose(losses[:3], numbers[f"loss_{scale}/{layer}"], rtol=1e-3)


def test_cuda_equals_cpu(gpu):
    W, _, S, I = problem(200, 120, 400)
    cpu, gpu = A.air(W, S, I, 30), A.air(W.cuda(), S.cuda(), I.cuda(), 30)
    assert distance((gpu[0] @ gpu[1]).cpu(), cpu[0] @ cpu[1]) < 1e-8


# ---- the two-sided metric


def metric(m=12, tokens=60, seed=5):
    """B (m, m) of random gradients, and its Cholesky factor."""
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(m, m, generator=g).double() @ torch.randn(m, tokens, generator=g).double()
    return G @ G.T, torch.linalg.cholesky(G @ G.T)


def two_sided_loss(D, A_, B):
    return torch.trace(B @ D @ A_ @ D.T)


def alternating(W, A_, B, k, seed, rounds=500):
    """min tr(B D A Dᵀ), D = W − UV, from a random start by each factor's normal equations."""
    V = torch.randn(k, W.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    for _ in range(rounds):
        U = W @ A_ @ V.T @ torch.linalg.inv(V @ A_ @ V.T)
        V = torch.linalg.inv(U.T @ B @ U) @ U.T @ B @ W
    return U, V


@pytest.mark.parametrize("k", [1, 4, 9])
def test_kfac_is_the_optimum_of_the_error_in_both_metrics(k):
    W, X, S, _ = problem()
    A_, (B, L) = X @ X.T, metric()
    U, V, sigma = A.kfac(W, S, L, k)
    loss = two_sided_loss(W - U @ V, A_, B)
    # Other roots of the same metrics have the same singular values; the dropped ones are the loss.
    Q, R = (torch.linalg.eigh(M) for M in (B, A_))
    values = torch.linalg.svdvals(Q[0].sqrt()[:, None] * (Q[1].T @ W @ R[1]) * R[0].sqrt())
    assert torch.allclose(loss, values[k:].square().sum(), rtol=1e-8)
    assert torch.allclose(sigma, values[:k], rtol=1e-8)
    best = min(two_sided_loss(W - u @ v, A_, B) for u, v in (alternating(W, A_, B, k, seed) for seed in range(3)))
    assert loss <= best * (1 + 1e-9) and torch.allclose(loss, best, rtol=1e-3)
    # SVD-LLM(W) does worse there; without a metric of the outputs it is the same.
    assert loss < two_sided_loss(W - torch.matmul(*A.svdllm(W, S, k)), A_, B) * (1 - 1e-3)
    same = torch.matmul(*A.kfac(W, S, torch.eye(12).double(), k)[:2])
    assert torch.allclose(same, torch.matmul(*A.svdllm(W, S, k)))


def test_kfac_air_without_influence_is_kfac_and_with_it_its_loss_falls():
    W, X, S, I = problem()
    _, L = metric()
    wanted = torch.matmul(*A.kfac(W, S, L, 4)[:2])
    for delta, orders in ((0.0, ("backward",)), (2.0, ())):
        U, V, losses = A.kfac_air(W, (S, L), I, 4, delta, orders)
        assert torch.allclose(U @ V, wanted, atol=1e-8)
    U, V, losses = A.kfac_air(W, (S, L), I, 4, 2.0)
    assert losses.after < losses.before
    # Its own objective, from what it returns: the residual between the symmetric roots, weighted by 1 + δI.
    (Q, _), (R, _) = A.square_root(L), A.square_root(S)
    found = ((1 + 2 * I) * (Q @ (W - U @ V) @ R).square()).sum().item()
    assert found == pytest.approx(losses.after, rel=1e-6)


def test_square_root_is_symmetric_and_its_inverse_one():
    _, L = metric()
    root, inverse = A.square_root(L)
    assert torch.allclose(root, root.T) and torch.allclose(root @ root, L @ L.T)
    assert torch.allclose(root @ inverse, torch.eye(12).double(), atol=1e-8)


@pytest.mark.parametrize("rank", [12, 5])
def test_blended_mixes_in_the_mean_diagonal_only_where_it_must(rank):
    X = torch.randn(12, rank, generator=torch.Generator().manual_seed(1)).double()
    M = X @ X.T
    S = A.blended(M)
    made = S @ S.T
    if rank == 12:
        assert torch.allclose(made, M)
        return
    share = (made - M)[0, 1] / -M[0, 1]                                     # α, from an element off the diagonal
    assert 0 < share < 1e-6
    wanted = (1 - share) * M + share * M.diagonal().mean() * torch.eye(12).double()
    assert torch.allclose(made, wanted, atol=1e-9 * M.diagonal().mean())


def test_the_two_sided_methods_run_on_a_models_own_statistics(tiny, windows):
    """The error each minimises, from whole-model gradients' statistics, is below SVD-LLM(W)'s in every layer."""
    ckpt = Checkpoint(str(tiny))
    for signal, method in (("kfac", "kfac"), ("gfwsvd", "gfwsvd")):
        ranks = A.pick_ranks(ckpt, range(2), 0.5)
        for l, stats in A.statistics(ckpt, windows, torch.device("cpu"), torch.float32, range(2), signal):
            for layer in A.layers_of(ckpt, l, stats, ranks, "cpu", 0.0):
                own, base = (A.solve(layer, A.Options(method=each))[:2] for each in (method, "svdllm"))
                B = layer.collected[f"B.{signal}"]
                A_ = layer.collected["A.gfwsvd"] if signal == "gfwsvd" else layer.inputs.gram
                if signal == "kfac":
                    B = layer.L @ layer.L.T
                losses = [two_sided_loss((layer.W - U @ V).double(), A_, B) for U, V in (own, base)]
                assert losses[0] <= losses[1] * (1 + 1e-4), layer.name


# -------------------------------------------------------------------------------- two streams
def test_the_anchored_form_is_the_least_squares_optimum_over_both_streams():
    """Against alternating least squares on the tokens themselves, in float64."""
    g = torch.Generator().manual_seed(0)
    X, noise = (torch.randn(8, 300, dtype=torch.float64, generator=g) for _ in range(2))
    X_hat = X + 0.5 * noise
    W = torch.randn(6, 8, dtype=torch.float64, generator=g)
    S, _ = A.profile(X_hat @ X_hat.T)
    moved = A.anchored(W, S, X @ X_hat.T)
    assert distance(moved, (torch.linalg.lstsq(X_hat.T, (W @ X).T).solution).T) < 1e-9
    U, V = A.svdllm(moved, S, 3)
    found = (W @ X - U @ V @ X_hat).square().sum()
    P = torch.randn(6, 3, dtype=torch.float64, generator=g)
    for _ in range(500):                                    # Y ≈ P B X̂, one factor at a time
        B = torch.linalg.lstsq(P, W @ X).solution @ torch.linalg.pinv(X_hat)
        P = torch.linalg.lstsq((B @ X_hat).T, (W @ X).T).solution.T
    best = (W @ X - P @ B @ X_hat).square().sum()
    assert torch.isclose(found, best, rtol=1e-6)
    ours = A.svdllm(W, S, 3)
    assert (W @ X - ours[0] @ ours[1] @ X_hat).square().sum() > found * 1.001
    # With one stream, ridge or none, it is SVD-LLM(W).
    for ridge in (0.0, 0.3):
        x = A.Inputs("", X @ X.T, None, ridge, X @ X.T)
        assert distance(A.anchored(W, x.profiled[0], x.anchor), W) < 1e-9


def test_the_anchored_two_sided_form_is_the_optimum_in_both_metrics():
    """‖Lᵀ(WX − UVX̂)‖² against alternating least squares on the tokens, in float64."""
    g = torch.Generator().manual_seed(1)
    X, noise = (torch.randn(8, 300, dtype=torch.float64, generator=g) for _ in range(2))
    X_hat = X + 0.5 * noise
    W, G = (torch.randn(6, 8, dtype=torch.float64, generator=g) for _ in range(2))
    L = torch.linalg.cholesky(G @ G.T)
    S, _ = A.profile(X_hat @ X_hat.T)
    U, V, _ = A.kfac(A.anchored(W, S, X @ X_hat.T), S, L, 2)
    found = (L.T @ (W @ X - U @ V @ X_hat)).square().sum()
    aim = L.T @ W @ X
    P = torch.randn(6, 2, dtype=torch.float64, generator=g)
    for _ in range(500):
        B = torch.linalg.lstsq(P, aim).solution @ torch.linalg.pinv(X_hat)
        P = torch.linalg.lstsq((B @ X_hat).T, aim.T).solution.T
    assert torch.isclose(found, (aim - P @ B @ X_hat).square().sum(), rtol=1e-6)
    U, V, _ = A.kfac(W, S, L, 2)
    assert (L.T @ (W @ X - U @ V @ X_hat)).square().sum() > found * 1.001


def test_every_method_reads_both_streams(tiny, windows, tmp_path):
    """Signals are the dense model's; --method aasvd is SVD-LLM(W) of anchored weights; AIR's sweep starts there."""
    ckpt, host = Checkpoint(tiny), torch.device("cpu")
    np.save(tmp_path / "w.npy", windows.numpy())
    dense = dict(A.statistics(ckpt, windows, host, torch.float32, range(2), "kfac"))
    ranks = A.pick_ranks(ckpt, range(2), 0.5)
    h = embed(ckpt, windows, torch.float32)
    for l, stats in A.anchored_sweep(ckpt, h, host, range(2), 1.0, iter(dense.items())):
        assert {f"{name}.{what}kfac" for name in LAYERS for what in ("", "B.")} == set(stats)
        for layer in A.layers_of(ckpt, l, stats, ranks, host, 0.0):
            name = layer.name.removeprefix(f"model.layers.{l}.")
            assert torch.equal(layer.collected["B.kfac"], dense[l][f"{name}.B.kfac"])
            assert torch.equal(layer.influence("kfac"), dense[l][f"{name}.kfac"])
            if not l and name in ("self_attn.q_proj", "self_attn.v_proj"):      # nothing is decomposed before them
                assert distance(layer.W, ckpt.tensor(layer.name + ".weight")) < 1e-4
                assert distance(layer.mean_abs, dense[l]["self_attn.q_proj.mean_abs"]) < 1e-5
            stats.replace(name, *A.svdllm(layer.W, layer.S, layer.k))
    made = {}
    alone = [(method,) for method in A.METHODS if method != "svd"]
    for method, *more in (*alone, ("air", "--delta", "0"), ("air", "--signal", "ones")):
        out = tmp_path / "-".join((method, *more))
        done = in_process("air", "--ckpt", tiny, "--method", method, "--anchor", "1", "--out", out, "--calib",
                      tmp_path / "w.npy", "--text", "none", "--rate", "0.5", *more)
        assert done.returncode == 0, done.stderr
        made[out.name] = Checkpoint(out)
    name = "model.layers.1.mlp.down_proj"

    def product(which):
        return made[which].tensor(f"{name}.U.weight") @ made[which].tensor(f"{name}.V.weight")
    assert torch.equal(product("aasvd"), product("svdllm"))
    assert distance(product("air---delta-0"), product("svdllm")) < 1e-3
    assert distance(product("air"), product("svdllm")) > 1e-2 < distance(product("kfac"), product("svdllm"))
    assert made["air"].raw["air"]["anchor"] == 1.0
    for method, share, said in (("svd", "1", "reads no inputs"), ("air", "1.5", "0 to 1"), ("air", "nan", "0 to 1")):
        done = in_process("air", "--ckpt", tiny, "--method", method, "--anchor", share, "--out", tmp_path / "no")
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("share", (1.0, 0.3))
def test_both_streams_are_collected_behind_what_is_decomposed(tiny, windows, tmp_path, share):
    """Every ΣX̂X̂ᵀ and ΣXX̂ᵀ against two whole models, the second's layers replaced one group at a time."""
    ckpt = Checkpoint(tiny)
    whole, small = ckpt.model(), ckpt.model()
    ranks = A.pick_ranks(ckpt, range(2), 0.5)
    options = A.Options("aasvd", ridge=0.0)
    seen = {}

    def inputs(model, name):
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda _, args: seen.update({name: args[0].flatten(0, 1).double()}))
        with torch.no_grad():
            model(windows)
        hook.remove()
        return seen[name]
    for l, stats in A.anchored_sweep(ckpt, embed(ckpt, windows, torch.float32), torch.device("cpu"), range(2), share):
        for solved in A.compress_block(ckpt, l, stats, ranks, options, torch.device("cpu")):
            short = solved.layer.removeprefix(f"model.layers.{l}.")
            if READS[short] == short:
                x, x_hat = inputs(whole, solved.layer), inputs(small, solved.layer)
                assert distance(stats[f"{short}.gram"], x_hat.T @ x_hat) < 1e-5, solved.layer
                aim = share * x + (1 - share) * x_hat
                assert distance(stats[f"{short}.cross"], aim.T @ x_hat) < 1e-5, solved.layer
            U, V = (solved.tensors[f"{solved.layer}.{which}.weight"] for which in "UV")
            small.get_submodule(solved.layer).weight.data = U @ V
    for more, how in ((("--stats", tmp_path / "s"), ("--method", "aasvd")),
                      (("--spill", tmp_path / "s"), ("--anchor", "0"))):
        np.save(tmp_path / "w.npy", windows.numpy())
        done = in_process("air", "--ckpt", tiny, *how, "--out", tmp_path / "o", *more,
                      "--calib", tmp_path / "w.npy", "--text", "none")
        assert done.returncode == 2 and "without --stats and --spill" in done.stderr
    how = ("aasvd",) if share == 1.0 else ("svdllm", "--anchor", share)
    done = in_process("air", "--ckpt", tiny, "--method", *how, "--out", tmp_path / "o", "--calib", tmp_path / "w.npy",
                  "--text", "none", "--ridge", "0", "--rate", "0.5")
    assert done.returncode == 0, done.stderr
    written = Checkpoint(tmp_path / "o")
    for name, w in small.state_dict().items():
        if name.endswith("proj.weight"):
            U, V = (written.tensor(name.replace("weight", f"{which}.weight")) for which in "UV")
            assert distance(U @ V, w) < 1e-3


@pytest.mark.parametrize("how", [("kfac", "--anchor", "0.3", "--ranks", "mixed", "--rate", "0.8"),
                                 ("air", "--anchor", "0.5", "--layers", "1:4")], ids=lambda how: how[0])
def test_a_killed_anchored_run_goes_on_behind_its_last_block(how, windows, tmp_path, monkeypatch, capsys):
    """Ends in the same file: the compressed stream goes through what was written, rounded to bf16, biases included."""
    config = TINY | {"num_hidden_layers": 4, "attention_bias": True}
    write_checkpoint(tmp_path / "m", config, dtype=torch.bfloat16, architectures=["Qwen2ForCausalLM"])
    np.save(tmp_path / "w.npy", windows.numpy())
    usual = ("--ckpt", tmp_path / "m", "--calib", tmp_path / "w.npy", "--text", "none", "--device", "cpu", "--method")
    air_main(monkeypatch, *usual, *how, "--out", tmp_path / "whole")
    solve_block, solved = A.solve_block, []

    def until(last):
        def counted(job, l, *more):
            if l > last:
                raise KeyboardInterrupt
            solved.append(l)
            return solve_block(job, l, *more)
        return counted
    finish = A.report.finish
    for last in (1, 2):                                             # killed within block 2, then within block 3
        monkeypatch.setattr(A, "solve_block", until(last))
        with pytest.raises(KeyboardInterrupt):
            air_main(monkeypatch, *usual, *how, "--out", tmp_path / "parts")
        assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(A, "solve_block", until(3))
    monkeypatch.setattr(A.report, "finish", lambda *_: 1 / 0)       # killed with every block on disk
    with pytest.raises(ZeroDivisionError):
        air_main(monkeypatch, *usual, *how, "--out", tmp_path / "parts")
    monkeypatch.setattr(A.report, "finish", finish)
    capsys.readouterr()
    first = 1 if "--layers" in how else 0
    with pytest.raises(InputError, match="was made with another delta"):
        air_main(monkeypatch, *usual, *how, "--out", tmp_path / "parts", "--delta", "1")
    with pytest.raises(InputError, match="holds finished parts of a run"):
        air_main(monkeypatch, *usual, "svdllm", "--out", tmp_path / "parts")
    air_main(monkeypatch, *usual, *how, "--out", tmp_path / "parts")
    assert f"going on: {4 - first} of {4 - first} blocks" in capsys.readouterr().err
    assert solved == list(range(first, 4)) and not list(tmp_path.glob("*.partial"))
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_kinds_are_swept_or_stay_the_start():
    """--kinds: AIR's factors for a layer that is named, SVD-LLM(W)'s approximation for one that is not."""
    torch.manual_seed(0)
    inputs = A.Inputs("", (x := torch.randn(40, 7).double()).T @ x, None, 0.0)
    layer = A.Layer("model.layers.0.mlp.up_proj", torch.randn(9, 7), 4, inputs, {"lrp": torch.rand(9, 7)})
    swept, named, both, left = (A.METHODS["air"].factors(layer, A.Options(kinds=kinds))
                                for kinds in ("all", "gate_proj,up_proj", "all,q_proj", "gate_proj,down_proj"))
    assert torch.equal(swept[0], both[0])
    assert torch.equal(swept[0], named[0]) and torch.equal(swept[1], named[1])
    start = A.METHODS["svdllm"].factors(layer, A.Options())
    assert distance(left[0] @ left[1], start[0] @ start[1]) < 1e-5 < distance(swept[0] @ swept[1], start[0] @ start[1])
    assert left[2].after == pytest.approx(left[2].before) and swept[2].after < swept[2].before


def test_a_kind_that_is_none_is_refused(tmp_path):
    done = in_process("air", "--ckpt", ROOT / "demo", "--kinds", "gate_proj,top_proj", "--out", tmp_path / "out")
    assert done.returncode == 2 and "--kinds has 'top_proj'; expected all, or some of q_proj," in done.stderr
