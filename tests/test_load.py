"""`fastbert.load` gives the same model from a run, a checkpoint and a Hugging Face folder.

Anything else is refused with one line.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_bert import TEXTS, VOCABULARY, make_hugging_face_folder, make_run
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers import BertForPreTraining as TheirModel

import fastbert
from fastbert.checkpoints import hugging_face, hugging_face_config
from fastbert.checkpoints.model_folder import CheckpointWarning
from fastbert.checkpoints.weight_names import shapes
from fastbert.errors import InputError
from fastbert.tasks.export import export
from fastbert.tasks.pretrained import TextCutWarning
from tests.ranks import environment

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def hf(original, tmp_path) -> Path:
    """A copy of the folder that a test may damage."""
    return shutil.copytree(original, tmp_path / "hf")


@pytest.fixture
def run(original, tmp_path) -> Path:
    return make_run(tmp_path / "run", original)


def test_every_layer_of_every_text_is_that_of_transformers(original):
    model, tokenizer = (
        BertModel.from_pretrained(original).eval(),
        AutoTokenizer.from_pretrained(original),
    )
    texts = TEXTS[:4]
    for text, states in zip(texts, fastbert.load(original).hidden_states(texts), strict=True):
        with torch.no_grad():
            expected = model(
                **tokenizer(text, return_tensors="pt"), output_hidden_states=True
            ).hidden_states
        assert len(states) == len(expected) == 3
        for ours, theirs in zip(states, expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs[0], rtol=0, atol=2e-5)


FORKED = """
import multiprocessing, sys, torch, fastbert
model = fastbert.load(sys.argv[1], "cpu")
torch.set_num_threads(2)
big = torch.ones(600, 600)
big @ big  # starts the threads of this process, of which a fork has none
queue = multiprocessing.get_context("fork").Queue()
def encode():
    big @ big
    queue.put(model.encode(["a text"] * 100).shape)
multiprocessing.get_context("fork").Process(target=encode, daemon=True).start()
print(queue.get(timeout=60))
"""


@pytest.mark.slow
def test_a_forked_process_computes_too(original):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(original)],
        env=environment() | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-600:]
    assert done.stdout.startswith("(100, ")


NAMED = "A [MASK] is a [SEP]"  # as text, not as special tokens


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_gives_the_same(original, copied):
    """As a process gets that is started with a model, though tokenizers lose a setting then."""
    model = fastbert.load(original)
    again = copied(model)
    assert np.array_equal(again.encode([NAMED]), model.encode([NAMED]))
    assert again.fill_mask("A [MASK].") == model.fill_mask("A [MASK].")


def test_threads_share_a_model(original):
    """Filling masks in one thread turns no text of another into special tokens."""
    model = fastbert.load(original)
    wanted = model.encode([NAMED])
    done = threading.Event()
    long = "[MASK] " + "list " * 5000  # it is tokenized, which takes a while, and then refused

    def fill():
        while not done.is_set():
            with pytest.raises(InputError, match="shorten it"):
                model.fill_mask(long)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        found = [model.encode([NAMED]) for _ in range(100)]
    finally:
        done.set()
        thread.join()
    assert all(np.array_equal(vectors, wanted) for vectors in found)


def test_run_checkpoint_and_folder_are_the_same_model(original, run):
    expected = fastbert.load(original).encode(TEXTS)
    for path in (run, run / "checkpoints/step-00000007", str(run)):
        found = fastbert.load(path)
        assert np.array_equal(found.encode(TEXTS), expected)
        assert found.metadata["step"] == 7 and found.recipe is not None


@pytest.mark.parametrize("bias", [True, False])
def test_a_decoder_of_its_own_goes_both_ways(original, hf, tmp_path, bias):
    """transformers now gives the decoder's bias its own name; it used to write the shared one."""
    config = BertConfig.from_pretrained(original, tie_word_embeddings=False)
    theirs = TheirModel.from_pretrained(original, config=config).eval()
    decoder = theirs.cls.predictions.decoder
    torch.nn.init.normal_(decoder.weight, std=0.3)
    torch.nn.init.normal_(decoder.bias)
    theirs.cls.predictions.bias.data.copy_(decoder.bias)
    theirs.save_pretrained(hf)
    if not bias:
        rewrite(lambda s: s.pop("cls.predictions.decoder.bias", None))(hf)
    ours, inputs = (
        fastbert.load(hf),
        AutoTokenizer.from_pretrained(hf)(TEXTS[0], return_tensors="pt"),
    )
    with torch.no_grad():
        expected = theirs(**inputs).prediction_logits[0]
    np.testing.assert_allclose(
        ours.model.token_logits(torch.tensor(ours.hidden_states(TEXTS[:1])[0][-1])),
        expected,
        rtol=0,
        atol=2e-5,
    )
    exported = export(ours, tmp_path / "again")
    assert exported.difference < 2e-5
    assert not json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"]
    with torch.no_grad():
        again = TheirModel.from_pretrained(tmp_path / "again").eval()(**inputs).prediction_logits[0]
    np.testing.assert_allclose(again, expected, rtol=0, atol=2e-5)


