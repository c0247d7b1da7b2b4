"""Attention as a softmax written out: what other kernels are compared with, and the way for soft
caps, attention sinks and attention dropout, which they do not take."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from truetune.compute.layout import Layout, visible


def explicit_attention(
    q_HTD: torch.Tensor,
    k_GTD: torch.Tensor,
    v_GTD: torch.Tensor,
    layout: Layout,
    window: int | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """(T, H, D) by softmax written out, node by node, the softmax in float32."""
    repeats = q_HTD.shape[0] // k_GTD.shape[0]
    k_HTD, v_HTD = (t.repeat_interleave(repeats, 0) for t in (k_GTD, v_GTD))
    outputs = []
    for node in range(len(layout.lengths)):
        own = (layout.starts[node], layout.starts[node + 1])
        spans = [(layout.starts[a], layout.starts[a + 1]) for a in layout.ancestors(node)] + [own]
        k, v = (torch.cat([t[:, a:b] for a, b in spans], 1) for t in (k_HTD, v_HTD))
        seen = torch.cat([visible(layout, own, span, window, q_HTD.device) for span in spans], 1)
        scores = (q_HTD[:, slice(*own)] @ k.transpose(1, 2)).float() * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if s_aux is not None:
            sinks = s_aux.float()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = F.dropout(scores.softmax(-1)[..., : k.shape[1]], dropout)
        outputs.append((weights.to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outputs)
