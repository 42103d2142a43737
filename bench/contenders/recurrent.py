"""GRU and LSTM layers, and their definitions, a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def definition(module: nn.GRU | nn.LSTM, x: Tensor) -> Tensor:
    """``x [B, L, E]`` → ``[B, L, E]`` by the equations in PyTorch's documentation of one layer."""
    parameters = dict(module.named_parameters())
    weight_x, weight_h = parameters["weight_ih_l0"], parameters["weight_hh_l0"]
    bias_x, bias_h = parameters["bias_ih_l0"], parameters["bias_hh_l0"]
    h = c = torch.zeros_like(x[:, 0])
    out = []
    for token in x.unbind(1):
        from_x, from_h = token @ weight_x.T + bias_x, h @ weight_h.T + bias_h
        if isinstance(module, nn.GRU):
            (r, z, new), (r_h, z_h, new_h) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
            h = (1 - z) * torch.tanh(new + r * new_h) + z * h
        else:
            i, f, g, o = (from_x + from_h).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out, 1)