def test_weights_in_an_empty_index(original, tmp_path):
    TheirModel.from_pretrained(original).save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(original / name, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found, expected = (
        fastbert.load(tmp_path).model.state_dict(),
        fastbert.load(original).model.state_dict(),
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    replace("model.safetensors.index.json", b'{"weight_map": {"x": "../x"}}')(tmp_path)
    with pytest.raises(
        InputError,
        match=r"model.safetensors.index.json: weight_map names '../x', which is no file of this "
        r"folder",
    ):
        fastbert.load(tmp_path)


def test_vocab_txt_alone_is_enough(original, hf):
    (hf / "tokenizer.json").unlink()
    assert np.array_equal(fastbert.load(hf).encode(TEXTS), fastbert.load(original).encode(TEXTS))


def test_a_damaged_checkpoint_is_skipped_with_a_message(original, run):
    make_run(run, original, step=9)
    damaged = next((run / "checkpoints/step-00000009").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    words = "step-00000009.*an older checkpoint is taken"
    with pytest.warns(CheckpointWarning, match=words) as caught:
        assert fastbert.load(run).path.name == "step-00000007"
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(InputError, match="step-00000009: not a valid checkpoint"):
        fastbert.load(damaged.parent)


def test_a_run_that_learned_no_pairs_has_no_pair_head(original, tmp_path):
    found = fastbert.load(make_run(tmp_path / "run", original, kind="mlm"))
    assert found.heads == {"mlm"}
    with pytest.raises(InputError, match="not trained on next sentences"):
        found.next_sentence("a", "b")


def test_long_texts_are_cut_and_said_so_once(original):
    model = fastbert.load(original)
    long = "names " * 100
    with pytest.warns(TextCutWarning, match="2 of 3 texts are longer than the 30 tokens") as caught:
        vectors = model.encode([long, "short", long + "more"])
    assert [warning.filename for warning in caught] == [__file__]
    assert np.array_equal(vectors[0], vectors[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = model.tokenizer.decode(
            model.tokenizer.encode(long, add_special_tokens=False).ids[:30]
        )
        np.testing.assert_allclose(model.encode([kept]), vectors[:1], atol=1e-5)


def in_the_config(side: str):
    return edit("tokenizer_config.json", truncation_side=side)


def in_the_tokenizer(side: str):
    truncation = {"direction": side.title(), "max_length": 9, "strategy": "LongestFirst"}
    return edit("tokenizer.json", truncation={**truncation, "stride": 0})


@pytest.mark.parametrize("said", [in_the_config, in_the_tokenizer])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_that_a_tokenizer_cuts(hf, side, said):
    """As with transformers, whose AutoTokenizer follows the same setting."""
    said(side)(hf)
    model, theirs = fastbert.load(hf), AutoTokenizer.from_pretrained(hf)
    texts = [" ".join(TEXTS) * 5, "a short text", " ".join(reversed(TEXTS)) * 5]
    with pytest.warns(TextCutWarning, match="2 of 3 texts"):
        ids = model._ids(texts)
    wanted = theirs(texts, truncation=True, max_length=model.max_length)["input_ids"]
    assert [[model.special.cls, *found, model.special.sep] for found in ids] == wanted
    assert len(wanted[0]) == model.max_length > len(wanted[1])


def test_one_of_two_settings_of_the_side(hf):
    in_the_tokenizer("left")(hf)
    in_the_config("right")(hf)
    assert AutoTokenizer.from_pretrained(hf).truncation_side == "right"
    assert not fastbert.load(hf).vectors.keeps_end


def test_a_word_of_more_than_100_characters_is_unknown_unless_it_has_spaces(original):
    """As docs/how-to/tokenizers.md says, and as in transformers."""
    long = "ab" * 51
    model, tokenizer = fastbert.load(original), AutoTokenizer.from_pretrained(original)
    whole, spaced = model.hidden_states([long, f"{long[:100]} {long[100:]}"])
    assert len(whole[0]) == 3 < len(spaced[0])
    assert tokenizer.tokenize(long) == ["[UNK]"]


def edit(file: str, **changes):
    """Change these keys of a JSON file, or remove them where the value is None."""

    def change(folder: Path) -> None:
        values = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def rewrite(change):
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


def replace(file: str, data: bytes):
    return lambda folder: (folder / file).write_bytes(data)


def remove(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def an_empty_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


DECODER, WORDS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
POOLER = "bert.pooler.dense.weight"


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (
            edit("config.json", model_type="roberta"),
            ["config.json", "model_type = 'roberta'", '"bert"'],
        ),
        (edit("config.json", model_type=None), ["config.json", "model_type = None"]),
        (edit("config.json", model_type=""), ['add "model_type": "bert" if this is one']),
        (replace("config.json", b"{"), ["config.json", "JSON"]),
        (replace("config.json", b"\xff\xfe"), ["config.json", "JSON"]),
        (replace("config.json", b"[]"), ["config.json", "model_type = None"]),
        *(
            (edit("config.json", **{key: [["x" * 30] * 30]}), [f"{key} = [["])
            for key in ("model_type", "hidden_act", "hidden_size", "tie_word_embeddings")
        ),
        (edit("config.json", hidden_act="relu"), ["hidden_act = 'relu'", "'gelu'"]),
        (edit("config.json", hidden_act="gelu_new"), ["hidden_act = 'gelu_new'"]),
        (
            edit("config.json", position_embedding_type="relative_key"),
            ["position_embedding_type = 'relative_key'"],
        ),
        (edit("config.json", type_vocab_size=1), ["type_vocab_size = 1"]),
        (edit("config.json", is_decoder=True), ["is_decoder = True"]),
        (edit("config.json", hidden_size="32"), ["hidden_size = '32'", "whole number"]),
        (edit("config.json", num_hidden_layers=0), ["num_hidden_layers = 0", "1 or more"]),
        (
            edit("config.json", num_attention_heads=5),
            ["num_attention_heads = 5", "hidden_size = 32"],
        ),
        (edit("config.json", tie_word_embeddings="no"), ["tie_word_embeddings = 'no'"]),
        (
            rewrite(lambda s: s.update({DECODER: s[WORDS] + 1})),
            ["model.safetensors", DECODER, "differs", "tie_word_embeddings"],
        ),
        (edit("config.json", layer_norm_eps="tiny"), ["layer_norm_eps = 'tiny'"]),
        (
            edit("config.json", vocab_size=VOCABULARY + 1),
            ["model.safetensors", "word_embeddings", f"[{VOCABULARY + 1}, 32]"],
        ),
        (
            edit("config.json", num_hidden_layers=3),
            ["model.safetensors", "encoder.layer.2", "missing", "3 layers"],
        ),
        (
            edit("config.json", num_hidden_layers=1),
            ["model.safetensors", "encoder.layer.1", "unknown"],
        ),
        (only_a_pickle, ["pytorch_model.bin", "pickle", "save_pretrained"]),
        (an_empty_index, ["model.safetensors.index.json", "weight_map"]),
        (remove("model.safetensors"), ["no model.safetensors"]),
        (
            replace("model.safetensors", b"not tensors"),
            ["model.safetensors", "cannot be read as safetensors"],
        ),
        (replace("model.safetensors", b""), ["model.safetensors", "cannot be read as safetensors"]),
        (replace("model.safetensors", POINTER), ["model.safetensors", "Git LFS", "git lfs pull"]),
        (replace("tokenizer.json", POINTER), ["tokenizer.json", "Git LFS", "git lfs pull"]),
        (replace("config.json", POINTER), ["config.json", "Git LFS", "git lfs pull"]),
        (
            rewrite(lambda s: s.update({POOLER: (s[POOLER] * 100).to(torch.int8)})),
            ["model.safetensors", POOLER, "holds int8", "quantized", "fp32"],
        ),
        (
            rewrite(lambda s: s.update({POOLER: s[POOLER] > 0})),
            ["model.safetensors", POOLER, "holds bool"],
        ),
        (
            rewrite(lambda s: s.update({POOLER: s[POOLER][:-1].clone()})),
            ["model.safetensors", POOLER, "[31, 32]"],
        ),
        (remove("tokenizer.json", "vocab.txt"), ["no tokenizer.json and no vocab.txt"]),
        (replace("tokenizer.json", b"{}"), ["tokenizer.json"]),
        (remove("config.json"), ["neither a run", "config.json"]),
    ],
)
def test_a_broken_hugging_face_folder_is_one_clear_line(hf, breakage, words):
    breakage(hf)
    with pytest.raises(InputError) as caught:
        fastbert.load(hf)
    message = str(caught.value)
    assert message.startswith(str(hf)) and "\n" not in message
    assert len(message) < 200 + 3 * len(str(hf)), message
    assert all(word in message for word in words), message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=2),
    max_leaves=3,
)
CONFIG_KEYS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "vocab_size",
    "is_decoder",
]


@settings(max_examples=300)
@given(
    st.binary(max_size=40)
    | st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON_VALUES).map(
        lambda v: json.dumps({"model_type": "bert", **v}).encode()
    )
)
def test_a_rubbish_config_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "config.json"
    file.write_bytes(data)
    try:
        config, vocab_size, tied = hugging_face_config.read_config(file)
    except InputError as error:
        assert str(error).startswith(str(file)) and len(str(error).splitlines()) == 1
    else:
        assert (
            config.hidden_size % config.num_attention_heads == 0
            and vocab_size > 0
            and tied in (True, False)
        )


