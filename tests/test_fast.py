"""support/fast.py gives what air.py's readable lines give."""
import pytest
import torch

import air
from support import fast
from conftest import distance

@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return "cpu" if request.param == "cpu" else request.getfixturevalue("gpu")


def with_spectrum(m, n, sigma, seed=0):
    """A matrix (m, n) in fp32 whose singular values are sigma (min(m, n),), to rounding."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, len(sigma), generator=g, dtype=torch.float64)).Q for size in (m, n))
    return ((U * sigma) @ V.T).float()


@pytest.mark.parametrize(
    "m, n, k", [(300, 300, 90), (500, 300, 111), (200, 420, 81), (300, 300, 20), (300, 300, 300), (600, 560, 200)]
)
@pytest.mark.parametrize(
    "decay, outliers",
    [(0.1, ()), (1, ()), (3, ()), (1, (300, 100, 30, 10)), (3, (1000, 900)), (8, ()), (20, ()), (0, ())],
)
def test_truncated_svd_is_optimal(m, n, k, decay, outliers, device):
    """The energy it leaves is the least possible (LAPACK in fp64) to 1e-6, or no worse than the fp32 SVD leaves.

    Spectra from flat to steep, with and without directions of 1e6 times the energy, whose square fp32 cannot hold.
    """
    sigma = torch.logspace(0, -decay / 2, min(m, n), dtype=torch.float64)
    sigma[:len(outliers)] = torch.tensor(outliers, dtype=torch.float64)
    W = with_spectrum(m, n, sigma)
    least = torch.linalg.svdvals(W.double())[k:].square().sum()

    def excess(U, sigma, Vh):
        left = (W.double() - (U * sigma).double().cpu() @ Vh.double().cpu()).square().sum()
        return ((left - least) / (least + 1e-12 * W.double().square().sum())).item()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    factors = fast.truncated_svd(W.to(device), k)
    assert excess(*factors) < max(1e-6, 1.2 * excess(U[:, :k], S[:k], Vh[:k]))
    # One side is W times eigenvectors, orthogonal only to rounding over λ_k/λ₁; neither factors nor sweep need more.
    assert (factors[2] @ factors[2].T - torch.eye(k, device=device)).abs().max() < 2e-3 and (factors[1] >= 0).all()


def test_huge_directions_do_not_send_it_to_fp64(monkeypatch):
    """W' = WS has a few directions of 1e6 times the energy of the rest: taken out first, the fast way goes on."""
    sigma = torch.logspace(0, -0.5, 300, dtype=torch.float64)
    sigma[:4] = torch.tensor((3000, 1000, 300, 100))
    W = with_spectrum(400, 300, sigma)

    square = fast.lower_square
    squared = []
    monkeypatch.setattr(fast, "lower_square", lambda W: squared.append(W.dtype) or square(W))
    U, S, Vh = fast.truncated_svd(W, 90)
    assert squared == [torch.float32]
    left, least = (W.double() - (U * S).double() @ Vh.double()).square().sum(), sigma[90:].square().sum()
    assert abs(left - least) < 1e-6 * least


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "m, n, k, block", [(60, 40, 17, 8), (40, 60, 8, 8), (50, 50, 5, 8), (64, 48, 20, 1), (30, 50, 20, 3)]
)
def test_als_sweep_is_air_pys(m, n, k, block, order, device, monkeypatch):
    monkeypatch.setattr(fast, "BLOCK", block)
    g = torch.Generator().manual_seed(k)
    Wp = torch.randn(m, n, generator=g, dtype=torch.float64).to(device)
    P = 1 + 2 * torch.rand(m, n, generator=g, dtype=torch.float64).pow(6).to(device) * 7
    start, ranks = air.truncated_svd(Wp, k), range(k)[::order]
    expected, got = air.als_sweep(Wp, P, *start, ranks), fast.als_sweep(Wp, P, *start, ranks)
    assert all(distance(a.cpu(), b.cpu()) < 1e-10 for a, b in zip(got, expected))
    assert air.objective(Wp, P, *got) < air.objective(Wp, P, *start)


def test_air_on_a_wide_layer_is_the_same_either_way(monkeypatch, device):
    """The factors' product through fast.py and through the plain lines, fp32: 1e-4; the loss falls either way."""
    g = torch.Generator().manual_seed(5)
    W, X = (
        torch.randn(192, 256, generator=g).to(device),
        torch.randn(1000, 256, generator=g) * torch.logspace(1, -2, 256),
    )
    S, _ = air.profile((X.T @ X).to(device))
    I, products = torch.rand(192, 256, generator=g).pow(8).to(device), []
    for width in (float("inf"), 1):
        monkeypatch.setattr(air, "FAST_FROM", width)
        U, V, losses = air.air(W, S, air.normalise(I), 60)
        assert losses[2] < losses[1]
        products.append((U @ V).cpu())
    assert distance(products[1], products[0]) < 1e-4


@pytest.mark.parametrize("rank", [0, 3])
def test_components_that_are_not_there_stay_away_either_way(rank):
    """W' of rank 3 and of rank 0, k = 10: Eq. 5 would divide by σ = 0; both forms leave these components out."""
    g = torch.Generator().manual_seed(1)
    Wp = torch.randn(20, rank, generator=g).double() @ torch.randn(rank, 16, generator=g).double()
    P = 1 + torch.rand(20, 16, generator=g).double()
    U, sigma, Vh = air.truncated_svd(Wp, 10)
    sigma[rank:] = 0
    for ranks in (range(9, -1, -1), range(10)):
        expected, got = (sweep(Wp, P, U, sigma, Vh, ranks) for sweep in (air.als_sweep, fast.als_sweep))
        assert torch.equal(expected[1] == 0, got[1] == 0) and (got[1] == 0).sum() == 10 - rank
        products = [(u * s) @ v for u, s, v in (expected, got)]
        assert torch.allclose(*products, atol=1e-12)
