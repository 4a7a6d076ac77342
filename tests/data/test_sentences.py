# ruff: noqa: RUF001  (text in many scripts)
"""Where a sentence ends: at marks of many scripts, at line ends where lines are sentences, and not where they wrap."""

import random
import textwrap
import time
from pydoc_data.topics import topics

import pytest
import sentencex

from bert_fast.data import read_documents, split_sentences
from bert_fast.data.sentences import lines_are_sentences

BY_LINES = {
    "subtitles": "I don't know\nNobody came\nWhere were you last night\nI told you that I was at home\nYes",
    "poem": "So much depends\nupon\na red wheel\nbarrow\nglazed with rain\nwater\nbeside the white\nchickens",
    "list": "Shopping list\nmilk\ntwo loaves of bread\nsomething else that is much longer than the others\neggs",
    "code": "def area(width, height):\n    if width < 0:\n        raise ValueError(width)\n    total = width * height\n"
    "    return total\nprint(area(3, 4))",
    "two lines": "the first sentence has no full stop\nthe second one has none either",
    "trailing off": "Well…\nI thought so…\nNobody came…",
    "some with a mark": "Who was it\nNobody knows\nReally?\nThe door was open when we came\nand it was dark",
    "Thai": "วันนี้อากาศดีมาก\nเราไปเที่ยวที่สวนสาธารณะด้วยกัน\nแมวของฉันชอบนอนบนโซฟา\nพรุ่งนี้ฝนอาจจะตก",
    "Chinese": "今天天气很好\n我们去公园玩\n他喜欢看书\n明天可能会下雨",
    "Khmer": "ខ្ញុំទៅផ្សារ\nគាត់មកផ្ទះ\nយើងញ៉ាំបាយ",
    "Arabic": "ذهبت إلى السوق\nثم عدت إلى البيت\nكان الجو جميلا",
}


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r", "\x85", "\u2028", " \n\t"])
@pytest.mark.parametrize("kind", BY_LINES)
def test_lines_without_marks_are_sentences(kind, ends):
    lines = [line.strip() for line in BY_LINES[kind].splitlines()]
    text = ends.join(lines) + ends
    assert split_sentences(text) == lines
    assert split_sentences(text, sentences="lines") == lines
    split = split_sentences(text, sentences="split")
    assert len(split) < len(lines)
    assert "".join("".join(split).split()) == "".join("".join(lines).split())


PROSE = (
    "The committee met twice in the spring. It had been asked to find out why the bridge, which was opened only four "
    "years ago, has to be closed whenever the wind blows from the north-east; nobody could say. Mr. Brown thought that "
    "the cables were to blame. Others, among them the engineer who had built it, said that it was the road itself. A "
    "report will be written by June. Until then the bridge stays closed on windy days, and those who must cross take "
    "the ferry."
)
CHINESE = (
    "中国是以华夏文明为源泉、中华文化为基础的多民族国家。各民族共同创造了光辉灿烂的文化，具有光荣的革命传统。"
    "一八四〇年以后，封建的中国逐渐变成半殖民地、半封建的国家。中国人民为国家独立、民族解放和民主自由进行了"
    "前仆后继的英勇奋斗。二十世纪，中国发生了翻天覆地的伟大历史变革。"
)


@pytest.mark.parametrize("width", [40, 55, 66, 72, 80, 100])
@pytest.mark.parametrize("prefix", ["", "    ", "> "])
def test_wrapped_prose_is_split_at_marks(width, prefix):
    wrapped = textwrap.fill(PROSE, width, initial_indent=prefix, subsequent_indent=prefix)
    mail = f"Hi Anna,\n\nthis is what they wrote:\n\n{wrapped}\n\nCheers\nBob"
    for text in (wrapped, mail, mail.replace("\n", "\r\n")):
        assert not lines_are_sentences(text)
        assert split_sentences(text) == split_sentences(text, sentences="split")


def test_wrapped_chinese_is_split_at_marks():
    for width in (20, 25, 32, 40):
        wrapped = "\n".join(textwrap.wrap(CHINESE, width))
        assert len(split_sentences(wrapped, "zh")) == CHINESE.count("。")


def test_the_reference_is_split_at_marks_alone():
    for name, text in topics.items():
        assert not lines_are_sentences(text), name
    assert read_documents() == read_documents(sentences="split")


