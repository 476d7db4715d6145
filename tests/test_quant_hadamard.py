import math

import pytest
import torch

from quantwm.quant.hadamard import (
    Hadamard,
    hadamard_matrix,
    hadamard_matrix_exists,
    random_orthogonal,
)

KNOWN = [1, 2, 12, 24, 64, 384, 768, 1024]
UNKNOWN = [0, -4, 3, 6, 20, 36, 404]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_orthogonal(matrix, tolerance):
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    assert (matrix @ matrix.T - identity).abs().max() < tolerance


@pytest.mark.parametrize("order", KNOWN)
def test_a_hadamard_matrix_is_orthogonal_and_of_one_magnitude(order):
    matrix = hadamard_matrix(order)
    assert matrix.shape == (order, order)
    assert matrix.dtype == torch.float64
    assert_orthogonal(matrix, 1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))
    assert hadamard_matrix_exists(order)


def test_the_matrix_of_order_four_is_sylvesters():
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (hadamard_matrix(4) * 2).tolist() == expected


@pytest.mark.parametrize("order", UNKNOWN)
def test_other_orders_are_not_known(order):
    assert hadamard_matrix(order) is None
    assert not hadamard_matrix_exists(order)
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is known"):
        Hadamard(order)


@pytest.mark.parametrize("order", [12, 384, 404, 512, 1024, 1536, 2048])
def test_random_rotations_are_orthogonal(order):
    matrix = random_orthogonal(order, generator())
    assert matrix.shape == (order, order)
    assert_orthogonal(matrix.float(), 1e-5)
    # No coordinate is left where it was: an outlier of one channel reaches every other.
    assert matrix.abs().max() < 6 / math.sqrt(order)


@pytest.mark.parametrize("order", [12, 20])
def test_random_rotations_come_from_their_generator_alone(order):
    one, again, other = (random_orthogonal(order, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_random_rotations_without_a_hadamard_matrix_favour_no_sign():
    # A plain QR has a fixed sign a column, so that the mean over many draws is far from zero.
    draws = torch.stack([random_orthogonal(5, generator(seed)) for seed in range(2000)])
    assert draws.mean(0).abs().max() < 5 * 5**-0.5 / 2000**0.5


@pytest.mark.parametrize("width", [1, 2, 12, 384, 1024, 1536, 2048])
def test_forward_is_the_product_with_the_matrix(width):
    module = Hadamard(width)
    x = torch.randn(2, 3, width, generator=generator())
    expected = x.double() @ module.matrix().T
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(x).norm(dim=-1), x.norm(dim=-1))


def test_forward_takes_a_slice_and_a_single_token():
    module = Hadamard(12)
    x = torch.randn(5, 24, generator=generator())[:, ::2]
    torch.testing.assert_close(module(x)[3], module(x[3].clone()))


@pytest.mark.parametrize(("width", "cost"), [(384, 384 * 40), (1024, 1024 * 64), (12, 12 * 13)])
def test_two_small_products_cost_less_than_one(width, cost):
    module = Hadamard(width)
    assert module.multiply_adds == cost
    assert len(module.left) * len(module.right) == width


def test_a_product_of_two_known_orders_will_do():
    assert hadamard_matrix(144) is None
    assert_orthogonal(Hadamard(144).matrix(), 1e-12)


@pytest.mark.parametrize("width", [12, 384, 2048])
def test_a_cast_keeps_the_signs_exact(width):
    module = Hadamard(width)
    before = module.matrix()
    module.to(torch.bfloat16)
    assert module.left.dtype == torch.bfloat16
    assert torch.equal(module.matrix(), before)
    x = torch.randn(4, width, generator=generator()).bfloat16()
    expected = x.double() @ before.T
    assert ((module(x).double() - expected).norm() / expected.norm()) < 0.01
    assert module.state_dict() == {}
