"""Small cross-encoders of the two kinds of tokenizer, with random weights, made where a test wants them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HAN = "量子位纠缠北京"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def make_bert(folder: Path, *, max_length: int = 48, num_labels: int = 1, seed: int = 0) -> Path:
    """Write a WordPiece model as MiniLM and BGE-base are."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *HAN, *"[]</>.,"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=max_length).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab), max_position_embeddings=max_length, num_labels=num_labels, initializer_range=0.4, **SIZES
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def make_roberta(folder: Path, *, max_length: int = 48, seed: int = 0) -> Path:
    """Write a unigram model as BGE-m3 is; its control tokens are ordinary pieces of the vocabulary."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *HAN, *"</>.,", "re", "▁red", "▁cat", "<mask>"]
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0 if i < 4 else -2.0) for i, piece in enumerate(pieces)], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=len(pieces),
        max_position_embeddings=max_length + 2,
        type_vocab_size=1,
        pad_token_id=1,
        num_labels=1,
        initializer_range=0.4,
        **SIZES,
    )
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


def export(folder: Path, *, graph: str = "onnx/model.onnx", inputs: tuple[str, ...] | None = None) -> Path:
    """Write a model's graph beside its weights, as Optimum does; return the graph's file."""
    network = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    names = inputs or (
        "input_ids",
        "attention_mask",
        *(["token_type_ids"] if network.config.type_vocab_size > 1 else []),
    )
    path = folder / graph
    path.parent.mkdir(exist_ok=True)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.network(**dict(zip(names, tensors, strict=True))).logits  # type: ignore[no-any-return]

    rows = {0: "batch_size", 1: "sequence_length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quick exporter says that there is a newer, slow one
        torch.onnx.export(
            Logits(),
            tuple(torch.ones(2, 7, dtype=torch.long) for _ in names),
            path,
            input_names=list(names),
            output_names=["logits"],
            dynamic_axes={**dict.fromkeys(names, rows), "logits": {0: "batch_size"}},
            opset_version=17,
            dynamo=False,
        )
    return path
