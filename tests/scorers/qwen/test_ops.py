"""The elementwise work against Transformers' own."""

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from qwen_rerank.scorers.qwen.kernels import EagerOps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_rotation_are_as_exact_as_transformers(dtype):
    """Mean error against float64, over enough heads that neither is lucky."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, 32, generator=draw).to(dtype)
    weight = (1 + 0.2 * torch.randn(32, generator=draw)).to(dtype)
    angles = 6 * torch.rand(64, 16, generator=draw)
    cos_sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def theirs(kind: torch.dtype) -> torch.Tensor:
        norm = Qwen3RMSNorm(32, eps=1e-6).to(kind)
        norm.weight.data = weight.to(kind)
        cosine, sine = (torch.cat((side, side), dim=-1).to(kind)[None] for side in cos_sin)
        heads = norm(x.to(kind)).transpose(0, 1)[None]
        return apply_rotary_pos_emb(heads, heads, cosine, sine)[0][0].transpose(0, 1).detach().double()

    def exact() -> torch.Tensor:
        scaled = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        first, second = scaled.chunk(2, dim=-1)
        cosine, sine = (side.double()[:, None] for side in cos_sin)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    ours = EagerOps().norm_rotate(x, weight, cos_sin, 1e-6)

    assert ours.dtype == dtype
    assert (ours.double() - exact()).abs().mean() <= 1.05 * (theirs(dtype) - exact()).abs().mean()
