"""Orthogonal matrices that spread outliers evenly, and the one that runs at inference."""

import math

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

_CORE = 12
"""Order of the one Hadamard matrix besides Sylvester's that is needed: 384, 768 and 1536 are
twelve times a power of two."""
_CORE_SIGNS = (1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1)


def hadamard_matrix(order: int) -> Tensor | None:
    """A Hadamard matrix over √order, which is orthogonal: (order, order) float64.

    Sylvester's construction for powers of two, Paley's first for 12 (Paley, "On orthogonal
    matrices", 1933), and their Kronecker product for 12·2^k; None for any other order.
    """
    if order < 1:
        return None
    core = _CORE if order % _CORE == 0 else 1
    rest = order // core
    if rest & (rest - 1):
        return None
    matrix = scipy.linalg.hadamard(rest).astype(np.float64)
    if core > 1:
        matrix = np.kron(_paley(_CORE - 1), matrix)
    return torch.from_numpy(matrix / math.sqrt(order))


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (order, order), float64, that mixes every coordinate with every other.

    A Hadamard matrix with random signs (QuaRot, arXiv 2404.00456) where one of that order is
    known, else one drawn uniformly: the Q of a Gaussian matrix's QR with the signs of R's
    diagonal taken out.
    """
    hadamard = hadamard_matrix(order)
    if hadamard is not None:
        signs: Tensor = torch.randint(0, 2, (order,), generator=generator).double() * 2 - 1
        return hadamard * signs
    gaussian = torch.randn(order, order, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    flipped: Tensor = q * r.diagonal().sign()
    return flipped


class Hadamard(nn.Module):
    """Multiplies the last dimension by a Hadamard matrix, as two small products.

    H of order a·b is the Kronecker product of one of order a and one of order b, so a token costs
    width · (a + b) multiply-adds instead of width².

    Signs within both spread a constant over all outputs, of which plain Hadamard matrices put it
    into one: what comes out of a GELU has a mean that would be the largest outlier of all.

    Args:
        width: of the last dimension.

    Raises:
        ValueError: no Hadamard matrix of that order is known here.
    """

    left: Tensor
    right: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        a, b = _split(width)
        # Signs alone, which every compute type holds exactly; the width says it all, so not stored.
        self.register_buffer("left", _signs(a), persistent=False)
        self.register_buffer("right", _signs(b), persistent=False)

    @property
    def multiply_adds(self) -> int:
        """Of one token."""
        return self.width * (len(self.left) + len(self.right))

    def matrix(self) -> Tensor:
        """H, (width, width) float64: `forward` gives x Hᵀ."""
        return torch.kron(self.left.double(), self.right.double()) / math.sqrt(self.width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        split = x.reshape(*x.shape[:-1], len(self.left), len(self.right))
        return (self.left @ (split @ self.right.T)).flatten(-2) / math.sqrt(self.width)


def _signs(order: int) -> Tensor:
    matrix = hadamard_matrix(order)
    assert matrix is not None
    return (matrix.sign() * _flattening_signs(order)).float()


def _flattening_signs(order: int) -> Tensor:
    """Signs (order,) whose product with `hadamard_matrix(order)` has no large value.

    The Rudin-Shapiro sequence for powers of two (all values have magnitude 1, or 0 and √2), the
    flattest signs of all for 12 (at most 2/√3), found by trying all, and their Kronecker product
    for 12·2^k.
    """
    core = order % _CORE == 0
    rest = order // _CORE if core else order
    signs = [(-1.0) ** (index & (index >> 1)).bit_count() for index in range(rest)]
    shapiro = torch.tensor(signs, dtype=torch.float64)
    return torch.kron(torch.tensor(_CORE_SIGNS).double(), shapiro) if core else shapiro


def _split(width: int) -> tuple[int, int]:
    """Two orders of known Hadamard matrices, near each other, whose product is `width`."""
    choices = [
        (a, width // a)
        for a in range(1, width + 1)
        if width % a == 0 and hadamard_matrix_exists(a) and hadamard_matrix_exists(width // a)
    ]
    if not choices:
        raise ValueError(f"no Hadamard matrix of order {width} is known")
    return min(choices, key=lambda pair: (pair[0] + pair[1], pair[0]))


def hadamard_matrix_exists(order: int) -> bool:
    """Whether `hadamard_matrix` knows one."""
    rest = order // _CORE if order % _CORE == 0 else order
    return order > 0 and rest & (rest - 1) == 0


def _paley(prime: int) -> np.ndarray:
    """Hadamard matrix of order prime + 1, prime ≡ 3 mod 4: I + S of quadratic residues."""
    residues = {(i * i) % prime for i in range(1, prime)}
    order = prime + 1
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0] = 1, -1
    for row in range(prime):
        for column in range(prime):
            if row != column:
                skew[row + 1, column + 1] = 1 if (column - row) % prime in residues else -1
    return np.eye(order) + skew
