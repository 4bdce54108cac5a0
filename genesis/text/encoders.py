"""Text encoders: one that others have trained, through `transformers`, or a small one for the cohort's own reports.

`transformers` and `tokenizers` are the extra [text]; they are imported when they are needed.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..errors import UserError
from ..files import verify_folder, write_folder_aside
from ..seeding import key

# The small one: METHODS 5. Every training makes it anew, from its own reports.
WIDTH, LAYERS, HEADS = 128, 2, 2
VOCABULARY = 8192  # words at most
PATIENTS = 3  # whose reports must have a word for it to become one token; rarer ones, names say, are spelled
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Encoder:
    """Texts → token numbers, of `length` tokens each: what is longer is cut, what is shorter padded."""

    tokenizer: Any  # a transformers.PreTrainedTokenizerFast
    length: int

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"tokens": (T, L) int64, "mask": (T, L) bool, "word": (T, L) int64} of T texts.

        mask: no padding. word: which word of the text, from 0, a token belongs to; -1 for padding, special tokens and
        punctuation. Word-pieces belong together as the tokenizer says, whatever its way to mark them.
        """
        coded = self.tokenizer(list(texts), truncation=True, max_length=self.length, padding="max_length")
        words = [_words(coded, number, text) for number, text in enumerate(texts)]
        return {
            "tokens": torch.tensor(coded["input_ids"], dtype=torch.int64),
            "mask": torch.tensor(coded["attention_mask"], dtype=torch.bool),
            "word": torch.tensor(words, dtype=torch.int64),
        }

    def words(self, text: str) -> list[str]:
        """Those that `word` counts, as they stand in the text."""
        coded = self.tokenizer([text], truncation=True, max_length=self.length)
        return [text[start:end] for start, end in _spans(coded, 0, text).values()]

    def unknown(self, texts: Sequence[str]) -> float:
        """The share of the tokens in words for which the vocabulary has nothing."""
        coded = self(texts)
        inside = coded["word"] >= 0
        missing = inside & (coded["tokens"] == self.tokenizer.unk_token_id)
        return float(missing.sum() / inside.sum().clamp(min=1))


class TextModel(nn.Module):
    """A transformer of the library `transformers`, and its tokenizer.

    width: length D of its token states. encode: texts → the arguments of `forward`.
    Raises `UserError` when tokenizer and network do not fit each other or cannot take texts of `length` tokens.
    """

    network: Any

    def __init__(self, network: Any, tokenizer: Any, *, length: int) -> None:
        super().__init__()
        _check(network, tokenizer, length)
        network.pooler = None  # its weights would learn nothing
        self.network = network
        self.width: int = network.config.hidden_size
        self.encode = Encoder(tokenizer, length)

    def forward(self, tokens: Int64[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> list[Float[Tensor, "b l d"]]:
        """Token states after each layer, the last layer's last."""
        output = self.network(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
        return list(output.hidden_states[1:])

    def freeze(self, layers: int) -> None:
        """From now on the embeddings and the first so many layers stay as they are. Raises `UserError`."""
        blocks = max(
            (part for part in self.network.modules() if isinstance(part, nn.ModuleList)),
            key=len,
            default=nn.ModuleList(),
        )
        if layers > len(blocks):
            raise UserError(f"method.text.frozen_layers is {layers}, but the text model has {len(blocks)} layers.")
        self.network.embeddings.requires_grad_(False)
        for block in blocks[:layers]:
            block.requires_grad_(False)

    def write(self, folder: Path) -> None:
        """config.json, model.safetensors, tokenizer.json and tokenizer_config.json, as `transformers` has them."""
        with _quiet():
            self.network.save_pretrained(folder)
            self.encode.tokenizer.save_pretrained(folder)


def keep_text_model(model: TextModel, folder: Path) -> None:
    """Write a text model into a folder of its own, with checksums."""
    with write_folder_aside(folder) as aside:
        model.write(aside)


def kept_text_model(folder: Path, length: int) -> TextModel:
    """The one that `keep_text_model` wrote. Raises `UserError` when it is damaged."""
    verify_folder(folder)
    return read_text_model(str(folder), None, length)


def read_text_model(name: str, revision: str | None, length: int) -> TextModel:
    """A local folder, or a model of the Hugging Face hub in a pinned revision. No code of theirs is run.

    One that was fetched before is taken from the hub's cache, without asking the network.

    Raises `UserError` when it is not there and cannot be fetched, or is no text encoder with a fast tokenizer.
    """
    transformers = _library()
    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"method.text.model: there is no folder {name}.")
    if not local and not revision:
        raise UserError(
            f"method.text.model={name} is no folder here; for a model of the hub set method.text.revision too, "
            "a commit, so that it is the same model tomorrow."
        )
    how: dict[str, Any] = {"trust_remote_code": False, **({} if local else {"revision": revision})}

    def load(**where: bool) -> TextModel:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **how, **where)
            network = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, **how, **where)
        return TextModel(network, tokenizer, length=length)

    if not local:
        with contextlib.suppress(Exception):  # not, or not all of it, in the cache
            return load(local_files_only=True)
    try:
        return load(local_files_only=local)
    except UserError:
        raise
    except Exception as error:  # of files, network, hub, configuration: the library raises nearly anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        wanted = "a folder with config.json, weights and tokenizer" if local else "fetch it first, or give its folder"
        raise UserError(f"The text model {name} cannot be loaded ({wanted}): {reason}") from None


