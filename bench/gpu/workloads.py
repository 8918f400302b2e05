"""The shared table of benchmark workloads (bench/workloads.h), made with PyTorch."""

import math

import torch


SLOPED = ("nape", "alibi")


def slopes(name, heads, device="cuda"):
    """ALiBi slopes a head, or None. nape: 1, 1/2, ..., 1/(heads/2), then none on the second half of
    the heads; alibi: 1, 1/2, ... on all of them, that is what the first half of nape does.
    """
    if name not in SLOPED:
        return None
    sloped = heads if name == "alibi" else heads // 2
    return torch.tensor([1 / (i + 1) if i < sloped else 0.0 for i in range(heads)], device=device)


def factors(name, batch, heads, n, device="cuda"):
    """A factor a row (query_scale), or None. asentmax: 1 + beta log(i + 2)^0.7 with beta uniform in
    [0, 0.3], 1 to 2.6 at n = 32,768.
    """
    if name != "asentmax":
        return None
    g = torch.Generator(device=device).manual_seed(7)
    beta = 0.3 * torch.rand(batch, heads, n, generator=g, device=device)
    return 1 + beta * torch.log(torch.arange(n, device=device, dtype=torch.float32) + 2) ** 0.7


def make(name, batch, heads, n, size, dtype=torch.bfloat16, seed=0, device="cuda"):
    """query, key, value, output gradient of (batch, heads, n, size).

    gauss(s): q ~ s N(0, 1), k ~ N(0, 1), so that scores have standard deviation s. topic(C):
    segments of 256 positions, each on one of C topics. local: q, k smooth in the position. nape,
    alibi: gauss1, see slopes(). asentmax: gauss1, see factors().
    """
    g = torch.Generator(device=device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, device=device)
    shape = (batch, heads, n, size)
    if name.startswith("gauss") or name in (*SLOPED, "asentmax"):
        std = float(name[5:]) if name.startswith("gauss") else 1.0
        q, k = normal(*shape) * std, normal(*shape)
    elif name.startswith("topic"):
        topics = int(name[5:])
        centre = torch.nn.functional.normalize(normal(batch, heads, topics, size), dim=-1)
        centre = centre * math.sqrt(6 * math.sqrt(size))
        topic = torch.randint(topics, (batch, heads, (n + 255) // 256), generator=g, device=device)
        topic = topic.repeat_interleave(256, 2)[:, :, :n, None].expand(-1, -1, -1, size)
        base = torch.gather(centre, 2, topic)
        q, k = base + 0.7 * normal(*shape), base + 0.7 * normal(*shape)
    elif name == "local":
        rho = 0.98
        base = normal(*shape) * math.sqrt(1 - rho * rho)
        base[:, :, 0] /= math.sqrt(1 - rho * rho)
        step, factor = 1, rho
        while step < n:  # b_t = rho b_(t-1) + noise, by doubling
            base[:, :, step:] = base[:, :, step:] + factor * base[:, :, :-step]
            step, factor = 2 * step, factor * factor
        q, k = base + 0.3 * normal(*shape), base + 0.3 * normal(*shape)
    else:
        raise ValueError(f"workload: got {name!r}; must be gauss<s>, topic<C>, local, nape, "
                         "alibi or asentmax")
    return [t.to(dtype) for t in (q, k, normal(*shape), normal(*shape))]
