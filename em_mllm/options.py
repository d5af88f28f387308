"""Questions with options, as they are written in Chinese and English: one grammar for the generator, the data
set, the scorer and the answer file.

Options begin with A and go on without a gap. The letter stands in brackets, `(A)` `（A）` `[A]`, or before a
mark, `A.` `A)` `A、` `A:`, or in a circle, `Ⓐ`, or alone at the beginning of a line; where there is nothing
of the kind, before a word or a mark that is the same behind every letter, `A is`, `A /`, `A (GFSK)`. Wide and
bold letters and marks count as plain ones, and items of HTML lists as lines; what begins or emphasises a
line in Markdown and LaTeX is left out. Letters elsewhere in the text, as in "in-phase (I) and quadrature
(Q)", are text.
"""

import re
from html import unescape
from unicodedata import category, normalize


class Plain(dict):
    """Table of `str.translate`, one character for one, so that places stay: brackets of every kind, and what
    Unicode says is a plain character in another dress."""

    def __missing__(self, code: int) -> str:
        plain = normalize("NFKC", chr(code))
        dressed = len(plain) == 1 and category(chr(code)) != "No"  # ① is no digit of a word
        self[code] = plain if dressed else chr(code)
        return self[code]


PLAIN = Plain(str.maketrans("【】〔〕「」『』《》〈〉“”‘’", "[]" * 6 + "\"\"''"))

# letters in circles, brackets and squares, each one character, and characters without width
LETTERED = (0x24B6, 0x24D0, 0x249C, 0x1F110, 0x1F130, 0x1F150, 0x1F170)
MARKED = {first + n: f"({chr(65 + n)})" for first in LETTERED for n in range(26)}
MARKED |= dict.fromkeys((0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), 0x2060, 0xFE0F, 0xFEFF))
CIRCLED = {0x2460 + n: f"({n + 1})" for n in range(9)}  # numbers
MARKED |= dict.fromkeys(map(ord, "□☐☑☒■○◯●"), " ")  # boxes to tick

# Markdown and LaTeX: what begins a line with an option, a letter that stands out, text in a formula, escapes
BEGINNING = re.compile(
    r"(?m)^[ \t]*(?:(?:[-*+•>]|(?<!#)#{1,6}(?!#)|\[[ xX]?\]|\d{1,2}[.)])[ \t]*)+"
    r"(?=(?:选项|[Oo]ption )?[\W_]{0,4}[A-Za-z][\W_])"
)
STANDS_OUT = re.compile(r"(?<!\w)(\*{1,3}|__|`)\(?([A-Za-z])\)?([.:：、]?)\1")
FORMULA = re.compile(
    r"\$?\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}\$?|\$\s*(\(?[A-Za-z]\)?[.:]?)\s*\$|\\([()\[\].:])"
)
SPACED = re.compile(r"\\(?:q?quad\b|[,; ]|\\)")
CONTROL = re.compile(r"<\|[^|<>]*\|>|</?(?:s|eos|bos|pad)>")

# HTML: items whose letter stands in the tag or comes from the kind of list, tags that begin a line, others
VALUED = re.compile(
    r"(?i)<\w{1,20}\s[^<>]{0,200}?\b(?:value|id|key|label|letter)\s*=\s*[\"']?([A-Z])[\"']?(?:\s[^<>]{0,200})?/?>"
    r"(?!\s*[(\[]?\1\s*[.)\]:、])"
)
LETTERED_LIST = re.compile(
    r"(?is)<ol\s[^<>]{0,200}?type\s*=\s*[\"']?A\b[^<>]{0,200}>.*?(?:</ol\s*>|$)"
    r"|\\begin\{enumerate\}\s*\[[^\]]{0,40}?(?:\\Alph\*|\bA\b)[^\]]{0,40}\].*?(?:\\end\{enumerate\}|$)"
)
ITEM = re.compile(r"(?i)<li(?:\s[^<>]*)?>|\\item\b|\\(?:begin|end)\{enumerate\}(?:\s*\[[^\]]*\])?")
LINE_TAG = re.compile(
    r"(?i)</?(?:br|p|div|li|ul|ol|dl|dt|dd|tr|table|tbody|thead|select|option|label|h[1-6])(?:\s[^<>]*)?/?>"
)
CELL_TAG = re.compile(r"(?i)</?(?:td|th|input|button)(?:\s[^<>]*)?/?>")
INLINE_TAG = re.compile(r"(?i)</?(?:strong|em|span|font|code|mark|small|sub|sup)(?:\s[^<>]*)?>")

