"""Toy models and text, made in a moment: a BERT with a WordPiece tokenizer and a RoBERTa with byte-level BPE."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = tuple(
    "the a red blue old small dog cat bird house tree river sees likes finds has near under with and not very".split()  # noqa: SIM905
)


def sentences(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) + " ." for _ in range(number)]


def write_text(folder: Path, lines: int = 400) -> Path:
    """A folder with train.txt and valid.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n\n".join(sentences(lines)) + "\n")
    (folder / "valid.txt").write_text("\n\n".join(sentences(lines // 4, seed=1)) + "\n")
    return folder


def write_bert(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0, pooler: bool = True) -> Path:
    """A random BERT with weights far enough from zero that masks matter; hidden 32, two layers."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS, "##s", "##ed", "##ing"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=64, initializer_range=0.15,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    if pooler:
        from transformers.models.bert.modeling_bert import BertPooler

        model.bert.pooler = BertPooler(config)
    model.save_pretrained(folder)
    return folder


def write_headless(folder: Path, model: Path) -> Path:
    """The encoder of a BERT by itself, without its MLM head."""
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    BertForMaskedLM.from_pretrained(model).bert.save_pretrained(folder)
    return folder


def write_roberta(folder: Path, *, seed: int = 0) -> Path:
    """A random RoBERTa: byte-level BPE, lm_head, 514 positions for 512 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(sentences(300), trainers.BpeTrainer(vocab_size=320, special_tokens=special))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=514, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        type_vocab_size=1, initializer_range=0.15,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def write_bert_base(folder: Path) -> Path:
    """BERT-base's shapes with random weights; its tokenizer knows a few dozen words of the 30,522."""
    write_bert(folder, layers=1)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig()).save_pretrained(folder)
    return folder
