"""Attention over a packed sequence, without a T x T mask.

input   queries, keys and values of one layer, as transformers' attention interface passes them,
        and the `Layout`, a keyword of the model's call
does    computes each range of queries with the ranges of keys that it attends to, in one kernel
        call each; partial results are merged by their log-sum-exp, so that a shared prefix takes
        one call
output  (1, T, H, D), as the interface requires

Kernels: torch's flash attention on CPU (for short nodes one padded product: gathered.py), its
variable-length flash attention on CUDA (cuda/varlen.py), and FlexAttention for what that kernel
does not support. An explicit softmax, node by node, computes soft caps and attention sinks on a
CPU, and attention dropout and other devices in every case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from truetune.compute import private
from truetune.compute.cuda.copies import sent
from truetune.compute.cuda.varlen import kernel_for, varlen
from truetune.compute.explicit import explicit_attention
from truetune.compute.gathered import Gathered, places
from truetune.compute.layout import Layout, Meeting, visible
from truetune.system.quiet import quiet

# The interface's name for it, and the keyword that carries the layout.
IMPLEMENTATION = "truetune"
KEYWORD = "segments"

# Queries times keys up to which torch's CPU kernel is faster backward in float32 than in bfloat16
# (2 groups of 7 heads of width 64: 1.9 ms instead of 10.5 at 131 x 131, but 56 ms instead of 46 at
# 512 x 512).
SMALL = 300 * 300


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. Without a layout it is transformers' own sdpa.

    Args:
        query: (1, H, T, D).
        key, value: (1, G, T, D), each shared by H / G query heads.
        scaling: of the scores; 1 / sqrt(D) where None.
        dropout: of the weights.
        sliding_window: positions that a token sees, itself included.
        softcap: scores become cap * tanh(score / cap).
        s_aux: (H,), a score per head that takes part in the softmax and has no value.
    """
    layout: Layout | None = kwargs.pop(KEYWORD, None)
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap or s_aux is not None:
            raise ValueError("sdpa has neither soft caps nor sinks: pass a layout")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    query, key, value = _one_dtype(query, key, value)
    plain = not softcap and s_aux is None and not dropout and query.shape[-1] == value.shape[-1]
    on_cpu = query.device.type == "cpu"
    on_cuda = query.device.type == "cuda" and not dropout
    heads, groups = query.shape[1], key.shape[1]
    if plain and on_cpu and (at := places(layout, sliding_window, heads, groups)):
        # Autocast would compute its products in bfloat16.
        with torch.autocast("cpu", enabled=False):
            mixed = Gathered.apply(query[0], key[0], value[0], at, scale)
    elif plain and on_cpu and private.has_flash():
        mixed = _FlashMeetings.apply(query[0], key[0], value[0], layout, sliding_window, scale)
    elif on_cuda and not softcap and (kernel := kernel_for(query, key, value)):
        mixed = varlen(query, key, value, layout, sliding_window, scale, s_aux, kernel)
    elif on_cuda and s_aux is None:
        from truetune.compute.flex import flex

        mixed = flex(query, key, value, layout, sliding_window, scale, softcap)
    else:
        mixed = explicit_attention(
            query[0], key[0], value[0], layout, sliding_window, scale, dropout, softcap, s_aux
        )
    return mixed[None], None


def _one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As autocast does for torch's own attention: rotary embeddings may have widened q and k."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    return [t.to(tensors[-1].dtype) for t in tensors]


