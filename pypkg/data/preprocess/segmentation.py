"""Splits documents into sentences, and Chinese text into words.

Whole-word masking needs the words of a text. Every piece of a word except the first gets the
prefix ``##``: 使用 becomes 使 ##用.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from pypkg.data.optional_packages import require
from pypkg.data.tokenizers.base import Tokenizer
from pypkg.errors import UserError

SEGMENTERS = ("jieba", "lac", "seg")
_CHINESE = re.compile("[\u4e00-\u9fa5]")
_MARK = "##"
_LONGEST_WORD = 6  # pieces


def sentence_splitter(chinese: bool) -> Callable[[str], list[str]]:
    """A function that splits text into sentences: Chinese at line breaks, other text by NLTK.

    Raises:
        UserError: NLTK or its English sentence model is not installed.
    """
    if chinese:
        return lambda text: text.split("\n")
    nltk = require("nltk", "nltk", "--split_sentences without --chinese")
    for name in ("tokenizers/punkt_tab/english/", "tokenizers/punkt/english.pickle"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        return nltk.tokenize.sent_tokenize
    raise UserError(
        "--split_sentences needs NLTK's English sentence model, which is not installed; "
        "python -m nltk.downloader punkt_tab brings it"
    )


def word_segmenter(name: str) -> Callable[[str], Iterable[str]]:
    """A function that splits Chinese text into words with ``jieba``, or LAC's ``lac`` or ``seg``.

    Raises:
        UserError: the package is not installed.
    """
    option = f"--cn_seg_func {name}"
    if name == "jieba":
        jieba = require("jieba", "jieba", option)
        jieba.setLogLevel("WARNING")
        return jieba.lcut
    model = require("LAC", "LAC", option).LAC(mode=name)
    return (lambda text: model.run(text)[0]) if name == "lac" else model.run


def words_of(divider: str) -> Callable[[str], list[str]]:
    """A function that splits text at a separator between its words.

    The second of two separators in a row is a word.
    """

    def split(text: str) -> list[str]:
        words = text.split(divider)
        empty_before = False
        for number, word in enumerate(words):
            if empty_before and not word:
                words[number] = divider
            empty_before = not word and not empty_before
        return words

    return split


def mark_words(pieces: Sequence[str], words: Iterable[str]) -> list[str]:
    """Prefixes every piece of a word except the first with ``##``.

    Args:
        pieces: WordPiece tokens of a text; each Chinese character is one token.
        words: of the same text. The longest word of at most six pieces that begins at a Chinese
            piece is used.
    """
    known = set(words)
    marked: list[str] = []
    while len(marked) < len(pieces):
        first = len(marked)
        length = 1
        if _CHINESE.search(pieces[first]):
            longest = min(_LONGEST_WORD, len(pieces) - first)
            length = next(
                (n for n in range(longest, 1, -1) if "".join(pieces[first : first + n]) in known), 1
            )
        marked.append(pieces[first])
        marked += [_MARK + piece for piece in pieces[first + 1 : first + length]]
    return marked


class WholeWords:
    """Encodes Chinese text with the prefixes of whole-word masking."""

    def __init__(self, tokenizer: Tokenizer, segment: Callable[[str], Iterable[str]]) -> None:
        """
        Raises:
            UserError: the tokenizer lacks the marked form of a Chinese character that it has.
        """
        self._tokenizer = tokenizer
        self._segment = segment
        vocabulary = tokenizer.vocabulary()
        self._ids = vocabulary
        self._pieces = {number: piece for piece, number in vocabulary.items()}
        characters = [p for p in vocabulary if len(p) == 1 and _CHINESE.match(p)]
        missing = [p for p in characters if _MARK + p not in vocabulary]
        if missing or not characters:
            found = (
                f"for {len(missing)} of {len(characters)}, the first is {missing[0]}"
                if missing
                else "as it has no Chinese characters"
            )
            raise UserError(
                f"--cn_whole_word_segment: {tokenizer.file} lacks the form with ## of Chinese "
                f"characters, {found}; use the WordPiece vocabulary of a Chinese BERT, or add them"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [list(self._segment(text)) for text in texts]
        rows = self._tokenizer.encode_batch(["".join(words) for words in cut])
        return [self._marked(row, words) for row, words in zip(rows, cut)]

    def _marked(self, ids: list[int], words: list[str]) -> list[int]:
        pieces = mark_words([self._pieces[i] for i in ids], words)
        # A word may hold pieces that are not Chinese, which have no marked form.
        return [self._ids.get(piece, number) for piece, number in zip(pieces, ids)]
