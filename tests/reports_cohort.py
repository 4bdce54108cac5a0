"""Text models and reports for tests: no network, no files of others."""

from collections.abc import Sequence
from pathlib import Path

import torch

from genesis.text.encoders import TextModel, own_text_model
from genesis.text.reports import text_hash

TEXTS = (
    "No lesion in the left lung.",
    "Two lesions in the right lung, the largest 24 mm.",
    "The liver is enlarged.",
    "Heart of normal size; no pericardial effusion.",
)


def small_text_model(length: int = 24) -> TextModel:
    return own_text_model({f"patient {number}": TEXTS for number in range(3)}, length=length, seed=0)


def report_batch(text: TextModel, texts: Sequence[str], patch_size: Sequence[int], first: int = 0) -> dict:
    """A batch of image-text methods; bright corners as many as the text is long."""
    generator = torch.Generator().manual_seed(first)
    hashes = torch.tensor([text_hash(one) for one in texts])
    return {
        "image": torch.rand(len(texts), 1, *patch_size, generator=generator),
        **text.encode(texts),
        "report": hashes,
        "text": hashes,
        "key": torch.arange(first, first + len(texts)),
    }


def save_bert(folder: Path, *, tokens: int = 0) -> None:
    """A tiny BERT with a WordPiece tokenizer of its own; `tokens` more in the tokenizer than in the network."""
    model = small_text_model()
    if tokens:
        model.encode.tokenizer.add_tokens([f"token{number}" for number in range(tokens)])
    model.write(folder)


def save_roberta(folder: Path) -> None:
    """A tiny RoBERTa with a byte-level BPE tokenizer, as RoBERTa's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **names)
    config = RobertaConfig(
        vocab_size=len(fast), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=42, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    fast.save_pretrained(folder)
    RobertaModel(config).save_pretrained(folder)