class _FlashMeetings(torch.autograd.Function):
    """Meetings by torch's CPU flash kernel, forward and backward.

    Keys of a stretch are read by their own node and by its descendants in separate calls; outputs
    o_i with log-sum-exp l_i merge to sum_i exp(l_i - l) o_i, l = log sum_i exp(l_i). With l and
    the merged output, the kernel's backward of each part gives exact gradients: the weights
    exp(score - l) and the row sums of output times gradient are those of the whole softmax.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: torch.Tensor,
        k_GTD: torch.Tensor,
        v_GTD: torch.Tensor,
        layout: Layout,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        meetings = layout.meetings(window)
        heads, length, _ = q_HTD.shape
        # Where every query is in one meeting there is nothing to merge.
        single = sum(m.num_queries for m in meetings) == length
        out_HTD = _like(q_HTD, q_HTD.dtype if single else torch.float32)
        lse_HT1 = q_HTD.new_full((heads, length, 1), -torch.inf, dtype=torch.float32)
        for meeting in meetings:
            q, k, v = _parts(meeting, q_HTD, k_GTD, v_GTD)
            mask = _mask(layout, meeting, window, q.dtype)
            out, lse = private.flash_forward(
                q, k, v, 0.0, meeting.kind == "causal", attn_mask=mask, scale=scale
            )
            out_HLD, lse_HL1 = _rows(out, meeting), _rows(lse[..., None], meeting)
            span = meeting.queries
            if single:
                out_HTD[:, span], lse_HT1[:, span] = out_HLD, lse_HL1
                continue
            total = torch.logaddexp(lse_HT1[:, span], lse_HL1)
            out_HTD[:, span] *= (lse_HT1[:, span] - total).exp()
            out_HTD[:, span] += out_HLD * (lse_HL1 - total).exp()
            lse_HT1[:, span] = total
        out_HTD = out_HTD.to(q_HTD.dtype)
        ctx.save_for_backward(q_HTD, k_GTD, v_GTD, out_HTD, lse_HT1)
        ctx.layout, ctx.window, ctx.scale, ctx.single = layout, window, scale, single
        return out_HTD.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_HTD, k_GTD, v_GTD, out_HTD, lse_HT1 = ctx.saved_tensors
        grad_HTD = grad_THD.contiguous().transpose(0, 1)
        groups = k_GTD.shape[0]
        # Sums over several meetings are taken in float32.
        wide = q_HTD.dtype if ctx.single else torch.float32
        dq, dk, dv = _like(q_HTD, wide), _like(k_GTD, wide), _like(v_GTD, wide)
        for meeting in ctx.layout.meetings(ctx.window):
            q, k, v = _parts(meeting, q_HTD, k_GTD, v_GTD)
            out, lse, grad = (_queries(t, meeting, groups) for t in (out_HTD, lse_HT1, grad_HTD))
            if q.shape[2] * k.shape[2] <= SMALL:
                q, k, v, out, grad = (t.float() for t in (q, k, v, out, grad))
            mask = _mask(ctx.layout, meeting, ctx.window, q.dtype)
            of_q, of_k, of_v = private.flash_backward(
                grad,
                q,
                k,
                v,
                out,
                lse[..., 0].contiguous(),
                0.0,
                meeting.kind == "causal",
                attn_mask=mask,
                scale=ctx.scale,
            )
            dq[:, meeting.queries] += _rows(of_q, meeting)
            _add_shared(dk, of_k, meeting)
            _add_shared(dv, of_v, meeting)
        return dq.to(q_HTD.dtype), dk.to(q_HTD.dtype), dv.to(q_HTD.dtype), None, None, None


def _like(t_HTD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, token by token in memory as the layers around want them."""
    heads, length, width = t_HTD.shape
    return t_HTD.new_zeros((length, heads, width), dtype=dtype).transpose(0, 1)


# The kernel takes (batch, heads, L, D). One stretch is (G, H / G, L, D): keys and values that
# heads share are views. Several alike are (count, H, L, D), for which shared keys are copied.


