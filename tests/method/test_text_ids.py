"""Special tokens inside a text are text, for byte-level tokenizers and for those of T5."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, T5Tokenizer

from data_shards.writer import manifest_shards, read_manifest, read_problems
from mmcot.errors import InputError
from mmcot.texts.encoding import encode_pair
from mmcot.texts.prompts import build_pair
from mmcot.texts.text_ids import encode_text, encode_texts
from mmcot.texts.tokenizer import open_tokenizer, train_tokenizer

SPECIAL = ("</s>", "<pad>", "<unk>", "<s>", "<mask>", "<image>", "<extra_id_0>", "<extra_id_7>", "[SEP]", "<|end|>")
CORPUS = ["The left magnet is red.", "The answer is (B) </s> <pad>.", "It closes </s></s></s>; <pad> is none."] * 4


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """The tokenizer of a data folder, to which special tokens were added, opened as a run opens it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(CORPUS, folder, vocab_size=400)
    tokenizer.add_tokens(["<image>", "<extra_id_0>", "<|end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return open_tokenizer(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 tokenizer with few pieces and eight sentinels, among its pieces as in the published ones."""
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([*CORPUS, "abcdefghijklmnopqrstuvwxyz [ ] | ABCDEFGHIJKLMNOPQRSTUVWXYZ _ 0 7"], trainer)
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(8))]
    tokenizer = T5Tokenizer(vocab=pieces + sentinels, extra_ids=8)
    folder = tmp_path_factory.mktemp("t5")
    tokenizer.save_pretrained(folder)
    opened = open_tokenizer(folder)
    opened.backend_tokenizer.normalizer = normalizers.NFKC()  # the published ones have a table of it
    return opened


def special_ids(tokenizer):
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def mixed(*, alphabet=None):
    """Texts with special tokens at any place, also inside words and side by side."""
    ordinary = st.text(alphabet, max_size=8) if alphabet else st.text(max_size=8)
    return st.lists(st.one_of(ordinary, st.sampled_from(SPECIAL)), max_size=8).map("".join)


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("around", ["{}", "a {} b", "a{}b", " {} ", "{0}{0}", "\n{}\t"])
def test_a_special_token_in_a_text_is_read_back_exactly(byte_level, token, around):
    text = around.format(token)
    ids = encode_text(byte_level, text)
    assert byte_level.decode(ids, skip_special_tokens=True) == text
    assert special_ids(byte_level).isdisjoint(ids[:-1]) and ids[-1] == byte_level.eos_token_id


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("around", ["{}", "a {} b", "a{}b", "{0}{0}"])
def test_a_special_token_in_a_text_of_t5_is_its_characters(t5, token, around):
    text = around.format(token)
    ids = encode_text(t5, text)
    assert t5.decode(ids, skip_special_tokens=True) == text
    assert special_ids(t5).isdisjoint(ids[:-1]) and ids[-1] == t5.eos_token_id


def test_every_special_token_of_both_tokenizers_is_among_those_tested(byte_level, t5):
    names = {tokenizer.convert_ids_to_tokens(n) for tokenizer in (byte_level, t5) for n in special_ids(tokenizer)}
    assert {name for name in names if not name.startswith("<extra_id_")} <= set(SPECIAL)


@pytest.mark.parametrize("number", range(8))
def test_every_sentinel_of_t5_in_a_text_is_its_characters(t5, number):
    ids = encode_text(t5, f"a <extra_id_{number}> b")
    assert special_ids(t5).isdisjoint(ids[:-1])


def test_wide_characters_that_become_a_special_token_are_text_too(t5):
    ids = encode_text(t5, "a ＜/s＞ b")  # NFKC makes </s> of it
    assert t5.decode(ids, skip_special_tokens=True) == "a </s> b" and ids.count(t5.eos_token_id) == 1


@settings(max_examples=300, deadline=None)
@given(text=mixed())
def test_any_text_with_special_tokens_is_read_back_exactly(byte_level, text):
    ids = encode_text(byte_level, text)
    assert byte_level.decode(ids, skip_special_tokens=True) == text
    assert special_ids(byte_level).isdisjoint(ids[:-1]) and ids[-1] == byte_level.eos_token_id


@settings(max_examples=300, deadline=None)
@given(text=mixed(alphabet="abcxyz </>_"))
def test_any_text_of_known_characters_is_read_back_by_t5_but_for_its_spaces(t5, text):
    ids = encode_text(t5, text)
    assert t5.decode(ids, skip_special_tokens=True) == " ".join(text.split())
    assert special_ids(t5).isdisjoint(ids[:-1]) and ids[-1] == t5.eos_token_id