# a word before the letter, as in "选项A：" or "Option A:"
WORD = r"\*{0,3}(?:(?:选项|选择|类别)\s*|(?:[Oo]ption|[Cc]hoice|[Cc]lass)\s+)?"
FAMILIES = (
    re.compile(rf"{WORD}[(\[<{{|]\s*([A-Za-z])\s*\.?[)\]>}}|]\**"),
    re.compile(
        rf"{WORD}(?<![A-Za-z0-9])(?!(?<=[(\[])[A-Za-z]\s*\.?\))(?![A-Za-z]\.[A-Za-z]\.)([A-Za-z])\**\s*"
        r"(?:\.?\)|[-=]>|→|[.:、,=]|['\"]\s*:|[-–—](?=\s))\**"
    ),
    re.compile(rf"(?:^|(?<=[\n;:]))[ \t]*{WORD}([A-Z])(?:[ \t]+|[ \t]*\n\s*)(?=\S)"),
)
# numbers, where a choice is asked for and there is nothing of the kind
NUMBERED = re.compile(r"(?:[(\[]|(?<![A-Za-z0-9.]))\s*([1-9])\s*(?:[)\]、:]|\.(?!\d+\b))")
# where there is nothing of the kind, the same behind each of at least four letters: a mark or spaces, or what
# defines quantities, too, unless a choice is asked for
ALONE = rf"(?<![A-Za-z0-9]){WORD}([A-Z])"
DEFINING = (r"\s*是\s*", r"\s*为\s*", r"\s+is\s+", r"\s?\((?=[^()]{1,80}\))")
LEADING = re.compile(r"\s*([-=]>|[-–—=~/→])\s*(?=(\d?))")  # between a letter in brackets and its name

# the letter behind the name, as in "GFSK(A)、FM(B)", with a mark behind each bracket
BEHIND = re.compile(
    r"([^\s、,;/:()]{1,80})\s?[(\[]\s*([A-Z])\s*[)\]](?=\s*(?:[、,;/]|或|和|还是|or\b|and\b|中|里|之|([。.?？])|$))"
)

MOST_STARTS = 64  # places at which options may begin, the last ones: so that no text takes minutes
SENTENCE = re.compile(r"[。!！?？;；]|\.(?=\s+[A-Z\u4e00-\u9fff])|\.(?=[\u4e00-\u9fff])")
# what follows the last option and is no part of it: behind a mark, or behind a space with more to follow
ORDER = (
    r"Please|Answer|(?:Your|The|My) (?:final |correct |best )?(?:answer|choice|option|response)|Choose|Select"
    r"|Reply|Respond|Output|Give|ASSISTANT|Assistant|Let['’]s|Let us|Correct (?:answer|option)"
)
CLOSING = re.compile(
    r"(?:[\s，,;；:：。.!！?？、|]+[(（\[【]?|[(（\[【]|(?<![\u4e00-\u9fff]))\s*(?:请|注意|要求|只需|仅需|只回答|仅回答|只填|只写|只给|只选|不确定|"
    r"只输出|直接|[你您我]的(?:答案|选择)|(?:正确|最终)?(?:答案|选项[是为:：])|回答|选出|从中|以上|无需|不要|不用|单选|该信号是)"
    r"|\s*[之其]?[中里]\s*(?:选|挑|任选)|[(\[]A(?:\s*[/|、,]\s*[B-Z])+[)\]]"
    rf"|(?<!not)(?<!n't)(?<!\bno)[\s，,]+[(\[]?(?:{ORDER}|Only one|Which|What)(?:\s+\w|\s*:)"
    rf"|[(\[](?i:{ORDER}|single|only)\b|\s+哪"
    rf"|(?:[.。,，;；!?？\n]|\s[-–—])\s*(?:{ORDER}|Return|Only|Just|Explain|Provide|Write|Pick|Do not|No "
    r"(?:explanation|need|reason)s?)(?![A-Za-z])"
    r"|(?:[,，:：;；.。?？]|\s[-–—])\s*(?i:which|what|answer|respond|reply|select|choose|given|based|哪)(?![A-Za-z])"
)
ENDING = re.compile(r"(?:\s+(?:or|and)|\s*(?:还是|或者|以及|或|和))\s*$")
BRACKETS = ("(（[【{「《", ")）]】}」》")
QUOTES = "\"'“”‘’`"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# fields of a record: of all options, or of one
CHOICES = re.compile(r"(?i)(?:answer[_ ]?)?(?:choices|options|candidates)|候?备?选项|候选答案")
EACH = re.compile(r"(?:option|choice|opt?|选项)[_ ]?([A-Ha-h])|([A-H])")
CHOOSE = re.compile(
    r"[四多]选一|选出|选择|选项|哪一?[项个种]|(?i:which o(?:ption|f|ne)|choose|select|pick|options?\b)"
)
HINT = re.compile(
    r"[四多]选一|选出|选择|选项|哪一[项个种]|下列|以下"
    r"|[Ww]hich (?:option|of)|[Cc]hoose|[Ss]elect|[Oo]ptions?\b"
)


