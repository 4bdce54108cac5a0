"""Reports and text encoders."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reports_cohort import TEXTS, save_bert, save_roberta, small_text_model

from genesis.data.reports import Report
from genesis.errors import UserError
from genesis.seeding import generator
from genesis.text.encoders import (
    keep_text_model,
    kept_text_model,
    own_text_model,
    read_text_model,
)
from genesis.text.reports import choose, normalised, sections, sentences, text_hash

TEXT = """INDICATION: cough, Mr. Zachariasson.
FINDINGS: 1. Nodule of 1.2 cm in the left lung.
2. No effusion.

Heart normal
IMPRESSION:
Nodule. Follow-up."""


def test_a_model_that_was_fetched_before_needs_no_network(tmp_path: Path) -> None:
    """The hub's cache is as huggingface_hub has it; a proxy that does not answer stands for the network."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    save_bert(tmp_path / "hub" / "models--some--model" / "snapshots" / revision)
    script = (
        "from genesis.text.encoders import read_text_model\n"
        f"print(read_text_model('some/model', {revision!r}, 24).width)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=40)
    assert done.stdout.strip() == "128", done.stderr


@pytest.mark.parametrize("save", [save_bert, save_roberta])
def test_words_are_named_as_they_stand_in_the_text(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path)
    encode = read_text_model(str(tmp_path), None, 24).encode
    text = "Liver, unenlarged (24 mm)."
    assert encode.words(text) == ["Liver", "unenlarged", "24", "mm"]
    assert encode([text])["word"].max() == 3
    assert encode.words(" . ") == []


def test_sections_are_found_by_their_headings() -> None:
    found = sections(Report("a", text=TEXT))
    assert found == {
        "findings": "1. Nodule of 1.2 cm in the left lung.\n2. No effusion.\nHeart normal",
        "impression": "Nodule. Follow-up.",
    }
    assert sections(Report("a", findings="A b.", impression=" . ")) == {"findings": "A b."}
    assert sections(Report("a", text="plain  text")) == {"findings": "plain text"}
    assert sections(Report("a", text="History: cough.")) == {"findings": "History: cough."}
    assert not Report("a", text=" -- \n.")


def test_sentences_have_words_and_no_numbers_of_lists() -> None:
    text = sections(Report("a", text=TEXT))["findings"]
    assert sentences(text) == ["Nodule of 1.2 cm in the left lung.", "No effusion.", "Heart normal"]
    assert sentences(". . ! \n - ") == []


@pytest.mark.parametrize("shown", ["sentence", "section", "shuffled_sections", "full"])
def test_what_is_shown(shown: str) -> None:
    report = Report("a", findings="A one. . B two.", impression="C three.")
    drawn = {choose(report, shown, generator(0, "test", number)) for number in range(40)}  # type: ignore[arg-type]
    assert (
        drawn
        == {
            "sentence": {"A one.", "B two.", "C three."},
            "section": {"A one. . B two.", "C three."},
            "shuffled_sections": {"A one. . B two. C three.", "C three. A one. . B two."},
            "full": {"A one. . B two. C three."},
        }[shown]
    )


def test_texts_are_the_same_whatever_case_punctuation_and_spaces() -> None:
    assert text_hash("No effusion.") == text_hash("  no\nEFFUSION ")
    assert text_hash("1.2 cm") != text_hash("12 cm")
    assert normalised("Left; right!") == "left right"
    assert 0 <= text_hash("x") < 2**63


def test_words_are_counted_as_words() -> None:
    prompt = "Pneumothorax, left apical."
    assert len(prompt) == 26
    model = small_text_model()
    coded = model.encode([prompt, "lung"])
    assert coded["word"].max(dim=1).values.tolist() == [2, 0]  # three words, whatever their pieces
    tokens = model.encode.tokenizer.convert_ids_to_tokens(coded["tokens"][0])
    for token, mask, word in zip(tokens, coded["mask"][0].tolist(), coded["word"][0].tolist(), strict=True):
        assert mask == (token != "[PAD]")
        assert (word == -1) == (token in ("[PAD]", "[CLS]", "[SEP]", ",", "."))


def test_words_of_another_language_are_unknown() -> None:
    model = own_text_model({f"patient {n}": ["The liver is enlarged."] for n in range(5)}, length=16, seed=0)
    assert model.encode.unknown(["The liver is enlarged.", "Enlarged: the liver!"]) == 0
    assert model.encode.unknown(["肝臓 が 腫大 して いる"]) == 1
    assert model.encode.unknown(["..."]) == 0


def test_the_own_vocabulary_has_no_rare_words_and_is_the_same_everywhere() -> None:
    texts = {f"patient {number}": ["The liver is enlarged."] for number in range(5)}
    texts["patient 0"] = ["The liver is enlarged.", *["Zachariasson, Zoe"] * 50]
    model = own_text_model(texts, length=16, seed=0)
    vocabulary = model.encode.tokenizer.get_vocab()
    assert "liver" in vocabulary
    assert max(len(token.removeprefix("##")) for token in vocabulary if re.search("[zw]", token)) == 1
    spelled = model.encode.tokenizer.tokenize("Zoe liver")
    assert spelled == ["z", "##o", "##e", "liver"]
    again = own_text_model(texts, length=16, seed=0)
    assert again.encode.tokenizer.get_vocab() == vocabulary
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("save", [save_bert, save_roberta])
def test_models_of_others_in_a_local_folder(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path)
    model = read_text_model(str(tmp_path), None, 24)
    coded = model.encode(["Two lesions, left lung.", "Heart"])
    assert coded["tokens"].shape == (2, 24)
    assert coded["word"].max(dim=1).values.tolist() == [3, 0]
    states = model(coded["tokens"], coded["mask"])
    assert [state.shape for state in states] == [(2, 24, model.width)] * 2
    longer = model.encode(["Heart"])
    alone = model(longer["tokens"], longer["mask"])[-1]
    torch.testing.assert_close(alone[longer["mask"]], states[-1][1][coded["mask"][1]], atol=1e-5, rtol=1e-5)
    model.freeze(1)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert any("embeddings" in name for name in frozen)
    assert any("layer.0." in name for name in frozen)
    assert not any("layer.1." in name for name in frozen)
    with pytest.raises(UserError, match="has 2 layers"):
        model.freeze(3)
    keep_text_model(model, tmp_path / "kept")
    kept = kept_text_model(tmp_path / "kept", 24)
    torch.testing.assert_close(kept(coded["tokens"], coded["mask"])[-1], states[-1])


def test_text_models_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        read_text_model(str(tmp_path / "nothing"), None, 24)
    with pytest.raises(UserError, match=r"set method.text.revision"):
        read_text_model("someone/bert", None, 24)
    with pytest.raises(UserError, match=r"someone/bert cannot be loaded .fetch it first"):
        read_text_model("someone/bert", "0123456", 24)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a folder with config.json, weights and tokenizer"):
        read_text_model(str(tmp_path / "empty"), None, 24)
    save_bert(tmp_path / "large", tokens=3)
    with pytest.raises(UserError, match=r"The vocabulary of .* does not fit: its tokenizer has (\d+) tokens"):
        read_text_model(str(tmp_path / "large"), None, 24)
    save_bert(tmp_path / "bert")
    with pytest.raises(UserError, match=r"method.text.length=25: .* takes at most 24 tokens"):
        read_text_model(str(tmp_path / "bert"), None, 25)
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        read_text_model(str(tmp_path / "bert"), None, 24)
    save_roberta(tmp_path / "roberta")  # counts positions from 2
    with pytest.raises(UserError, match="at most 40 tokens"):
        read_text_model(str(tmp_path / "roberta"), None, 41)


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    save_bert(tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    code = '"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}, "model_type": "evil",'
    config = re.sub('"model_type": "bert",', code, config)
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded"):
        read_text_model(str(tmp_path), None, 24)
    assert not (tmp_path / "ran").exists()


def test_texts_longer_than_the_length_are_cut() -> None:
    model = small_text_model(length=8)
    assert model.encode(TEXTS)["tokens"].shape == (4, 8)
