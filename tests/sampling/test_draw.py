"""One uniform, one token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selective.sampling import draw as drawing
from trl_selective.sampling.draw import BELOW_1, inverse_cdf, position_noise


@pytest.fixture(scope="module", autouse=True, params=["one scan", "blocks", "blocks of blocks"])
def way(request):
    """Small vocabularies are drawn from in one scan; here also as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "one scan":
            patch.setattr(drawing, "MAX_SCAN", 3)
            patch.setattr(drawing, "BLOCK", 3 if request.param == "blocks" else 2)
        yield


def draw(probs: list[float], uniform: float, dtype=torch.float64) -> int:
    return inverse_cdf(torch.tensor(probs, dtype=dtype), torch.tensor(uniform, dtype=torch.float64)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_numbers(dtype):
    probs = [0.25, 0.0, 0.5, 0.25]  # slices [0, 0.25), none, [0.25, 0.75), [0.75, 1)
    for uniform, token in {0.0: 0, 0.2499: 0, 0.25: 2, 0.7499: 2, 0.75: 3, BELOW_1: 3}.items():
        assert draw(probs, uniform, dtype) == token


def test_tokens_of_probability_0_at_either_end():
    for uniform in (0.0, 0.5, BELOW_1):
        assert draw([0.0, 0.0, 1.0, 0.0, 0.0], uniform) == 2


def test_what_does_not_sum_to_1_is_normalised():
    # slices of [1, 3] are [0, 1/4) and [1/4, 1)
    assert [draw([1.0, 3.0], uniform) for uniform in (0.0, 0.24, 0.25, BELOW_1)] == [0, 0, 1, 1]
    assert [draw([0.1, 0.3, 0.0], uniform) for uniform in (0.0, 0.24, 0.26, BELOW_1)] == [0, 0, 1, 1]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    probs=st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1.0)), min_size=1, max_size=20).filter(any),
    uniform=st.one_of(st.just(0.0), st.just(BELOW_1), st.floats(0, BELOW_1)),
)
def test_a_token_of_probability_0_is_never_drawn(probs, uniform):
    assert probs[draw(probs, uniform)] > 0


def test_a_batch_is_drawn_row_by_row():
    probs, uniform = torch.rand(4, 3, 7), torch.rand(4, 3, dtype=torch.float64)
    tokens = inverse_cdf(probs, uniform)
    for i in range(4):
        for j in range(3):
            assert tokens[i, j] == inverse_cdf(probs[i, j], uniform[i, j])


def test_rare_tokens_among_many_keep_their_share():
    """A uniform from the middle of a token's slice draws that token, among 150,000 and with a probability of 1e-12."""
    probs = torch.full((150_000,), 1e-12)
    probs[-1] = 1.0
    total = probs.double().sum().item()
    for token in (0, 1, 77_777, 149_998):
        assert draw(probs.tolist(), (token + 0.5) * probs[0].double().item() / total) == token


def test_likely_tokens_do_not_swallow_the_rare_ones_behind_them():
    """In float32, 1 + 1e-9 is 1."""
    probs = torch.full((1000,), 1e-9)
    probs[0] = 1.0
    total = probs.double().sum().item()
    for token in (1, 500, 998):
        uniform = (1 + (token - 0.5) * probs[1].double().item()) / total
        assert inverse_cdf(probs, torch.tensor(uniform, dtype=torch.float64)) == token


def test_an_even_grid_of_uniforms_gives_each_token_its_share():
    probs = torch.tensor([0.125, 0.5, 0.0, 0.375])
    grid = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    assert inverse_cdf(probs.expand(800, 4), grid).bincount(minlength=4).tolist() == [100, 400, 0, 300]


def test_blocks_draw_what_one_scan_draws():
    """From 40,000 tokens with probabilities of many sizes; of multiples of 2^-40, so that no sum is rounded."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(0, 20, (4, 40_000), generator=generator)
    probs = torch.ldexp(torch.randint(0, 3, exponents.shape, generator=generator).double(), exponents - 40)
    cdf = probs.cumsum(-1)
    uniform = torch.rand(4, 100, dtype=torch.float64, generator=generator)
    expected = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    assert torch.equal(inverse_cdf(probs[:, None].expand(4, 100, -1), uniform), expected)


def test_rounding_between_blocks():
    """1 + 1.5 / 2^53 is rounded up, so that the second token seems to begin before 1."""
    assert draw([1.0, 0.0, 0.0, 0.0, 1.5 / 2**53, 0.0], BELOW_1) == 4


def test_noise_of_a_position_is_its_own():
    noise = position_noise(50, 40, torch.device("cpu"))
    assert noise.shape == (50, 40, 3)
    assert noise.dtype == torch.float64
    assert noise.unique().numel() == noise.numel()
    assert 0 <= noise.min() < noise.max() < 1
    torch.manual_seed(0)
    assert torch.equal(position_noise(50, 40, torch.device("cpu")), noise)
