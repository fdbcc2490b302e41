"""ModernBERT folders of transformers are read, and ours are read by stock libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from fastbert.checkpoints.hugging_face_config import read_config, written
from fastbert.config import ModernBertConfig
from fastbert.data.tokenizer import save_tokenizer
from fastbert.data.vocabulary import train_tokenizer
from fastbert.errors import InputError
from fastbert.tasks.export import TOLERANCE, export
from tests.modern_bert import CONFIGS, SMALL, SPECIAL
from tests.tiny_bert import TEXTS, VOCABULARY

SAME = {"rtol": TOLERANCE, "atol": TOLERANCE}  # what `export` allows
LONG = "names refer to objects, and objects have types. " * 6  # beyond the window of a local layer


@pytest.fixture(scope="module")
def tokenizer(english_documents):
    return train_tokenizer(iter(english_documents[:60]), VOCABULARY)


def make_folder(folder: Path, config: ModernBertConfig, tokenizer, **changes) -> Path:
    """Let transformers save a ModernBertForMaskedLM with random weights."""
    torch.manual_seed(0)
    values = written(config, SPECIAL) | {"vocab_size": tokenizer.get_vocab_size(), **changes}
    model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**values))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory, tokenizer):
    return make_folder(tmp_path_factory.mktemp("m") / "folder", CONFIGS[request.param], tokenizer)


@pytest.fixture(scope="module")
def ours(folder):
    return fastbert.load(folder)


def inputs_of(folder: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, model_input_names=["input_ids", "attention_mask"]
    )
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def test_every_layer_and_logit_is_that_of_transformers(folder, ours):
    assert ours.heads == {"mlm"}
    texts, model = [*TEXTS, LONG], transformers.ModernBertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model.eval()(**inputs_of(folder, texts), output_hidden_states=True)
    for i, states in enumerate(ours.hidden_states(texts)):
        length = len(states[-1])
        for state, expected in zip(states, theirs.hidden_states, strict=True):
            np.testing.assert_allclose(state, expected[i, :length], **SAME)
        logits = ours.model.token_logits(torch.from_numpy(states[-1]))
        np.testing.assert_allclose(logits, theirs.logits[i, :length], **SAME)


def test_an_export_is_loaded_by_stock_libraries(ours, tmp_path, caplog):
    from sentence_transformers import SentenceTransformer

    done = export(ours, tmp_path / "out", [*TEXTS, LONG])
    assert done.architecture == "ModernBertForMaskedLM"
    out = str(tmp_path / "out")
    for stock in (transformers.ModernBertForMaskedLM, transformers.AutoModelForMaskedLM):
        _, report = stock.from_pretrained(out, output_loading_info=True)
        assert not any(report.values()), report
    text = "Names [MASK] to objects."
    fill = transformers.pipeline("fill-mask", out, top_k=3)
    (expected,) = [[(x["token_str"], x["score"]) for x in fill(text)]]
    (found,) = ours.fill_mask(text, k=3)
    assert [token for token, _ in found] == [token for token, _ in expected]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], **SAME)
    vectors = SentenceTransformer(out, device="cpu").encode([*TEXTS, LONG])
    np.testing.assert_allclose(ours.encode([*TEXTS, LONG]), vectors, **SAME)
    again = fastbert.load(out)
    assert again.config == ours.config
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name])


def test_the_config_of_an_export_is_that_of_transformers(ours, folder, tmp_path):
    export(ours, tmp_path / "out")
    found, expected = (
        transformers.AutoConfig.from_pretrained(path).to_dict()
        for path in (tmp_path / "out", folder)
    )
    for key in ("_name_or_path", "transformers_version"):
        found[key] = expected[key]
    more = found.keys() - expected.keys()
    older = {"global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"}
    assert more <= older and {k: v for k, v in found.items() if k not in older} == {
        k: v for k, v in expected.items() if k not in older
    }


def test_an_encoder_alone(tmp_path, tokenizer, caplog):
    folder = make_folder(tmp_path / "m", SMALL, tokenizer)
    done = export(fastbert.load(folder), tmp_path / "encoder", encoder=True)
    assert done.architecture == "ModernBertModel" and done.compared > 0
    caplog.clear()
    model = transformers.AutoModel.from_pretrained(tmp_path / "encoder")
    assert "LOAD REPORT" not in caplog.text and isinstance(model, transformers.ModernBertModel)
    alone = fastbert.load(tmp_path / "encoder")
    assert alone.heads == frozenset()
    assert np.array_equal(alone.encode(TEXTS), fastbert.load(folder).encode(TEXTS))
    with pytest.raises(InputError, match="not trained on masked tokens"):
        alone.fill_mask("a [MASK]")
    with pytest.raises(InputError, match="not trained on next sentences"):
        alone.next_sentence("a", "b")


# ------------------------------------------------------------------------- config.json


def test_defaults_are_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "modernbert"}')
    config, vocab_size, tied = read_config(tmp_path / "config.json")
    theirs = transformers.ModernBertConfig()
    assert config == ModernBertConfig() and vocab_size == theirs.vocab_size and tied
    expected = transformers.ModernBertConfig(**written(config, SPECIAL), vocab_size=vocab_size)
    for key, value in theirs.to_dict().items():
        if not key.endswith(("token_id", "version")):
            assert getattr(expected, key) == value, key


def read(folder: Path, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": "modernbert", **values}))
    return read_config(file)[0]


def test_keys_of_transformers_4_and_5(tmp_path):
    """Those of mmBERT and Ettin, as published, and what transformers 5 makes of them."""
    older = {
        "num_hidden_layers": 7,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 160000.0,
        "position_embedding_type": "sans_pos",
        "repad_logits_with_grad": False,
    }
    newer = json.loads(transformers.ModernBertConfig(**older).to_json_string())
    del newer["model_type"]
    assert "layer_types" in newer and "global_rope_theta" not in newer["rope_parameters"]
    newer = {k: v for k, v in newer.items() if not k.startswith("global_attn")}
    expected = read(tmp_path, **older)
    assert read(tmp_path, **newer) == expected
    assert (expected.local_rope_theta, expected.global_attn_every_n_layers) == (160000.0, 3)
    one = {"num_hidden_layers": 3, "layer_types": ["full_attention"] + ["sliding_attention"] * 2}
    assert [read(tmp_path, **one).window_of(i) for i in range(3)] == [None, 64, 64]
    # As transformers 4 did: without a theta of their own, local layers have that of the others.
    null = read(tmp_path, global_rope_theta=5e4, local_rope_theta=None)
    assert null.local_rope_theta == 5e4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_activation": "relu"}, ["hidden_activation = 'relu'", "only 'gelu'"]),
        ({"classifier_activation": "silu"}, ["classifier_activation = 'silu'"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "None"]),
        ({"norm_bias": "yes"}, ["norm_bias = 'yes'", "true or false"]),
        ({"norm_bias": 1}, ["norm_bias = 1", "true or false"]),
        ({"classifier_pooling": "max"}, ["classifier_pooling = 'max'", "cls, mean"]),
        ({"local_attention": 0}, ["local_attention = 0", "1 or more"]),
        ({"local_attention": "128"}, ["local_attention = '128'"]),
        ({"global_attn_every_n_layers": 0}, ["global_attn_every_n_layers = 0"]),
        ({"global_rope_theta": -1}, ["global_rope_theta = -1"]),
        ({"local_rope_theta": 0}, ["local_rope_theta = 0", "1 or more"]),
        ({"attention_dropout": 2}, ["attention_dropout = 2", "0.9 at most"]),
        ({"num_attention_heads": 5}, ["num_attention_heads = 5", "hidden_size = 768"]),
        ({"num_attention_heads": 256}, ["hidden_size / num_attention_heads = 3", "even"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings = 'no'"]),
        ({"layer_types": ["sliding_attention"] * 22}, ["layer_types", "full_attention"]),
        ({"layer_types": ["full_attention"] * 3}, ["layer_types has 3", "num_hidden_layers = 22"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            ["rope_parameters.full_attention.rope_type = 'yarn'", "'default'"],
        ),
        # transformers takes "type", too, as in files of older releases.
        (
            {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
            ["rope_parameters.sliding_attention.type = 'linear'", "'default'"],
        ),
        (
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            ["rope_parameters.full_attention.partial_rotary_factor = 0.5", "only rope_theta"],
        ),
        ({"rope_parameters": {"full_attention": 1e4}}, ["full_attention = 10000.0", "object"]),
        ({"rope_parameters": {"rope_theta": 1e4}}, ["rope_parameters = {'rope_theta'", "entry"]),
        ({"rope_parameters": [1e4]}, ["rope_parameters = [10000.0]", "full_attention"]),
        ({"model_type": "modernbert-decoder"}, ["model_type = 'modernbert-decoder'", "bert"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_config_is_one_clear_line(tmp_path, values, words):
    with pytest.raises(InputError) as caught:
        read(tmp_path, **values)
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert all(word in message for word in words), message


# ------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("model.layers.1.attn_norm.weight"), ["attn_norm.weight is missing"]),
        (
            lambda s: s.update({"model.layers.0.attn_norm.weight": torch.ones(48)}),
            ["layers.0.attn_norm.weight is unknown", "ModernBERT"],
        ),
        (
            lambda s: s.update({"model.layers.0.mlp.Wi.bias": torch.ones(80)}),
            ["Wi.bias is unknown"],
        ),
        (
            lambda s: s.update({"model.layers.2.mlp.Wi.weight": torch.ones(40, 48)}),
            ["mlp.Wi.weight", "[40, 48]", "[80, 48]"],
        ),
        (
            lambda s: s.update({"decoder.weight": torch.zeros(VOCABULARY, 48)}),
            ["decoder.weight differs", "tie_word_embeddings"],
        ),
        (
            lambda s: s["model.final_norm.weight"].fill_(float("nan")),
            ["model.final_norm.weight", "not finite"],
        ),
    ],
    ids=["missing", "layer 0", "bias", "shape", "untied", "nan"],
)
def test_wrong_weights_are_one_clear_line(tmp_path, tokenizer, change, words):
    file = make_folder(tmp_path / "m", SMALL, tokenizer) / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        fastbert.load(tmp_path / "m")
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_decoder_of_its_own_is_a_missing_head(tmp_path, tokenizer):
    folder = make_folder(tmp_path / "m", CONFIGS["untied"], tokenizer)
    state = load_file(folder / "model.safetensors")
    del state["decoder.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert fastbert.load(folder).heads == frozenset()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_head_of_a_classifier_is_no_mlm_head(tmp_path, tokenizer, bias):
    """Without a bias in the decoder, the two heads have the same weights."""
    folder = make_folder(tmp_path / "m", SMALL, tokenizer, decoder_bias=bias)
    assert fastbert.load(folder).heads == {"mlm"}
    stock = transformers.ModernBertForTokenClassification.from_pretrained(folder)
    stock.save_pretrained(tmp_path / "classifier")
    save_tokenizer(tokenizer, tmp_path / "classifier")
    assert fastbert.load(tmp_path / "classifier").heads == frozenset()


def test_the_advice_on_a_pickle_works(tmp_path, tokenizer):
    folder = make_folder(tmp_path / "m", SMALL, tokenizer)
    expected = fastbert.load(folder).encode(TEXTS)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="a pickle") as caught:
        fastbert.load(folder)
    advice = re.search(r"transformers\.(\w+)\.from_pretrained\(DIR\)", str(caught.value))
    assert advice is not None
    getattr(transformers, advice[1]).from_pretrained(folder).save_pretrained(folder)
    assert np.array_equal(fastbert.load(folder).encode(TEXTS), expected)
