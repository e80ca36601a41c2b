"""Captions as the words that caption metrics count: Penn Treebank tokens in small letters, without punctuation.

COCO's caption evaluation (Chen et al. 2015, arXiv:1504.00325) cuts captions with Stanford's PTBTokenizer 3.4.1, which
runs on Java, and drops the tokens that are punctuation. This is the same cut in Python. Its rules were found by asking
that tokenizer and are written down anew: at each place the longest match of any rule is taken, of equals the first.

Oddities that scores depend on are kept: brackets become -lrb- and count as words, "!!" stays where "!" goes, "½" is
"1/2", characters outside Unicode's first plane (emoji among them) vanish. One is not: whether a single letter at a
caption's end keeps its full stop ("plan B.") depends there on how the next caption in the file begins. It loses it
before "A" or "The", as most captions begin, and here always, so that no caption's words depend on another's.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_REMEMBERED = 1 << 17  # pieces between spaces whose words are kept
_known: dict[str, str | None] = {}  # piece → its words; None: they depend on what follows the piece

# Where a rule may look over the space behind a piece: numbers, tags, a single letter with a full stop.
_REACHES = re.compile(r"[\d<]|(?<![A-Za-z])[A-Za-z]\.")


def words(caption: str) -> str:
    """The caption's words with single spaces between: "A dog; it isn’t wet." → "a dog it is n't wet".

    A word can hold a no-break space ("3 1/2" is one number), on which `str.split()` cuts and `str.split(" ")` doesn't.
    A line break counts as a space.
    """
    cut = []
    for piece in caption.split():
        if piece in _known:
            found = _known[piece]
        else:
            if len(_known) >= _REMEMBERED:
                _known.clear()
            found = _known[piece] = None if _REACHES.search(piece) else " ".join(_read(piece))
        if found is None:
            return " ".join(_read(" ".join(caption.splitlines())))
        if found:
            cut.append(found)
    return " ".join(cut)


def _read(text: str) -> list[str]:
    """The words of one line, rule by rule."""
    line = text.replace("\xad", "") + "\n"  # a soft hyphen is no character
    outline, rules = line.translate(_OUTLINE), _rules()
    found: list[str] = []
    place = 0
    while place < len(line):
        reach, end, kind = place, place + 1, "dropped"
        for rule, name in rules:
            match = rule.match(outline, place)
            if match and match.end() > reach:
                reach, end, kind = match.end(), match.end(rule.groups), name
        word = "" if kind == "dropped" else _spelled(line[place:end], kind)
        if word:
            found.append(word)
        place = end
    return found


_SPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$", "\x80": "$",
    "&lt;": "<", "&gt;": ">", "&amp;": "&",
}  # fmt: skip


def _spelled(word: str, kind: str) -> str:
    """A word as it is written in the end."""
    small = word.lower()
    if kind == "address":
        return small
    if kind == "clitic":
        return re.sub("[’\x92]|&apos;", "'", small)
    if kind == "quotes":
        straight = "".join(_STRAIGHT[mark] for mark in word)
        return "" if straight in ("`", "'", "``", "''") else straight
    if kind == "spaced":  # one word over spaces, which no longer part it
        return re.sub("[ \t]", "\xa0", small).replace("(", "-lrb-").replace(")", "-rrb-")
    return _SPELLED.get(small, small.replace("&amp;", "&"))


# Quotation marks as the tokenizer writes them. Two in a row are one token, which is dropped only where it then looks
# like one mark: of “the ‘dog’” the end, ''', stays.
_STRAIGHT = dict.fromkeys("‘‛‹\x91", "`") | dict.fromkeys("’›\x92", "'") | dict.fromkeys("“«\x93", "``")
_STRAIGHT |= dict.fromkeys("”»\x94", "''") | {mark: mark for mark in "`„‚‟"}
_QUOTES = "".join(_STRAIGHT)

# The rules read an outline of the line, of the same length: beyond ASCII and what stands in `_OURSELVES`, each letter
# is an é, each digit an Arabic zero, each symbol that is a word of its own a §, and what is nothing a NUL.
_OURSELVES = frozenset("–—―‐‑֊…¼½¾⅓⅔⁄¢£€¤₠、\x80\x96\x97\u066b\u066c" + _QUOTES)
_SYMBOL = re.compile(
    "[¡¥-©¬®-´¶-¹¿×÷\u0387\u0589\u060c\u061b\u061f\u066d\u06d4\u0964\u0965‖‗‚„-•‰-‸※‾-⁂⁰⁴-⁾₀-₎₤℀-⅏⅕-⅞←-\u2bff"
    "。〒・！-／：-＠［-｀｛-･￠￡￥￦]"
)
_LAST_MARK = 0xECD  # in the scripts behind Lao the original takes no combining mark for part of a word


class _Outline(dict[int, str]):
    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        if code < 0x80 or character in _OURSELVES or character.isspace():
            found = character
        elif code > 0xFFFF:
            found = "\0"
        elif category[0] == "L" or (category in ("Mn", "Mc") and code <= _LAST_MARK):
            found = "é"
        elif category == "Nd":
            found = "٠"
        else:
            found = "§" if _SYMBOL.match(character) else "\0"
        self[code] = found
        return found


_OUTLINE = _Outline()

# Abbreviations keep their full stop: `_TITLES`; `_ENDS`, behind which a sentence may end and a letter is a new word;
# `_NAMES`, which are words too and need a capital; and `_BEFORE_NUMBERS` where a number follows.
_TITLES = """adj adm adv alex assoc asst attys ave brig capt cf cie cmdr col comdr cpl dept det drs elec ens ft gen
    govs hon insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres profs pvt reps rev
    sens sfc sgt spc st ste supt vs wm"""
_ENDS = """al ala apr ariz assn atty aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec dr esq est etc ext
    feb fla fri ga gov inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla
    penn plc ppte ppty prof pte ptes pty ptys rd rep rt sen sep sept seq sq sr sys tel tenn thu thurs tue tues univ va
    vt wed wis wisc wyo ph\\.d"""
_NAMES = "ark az del ill la mass miss ore pa tex wash"
_BEFORE_NUMBERS = "art ca figs? nos? op pp prop"
# A capitalised one of these after a single letter and a full stop starts a sentence: the full stop is not the letter's.
_STARTERS = """a about according additionally after an as at but earlier he her here however if in it last many more
    now once one other our she since so some such that the their then there these they this we what when while yet
    you mr\\. ms\\."""
# Words with an apostrophe of their own.
_WHOLE = "'n'? [ldj]' dunkin' somethin' ol' 'em 'till? 'cause o'o"
_WHOLE_PLAIN = "nor'easter c'mon e'er s'mores ev'ry li'l nat'l"  # and these with a straight one


def _any(listed: str) -> str:
    return "(?:" + "|".join(listed.split()) + ")"


_QUOTE = "(?:['’\x92]|&apos;)"
_MARK = "(?:['’‘‛`\x91\x92]|&apos;)"
_CLITIC = f"{_QUOTE}(?i:[smd]|ll|re|ve)"
_NOT = f"[nN](?:{_QUOTE}|`)[tT]"
_LETTER = "(?:[A-Za-zé]|&[aeiouAEIOU](?:acute|grave|uml);)"
_EITHER = "(?:[A-Za-zé0-9٠]|&[aeiouAEIOU](?:acute|grave|uml);)"
_WORD = f"{_LETTER}{_EITHER}*(?:[.!?]{_LETTER}{_EITHER}*)*"
_DIGIT = "[0-9٠]"
_NUMBER = f"(?:[-+]?{_DIGIT}*(?:[.:,\u066b\u066c]{_DIGIT}+)+|[-+]?{_DIGIT}+)"
_ENDING = f"(?:(?i:{_any(_ENDS)})|(?=[A-Z])(?i:{_any(_NAMES)}))\\."
_INITIALS = "[A-Za-z](?:\\.[A-Za-z])+\\."
_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_VALUE = f"""{_NAME}(?: *= *(?:'[^'\n]*'|"[^"\n]*"))?"""


@cache
def _rules() -> list[tuple[re.Pattern[str], str]]:
    """(pattern, kind) in order. All that a pattern takes counts for its length; its group, if any, is the word."""
    listed = [*_cut_words(), *_addresses(), *_numbers(), *_short_words(), *_signs()]
    return [(re.compile(pattern), kind) for pattern, kind in listed]


def _cut_words() -> list[tuple[str, str]]:
    """Words, what is cut off them, and words with an apostrophe in them."""
    return [
        (
            "(?i:(can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:lem|gim)(?=me)|'t(?=is|was))(?:not|[ntm][ae]|is|was))",
            "plain",
        ),
        (f"({_WORD}){_CLITIC}", "plain"),
        (f"([A-Za-z]*[A-MO-Za-mo-z]){_NOT}", "plain"),
        (_WORD, "plain"),
        (f"(?i:{_any(_WHOLE)})".replace("'", _QUOTE), "plain"),
        (f"(?i:{_any(_WHOLE_PLAIN)})", "plain"),
        (f"{_QUOTE}[2-9]0s|[A-HJ-XZn]{_MARK}[A-Za-zé]{{2,}}", "plain"),
        (f"[A-Za-zé]+[aeiouyAEIOUY]{_MARK}[aeiouA-Z][A-Za-zé]*", "plain"),
        (f"([yY]{_QUOTE})[A-Za-zé]", "plain"),
        (f"({_CLITIC})[^A-Za-z]", "clitic"),
        (_NOT, "clitic"),
        ("(')[A-Za-z][^ \t\n\xa0]", "dropped"),
        (_CLITIC, "clitic"),
    ]


def _addresses() -> list[tuple[str, str]]:
    """Tags, addresses, and what is said on the web."""
    path = r"""(?:/[^\s"<>|()]+[^\s"<>|.!?(){},-])?"""
    return [
        (rf"<(?:[!?][A-Za-z-][^>\n]*|/?{_NAME}(?: +{_VALUE})* *[/]?) *>", "spaced"),
        (r"""(?i:https?)://[^\s"<>|(){}]+[^\s"<>|.!?(){},-]""", "address"),
        (rf"""www\.(?:[^\s"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path}""", "address"),
        (rf"""(?:[^\s"'`|!(){{}}$,-_]+\.)+(?:com|net|org|edu){path}""", "address"),
        (r"""<?[a-zA-Z0-9][^\s"<>|(){}]*@(?:[^\s"<>|(){}.]+\.)*[^\s"<>|(){}.]+>?""", "address"),
        ("@[A-Za-z_][A-Za-z_0-9]*|#[A-Za-zé]+", "plain"),
    ]


def _numbers() -> list[tuple[str, str]]:
    """Numbers, fractions, telephone numbers, years and what things cost."""
    dash, area = "[- \xa0]", "\\([0-9]{2,3}\\)[ \xa0]?"
    return [
        (_NUMBER, "plain"),
        (rf"(?:[0-9]{{1,4}}{dash})?[0-9]{{1,4}}[/⁄][0-9]{{1,4}}", "spaced"),
        (f"(?:{area}|(?:\\+\\+?)?(?:[0-9]{{2,4}}{dash})?[0-9]{{2,4}}{dash})[0-9]{{3,4}}{dash}?[0-9]{{3,5}}", "spaced"),
        ("(?:\\+\\+?)?(?:[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\.[0-9]{3,5}", "plain"),
        (f"({_QUOTE}[0-9]{{2}})\\s", "plain"),
        ("[A-Z]+\\$|[$¢£€¤₠\x80]", "plain"),
    ]


def _short_words() -> list[tuple[str, str]]:
    """Abbreviations, initials, and words that hyphens and strokes join."""
    part = f"(?:[dDoOlL]{_MARK}{_EITHER})?{_EITHER}+"
    joined = f"{part}(?:[-_֊‐‑]{part})*"
    stroke = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    return [
        (f"({_ENDING})[^\0]{{2}}", "plain"),
        (f"{_ENDING}|(?i:{_any(_TITLES)})\\.", "plain"),
        (f"((?i:{_any(_BEFORE_NUMBERS)})\\.)[ \xa0]?[0-9]", "plain"),
        (f"{_INITIALS}|[A-Za-z]\\.", "plain"),
        (f"([A-Za-z])\\.(?:\\s+(?=[A-Z])(?i:{_any(_STARTERS)})\\s|\\s*\\n\\Z)", "plain"),
        (f"((?:{_WORD}|{_NUMBER}|{joined})\\.)[,;:、]", "plain"),
        (joined, "plain"),
        (f"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{_INITIALS}|[A-Za-z0-9]+))+", "plain"),
        (f"{stroke}(?:/{stroke}){{1,2}}", "plain"),
        ("[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+|[Cc]\\+\\+|[CcFf]#", "plain"),
    ]


def _signs() -> list[tuple[str, str]]:
    """Faces, punctuation and all other signs."""
    return [
        ("([<>]?[:;=][-o*']?[()DPdpO\\\\{@|[\\]])[^A-Za-z0-9]", "spaced"),
        ("[-^x=~<>']_[-^x=~<>']|\\([-^x=~<>'][_.]?[-^x=~<>']\\)|\\([\\^x=~<>']-[\\^x=~<>'`]\\)", "spaced"),
        ("&(?i:lt|gt|amp);|&#[0-9]+;|(?i:-[lr][rsc]b-)", "plain"),
        ("&(?i:quot|apos|nbsp|[mn]dash);", "dropped"),
        ("[!?]{2,}|-{5,}", "plain"),
        (f"[{_QUOTES}]{{1,2}}", "quotes"),
        ("''|\\.{3,}|-{1,4}|[!?.,:;'\"–—―…\x96\x97]", "dropped"),
        ("\\\\?\\*+|_+|@+|#+|<<|>>|[][(){}¼½¾⅓⅔⁄§$%&+/<=>\\\\^|~]", "plain"),
    ]