def test_real_sentences_one_a_line_and_wrapped():
    """Of the reference: documents of some sentences without their marks, and the same wrapped as they were."""
    draw = random.Random(time.time_ns())
    prose = [s for document in read_documents() for s in document if len(s) > 40 and s[0].isupper() and s[-1] == "."]
    prose = [" ".join(sentence.split()) for sentence in prose]
    right = [0, 0]
    for _ in range(200):
        some = draw.sample(prose, draw.randint(4, 30))
        right[0] += lines_are_sentences("\n".join(sentence.rstrip(".") for sentence in some))
        right[1] += not lines_are_sentences(textwrap.fill(" ".join(some), draw.randint(50, 100)))
    assert right[0] > 170
    assert right[1] > 195


def test_a_wrapped_paragraph_among_lines_is_whole():
    wrapped = textwrap.fill(PROSE, 72)
    text = "# Name\n\n" + "\n".join(f"* item {n} of the list" for n in range(60)) + f"\n\n{wrapped}\n\n* one\n* two"
    found = split_sentences(text)
    assert found[:3] == ["# Name", "* item 0 of the list", "* item 1 of the list"]
    assert found[-2:] == ["* one", "* two"]
    assert [" ".join(s.split()) for s in found[61:-2]] == split_sentences(PROSE)


def test_one_line_that_lacks_a_mark_goes_on():
    assert split_sentences("A line\nand another.") == ["A line\nand another."]
    assert split_sentences("Title\nA man came. He left.") == ["Title\nA man came.", "He left."]


def test_sentences_with_marks_are_as_before():
    text = "Introduction\nThis is the first. This is the second.\nAnd a third one here.\nAll is well. Nothing failed."
    split = split_sentences(text, sentences="split")
    assert split_sentences(text) == split
    assert split_sentences(text, sentences="lines") == text.splitlines()


def test_the_rest_of_a_line_by_lines_is_split_at_marks():
    text = "Home\nAbout us\nContact\nNews\nWe are a small firm. We sell boats to people who like them\nOther\nMore"
    assert split_sentences(text)[4:6] == ["We are a small firm.", "We sell boats to people who like them"]
    assert len(split_sentences(text, sentences="lines")) == 7


@pytest.mark.parametrize("rule", ["auto", "lines", "split"])
def test_lines_beyond_the_limit_are_cut_at_white_space(rule):
    found = split_sentences("word " * 5_000 + "\nend", sentences=rule)
    assert max(map(len, found)) <= 10_000
    assert " ".join(found).split() == ["word"] * 5_000 + ["end"]
    assert split_sentences("", sentences=rule) == split_sentences(" \r\n\n", sentences=rule) == []


ENDED = {
    "Khmer": ("ខ្ញុំទៅផ្សារ។", "គាត់មកផ្ទះ៕", "យើងញ៉ាំបាយ។"),
    "Tibetan": ("བོད་ཡིག་ནི།", "ཁོང་འོང་གི་རེད། །", "ང་འགྲོ་གི་ཡིན༎"),
    "Burmese": ("ကျွန်တော်သွားသည်။", "သူလာသည်။", "ကောင်းသည်။"),
    "Amharic": ("ሰላም ነው።", "እንዴት ነህ፧", "ደህና ነኝ።"),
    "Armenian": ("Բարեւ ձեզ։", "Ես եմ։", "Դու ես։"),
    "Hindi": ("यह अच्छा है।", "वह जाता है।", "हम आते हैं॥"),
    "Urdu": ("یہ اچھا ہے۔", "کیا وہ جاتا ہے؟", "ہم آتے ہیں۔"),
    "Chinese": ("天气很好。", "你去吗？", "好！"),
    "Mongolian": ("ᠪᠢ ᠶᠠᠪᠤᠨᠠ᠃", "ᠲᠡᠷᠡ ᠢᠷᠡᠪᠡ᠃", "ᠰᠠᠢᠨ᠃"),
}


@pytest.mark.parametrize("script", ENDED)
def test_marks_of_many_scripts_end_a_sentence(script):
    sentences = list(ENDED[script])
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("\n".join(sentences)) == sentences


def test_what_is_no_end():
    assert split_sentences("ឆ្កែ ឆ្មា។ល។ ទាំងអស់") == ["ឆ្កែ ឆ្មា។ល។ ទាំងអស់"]  # "and so on"
    assert split_sentences("«ខ្ញុំទៅ។» គាត់និយាយ។") == ["«ខ្ញុំទៅ។»", "គាត់និយាយ។"]


def test_other_text_is_what_sentencex_makes_of_it():
    text = 'He came. "Why?" she said. Dr. No went on... and on! 今天。明天。 Fin'
    assert split_sentences(text) == [sentence.strip() for sentence in sentencex.segment("en", text)]


def test_another_rule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'line' is none of auto, lines, split"):
        split_sentences("text", sentences="line")
