"""What of a report is shown: its sections and sentences, one choice per sample; what counts as the same text."""

import hashlib
import re
import unicodedata
from typing import Literal

import torch

from ..data.reports import Report

Shown = Literal["sentence", "section", "shuffled_sections", "full"]

# A heading stands at the beginning of a line, or of the text, and ends with a colon.
_HEADINGS = {
    "findings": "findings|report|description",
    "impression": "impression|conclusion|summary|opinion|assessment",
    "": "indication|history|clinical (?:history|information|indication)|technique|comparison|protocol|recommendation",
}
_HEADING = re.compile(
    "|".join(rf"(?P<{name or 'other'}>^[ \t]*(?:{words})[ \t]*:)" for name, words in _HEADINGS.items()), re.I | re.M
)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_NUMBERED = re.compile(r"^\s*(?:[-*•]+|\(?\d{1,2}[.)])\s+")


def sections(report: Report) -> dict[str, str]:
    """Findings and impression, as far as there are any words in them.

    A text with headings is divided at them; of what stands before the first, or under others (history, technique),
    nothing is kept unless there is nothing else. A text without them is one section, `findings`.
    """
    found = {"findings": report.findings, "impression": report.impression}
    headings = list(_HEADING.finditer(report.text))
    bounds = [*(heading.start() for heading in headings), len(report.text)]
    for heading, end in zip(headings, bounds[1:], strict=True):
        if (name := heading.lastgroup) in found:
            found[name] = f"{found[name]} {report.text[heading.end() : end]}"
    found = {name: _clean(text) for name, text in found.items() if _has_words(text)}
    return found or ({"findings": _clean(report.text)} if _has_words(report.text) else {})


def sentences(text: str) -> list[str]:
    """Those with a letter in them; a list's numbers and dashes are no part of them."""
    parts = (_NUMBERED.sub("", part).strip() for part in _SENTENCE.split(text))
    return [part for part in parts if any(map(str.isalpha, part))]


def choose(report: Report, shown: Shown, source: torch.Generator) -> str:
    """A sentence or a section, each as likely as the others; or all sections, in random order or as they stand.

    Raises ValueError for a report without words.
    """
    parts = list(sections(report).values())
    if not parts:
        raise ValueError("a report without words has nothing to show")
    if shown == "full":
        return " ".join(parts)
    if shown == "shuffled_sections":
        return " ".join(parts[place] for place in torch.randperm(len(parts), generator=source).tolist())
    if shown == "sentence":
        parts = [sentence for part in parts for sentence in sentences(part)] or parts
    return parts[int(torch.randint(len(parts), (), generator=source))]


def normalised(text: str) -> str:
    """The words in lower case: texts that differ in case, punctuation or white space alone are the same."""
    return " ".join(re.findall(r"\w+(?:[.,]\d+)*", unicodedata.normalize("NFKC", text).casefold()))


def text_hash(text: str) -> int:
    """A 63-bit number, the same for texts that are the same when normalised."""
    digest = hashlib.blake2b(normalised(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _clean(text: str) -> str:
    """With single spaces; lines stay apart, for a line may be a sentence without its full stop."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)
