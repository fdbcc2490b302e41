"""A tiny BERT with random weights, as a transformers folder and as a run of fastbert.

The tests of the tasks use it.
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch
from transformers import BertConfig, BertForPreTraining

from fastbert.checkpoints import hugging_face, hugging_face_config
from fastbert.data.dataset import open_dataset
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer
from fastbert.data.vocabulary import train_tokenizer
from fastbert.recipe import dump_config, parse_config
from tests import one_process

POSITIONS = 32
VOCABULARY = 400
TEXTS = [
    "The statement is executed.",
    "A list is a mutable sequence of objects, and so is a bytearray.",
    "",
    "Names refer to objects; they are introduced by name binding operations.",
    "Ünïcode, punctuation... and unknown 漢字!",
]

RECIPE = """
data = "{data}"
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 64
max_position_embeddings = 32
[batch]
max_length = 32
sequences = 8
micro_batch_tokens = 256
[objective]
kind = "{kind}"
"""


def make_hugging_face_folder(folder: Path, tokenizer: Path | None = None) -> Path:
    """Let transformers save a BertForPreTraining with random weights.

    The weights are large, so that no logit is near zero.
    """
    texts = list(pydoc_data.topics.topics.values())[:20]
    vocabulary = (
        load_tokenizer(tokenizer) if tokenizer else train_tokenizer(iter(texts), VOCABULARY)
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    BertForPreTraining(config).save_pretrained(folder)
    save_tokenizer(vocabulary, folder)
    return folder


def make_run(
    folder: Path, hf_folder: Path, data: str = "nowhere", kind: str = "mlm+nsp", step: int = 7
) -> Path:
    """A run folder whose one checkpoint holds the weights of `hf_folder`."""
    recipe = parse_config(RECIPE.format(data=data, kind=kind), "test")
    model, vocab_size, tied = hugging_face_config.read_config(hf_folder / "config.json")
    weights = hugging_face.read_weights(hf_folder, model, vocab_size, tied)
    metadata = {"recipe": dump_config(recipe), "vocab_size": vocab_size, "dataset_sha256": "0" * 64}
    if data != "nowhere":
        metadata["dataset_sha256"] = open_dataset(data).sha256
    one_process.save(
        folder / "checkpoints",
        step,
        ((f"weight/{name}", tensor) for name, tensor in weights.items()),
        metadata,
        keep=3,
    )
    save_tokenizer(load_tokenizer(hf_folder), folder / "tokenizer")
    (folder / "config.toml").write_text(dump_config(recipe), encoding="utf-8")
    return folder
