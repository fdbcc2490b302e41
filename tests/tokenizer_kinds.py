"""Makes tokenizer folders of every common kind, trained on real text in many scripts.

Each has the components, the special tokens and the files of a published model; only the vocabulary
is smaller.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.scripts import ARTICLES

SIZE = 900
EXTRA = [
    AddedToken("<e1>", special=True, normalized=False),
    AddedToken("[NAME]", special=False, normalized=True),
    AddedToken("|||EMAIL|||", special=False, normalized=True),
]
# Llama 3's, Qwen's and GPT-4's way of splitting.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Settings = dict[str, Any]


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(list(ARTICLES.values()) * 2, trainer)
    return tokenizer


def _byte_level(special: list[str], split: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _train(tokenizer, trainer)


def modernbert() -> tuple[Tokenizer, Settings]:
    """Special tokens beside the model, runs of spaces as added tokens, a mask that eats spaces."""
    tokenizer = _byte_level(["<|padding|>", "<|endoftext|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 6)])
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{name[1:-1].lower()}_token": name for name in [*special, "[MASK]"]}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **names}


ANGLE = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}


def roberta() -> tuple[Tokenizer, Settings]:
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer, {"tokenizer_class": "RobertaTokenizer", **ANGLE}


def gpt2() -> tuple[Tokenizer, Settings]:
    """One token begins and ends a text; mask and padding are known to the settings alone."""
    tokenizer = _byte_level(["<|endoftext|>"])
    end = "<|endoftext|>"
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }


def prefix_space() -> tuple[Tokenizer, Settings]:
    tokenizer = _byte_level(
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel(add_prefix_space=True)
    )
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **ANGLE}


def llama3() -> tuple[Tokenizer, Settings]:
    """A pattern of its own; the template names the first token only."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level(["<|begin|>", "<|end|>", "<|pad|>", "<|mask|>"], split)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin|> $A",
                pair="<|begin|> $A <|begin|>:1 $B:1",
                special_tokens=[("<|begin|>", 0)],
            ),
        ]
    )
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "mask_token": "<|mask|>",
    }


def unknown_pattern() -> tuple[Tokenizer, Settings]:
    """A pattern that nobody publishes, in which a space ends a word."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\S+ ?|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], split)
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **ANGLE}


def _unigram(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer = _train(tokenizer, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def xlm_roberta() -> tuple[Tokenizer, Settings]:
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return _unigram(split), {"tokenizer_class": "XLMRobertaTokenizer", **ANGLE}


def nmt_unigram() -> tuple[Tokenizer, Settings]:
    """With the normalizers that sentencepiece's nmt_nfkc is made of."""
    normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer = _unigram(pre_tokenizers.Metaspace(), normalizer)
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **ANGLE}


def whole_unigram() -> tuple[Tokenizer, Settings]:
    """A model that sees a text as one word."""
    tokenizer = _unigram(pre_tokenizers.Metaspace())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **ANGLE}


def _sentencepiece_bpe() -> Tokenizer:
    """A BPE with bytes to fall back to, whose words begin with a mark; not assembled yet."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE + 300,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *bytes_, "▁"],
        show_progress=False,
    )
    settings = json.loads(_train(tokenizer, trainer).to_str())
    settings["added_tokens"] = settings["added_tokens"][:5]
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


GEMMA = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}


def gemma() -> tuple[Tokenizer, Settings]:
    """As mmBERT: spaces become marks before the split at spaces, so a text is one word."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer, GEMMA


def llama2() -> tuple[Tokenizer, Settings]:
    """A mark before every text, and no words."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    return tokenizer, GEMMA


def metaspace_bpe() -> tuple[Tokenizer, Settings]:
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer, GEMMA


def wordpiece() -> tuple[Tokenizer, Settings]:
    """A WordPiece that is not BERT's: names, normalizer, and words kept with their punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.decoder = decoders.WordPiece()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=SIZE, special_tokens=special, show_progress=False
    )
    return _train(tokenizer, trainer), {"tokenizer_class": "PreTrainedTokenizerFast", **ANGLE}


def word_level() -> tuple[Tokenizer, Settings]:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.WordLevelTrainer(
        vocab_size=SIZE, special_tokens=special, show_progress=False
    )
    return _train(tokenizer, trainer), {"tokenizer_class": "PreTrainedTokenizerFast", **ANGLE}


# Of each kind whether its words can be looked up one by one.
KINDS: dict[str, tuple[Callable[[], tuple[Tokenizer, Settings]], bool]] = {
    "modernbert": (modernbert, True),
    "roberta": (roberta, True),
    "gpt2": (gpt2, True),
    "prefix_space": (prefix_space, True),
    "llama3": (llama3, True),
    "unknown_pattern": (unknown_pattern, False),
    "xlm_roberta": (xlm_roberta, True),
    "nmt_unigram": (nmt_unigram, True),
    "whole_unigram": (whole_unigram, False),
    "gemma": (gemma, True),
    "llama2": (llama2, False),
    "metaspace_bpe": (metaspace_bpe, True),
    "wordpiece": (wordpiece, True),
    "word_level": (word_level, True),
}


def make_folder(kind: str, folder: Path, extra: list[AddedToken] | None = None) -> Path:
    """Write a tokenizer of a kind as transformers 4 wrote it.

    Args:
        kind: of KINDS.
        folder: is made.
        extra: more added tokens; by default EXTRA.
    """
    tokenizer, settings = KINDS[kind][0]()
    for token in EXTRA if extra is None else extra:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