def _clean(text: str) -> str:
    """An option without the marks around it: separators, bold stars, a closing bracket where it opened
    none."""
    text = re.sub(rf"^(?:[\s:：、，,*_{QUOTES}]|[.．](?!\d))+", "", text)
    while True:
        before = text
        text = re.sub(
            rf"(?:[\s:：;；,，、。.．|/*_?？→$\\(（\[【{QUOTES}]|[①-⑳]|</?\w+>|[(（]\s*[)）])+$", "", text
        )
        text = ENDING.sub("", text)
        opened, closed = (sum(map(text.count, marks)) for marks in BRACKETS)
        if text[-1:] and text[-1] in BRACKETS[1] and opened < closed:  # intervals may be (0, 1]
            text = text[:-1]
        if text == before:
            return text


def _last(text: str, others: list[str]) -> str:
    """The last option without the instruction behind it; others: the texts of the options before it."""
    closing = CLOSING.search(text)
    if closing and closing.start() and not any(CLOSING.search(other.strip()) for other in others):
        text = text[: closing.start()]
    # one line, unless the others have several
    if not any("\n" in other.strip() for other in others):
        text = text.lstrip().split("\n")[0]
    # as many sentences as the longest of the others has
    most = max((len([s for s in SENTENCE.split(_clean(o)) if s.strip()]) for o in others), default=1) or 1
    ends = [match.start() for match in SENTENCE.finditer(text)]
    return text[: ends[most - 1]] if len(ends) >= most and ends[most - 1] else text


def _chain(text: str, marks: list, start: int) -> dict[str, str]:
    """The options whose first mark is marks[start]: each next letter where it first occurs."""
    chain, case = [marks[start]], str.isupper(marks[start].group(1))
    for mark in marks[start + 1 :]:
        letter = mark.group(1)
        if letter.isupper() == case and ord(letter) == ord(chain[-1].group(1)) + 1:
            chain.append(mark)
    bounds = [*(mark.start() for mark in chain[1:]), len(text)]
    parts = [text[mark.end() : end] for mark, end in zip(chain, bounds)]
    # the same mark before every name belongs to none of them, unless it is the minus of numbers
    leads = [LEADING.match(part) for part in parts]
    if all(leads) and len({lead[1] for lead in leads}) == 1 and not all(lead[2] for lead in leads):
        parts = [part[lead.end() :] for part, lead in zip(parts, leads)]
    parts[-1] = _last(parts[-1], parts[:-1])
    options = {mark.group(1).upper(): _clean(part) for mark, part in zip(chain, parts)}
    good = len(chain) > 1 and all(options.values()) and len(set(options.values())) == len(options)
    return options if good else {}


