"""Registering the implementation, converting models, and their α."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, masking_utils, modeling_utils

from ._attention import LOGITS, NAME, attention_forward
from ._masks import attention_mask

Alpha = float | Sequence[float | Sequence[float]]


def register() -> None:
    """Makes ``attn_implementation="flash_entmax"`` known to transformers. Harmless to repeat.

    Both halves are registered: the attention and its masks. Without the latter a model would run
    without any mask, and a decoder would see the future.

    transformers takes every name that contains "flash" for one of Dao's flash attentions and would
    look for a package of that name when a model is made. ``register`` therefore replaces the one
    check in ``transformers.modeling_utils`` by one that knows this name.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        raise NotImplementedError(
            f"transformers: got version {transformers.__version__}; must be 5 or later"
        )
    modeling_utils.AttentionInterface.register(NAME, attention_forward)
    masking_utils.AttentionMaskInterface.register(NAME, attention_mask)
    module: Any = modeling_utils
    original = getattr(module, "is_flash_attention_requested", None)
    if original is not None and not hasattr(original, "flash_entmax_original"):
        module.is_flash_attention_requested = _except_ours(original)


def _except_ours(original: Callable[..., bool]) -> Callable[..., bool]:
    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, **kwargs: Any
    ) -> bool:
        name = requested_attention_implementation
        if (config._attn_implementation if config is not None else name) == NAME:
            return False
        return original(config=config, requested_attention_implementation=name, **kwargs)

    is_flash_attention_requested.flash_entmax_original = original  # type: ignore[attr-defined]
    return is_flash_attention_requested


def _attention_modules(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, "is_causal") and hasattr(getattr(module, "config", None), "to_dict"):
            yield module


def _configurations(model: nn.Module) -> list[Any]:
    """Every configuration that an attention layer reads, once."""
    found = {id(module.config): module.config for module in _attention_modules(model)}
    config = getattr(model, "config", None)
    if config is not None:
        found[id(config)] = config
    return list(found.values())


def _check_alpha(alpha: Any, depth: int = 0) -> Any:
    if isinstance(alpha, (list, tuple)) and depth < 2:
        return [_check_alpha(value, depth + 1) for value in alpha]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(
            f"alpha: got {type(alpha).__name__}; must be a number, one a layer, or one a layer and "
            "head"
        )
    if not (math.isfinite(alpha) and alpha > 0.0):
        raise ValueError(f"alpha: got {alpha}; must be finite and > 0")
    return float(alpha)


def _implementation(module: Any) -> str | None:
    return getattr(module.config, "_attn_implementation", None)


def _all_attention(model: nn.Module) -> list[Any]:
    """Every attention layer; raises if there is none."""
    modules = list(_attention_modules(model))
    if not modules:
        raise TypeError(
            f"model: got {type(model).__name__}, which has no attention of transformers; must be a "
            "transformers model"
        )
    return modules


def _converted(model: nn.Module) -> list[Any]:
    """The layers that use this attention; raises if none does."""
    modules = _all_attention(model)
    ours = [module for module in modules if _implementation(module) == NAME]
    if not ours:
        names = ", ".join(sorted({repr(_implementation(module)) for module in modules}))
        raise ValueError(
            f"model: got one with attention {names}; must use {NAME!r} (convert() makes it)"
        )
    return ours


def _check_sizes(model: nn.Module, modules: Sequence[Any], alpha: Any) -> None:
    """Raises unless a list has one entry a layer, and lists in it one a head."""
    if not isinstance(alpha, list):
        return
    numbers = [int(getattr(module, "layer_idx", None) or 0) for module in modules]
    if any(getattr(module, "layer_idx", None) is None for module in modules):
        raise ValueError(
            f"alpha: got a list; must be a number, since the layers of {type(model).__name__} have "
            "no numbers"
        )
    layers = 1 + max(numbers)
    if len(alpha) != layers:
        raise ValueError(f"alpha: got {len(alpha)} entries; must be a number or have {layers}")
    for module, number in zip(modules, numbers, strict=True):
        heads, entry = module.config.num_attention_heads, alpha[number]
        if isinstance(entry, list) and len(entry) != heads:
            raise ValueError(
                f"alpha: got {len(entry)} entries for layer {number}; must be a number or have "
                f"{heads}"
            )