@settings(max_examples=200)
@given(st.data())
def test_rubbish_weights_are_refused(original, tmp_path_factory, data):
    """A valid file is truncated or has changed bytes in its header.

    It may be read only where the change does not matter.
    """
    folder = tmp_path_factory.getbasetemp() / "rubbish"
    folder.mkdir(exist_ok=True)
    valid = bytearray((original / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        valid[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(
        valid[: data.draw(st.integers(0, len(valid)) | st.just(len(valid)))]
    )
    config, vocab_size, tied = hugging_face_config.read_config(original / "config.json")
    try:
        weights = hugging_face.read_weights(folder, config, vocab_size, tied)
    except InputError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1
    else:
        assert {name: tuple(t.shape) for name, t in weights.items() if "_head" not in name} == {
            name: shape for name, shape in shapes(config, vocab_size).items() if "_head" not in name
        }


def test_a_tokenizer_with_more_tokens_than_embeddings(hf):
    # Both tokenizer and weights are valid; they are of different models.
    state = load_file(hf / "model.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        state[name] = state[name][:-7].clone()
    save_file(state, hf / "model.safetensors")
    edit("config.json", vocab_size=VOCABULARY - 7)(hf)
    with pytest.raises(InputError, match=f"{VOCABULARY} tokens for {VOCABULARY - 7} embeddings"):
        fastbert.load(hf)


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (
            lambda run: shutil.rmtree(run / "checkpoints"),
            ["without a checkpoint", 'config.toml", resume=True'],
        ),
        (
            lambda run: (run / "checkpoints/step-00000007/manifest.json").unlink(),
            ["without a valid checkpoint", "manifest.json is missing"],
        ),
        (lambda run: shutil.rmtree(run / "tokenizer"), ["tokenizer: no such folder"]),
        (lambda run: (run / "tokenizer/tokenizer.json").write_text("{}"), ["tokenizer.json"]),
    ],
)
def test_a_half_written_run_is_one_clear_line(run, breakage, words):
    breakage(run)
    with pytest.raises(InputError) as caught:
        fastbert.load(run)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_no_model_at_all(tmp_path):
    for name in ("train", "heldout"):
        (tmp_path / "dataset" / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, words in [
        ("nothing", "no such folder"),
        ("file", "a file"),
        ("empty", "neither a run"),
        ("dataset", "a dataset of text"),
    ]:
        with pytest.raises(InputError, match=f"{path}: .*{words}"):
            fastbert.load(tmp_path / path)


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("bert-base-uncased", True),
        ("google-bert/bert-base-uncased", True),
        ("there/bert", False),  # beside this, a folder has another name
        ("./bert", False),
        ("a/b/c", False),
    ],
)
def test_a_name_of_the_hub_is_not_downloaded(tmp_path, monkeypatch, name, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="no such folder") as caught:
        fastbert.load(name)
    assert (f"give the folder that `hf download {name}` prints" in str(caught.value)) == hub


@pytest.mark.parametrize(
    ("inside", "beside", "words"),
    [
        ("snapshots/0123abc", "refs/main", r"models are in it: snapshots/0123abc; give the folder"),
        ("checkpoint-500", "trainer_state.json", r"models are in it: checkpoint-500; give"),
        ("0_Transformer", "modules.json", r"0_Transformer; give .* pool that 1_Pooling/config.js"),
        ("", "adapter_config.json", r"an adapter of PEFT; merge it into its model"),
        ("", "bert_config.json", r"a BERT of Google's code; convert its weights"),
    ],
)
def test_a_folder_around_a_model(original, tmp_path, inside, beside, words):
    top = tmp_path / "top"
    if inside:
        shutil.copytree(original, top / inside)
    for name in (beside, "1_Pooling/config.json"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text("{}")
    with pytest.raises(InputError, match=f"^{top}: neither a run .*{words}"):
        fastbert.load(top)
    if inside:
        assert fastbert.load(top / inside).encode("a").shape == (32,)


def test_other_names_of_the_package_are_unknown():
    with pytest.raises(AttributeError, match="nonsense"):
        fastbert.nonsense  # noqa: B018