@settings(max_examples=300, deadline=None)
@given(text=st.text())
@pytest.mark.parametrize("kind", ["byte_level", "t5"])
def test_an_ordinary_text_has_the_ids_of_the_tokenizer_itself(kind, request, text):
    tokenizer = request.getfixturevalue(kind)
    if not any(token in text for token in SPECIAL):
        assert encode_text(tokenizer, text) == tokenizer(text).input_ids


@pytest.mark.parametrize("kind", ["data folder", "t5"])
def test_the_texts_of_mini_sqa_have_the_ids_of_the_tokenizer_itself(kind, tiny_data, t5):
    tokenizer = t5 if kind == "t5" else open_tokenizer(tiny_data.path / "tokenizer")
    folder = tiny_data.path / "text"
    problems = [problem for shard in manifest_shards(read_manifest(folder)) for problem in read_problems(folder, shard)]
    texts = [text for problem in problems for text in build_pair(problem, "QCM-LE")]
    assert len(texts) > 100
    assert [encode_text(tokenizer, text) for text in texts] == tokenizer(texts).input_ids


@pytest.mark.parametrize("kind", ["byte_level", "t5"])
def test_many_texts_have_the_ids_of_each(kind, request):
    tokenizer, texts = request.getfixturevalue(kind), [*CORPUS, *SPECIAL, ""]
    assert encode_texts(tokenizer, texts) == [encode_text(tokenizer, text) for text in texts]


def test_the_tokenizer_itself_is_not_changed(byte_level):
    before = byte_level.backend_tokenizer.to_str()
    encode_text(byte_level, "a </s> b")
    assert byte_level.backend_tokenizer.to_str() == before
    assert byte_level("</s>").input_ids == [byte_level.eos_token_id] * 2


def test_truncation_and_padding_of_a_tokenizers_file_do_not_cut_or_pad_a_text(byte_level, tmp_path):
    byte_level.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(path))
    assert encode_text(open_tokenizer(tmp_path), "a b c d e f") == encode_text(byte_level, "a b c d e f")


def test_a_word_that_was_added_to_the_vocabulary_stays_one_token(tmp_path):
    train_tokenizer(CORPUS, tmp_path, vocab_size=400)
    tokenizer = open_tokenizer(tmp_path)
    tokenizer.add_tokens(["<first>"], special_tokens=True)
    tokenizer.add_tokens(["{{", "magnetite"])
    text = "a {{magnetite}} <first>"
    ids = encode_text(tokenizer, text)
    added = [number for number in ids if number >= tokenizer.vocab_size]
    assert tokenizer.convert_ids_to_tokens(added) == ["{{", "magnetite"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("token", "merges"),
    [
        ("</s>", [["<", "/"], ["s", ">"], ["</", "s>"], ["</s>", "b"]]),
        ("<pad>", [["<", "p"], ["a", "d"], ["ad", ">"], ["<p", "ad>"]]),
    ],
)
def test_pieces_that_would_be_merged_to_a_special_token_stay_apart(token, merges, tmp_path):
    train_tokenizer(CORPUS, tmp_path, vocab_size=400)
    path = tmp_path / "tokenizer.json"
    written = json.loads(path.read_text())
    written["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] = False  # pieces may be of letters and signs
    for piece in map("".join, merges):
        written["model"]["vocab"].setdefault(piece, len(written["model"]["vocab"]))
    path.write_text(json.dumps(written | {"model": written["model"] | {"merges": merges}}))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.backend_tokenizer.model.tokenize(token)[0].value == token  # they would be
    ids = encode_text(tokenizer, f"a{token}b")
    assert special_ids(tokenizer).isdisjoint(ids[:-1])
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{token}b"


def test_special_tokens_in_the_training_texts_are_learned_as_text(tmp_path):
    tokenizer = train_tokenizer(["</s><pad>"] * 50, tmp_path, vocab_size=400)
    assert "</" in tokenizer.get_vocab() and "pad" in tokenizer.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_both_sides_of_a_pair_keep_special_tokens_as_text(byte_level):
    source, target = "What does </s> close? <pad>", "It closes <s>; </s> ends it."
    pair = encode_pair(byte_level, source, target, max_source_tokens=512, max_target_tokens=512)
    assert byte_level.decode(pair.source_ids, skip_special_tokens=True) == source
    assert byte_level.decode(pair.target_ids, skip_special_tokens=True) == target


def test_a_tokenizer_in_python_keeps_special_tokens_as_text():
    tokenizer = ByT5Tokenizer()
    assert tokenizer.decode(encode_text(tokenizer, "a </s> <pad>"), skip_special_tokens=True) == "a </s> <pad>"


def test_a_tokenizer_that_cannot_write_a_special_token_as_text_is_refused():
    class OneToken(ByT5Tokenizer):
        def _tokenize(self, text):
            return [self.eos_token] if "</s>" in text else super()._tokenize(text)

    with pytest.raises(InputError, match="fast tokenizers"):
        encode_text(OneToken(), "a </s>")
