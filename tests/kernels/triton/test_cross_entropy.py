"""Cross-entropy against fp64: every token's loss and gradient, on one rank and on several."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.layers.cross_entropy import cross_entropy
from fp8lm.layers.tp_context import NO_TP
from tests.kernels.triton.compare import assert_same_values, normal
from tests.kernels.triton.traffic import counting

pytestmark = pytest.mark.slow

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()
ROUNDINGS = 64 * 2.0**-24  # of a sum of exponentials, relative to it


def exact(logits, labels, dy, used):
    """Losses and gradient of the whole vocabulary in fp64."""
    x = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(x[:, :used], labels, reduction="none")
    losses.backward(dy.double())
    return losses.detach(), x.grad


def on_ranks(kernels, logits, labels, dy, used, ranks, device):
    """Losses and gradient with the vocabulary in `ranks` parts; what each gathers is known."""
    parts, terms = logits.chunk(ranks, dim=1), []

    def run(gather):
        for rank, part in enumerate(parts):
            columns = labels - rank * part.shape[1]
            own = min(max(used - rank * part.shape[1], 0), part.shape[1])
            losses, saved = kernels.cross_entropy(
                part.clone().to(device), columns.to(device), own, gather
            )
            yield losses, kernels.cross_entropy_backward(saved, dy.to(device), own)

    def remember(values):
        terms.append(values)
        return values[None]

    if ranks == 1:
        ((losses, gradient),) = run(None)
        return losses, gradient
    list(run(remember))
    gathered = torch.stack(terms)
    results = list(run(lambda _: gathered))
    for losses, _ in results:
        assert_same_values(losses, results[0][0].cpu())
    return results[0][0], torch.cat([gradient for _, gradient in results], dim=1)


def inputs(tokens, rows, used, dtype, scale, offset):
    logits = (normal(tokens, rows, dtype=torch.float32, scale=scale) + offset).to(dtype)
    labels = torch.randint(0, used, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[-1] = used - 1
    dy = normal(tokens, dtype=torch.float32)
    dy[0] = 0.0  # a masked token
    return logits, labels, dy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "ranks, rows, used", [(1, 9000, 8999), (1, 3, 3), (2, 120, 101), (4, 64, 8)]
)
@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (30.0, 300.0), (5.0, -1e4)])
def test_losses_and_gradients(dtype, ranks, rows, used, scale, offset, device):
    logits, labels, dy = inputs(7, rows, used, dtype, scale, offset)
    losses, gradient = exact(logits, labels, dy, used)
    mine, my_gradient = on_ranks(KERNELS, logits, labels, dy, used, ranks, device)
    # The logarithm of a sum near x, and x itself, are rounded to fp32 before they are subtracted.
    largest = logits[:, :used].float().abs().amax(dim=1).double()
    bound = ROUNDINGS + 2.0**-22 * (largest + math.log(used))
    assert mine.dtype == torch.float32 and my_gradient.dtype == dtype
    assert ((mine.cpu() - losses).abs() <= bound).all()
    rounding = torch.finfo(dtype).eps / 2 * gradient.abs() + dy.abs()[:, None] * bound[:, None]
    assert ((my_gradient.cpu().double() - gradient).abs() <= rounding).all()
    assert not my_gradient[:, used:].any() and not my_gradient[0].any()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("event", [math.nan, math.inf])
def test_events_stay_in_their_token(ranks, event, device):
    logits, labels, dy = inputs(7, 64, 60, torch.bfloat16, 1.0, 0.0)
    logits[3, 17] = event
    losses, gradient = on_ranks(KERNELS, logits, labels, dy, 60, ranks, device)
    finite = torch.arange(7) != 3
    assert torch.equal(losses.cpu().isfinite(), finite)
    assert gradient[:, :60].cpu().isfinite().all(dim=1).equal(finite)


@pytest.mark.parametrize("ranks", [1, 2])
def test_impossible_rows(ranks, device):
    """Logits of -Inf have no share, as in the reference."""
    logits, labels, dy = inputs(7, 64, 60, torch.float32, 1.0, 0.0)
    logits[:, 5:40] = -math.inf
    labels[:] = 41
    arguments = (logits, labels, dy, 60, ranks)
    losses, gradient = on_ranks(KERNELS, *arguments, device)
    expected, reference = on_ranks(REFERENCE, *arguments, "cpu")
    torch.testing.assert_close(losses.cpu(), expected, rtol=0, atol=2 * ROUNDINGS)
    torch.testing.assert_close(gradient.cpu(), reference, rtol=1e-5, atol=2 * ROUNDINGS)
    assert not gradient[:, 5:40].any()


def test_the_order_of_a_sum_is_fixed(device):
    arguments = (*inputs(5, 9000, 9000, torch.bfloat16, 4.0, 0.0), 9000, 1)
    first, again = (on_ranks(KERNELS, *arguments, device) for _ in range(2))
    for mine, other in zip(first, again, strict=True):
        assert_same_values(mine, other.cpu())


def test_no_tokens(device):
    logits, labels, dy = (x[:0] for x in inputs(1, 64, 60, torch.bfloat16, 1.0, 0.0))
    losses, gradient = on_ranks(KERNELS, logits, labels, dy, 60, 1, device)
    assert losses.shape == (0,) and gradient.shape == (0, 64)


def test_the_gradient_replaces_logits_that_nobody_else_needs(device):
    logits, labels, dy = (x.to(device) for x in inputs(7, 64, 60, torch.float32, 1.0, 0.0))
    unchanged = logits.clone()
    logits.requires_grad_()
    z_loss = torch.logsumexp(logits, dim=1).square().sum()  # saves the logits as well
    losses = cross_entropy(logits, labels, 60, NO_TP, KERNELS)
    losses.backward(dy)
    assert not torch.equal(logits.detach(), unchanged)
    with pytest.raises(RuntimeError, match="inplace"):
        z_loss.backward()
    with pytest.raises(RuntimeError):
        losses.backward(dy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic():
    logits, labels, dy = inputs(7, 6000, 5000, torch.bfloat16, 1.0, 0.0)
    with counting() as traffic:
        _, saved = KERNELS.cross_entropy(logits, labels, 5000, None)
        KERNELS.cross_entropy_backward(saved, dy, 5000)
    assert traffic.measured == traffic.declared
    assert traffic.declared == [
        ("log_sums", 2 * 7 * 5008 + 8 * 7, 8 * 7),
        ("softmax_gradient", 2 * 7 * 5008 + 16 * 7, 2 * 7 * 6000),
    ]
