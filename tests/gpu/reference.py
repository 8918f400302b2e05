"""Dense attention in float64 with autograd: what the GPU tests compare with.

Also the same in a lower precision, to know what error a plain implementation would make.
"""

import math

import torch


def solve_threshold(z, order, steps=64):
    """tau of each row by bisection. z: (..., keys), -inf hides a key; order = alpha - 1."""
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(steps):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).pow(1 / order).sum(-1, keepdim=True) >= 1
        low = torch.where(above, middle, low)
        high = torch.where(above, high, middle)
    return (low + high) / 2


def entmax(scores, alpha):
    """alpha-entmax of the last dimension, differentiable in both. Returns (p, tau, row_is_empty).

    tau is found without gradients; one differentiable Newton step, which moves it by nothing,
    carries the gradients of the implicit function.
    """
    order = alpha - 1
    # A hidden key's score must not meet the gradient in alpha: 0 * -inf is NaN.
    hidden = torch.isinf(scores) & (scores < 0)
    z = (order * scores.masked_fill(hidden, 0.0)).masked_fill(hidden, -math.inf)
    with torch.no_grad():
        empty = hidden.all(-1, keepdim=True)
        safe = torch.where(empty, torch.zeros_like(z), z)
        tau = solve_threshold(safe, order)
    inside = (z > tau) & ~empty

    def power(t):
        w = torch.where(inside, (z - t).clamp(min=1e-30), torch.ones_like(z))
        return torch.where(inside, w.pow(1 / order), torch.zeros_like(z))

    p = power(tau)
    with torch.no_grad():
        slope = torch.where(inside, (z - tau).clamp(min=1e-300).pow(1 / order - 1) / order,
                            torch.zeros_like(z)).sum(-1, keepdim=True)
    tau = tau + torch.where(empty, torch.zeros_like(tau),
                            (p.sum(-1, keepdim=True) - 1) / slope.clamp(min=1e-300))
    return power(tau), tau[..., 0], empty[..., 0]


def visible(query_length, key_length, causal, window, key_limit, device):
    """(query_length, key_length) booleans; positions follow from key_limit, the keys that exist."""
    i = torch.arange(query_length, device=device)[:, None] + key_limit - query_length
    j = torch.arange(key_length, device=device)[None]
    mask = j < key_limit
    if causal:
        mask = mask & (j <= i)
    if window[0] >= 0:
        mask = mask & (j >= i - window[0])
    if window[1] >= 0:
        mask = mask & (j <= i + window[1])
    return mask, (i - j).abs()


def dense(query, key, value, alpha, scale, query_scale=None, causal=False, window=(-1, -1),
          key_limit=None, slopes=None, softcap=0.0, dtype=torch.float64):
    """One batch entry: (heads, n, d). alpha, slopes: [heads]; query_scale: [heads, n].

    With a lower dtype products are rounded to it, as PyTorch's matmul does.
    """
    heads, nq, _ = query.shape
    group = heads // key.shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    s = (q @ k.transpose(1, 2)).to(wide) * scale
    if query_scale is not None:
        s = s * query_scale.to(wide)[..., None]
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    mask, distance = visible(nq, k.shape[1], causal, window,
                             k.shape[1] if key_limit is None else key_limit, q.device)
    if slopes is not None:
        s = s - slopes.to(wide)[:, None, None] * distance
    s = s.masked_fill(~mask, -math.inf)
    p, tau, empty = entmax(s, alpha.to(wide)[:, None, None])
    return (p.to(dtype) @ v).to(wide), tau, p, empty, s


def parts(call):
    """The sequences of a call as (batch entry, query slice, key slice, keys that exist)."""
    nq, nk = call["query"].shape[2], call["key"].shape[2]
    if call.get("cu_query") is not None:
        cq, ck = call["cu_query"].tolist(), call["cu_key"].tolist()
        return [(0, slice(cq[i], cq[i + 1]), slice(ck[i], ck[i + 1]), ck[i + 1] - ck[i])
                for i in range(len(cq) - 1)]
    limits = (call["key_lengths"].tolist() if call.get("key_lengths") is not None
              else [nk] * call["query"].shape[0])
    return [(b, slice(0, nq), slice(0, nk), limits[b]) for b in range(len(limits))]


def attention(call, output_gradient=None, dtype=torch.float64):
    """Everything a call of engine.Attention gives, densely.

    call: its tensors and settings by name. Returns a dict of output, threshold, empty, support (a
    list of dense p, one a part), margin (distance of the scores from the threshold), and gradients.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaf = lambda t: t.detach().to(wide).requires_grad_(output_gradient is not None)
    q, k, v = leaf(call["query"]), leaf(call["key"]), leaf(call["value"])
    b, h, nq, d = q.shape
    per_head = call.get("alpha_per_head")
    alpha = leaf(per_head if per_head is not None
                 else torch.full((h,), call.get("alpha", 1.5), device=q.device))
    slopes = leaf(call["slopes"]) if call.get("slopes") is not None else None
    row_scale = (leaf(call["query_scale"].expand(b, h, nq))
                 if call.get("query_scale") is not None else None)
    scale = call["scale"] if call.get("scale") is not None else d ** -0.5
    output = torch.zeros(b, h, nq, v.shape[3], dtype=wide, device=q.device)
    threshold = torch.full((b, h, nq), math.nan, dtype=wide, device=q.device)
    dense_parts = []
    for entry, rows, keys, limit in parts(call):
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        o, tau, p, empty, s = dense(
            q[entry, :, rows], k[entry, :, keys], v[entry, :, keys], alpha, scale,
            row_scale[entry, :, rows] if row_scale is not None else None,
            call.get("causal", False), call.get("window", (-1, -1)), limit, slopes,
            call.get("softcap", 0.0), dtype)
        output[entry, :, rows] = o
        threshold[entry, :, rows] = torch.where(empty, torch.full_like(tau, math.nan), tau.detach())
        dense_parts.append(dict(entry=entry, rows=rows, keys=keys, p=p.detach(), s=s.detach(),
                                tau=tau.detach(), empty=empty))
    result = dict(output=output.detach(), threshold=threshold, parts=dense_parts,
                  alpha=alpha.detach())
    if output_gradient is not None:
        leaves = dict(query=q, key=k, value=v, alpha=alpha)
        if slopes is not None:
            leaves["slopes"] = slopes
        if row_scale is not None:
            leaves["query_scale"] = row_scale
        gradients = torch.autograd.grad(output, list(leaves.values()), output_gradient.to(wide),
                                        allow_unused=True)
        result["gradients"] = {
            name: torch.zeros_like(leaves[name]) if g is None else g
            for name, g in zip(leaves, gradients)}
    return result
