"""Sentences and Chinese words. The packages that find them are stood in for."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tokenizers
from preprocess_testing import run
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pypkg.data import IndexedDataset
from pypkg.data.preprocess.segmentation import SEGMENTERS, mark_words, word_segmenter, words_of

TEXT = "使用mercer核。使原来没有显现的特征突现出来"
WORDS = ["使用", "mercer", "核", "。", "使", "原来", "没有", "显现", "的", "特征", "突现出来"]
PIECES = ["使", "用", "me", "##rc", "##er", "核", "。", *"使原来没有显现的特征突现出来"]
MARKED = [
    *["使", "##用", "me", "##rc", "##er", "核", "。", "使", "原", "##来", "没", "##有"],
    *["显", "##现", "的", "特", "##征", "突", "##现", "##出", "##来"],
]


def test_marks_of_words():
    assert mark_words(PIECES, WORDS) == MARKED
    assert mark_words(PIECES, []) == PIECES
    assert mark_words([], WORDS) == []


def test_longest_word_wins_up_to_six_characters():
    text = "一二三四五六七"
    assert mark_words(list(text), ["一二", "一二三"]) == ["一", "##二", "##三", *"四五六七"]
    six = ["一", "##二", "##三", "##四", "##五", "##六"]
    assert mark_words(list(text), [text[:6]]) == [*six, "七"]
    assert mark_words(list(text), [text]) == list(text)  # seven are too many


def test_text_that_is_cut_already():
    assert words_of(" ")("我 爱  北京") == ["我", "爱", "", "北京"]
    assert words_of(" ")("a   b") == ["a", "", " ", "b"]
    assert words_of("|")("a|b") == ["a", "b"]


@pytest.fixture
def wordpiece(tmp_path):
    """A tokenizer like that of a Chinese BERT; returns a function from pieces to ids."""
    characters = sorted({c for c in TEXT if "\u4e00" <= c <= "\u9fa5"})
    pieces = ["[UNK]", "[SEP]", "。", "me", "##rc", "##er", *characters]
    pieces += ["##" + c for c in characters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[SEP]"}))
    return lambda wanted: [vocabulary[piece] for piece in wanted]


def jieba(words):
    module = ModuleType("jieba")
    module.setLogLevel = lambda level: None
    module.lcut = lambda text: words if text == TEXT else [text]
    return module


def lac(words):
    def model(mode):
        def segment(text):
            return words if mode == "seg" else (words, ["n"] * len(words))

        return SimpleNamespace(run=segment)

    module = ModuleType("LAC")
    module.LAC = model
    return module


@pytest.mark.parametrize("name", SEGMENTERS)
def test_whole_words(tmp_path, monkeypatch, wordpiece, name):
    module = jieba(WORDS) if name == "jieba" else lac(WORDS)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = tmp_path / "c.txt"
    file.write_text(TEXT)
    options = ["--chinese", "--cn_whole_word_segment", "--append_eos"]
    assert run(tmp_path, *options, input_path=file, cn_seg_func=name, workers=1) == 0
    corpus = IndexedDataset(tmp_path / "out" / "corpus")
    assert corpus[0].tolist() == wordpiece([*MARKED, "[SEP]"])


def test_whole_words_of_text_that_is_cut_already(tmp_path, wordpiece):
    file = tmp_path / "c.txt"
    file.write_text("|".join(WORDS))
    options = ["--cn_whole_word_segment", "--cn_splited"]
    assert run(tmp_path, *options, input_path=file, cn_split_dimer="|", workers=1) == 0
    assert IndexedDataset(tmp_path / "out" / "corpus")[0].tolist() == wordpiece(MARKED)


def test_a_vocabulary_without_marked_characters(tmp_path, wordpiece, capsys):
    file = tmp_path / "tokenizer" / "tokenizer.json"
    contents = json.loads(file.read_text())
    del contents["model"]["vocab"]["##用"]
    file.write_text(json.dumps(contents))
    (tmp_path / "c.txt").write_text(TEXT)
    options = ["--cn_whole_word_segment", "--cn_splited"]
    assert run(tmp_path, *options, input_path=tmp_path / "c.txt", workers=1) == 2
    assert "for 1 of 14, the first is 用" in capsys.readouterr().err


@pytest.mark.parametrize("name", SEGMENTERS)
def test_missing_segmenter(tmp_path, monkeypatch, wordpiece, capsys, name):
    package = "jieba" if name == "jieba" else "LAC"
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "c.txt").write_text(TEXT)
    options = ["--cn_whole_word_segment", "--cn_seg_func", name]
    assert run(tmp_path, *options, input_path=tmp_path / "c.txt", workers=1) == 2
    err = capsys.readouterr().err
    assert f"--cn_seg_func {name} needs the package {package}, which is not installed" in err
    assert 'pip install ".[segmentation]"' in err or "pip install LAC" in err


def sequences(tmp_path):
    corpus = IndexedDataset(tmp_path / "out" / "corpus")
    return [corpus[i].tolist() for i in range(len(corpus))], corpus.document_indices.tolist()


def test_chinese_sentences(tmp_path, tokenizer, capsys):
    file = tmp_path / "c.jsonl"
    texts = ["one\n two \n\n", "three", " \n"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--split_sentences", "--chinese", "--append_eos"]
    assert run(tmp_path, *options, input_path=file) == 0
    plain = [list(word.encode()) for word in ("one", "two", "three")]
    found, starts = sequences(tmp_path)
    assert starts == [0, 2, 3]
    # The eos ends the last sentence of each document.
    assert [len(ids) for ids in found] == [len(plain[0]), len(plain[1]) + 1, len(plain[2]) + 1]
    assert [ids[-1] == 2 for ids in found] == [False, True, True]
    out = capsys.readouterr().out
    assert "documents        2 of 3 sentences\n" in out and "dropped          1 empty\n" in out


def nltk(installed: tuple[str, ...]) -> ModuleType:
    def find(name):
        if name not in installed:
            raise LookupError(name)

    module = ModuleType("nltk")
    module.data = SimpleNamespace(find=find)
    module.tokenize = SimpleNamespace(sent_tokenize=lambda text: text.split(". "))
    return module


def test_english_sentences(tmp_path, tokenizer, monkeypatch, capsys):
    file = tmp_path / "c.txt"
    file.write_text("One. Two two")
    monkeypatch.setitem(sys.modules, "nltk", nltk(("tokenizers/punkt_tab/english/",)))
    assert run(tmp_path, "--split_sentences", input_path=file, workers=1) == 0
    assert sequences(tmp_path)[1] == [0, 2]
    monkeypatch.setitem(sys.modules, "nltk", nltk(()))
    values = {"input_path": file, "output_prefix": tmp_path / "b", "workers": 1}
    assert run(tmp_path, "--split_sentences", **values) == 2
    assert "python -m nltk.downloader punkt_tab" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert run(tmp_path, "--split_sentences", **values) == 2
    assert 'pip install ".[segmentation]"' in capsys.readouterr().err


def test_the_package_is_named_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", jieba(["a", "b"]))
    assert word_segmenter("jieba")(TEXT) == ["a", "b"]