def _without_tags(text: str) -> str:
    """A text whose letters in circles stand in brackets, and whose HTML, Markdown and LaTeX is lines and
    words."""

    def lettered(found):
        letters = iter(LETTERS)
        is_item = lambda item: item.group()[:6] not in ("\\begin", "\\end{e")
        return ITEM.sub(lambda i: f"\n({next(letters, '?')}) " if is_item(i) else "\n", found.group())

    text = CONTROL.sub(" ", text.translate(MARKED))
    if "\\begin" in text or "<" in text:
        text = LETTERED_LIST.sub(lettered, text)
    if "</A>" in text:  # <A>GFSK</A> <B>FM</B>
        text = re.sub(r"</[A-Z]>", "", re.sub(r"<([A-Z])>", r"\n(\1) ", text))
    if "<" in text:
        text = VALUED.sub(r"\n(\1) ", text)
        text = INLINE_TAG.sub("", CELL_TAG.sub(" ", LINE_TAG.sub("\n", text)))
        for tag in "biu":  # where they are closed: <b> alone may be an option's letter
            if f"</{tag}>" in text:
                text = re.sub(rf"</?{tag}(?:\s[^<>]*)?>", "", text)
    text = FORMULA.sub(r"\1\2\3", STANDS_OUT.sub(r"(\2)\3", SPACED.sub(" ", text)))
    return unescape(text) if "&" in text else text


def read_options(text: str, is_choice: bool = False) -> dict[str, str]:
    """{"A": "GFSK", "B": "FM", ...} of the options in a text, or {"1": ...}; empty where there are none.
    is_choice: the text holds nothing but options."""
    text = BEGINNING.sub("", _without_tags(text.replace("\\n", "\n")))  # escaped twice
    plain = text.translate(PLAIN)
    behind = BEHIND.findall(plain)
    in_order = "".join(letter for _, letter, _ in behind) == LETTERS[: len(behind)]
    if len(behind) > 1 and in_order and not any(end for _, _, end in behind[:-1]):
        lead = re.compile(r"^(?:还是|或者|或|和|.*(?:从|是|为|在)(?=.))")  # of the sentence, not of a name
        return {letter: lead.sub("", name) for name, letter, _ in behind}
    found = (_longest(text, list(family.finditer(plain))) for family in FAMILIES)
    if best := max(found, key=len):
        return best
    marks = dict.fromkeys(re.findall(r"(?<![A-Za-z0-9])A\s*([^\w\s()])", plain))
    behind = [
        *(DEFINING if HINT.search(text) else ()),
        *map(r"\s*\{}\s*".format, marks),
        r"[ \t]+(?=[^\sa-z])",
    ]
    found = (_longest(text, list(re.finditer(ALONE + mark, plain))) for mark in behind)
    if best := next((options for options in found if len(options) >= 4), {}):
        return best
    text = text.translate(CIRCLED)
    best = _longest(text, list(NUMBERED.finditer(text.translate(PLAIN))))
    return best if len(best) > 2 and (is_choice or CHOOSE.search(text)) else {}


def _longest(text: str, marks: list) -> dict[str, str]:
    """The most options that begin at one of the marks, the last of equal ones."""
    found = {}
    starts = [start for start, mark in enumerate(marks) if mark.group(1) in "Aa1"]
    for start in starts[-MOST_STARTS:]:
        chain = _chain(text, marks, start)
        found = chain if len(chain) >= len(found) else found
    return found


def stated_choices(record: dict):
    """What a record holds of its options outside the question: one field, or one for each letter."""
    for key, value in record.items():
        if value and isinstance(value, (str, list, dict)) and CHOICES.fullmatch(key):
            return value
    each = {key: EACH.fullmatch(key) for key, value in record.items() if isinstance(value, (str, int, float))}
    each = {(found[1] or found[2]).upper(): str(record[key]) for key, found in each.items() if found}
    return dict(sorted(each.items())) if "A" in each and "B" in each else None


