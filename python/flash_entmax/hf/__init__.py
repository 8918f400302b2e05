"""α-entmax attention in Hugging Face models (transformers 5).

>>> import flash_entmax.hf
>>> flash_entmax.hf.register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flash_entmax")

or, for a model that is already there, ``flash_entmax.hf.convert(model, alpha=1.5)``.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flash_entmax.hf needs transformers 5 or later: pip install 'transformers>=5'"
    ) from error

from ._attention import NAME, attention_forward
from ._masks import attention_mask
from ._models import AlphaAnnealing, convert, get_alpha, register, set_alpha

__all__ = [
    "NAME",
    "AlphaAnnealing",
    "attention_forward",
    "attention_mask",
    "convert",
    "get_alpha",
    "register",
    "set_alpha",
]
