"""The norm on a CPU is torch's own, in value and in gradient, by itself and where autocast is on."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_sft.norm import RMSNorm, _RMSNorm


def by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).type_as(x)


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 8), (0, 8), (1, 1)])
def test_the_gradient_is_the_derivative(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in (shape, shape[-1:]))
    assert torch.autograd.gradcheck(_RMSNorm.apply, (x, weight, 1e-2))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_torchs(autocast: bool, trained: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-6)
    torch.nn.init.normal_(norm.weight).requires_grad_(trained)
    x, upstream = torch.randn(64, 48, dtype=dtype, requires_grad=True), torch.randn(64, 48, dtype=dtype)
    wanted = (x, norm.weight) if trained else (x,)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # backward in it as well, as when the base is read
        ours, theirs = norm(x), by_torch(x, norm.weight, 1e-6)
        gradients = [torch.autograd.grad(out, wanted, upstream) for out in (ours, theirs)]
    assert ours.dtype == x.dtype
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if one.dtype == torch.float32 else 1.6e-2, atol=1e-5)