def asked(record: dict) -> str:
    """The text of a question with its options, which upstream puts behind it where they stand in a field of
    their own, as in the competition's test files."""
    question, choices = record["question"], stated_choices(record)
    options = parse_options(record) if choices else {}
    if not options or read_options(question) == options:
        return question
    shown = [f"({letter}) {name}" for letter, name in options.items()]
    if isinstance(choices, list):  # as they are written, where they have letters
        each = zip(choices, options.values(), shown)
        shown = [own if isinstance(own, str) and own != name else text for own, name, text in each]
    space = " " if re.search(r"[!-~]$", question) else ""
    return question + space + " ".join([choices] if isinstance(choices, str) else shown)


def parse_options(record: dict) -> dict[str, str]:
    """{"A": "GFSK", ...} of a question record: from its field "Answer choices" (a list, an object or text)
    or a field for each letter, or from the question, of which "turn" is the last turn; empty for an open
    question."""
    choices = stated_choices(record)
    if isinstance(choices, dict) and all(isinstance(column, list) for column in choices.values()):
        choices = [
            dict(zip(choices, row)) for row in zip(*choices.values())
        ]  # {"text": [...], "label": [...]}
    if isinstance(choices, dict):
        alone = [re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", str(key)) for key in choices]
        letters = [found[0].upper() if found else str(key) for found, key in zip(alone, choices)]
        known = any(set(letters) <= set(kind) for kind in (LETTERS, "123456789"))
        names = [str(name).strip() for name in choices.values()]
        return dict(zip(letters if known and len(set(letters)) == len(names) else LETTERS, names))
    if isinstance(choices, list):
        texts = [_spelled(choice) for choice in choices]
        read = read_options("\n".join(texts), is_choice=True)
        return read if len(read) == len(texts) else dict(zip(LETTERS, texts))
    if choices is None:
        return read_options(record.get("turn") or record["question"])
    return read_options(choices, is_choice=True)


def _spelled(choice) -> str:
    """One choice of a list as text: also ["A", "GFSK"], {"A": "GFSK"} and {"text": "GFSK", "label": "A"}."""
    if isinstance(choice, dict):
        choice = [*choice.values(), *(key for key in choice if len(key) == 1)]
    if isinstance(choice, list):
        return ". ".join(sorted(map(str, choice), key=lambda part: len(part) > 1))  # the letter first
    return str(choice)


def looks_like_choice(record: dict) -> bool:
    """Whether a question asks for a letter, by its wording or its answer, whatever `parse_options` reads."""
    hint = HINT.search(record.get("turn") or record["question"])
    return bool(hint or stated_choices(record) or stated_letter(record.get("answer") or ""))


# ---- answers

L = r"[\"'*_`(\[{<\s]*([A-Za-z])(?![A-Za-z0-9])"
STATED = (
    re.compile(
        rf"(?:答案|选项|应选|应该选|选择|我选|故选|所以选|选)[\])\"']?\s*(?:应该|应当|应)?\s*(?:是|为|：|:)?\s*(?:：|:)?{L}"
    ),
    re.compile(
        rf"(?i:(?<![a-z])(?:answer|ans\b\.?|option|choice|letter|pred|result|select|choose|pick)\b[\"'*_]*"
        rf"(?:\s+(?:is|would be|should be|must be))?\s*(?:[:：=]|→)?){L}"
    ),
    re.compile(r"\\boxed\s*\{\s*\(?([A-Za-z])\)?\s*\}"),
    re.compile(r"<answer>\s*\(?([A-Za-z])\)?\s*[.)]?\s*</answer>"),
    re.compile(
        r"(?<![A-Za-z0-9])\(?([A-Z])\)?\s*(?:is|是|为|选项|项|:|)\s*(?:(?:the|my)\s+)?(?:final\s+)?(?:correct|right|answer|best|正确|对|答案|√|✓)"
    ),
    re.compile(r"(?:^|应为|应是|是|为|选|第|对应|属于|符合)[\s(]*([A-Z])\)?\s*(?:选项|项|类)"),
)
# one of several letters: what stands before it, and what behind it; a comma may begin another sentence
MAYBE = r"(?:(?:maybe|perhaps|possibly)\s+|可能是?)?"
LONE = rf"{MAYBE}(?:option\s+|选项)?[(\[]*[A-HJ-Z](?![A-Za-z0-9])"  # I is a word
JOIN = r"\s*(?:\b(?:and|or|nor)\b|还是|和|或|与|及|/|&)\s*"
JOINED = re.compile(
    rf"(?:(?<![A-Za-z0-9])[A-Z][)\]]*(?:{JOIN}|\s*[、,]\s*|\s+)|\b(?:and|n?or)\s*{MAYBE}|[和或与及、/&]\s*{MAYBE})[(\[]*$"
)
JOINS = re.compile(rf"[)\]]*(?:{JOIN}{LONE}|\s*[、,]\s*{LONE}[)\]]*(?:$|[.。、,;!?]|{JOIN}))")
NEGATED = re.compile(
    r"(?i:不是|不选|而非|排除|\bnot|\bisn't|n't be|\brather than|\binstead of)\s*[(\[\"'*]*$"
)
DENIED = re.compile(
    r"(?i)[)\]\"'*:]*(?:\.\s*[^\s.,;。，；]{1,20})?\s*(?:选项|项)?\s*(?:(?:is|was)\s+)?"
    r"(?:incorrect|wrong|false|not (?:correct|right|the)\b|不对|不正确|不符合|不成立|错|×)"
)


def _negated(text: str, start: int, end: int) -> bool:
    """Whether what stands from `start` to `end` is said not to be the answer."""
    return bool(NEGATED.search(text[max(0, start - 40) : start]) or DENIED.match(text, end))


def _is_article(text: str, match) -> bool:
    """Whether the letter found is the word "a" or "I" before another word."""
    reason = r"(?:because|since|as|and|but|for|which|is)\b"
    return match.group(1) in "AaI" and bool(re.match(rf"\s+(?!{reason})[a-zA-Z]", text[match.end(1) :]))


def _said(text: str) -> str:
    """An answer in plain characters without its control tokens and what was thought before it."""
    return _without_tags(text.rpartition("</think>")[2].replace("\\n", "\n")).translate(PLAIN)


def stated_letter(text: str) -> str | None:
    """The letter that a text states as its answer, whatever the options are; the last where it states
    several, None where it states none."""
    plain, found = _said(text), []
    for pattern in STATED:
        for match in pattern.finditer(plain):
            letter = match.group(1)
            in_words = letter.islower() and not re.fullmatch(r"[\s\"'*.)\]}]*", plain[match.end(1) :])
            wrong = _negated(plain, *match.span(1)) or JOINS.match(plain, match.end(1))
            if not (in_words or wrong or _is_article(plain, match)):
                found.append((match.start(1), letter.upper()))
    if found:
        return max(found)[1]
    if line := re.match(r"\W*([A-Z])\W*?(?:\n|$)", plain):  # alone, whatever follows
        return line.group(1)
    enclosed = re.finditer(r"[(\[<{\"']\s*\**([A-Z])\**\s*[)\]>}\"']", plain)
    brackets = {m.group(1) for m in enclosed if not _negated(plain, *m.span())}
    if len(brackets) == 1:
        return brackets.pop()
    alone = re.match(r"[\s\"'*_`([{]*([A-Za-z])[\s\"'*_`)\]}]*[.,:;、。!?]*(?:\s|$)", plain)
    if alone and not (brackets or _negated(plain, *alone.span(1)) or JOINS.match(plain, alone.end(1))):
        rest = plain[alone.end(1) :].strip("\"'*_`)]} \t\n.,:;、。!?")
        # a mark, the end of the line, or a reason
        marked = bool(re.match(r"[*_`\"']*\s*[.):、,\]}]|[*_`\"']*\s*\n|\s+because\b", plain[alone.end(1) :]))
        if not rest or marked and alone.group(1).isupper():
            return alone.group(1).upper()
    glued = re.match(r"\s*([A-Z])\s*[.):;,、](?=\S)(?![A-Z](?![A-Za-z0-9]))", plain)
    return glued.group(1) if glued and not brackets and not DENIED.match(plain, glued.end(1)) else None


def named_option(text: str, options: dict) -> str | None:
    """The letter of the one option whose name stands in the text; of names inside one another the longest."""
    text, names = _said(text).lower(), {a: name.translate(PLAIN).lower() for a, name in options.items()}
    named = []
    for letter, name in names.items():
        places = re.finditer(rf"(?<![a-z0-9\-]){re.escape(name)}(?![a-z0-9]|-[a-z0-9])", text)
        if any(not _negated(text, *place.span()) for place in places):
            named.append(letter)
    inner = lambda a: any(names[a] != names[b] and names[a] in names[b] for b in named)
    longest = [a for a in named if not inner(a)]
    return longest[0] if len(longest) == 1 else None


def extract_letter(text: str, options: dict) -> str | None:
    """The letter of `options` that `text` answers with: the one that it states, else the one alone at its
    beginning or end, else that of the one option it names; else None."""
    if "1" in options:  # numbers are read as letters are
        named = {chr(ord(key) + 16): name for key, name in options.items()}
        lettered = LONE_NUMBER.sub(
            lambda digit: chr(ord(digit[0]) + 16), text.translate(CIRCLED).translate(PLAIN)
        )
        letter = extract_letter(lettered, named)
        return letter and chr(ord(letter) - 16)
    stated = stated_letter(text)
    if stated in options:
        return stated
    plain = _said(text)
    # a letter with its name, and what follows is a reason and no other letter
    start = re.match(r"\W*([A-Z])(?=\W)", plain)
    if start and (name := options.get(start.group(1), "").translate(PLAIN)):
        found = re.match(rf"(?i)\W+?{re.escape(name)}(?!\w)", plain[start.end() :])
        rest = plain[start.end() + found.end() :] if found else ""
        if found and not (DENIED.match(rest) or re.match(rf"{JOIN}|\W*[A-Z]\W", rest)):
            return start.group(1)
    named = named_option(text, options)
    end = re.search(r"(?:^|[\s:,=>→*\u4e00-\u9fff])([A-Z])[.。*)\]\s]*$", plain)
    said_alone = end and not _negated(plain, *end.span(1)) and not JOINED.search(plain[: end.start(1)])
    ended = end.group(1) if said_alone else None
    said = {named, ended if ended in options else None} - {None}
    return said.pop() if len(said) == 1 else None  # a name and a letter that differ are no answer


LONE_NUMBER = re.compile(r"(?<![A-Za-z0-9.\-])[1-9](?![A-Za-z0-9]|\.\d| ?(?:dB|[kMG]?Hz|[nuμm]?s\b|%))")

# ---- wording of answers

# how a letter may be written: name in a template -> the A of that alphabet
STYLES = {"letter": "A", "wide": "Ａ", "circled": "Ⓐ"}
SEED_WORDING = {"zh": "正确答案是：({letter}) {name}", "en": "The correct answer is: ({letter}) {name}"}


def language(text: str) -> str:
    """ "zh" where a text holds Chinese characters, else "en"."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


def wording(answer: str, options: dict) -> str | None:
    """The template of an answer to a question with options, None where it holds no letter or name of one.

    "正确答案是：(B) FM" -> "正确答案是：({letter}) {name}"
    """
    letter = extract_letter(answer, options)
    if letter is None:
        return None
    name = options[letter]
    text = answer.replace("{", "{{").replace("}", "}}")
    place = text.rfind(name)
    if place >= 0:
        text = text[:place] + "{name}" + text[place + len(name) :]
    styles = {chr(ord(first) + ord(letter) - 65): style for style, first in STYLES.items()}
    marks = list(re.finditer(rf"(?<![A-Za-z0-9{{])[{''.join(styles)}](?![A-Za-z0-9}}])", text))
    if marks:
        style = styles[marks[-1].group()]
        text = text[: marks[-1].start()] + f"{{{style}}}" + text[marks[-1].end() :]
    return text if marks or "{name}" in text else None


def candidate(question: str, letter: str, name: str, wordings: dict | None = None) -> str:
    """A complete answer in the language of the question: in the wording that was trained, or the seed's."""
    known = wordings or SEED_WORDING
    template = known.get(language(question)) or next(iter(known.values()))
    letters = {style: chr(ord(first) + ord(letter) - 65) for style, first in STYLES.items()}
    return template.format(name=name, **letters)
