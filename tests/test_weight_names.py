"""Names and shapes against transformers' own model, and every kind of faulty weights file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig as StockConfig
from transformers import BertForMaskedLM as StockMaskedLM
from transformers import BertForPreTraining as StockModel
from transformers import BertModel as StockEncoder

from fastbert.checkpoints.weight_names import from_hugging_face, heads, shapes, to_hugging_face
from fastbert.config import BertConfig
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining

MODEL = BertConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
)
VOCABULARY = 50
TIED = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}


def stock(kind: Any = StockModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 16,
    }
    model = kind(StockConfig(vocab_size=VOCABULARY, **sizes))
    for (
        parameter
    ) in model.parameters():  # biases and LayerNorms too: a swap of two zeros would not show
        torch.nn.init.normal_(parameter)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def read(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return from_hugging_face(state, MODEL, VOCABULARY, "x.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_shapes_are_those_of_our_model():
    ours = BertForPreTraining(MODEL, VOCABULARY).state_dict()
    assert shapes(MODEL, VOCABULARY) == {name: tuple(tensor.shape) for name, tensor in ours.items()}


def test_there_and_back_gives_every_weight_of_transformers():
    state = stock()
    ours = read(state)
    assert {name: tuple(t.shape) for name, t in ours.items()} == shapes(MODEL, VOCABULARY)
    assert heads(ours, MODEL) == {"mlm", "nsp"}
    assert same(
        to_hugging_face(ours, MODEL),
        {
            name: t
            for name, t in state.items()
            if name not in TIED and not name.endswith("position_ids")
        },
    )


def test_query_key_and_value_are_joined_in_this_order():
    state = stock()
    parts = [
        state[f"bert.encoder.layer.1.attention.self.{name}.weight"]
        for name in ("query", "key", "value")
    ]
    assert torch.equal(read(state)["layers.1.attention.qkv_weight"], torch.cat(parts))


def test_exported_tensors_share_no_memory():
    found = to_hugging_face(read(stock()), MODEL)
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == len(found)


def test_old_names_of_layer_norms():
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in stock().items()
    }
    assert any("gamma" in name for name in old)
    assert same(read(old), read(stock()))


def test_encoder_alone_without_prefix():
    ours = read(stock(StockEncoder))
    assert heads(ours, MODEL) == set()
    assert "nsp_head.pooler.weight" in ours and "mlm_head.weight" not in ours
    assert all(
        name in ours
        for name in shapes(MODEL, VOCABULARY)
        if name.startswith(("embeddings.", "layers."))
    )


def test_masked_lm_has_one_head_and_heads_of_other_tasks_are_left_out():
    state = stock(StockMaskedLM)
    assert heads(read(state), MODEL) == {"mlm"}
    assert same(
        read({**state, "classifier.weight": torch.zeros(3, 24), "classifier.bias": torch.zeros(3)}),
        read(state),
    )


def test_decoder_may_be_missing_or_hold_the_only_bias():
    state = stock()
    untied = {name: t for name, t in state.items() if name not in TIED}
    assert same(read(untied), read(state))
    moved = {**untied, "cls.predictions.decoder.bias": untied["cls.predictions.bias"]}
    del moved["cls.predictions.bias"]
    assert same(read(moved), read(state))


def test_a_decoder_that_is_neither_tied_nor_there():
    """transformers would draw it at random: the word embeddings are another model's decoder."""
    state = {name: t for name, t in stock().items() if name not in TIED}
    ours = from_hugging_face(state, MODEL, VOCABULARY, "m", tied=False)
    assert heads(ours, MODEL) == {"nsp"}
    assert same(ours, {n: t for n, t in read(state).items() if not n.startswith("mlm_head.")})


def test_half_precision_becomes_fp32():
    ours = read({name: t.half() for name, t in stock().items()})
    assert {t.dtype for t in ours.values()} == {torch.float32}


def broken(change) -> dict[str, torch.Tensor]:
    state = stock()
    change(state)
    return state


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(QUERY), [QUERY + " is missing", "2 layers"]),
        (lambda s: [s.pop(n) for n in list(s) if ".layer.1." in n], ["are missing", "and 13 more"]),
        (lambda s: s.update({QUERY: torch.zeros(24, 23)}), [QUERY, "[24, 23]", "[24, 24]"]),
        (
            lambda s: s.update({"bert.embeddings.word_embeddings.weight": torch.zeros(51, 24)}),
            ["word_embeddings", "[51, 24]", "[50, 24]"],
        ),
        (
            lambda s: s.update({"bert.encoder.layer.2.output.dense.bias": torch.zeros(24)}),
            ["layer.2.output.dense.bias is unknown"],
        ),
        (
            lambda s: s.update({"cls.predictions.decoder.weight": torch.zeros(50, 24)}),
            ["decoder.weight differs", "tie_word_embeddings"],
        ),
    ],
    ids=["one missing", "a layer missing", "wrong shape", "wrong vocabulary", "unknown", "untied"],
)
def test_a_wrong_file_is_one_clear_line(change, words):
    with pytest.raises(InputError) as caught:
        read(broken(change))
    message = str(caught.value)
    assert message.startswith("x.safetensors: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "0.auto_model.", "model.encoder."])
def test_a_model_inside_another_one_is_named(prefix):
    """As torch.compile, DistributedDataParallel and Lightning leave the names."""
    whole, bare = stock(), stock(StockEncoder)
    for state in (whole, bare):
        wrapped = {prefix + name: tensor for name, tensor in state.items()}
        with pytest.raises(InputError, match=f"missing; .*; the names begin with '{prefix}', as "):
            read(wrapped)
        short = {name: t for name, t in state.items() if "layer.1." not in name}
        with pytest.raises(InputError, match=r"of 2 layers$"):
            read(short)