def _parts(
    meeting: Meeting, q_HTD: torch.Tensor, k_GTD: torch.Tensor, v_GTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = k_GTD.shape[0]
    repeats = q_HTD.shape[0] // groups
    q = _queries(q_HTD, meeting, groups)
    k, v = (_keys(t, meeting, repeats) for t in (k_GTD, v_GTD))
    return q, k, v


def _queries(t_HTD: torch.Tensor, meeting: Meeting, groups: int) -> torch.Tensor:
    rows = t_HTD[:, meeting.queries]
    if meeting.count == 1:
        return rows.unflatten(0, (groups, -1))
    return rows.unflatten(1, (meeting.count, -1)).transpose(0, 1)


def _keys(t_GTD: torch.Tensor, meeting: Meeting, repeats: int) -> torch.Tensor:
    spans = [t_GTD[:, span] for span in meeting.spans]
    rows = spans[0] if len(spans) == 1 else torch.cat(spans, 1)
    if meeting.count == 1:
        return rows[:, None].expand(-1, repeats, -1, -1)
    return rows.unflatten(1, (meeting.count, -1)).transpose(0, 1).repeat_interleave(repeats, 1)


def _rows(t: torch.Tensor, meeting: Meeting) -> torch.Tensor:
    """The kernel's rows of queries as (H, L, D)."""
    if meeting.count == 1:
        return t.flatten(0, 1)
    return t.transpose(0, 1).flatten(1, 2)


def _add_shared(total_GTD: torch.Tensor, t: torch.Tensor, meeting: Meeting) -> None:
    """Add the kernel's gradients of keys, summed over the heads that share them."""
    groups = len(total_GTD)
    if meeting.count == 1:
        rows = t.sum(1, dtype=total_GTD.dtype)
    else:
        rows = t.unflatten(1, (groups, -1)).sum(2, dtype=total_GTD.dtype)
        rows = rows.transpose(0, 1).flatten(1, 2)
    begin = 0
    for span in meeting.spans:
        end = begin + span.stop - span.start
        total_GTD[:, span] += rows[:, begin:end]
        begin = end


def _mask(
    layout: Layout, meeting: Meeting, window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    if meeting.kind != "window":
        return None
    seen = visible(layout, (meeting.q0, meeting.q1), meeting.keys[0], window)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def packed_arguments(layout: Layout, device: torch.device, *, mask: bool = False) -> dict[str, Any]:
    """Return the keywords of the model's call, in addition to the ids (1, T).

    Args:
        mask: let the model build its own masks, for callers that examine them.
    """
    # The model uses a mask of four dimensions unchanged, so it builds none of T x T.
    dummy = {} if mask else {"attention_mask": torch.zeros(1, 1, 1, 1, device=device)}
    positions = sent(torch.tensor([layout.positions]), device)
    return {"position_ids": positions, KEYWORD: layout, **dummy}


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """The model calls `attention` inside, and what it called before afterwards.

    Recomputed activations call it again: the backward pass belongs inside too.
    """
    from transformers.masking_utils import sdpa_mask

    with _calling(model, IMPLEMENTATION, attention, sdpa_mask):
        yield


@dataclass(frozen=True)
class Seen:
    """What one attention layer was given: its window, and the rule of the mask built for it."""

    window: int | None
    rule: Callable[..., Any] | None

    def is_what_the_mask_shows(self, longest: int) -> bool:
        """Whether the last token of a row sees what the window says, and nothing else."""
        if self.rule is None:
            return False
        last = longest - 1
        keys = torch.arange(longest)
        zero = torch.tensor(0)
        shown = torch.as_tensor(self.rule(zero, zero, torch.tensor(last), keys)).expand(longest)
        return torch.equal(shown, keys > last - (self.window or longest))


@contextlib.contextmanager
def watched_attention(model: Any, seen: list[Seen]) -> Iterator[None]:
    """As `packed_attention`, with the model's own masks, whose rules are noted layer by layer."""
    from transformers.masking_utils import sdpa_mask

    def build(*args: Any, mask_function: Any, **kwargs: Any) -> torch.Tensor:
        kwargs["allow_is_causal_skip"] = False
        made = sdpa_mask(*args, mask_function=mask_function, **kwargs)
        made.rule = mask_function
        return made

    def watch(
        module: torch.nn.Module, q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        seen.append(Seen(kwargs.get("sliding_window"), getattr(mask, "rule", None)))
        return attention(module, q, k, v, None, *args, **kwargs)

    with _calling(model, f"{IMPLEMENTATION}-watched", watch, build):
        yield


@contextlib.contextmanager
def _calling(model: Any, name: str, function: Any, mask: Any) -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    before = model.config._attn_implementation
    with quiet():
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)
