"""Multi-head α-entmax attention as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._attention import attention
from .._checks import check_floating, check_int, check_number
from ._mappings import bounded_alpha
from ._positions import RotaryEmbedding, alibi_slopes, nape_slopes
from ._scaling import ASEntmaxScale, SSMaxScale

POSITIONS = ("none", "alibi", "nape", "rope")
SCALINGS = ("none", "ssmax", "asentmax")


def check_alpha(alpha: object) -> float:
    number = check_number("alpha", alpha)
    if not (math.isfinite(number) and number >= 1.0):
        raise ValueError(f"alpha: got {number}; must be finite and ≥ 1")
    return number


class EntmaxAttention(nn.Module):
    """Multi-head attention with α-entmax.

    Parameters
    ----------
    features : int
        Size of the hidden states.
    heads : int
    kv_heads : int, optional
        A divisor of ``heads``; as many as ``heads`` if not given.
    head_size : int, optional
        ``features // heads`` if not given.
    alpha : float
        ≥ 1 (on GPUs in [1, 2]). The value, or where learning starts.
    learnable_alpha : bool
        Whether every head learns its α, as 1 + sigmoid(a) in (1, 2) (adaptively sparse
        transformers: Correia, Niculae & Martins 2019).
    causal : bool
    window : int, optional
        ≥ 1: how many keys back a query sees, itself included.
    positions : str
        ``"none"``, ``"rope"``, ``"alibi"``, or ``"nape"`` (half the heads ALiBi, half nothing).
    scaling : str
        ``"none"``, ``"ssmax"``, or ``"asentmax"`` (which leaves heads with ALiBi alone).
    softcap : float
        0 means none.
    bias : bool
        Whether the projections have biases.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_size: int | None = None,
        alpha: float = 1.5,
        learnable_alpha: bool = False,
        causal: bool = False,
        window: int | None = None,
        positions: str = "none",
        scaling: str = "none",
        softcap: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, number in (
            ("features", features), ("heads", heads), ("kv_heads", kv_heads),
            ("head_size", head_size), ("window", window),
        ):  # fmt: skip
            if number is not None and check_int(name, number) < 1:
                raise ValueError(f"{name}: got {number}; must be ≥ 1")
        if not isinstance(causal, bool):
            raise TypeError(f"causal: got {type(causal).__name__}; must be True or False")
        check_alpha(alpha)
        softcap = check_number("softcap", softcap)
        if not (math.isfinite(softcap) and softcap >= 0.0):
            raise ValueError(f"softcap: got {softcap}; must be finite and ≥ 0")
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads != 0:
            raise ValueError(f"kv_heads: got {kv_heads}; must be a divisor of heads, {heads}")
        if head_size is None:
            if features % heads != 0:
                raise ValueError(f"features: got {features}; must be a multiple of heads, {heads}")
            head_size = features // heads
        if positions not in POSITIONS:
            raise ValueError(f"positions: got {positions!r}; must be one of {', '.join(POSITIONS)}")
        if scaling not in SCALINGS:
            raise ValueError(f"scaling: got {scaling!r}; must be one of {', '.join(SCALINGS)}")
        if scaling == "asentmax" and positions == "alibi":
            raise ValueError(
                "scaling: got 'asentmax'; with positions 'alibi' must be 'none' or 'ssmax' (it "
                "scales the heads without ALiBi; 'nape' has such heads)"
            )
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.causal, self.window, self.softcap = causal, window, softcap
        self.query = nn.Linear(features, heads * head_size, bias=bias)
        self.key = nn.Linear(features, kv_heads * head_size, bias=bias)
        self.value = nn.Linear(features, kv_heads * head_size, bias=bias)
        self.output = nn.Linear(heads * head_size, features, bias=bias)
        self.fixed_alpha = float(alpha)
        self.alpha_logits = (
            nn.Parameter(bounded_alpha(alpha).repeat(heads)) if learnable_alpha else None
        )
        slopes = {"alibi": alibi_slopes, "nape": nape_slopes}.get(positions)
        self.register_buffer("slopes", None if slopes is None else slopes(heads), persistent=False)
        self.slopes: Tensor | None
        self.sloped_heads = heads // 2 if positions == "nape" else heads
        self.rotary = RotaryEmbedding(head_size) if positions == "rope" else None
        self.scale: SSMaxScale | ASEntmaxScale | None = None
        if scaling == "ssmax":
            self.scale = SSMaxScale(heads)
        elif scaling == "asentmax":
            self.scale = ASEntmaxScale(
                features, heads, None if self.slopes is None else self.slopes == 0
            )

    @property
    def alpha(self) -> float | Tensor:
        """α: a number, or [heads] if it is learnt."""
        if self.alpha_logits is None:
            return self.fixed_alpha
        return 1.0 + torch.sigmoid(self.alpha_logits.float())

    @alpha.setter
    def alpha(self, value: float) -> None:
        if self.alpha_logits is not None:
            raise ValueError("alpha: is learnt; must not be set (see alpha_logits)")
        self.fixed_alpha = check_alpha(value)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Attention from ``hidden`` to ``context``.

        Parameters
        ----------
        hidden : Tensor
            [batch, queries, features]
        context : Tensor, optional
            [batch, keys, features]; ``hidden`` if not given. If there are more keys than queries,
            the queries are the last of them.
        key_mask, key_lengths : Tensor, optional
            As for ``flash_entmax.attention``.

        Returns
        -------
        Tensor
            [batch, queries, features]
        """
        context = hidden if context is None else context
        for name, tensor in (("hidden", hidden), ("context", context)):
            features = self.query.in_features
            if check_floating(name, tensor).dim() != 3 or tensor.shape[2] != features:
                raise ValueError(
                    f"{name}: got shape {list(tensor.shape)}; must be [batch, length, {features}]"
                )
        queries, keys = hidden.shape[1], context.shape[1]
        first = max(keys - queries, 0)

        def heads(tensor: Tensor, count: int) -> Tensor:
            return tensor.view(*tensor.shape[:-1], count, self.head_size).transpose(1, 2)

        query = heads(self.query(hidden), self.heads)
        key = heads(self.key(context), self.kv_heads)
        value = heads(self.value(context), self.kv_heads)
        if self.rotary is not None:
            query, key = self.rotary(query, first), self.rotary(key)
        result = attention(
            query,
            key,
            value,
            alpha=self.alpha,
            causal=self.causal,
            window_left=None if self.window is None else self.window - 1,
            key_mask=key_mask,
            key_lengths=key_lengths,
            alibi_slopes=None if self.slopes is None else self.slopes[: self.sloped_heads],
            softcap=self.softcap,
            query_scale=None if self.scale is None else self.scale(hidden, first),
        )
        projected: Tensor = self.output(result.transpose(1, 2).flatten(2))
        return projected

    def extra_repr(self) -> str:
        alpha = "learnt" if self.alpha_logits is not None else self.fixed_alpha
        return f"heads={self.heads}, kv_heads={self.kv_heads}, alpha={alpha}, causal={self.causal}"