def own_text_model(texts: Mapping[str, Iterable[str]], *, length: int, seed: int) -> TextModel:
    """The offline default: a small BERT, untrained, and a WordPiece tokenizer of the words of these texts by patient.

    The trainer of `tokenizers` gives another vocabulary in every process and learns what is rare, such as names. Here
    words that several patients' reports have are tokens, the most frequent first; all others are spelled by letters.
    """
    transformers = _library()
    tokenizer = _own_tokenizer(texts, length)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "text model"))
        network = transformers.BertModel(config, add_pooling_layer=False)
    return TextModel(network, tokenizer, length=length)


def _own_tokenizer(texts: Mapping[str, Iterable[str]], length: int) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    transformers = _library()
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    often: Counter[str] = Counter()
    for written in texts.values():
        plain = (normalizer.normalize_str(text) for text in written)
        often.update({word for text in plain for word, _ in splitter.pre_tokenize_str(text)})
    words = sorted((word for word, count in often.items() if count >= PATIENTS), key=lambda word: (-often[word], word))
    letters = sorted({letter for word in (*words, *map(chr, range(33, 127))) for letter in word.lower()})
    tokens = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words[:VOCABULARY]])
    model = models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def _words(coded: Any, number: int, text: str) -> list[int]:
    """Which word each token of the text belongs to, counted without those that are punctuation alone."""
    places = {index: place for place, index in enumerate(_spans(coded, number, text))}
    return [places.get(index, -1) for index in coded.word_ids(number)]


def _spans(coded: Any, number: int, text: str) -> dict[int, tuple[int, int]]:
    """Where in the text the words stand, by the tokenizer's number of each; not those that are punctuation alone."""
    indices = (index for index in dict.fromkeys(coded.word_ids(number)) if index is not None)
    spans = {index: coded.word_to_chars(number, index) for index in indices}
    return {
        index: (span.start, span.end)
        for index, span in spans.items()
        if any(map(str.isalnum, text[span.start : span.end]))
    }


def _check(network: Any, tokenizer: Any, length: int) -> None:
    config: Any = network.config
    name = getattr(config, "name_or_path", "") or "the text model"
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise UserError(f"{name} is no text encoder like BERT or RoBERTa.")
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise UserError(f"The tokenizer of {name} must be a fast one (tokenizer.json) with a padding token.")
    there = network.get_input_embeddings().num_embeddings
    if 2 * len(tokenizer) < there:  # what transformers makes of a folder without the tokenizer's files
        raise UserError(f"The tokenizer of {name} has {len(tokenizer)} tokens for {there} embeddings: it is not whole.")
    if len(tokenizer) > there:
        raise UserError(
            f"The vocabulary of {name} does not fit: its tokenizer has {len(tokenizer)} tokens, its network {there}."
        )
    # RoBERTa counts positions from the one after its padding token's number.
    offset = tokenizer.pad_token_id + 1 if "roberta" in config.model_type else 0
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most - offset:
        raise UserError(f"method.text.length={length}: {name} takes at most {most - offset} tokens.")


def _library() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data loading do not go together
    try:
        import transformers
    except ImportError:
        raise UserError(
            'Text encoders need the extra [text]: pip install "genesis-medical[text]" (transformers, tokenizers).'
        ) from None
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and remarks of the library and of the hub's, which tells of every retry."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub = getLogger("huggingface_hub")
    hub_level = hub.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.setLevel(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()