def _write_alpha(model: nn.Module, alpha: Any) -> None:
    for config in _configurations(model):
        config.flash_entmax_alpha = alpha


def set_alpha(model: nn.Module, alpha: Alpha) -> None:
    """Sets α of every layer.

    Parameters
    ----------
    model : Module
        A transformers model that uses this attention, or a module around one. Its α must not be
        learnt.
    alpha : float or list
        > 0: a number, a list with one a layer, or a list with one list a layer (one a head). It is
        kept in the configuration as ``flash_entmax_alpha``, and saved with the model.
    """
    modules = _converted(model)
    if any(hasattr(module, LOGITS) for module in modules):
        raise ValueError(
            f"alpha: is learnt; must not be set (see the parameters {LOGITS}; convert() makes it a "
            "number again)"
        )
    checked = _check_alpha(alpha)
    _check_sizes(model, modules, checked)
    _write_alpha(model, checked)


def get_alpha(model: nn.Module) -> Any:
    """What ``set_alpha`` set (1.5 if nothing); learnt values, by layer, where α is learnt."""
    modules = _converted(model)
    learnt = [
        (1.0 + torch.sigmoid(getattr(module, LOGITS).detach().float())).tolist()
        for module in modules
        if hasattr(module, LOGITS)
    ]
    if learnt:
        return learnt
    return getattr(modules[0].config, "flash_entmax_alpha", 1.5)


def convert(
    model: PreTrainedModel, alpha: Alpha = 1.5, *, learnable: bool = False
) -> PreTrainedModel:
    """Makes a loaded model use α-entmax attention.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place. With α = 1 its results stay what they were. An α that an earlier call made
        learnable is forgotten.
    alpha : float or list
        As for ``set_alpha``.
    learnable : bool
        Whether every head learns its α, as 1 + sigmoid(a) with a parameter a (Correia, Niculae &
        Martins 2019), starting from ``alpha``, which must be in (1, 2). The parameters are named
        ``flash_entmax_alpha_logits``; give them to the optimiser after this call.

    Returns
    -------
    PreTrainedModel
        ``model``.
    """
    register()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}; must be a transformers model")
    modules = _all_attention(model)
    checked = _check_alpha(alpha)
    _check_sizes(model, modules, checked)
    if learnable:
        _check_learnable(checked)
    # Nothing has changed up to here.
    for module in modules:
        if hasattr(module, LOGITS):
            delattr(module, LOGITS)
    _write_alpha(model, checked)
    model.set_attn_implementation(NAME)
    for config in _configurations(model):
        used = getattr(config, "_attn_implementation", NAME)
        if used != NAME:
            raise NotImplementedError(
                f"model: {type(model).__name__} uses attention {used!r} in place of {NAME!r}; it "
                "does not allow other implementations"
            )
    if learnable:
        _make_learnable(model)
    return model


def _check_learnable(alpha: Any) -> None:
    if isinstance(alpha, list):
        for value in alpha:
            _check_learnable(value)
    elif not 1.0 < alpha < 2.0:
        raise ValueError(f"alpha: got {alpha}; must be in (1, 2) to be learnt")


def _make_learnable(model: nn.Module) -> None:
    from ._attention import alpha_of

    for module in _attention_modules(model):
        heads = module.config.num_attention_heads
        weight = next(module.parameters())
        alpha = torch.as_tensor(alpha_of(module, weight), dtype=torch.float32).expand(heads)
        logits = torch.logit(alpha - 1.0).to(weight.device)
        module.register_parameter(LOGITS, nn.Parameter(logits))


class AlphaAnnealing(TrainerCallback):
    """Moves α while a ``transformers.Trainer`` runs: ``callbacks=[AlphaAnnealing(schedule)]``.

    Parameters
    ----------
    schedule : callable
        Step to α, as ``flash_entmax.schedules.AlphaSchedule``.
    """

    def __init__(self, schedule: Callable[[int], float]) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_alpha(kwargs["model"], self.schedule(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_alpha(kwargs["model"], self.schedule(state.global_step))
