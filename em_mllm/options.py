"""Questions with options, as they are written in Chinese and English: one grammar for the generator, the data
set, the scorer and the answer file.

Options begin with A and go on without a gap. The letter stands in brackets, `(A)` `（A）` `[A]`, or before a
mark, `A.` `A)` `A、` `A:`, or in a circle, `Ⓐ`, or alone at the beginning of a line; full-width letters and
marks count as plain ones, and items of HTML lists as lines. Letters elsewhere in the text, as in "in-phase
(I) and quadrature (Q)", are text.
"""

import re
from html import unescape

# full-width ASCII to plain, one character for one, so that places stay
PLAIN = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0xA0: " ", 0x3000: " "}
PLAIN |= {0x3010: "[", 0x3011: "]", 0x3014: "[", 0x3015: "]", 0xFE59: "(", 0xFE5A: ")"}

# letters in circles, brackets and squares, each one character, and characters without width
LETTERED = (0x24B6, 0x24D0, 0x249C, 0x1F110, 0x1F130, 0x1F150, 0x1F170)
MARKED = {first + n: f"({chr(65 + n)})" for first in LETTERED for n in range(26)}
MARKED |= dict.fromkeys((0x200B, 0x2060, 0xFE0F, 0xFEFF))

# HTML: items whose letter stands in the tag or comes from the kind of list, tags that begin a line, others
VALUED = re.compile(
    r"(?i)<(?:option|input|button|label|li)\s[^<>]{0,200}?\bvalue\s*=\s*[\"']?([A-Z])[\"']?(?:\s[^<>]{0,200})?/?>"
    r"(?!\s*[(\[]?\1\s*[.)\]:、])"
)
LETTERED_LIST = re.compile(r"(?is)<ol\s[^<>]{0,200}?type\s*=\s*[\"']?A\b[^<>]{0,200}>.*?(?:</ol\s*>|$)")
ITEM = re.compile(r"(?i)<li(?:\s[^<>]*)?>")
LINE_TAG = re.compile(
    r"(?i)</?(?:br|p|div|li|ul|ol|dl|dt|dd|tr|table|tbody|thead|select|option|label|h[1-6])(?:\s[^<>]*)?/?>"
)
CELL_TAG = re.compile(r"(?i)</?(?:td|th|input|button)(?:\s[^<>]*)?/?>")
INLINE_TAG = re.compile(r"(?i)</?(?:strong|em|span|font|code|mark|small|sub|sup)(?:\s[^<>]*)?>")

# a word before the letter, as in "选项A：" or "Option A:"
WORD = r"(?:(?:选项|选择|类别)\s*|(?:[Oo]ption|[Cc]hoice|[Cc]lass)\s+)?"
BULLET = r"(?:(?<=\n)[ \t]*[-*•][ \t]+)?\*{0,3}"
FAMILIES = (
    re.compile(rf"{BULLET}{WORD}[(\[<{{|]\s*([A-Za-z])\s*\.?[)\]>}}|]\**(?:\s*[:：])?"),
    re.compile(
        rf"{BULLET}{WORD}(?<![A-Za-z0-9])(?!(?<=[(\[])[A-Za-z]\s*\.?\))(?![A-Za-z]\.[A-Za-z]\.)([A-Za-z])\**\s*"
        r"(?:\.?\)|[-=]>|→|[.:、,=]|['\"”’]\s*:|[-–—](?=\s))\**"
    ),
    re.compile(rf"(?:^|(?<=[\n;:]))[ \t]*{WORD}([A-Z])[ \t]+(?=\S)"),
)

# the letter behind the name, as in "GFSK(A)、FM(B)", with a mark behind each bracket
BEHIND = re.compile(
    r"([^\s、,;/:()]{1,80})\s?[(\[]\s*([A-Z])\s*[)\]](?=\s*(?:[、,;/]|或|和|还是|or\b|and\b|中|里|之|[。.?？]|$))"
)

MOST_STARTS = 64  # places at which options may begin, the last ones: so that no text takes minutes
SENTENCE = re.compile(r"[。!！?？;；]|\.(?=\s+[A-Z\u4e00-\u9fff])|\.(?=[\u4e00-\u9fff])")
# what follows the last option and is no part of it: behind a mark, or behind a space with more to follow
ORDER = r"Please|Answer|Your answer|The answer|Choose|Select|Reply|Respond|Output|Give"
CLOSING = re.compile(
    r"(?:[\s，,;；:：。.!！?？、|]+[(（\[【]?|[(（\[【]|(?<![\u4e00-\u9fff]))\s*(?:请|注意|要求|只需|仅需|只回答|仅回答|只填|只写|只给|只选|不确定|"
    r"只输出|直接|你的答案|您的答案|你的选择|答案|回答|选出|从中|以上|无需|不要|不用|单选|该信号是)"
    r"|\s*[之其]?[中里]\s*(?:选|挑|任选)"
    rf"|[\s，,]+[(\[]?(?:{ORDER})(?:\s+\w|\s*:)|[(\[](?i:{ORDER}|single|only)\b"
    rf"|(?:[.。,，;；!?？\n]|\s[-–—])\s*(?:{ORDER}|Return|Only|Just|Explain|Provide|Write|Pick|Do not|No "
    r"(?:explanation|need|reason)s?)(?![A-Za-z])"
    r"|(?:[,，:：;；.。?？]|\s[-–—])\s*(?i:which|what|answer|respond|reply|select|choose|哪)(?![A-Za-z])"
)
ENDING = re.compile(r"(?:\s+(?:or|and)|\s*(?:还是|或者|以及|或|和))\s*$")
BRACKETS = {")": "(", "）": "（", "]": "[", "】": "【", "}": "{"}
QUOTES = "\"'“”‘’`"
HINT = re.compile(
    r"四选一|多选一|选出|选择|选项|哪一[项个种]|下列|以下"
    r"|[Ww]hich (?:option|of)|[Cc]hoose|[Ss]elect|[Oo]ptions?\b"
)


def _clean(text: str) -> str:
    """An option without the marks around it: separators, bold stars, a closing bracket that it did not
    open."""
    text = re.sub(rf"^(?:[\s:：、，,*{QUOTES}]|[.．](?!\d)|[-–—](?=\s))+", "", text)
    while True:
        before = text
        text = re.sub(
            rf"(?:[\s;；,，、。.．|/*?？{QUOTES}]|(?<=\n)[-•]|\n\s*\d+[.)]|[①-⑳]|</?\w+>)+$", "", text
        )
        text = ENDING.sub("", text)
        if text and (opening := BRACKETS.get(text[-1])) and text.count(opening) < text.count(text[-1]):
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
    parts[-1] = _last(parts[-1], parts[:-1])
    options = {mark.group(1).upper(): _clean(part) for mark, part in zip(chain, parts)}
    good = len(chain) > 1 and all(options.values()) and len(set(options.values())) == len(options)
    return options if good else {}


def _without_tags(text: str) -> str:
    """A text whose letters in circles stand in brackets, and whose HTML is lines and words."""

    def lettered(found):
        letters = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        return ITEM.sub(lambda item: f"\n({next(letters, '?')}) ", found.group())

    text = text.translate(MARKED)
    if "</A>" in text:  # <A>GFSK</A> <B>FM</B>
        text = re.sub(r"</[A-Z]>", "", re.sub(r"<([A-Z])>", r"\n(\1) ", text))
    if "<" in text:
        text = VALUED.sub(r"\n(\1) ", LETTERED_LIST.sub(lettered, text))
        text = INLINE_TAG.sub("", CELL_TAG.sub(" ", LINE_TAG.sub("\n", text)))
        for tag in "biu":  # where they are closed: <b> alone may be an option's letter
            if f"</{tag}>" in text:
                text = re.sub(rf"</?{tag}(?:\s[^<>]*)?>", "", text)
    return unescape(text) if "&" in text else text


def read_options(text: str) -> dict[str, str]:
    """{"A": "GFSK", "B": "FM", ...} of the options in a text; empty where there are none."""
    text = _without_tags(text.replace("\\n", "\n"))  # escaped twice
    plain, best = text.translate(PLAIN), {}
    behind = [(letter, name) for name, letter in BEHIND.findall(plain)]
    if len(behind) > 1 and [letter for letter, _ in behind] == [chr(65 + n) for n in range(len(behind))]:
        lead = re.compile(r"^(?:还是|或者|或|和|.*(?:从|是|为|在)(?=.))")  # of the sentence, not of a name
        return {letter: lead.sub("", name) for letter, name in behind}
    for family in FAMILIES:
        marks = list(family.finditer(plain))
        starts = [start for start, mark in enumerate(marks) if mark.group(1) in "Aa"]
        found = {}
        for start in starts[-MOST_STARTS:]:
            chain = _chain(text, marks, start)
            found = chain if len(chain) >= len(found) else found  # the last of equal ones
        best = found if len(found) > len(best) else best
    return best


def parse_options(record: dict) -> dict[str, str]:
    """{"A": "GFSK", ...} of a question record: from its field "Answer choices" (a list, an object or text),
    or from the question; empty for an open question."""
    choices = next((record[k] for k in ("Answer choices", "choices", "options") if record.get(k)), None)
    if isinstance(choices, dict):
        return {str(letter).strip("()（） .").upper(): str(name).strip() for letter, name in choices.items()}
    if isinstance(choices, list):
        read = read_options("\n".join(map(str, choices)))
        return (
            read if len(read) == len(choices) else dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", map(str, choices)))
        )
    return read_options(choices if isinstance(choices, str) else record["question"])


def looks_like_choice(record: dict) -> bool:
    """Whether a question asks for a letter, by its wording or its answer, whatever `parse_options` reads."""
    if any(record.get(key) for key in ("Answer choices", "choices", "options")):
        return True
    answer = record.get("answer")
    return bool(HINT.search(record["question"]) or (answer and stated_letter(answer)))


# ---- answers

L = r"[\"'“‘*_`(\[{<\s]*([A-Za-z])(?![A-Za-z0-9])"
STATED = (
    re.compile(
        rf"(?:答案|选项|应选|应该选|选择|我选|故选|所以选|选)[\])]?\s*(?:应该|应当|应)?\s*(?:是|为|：|:)?\s*(?:：|:)?{L}"
    ),
    re.compile(
        rf"(?i:\b(?:answer|option|choice|letter|select|choose|pick)\b[\"'*_]*"
        rf"(?:\s+(?:is|would be|should be|must be))?\s*(?:[:：=]|→)?){L}"
    ),
    re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*\(?([A-Za-z])\)?\s*\}"),
    re.compile(r"<answer>\s*\(?([A-Za-z])\)?\s*[.)]?\s*</answer>"),
    re.compile(
        r"(?<![A-Za-z0-9])\(?([A-Z])\)?\s*(?:is|是|为)\s*(?:(?:the|my)\s+)?(?:correct|right|answer|best|正确|对的|答案)"
    ),
    re.compile(r"(?:^|应为|应是|是|为|选)[\s(]*([A-Z])\)?\s*(?:选项|项)"),
)
JOINED = re.compile(r"(?:\band|\bor|和|或|与|及|、|/|&)\s*[(\[]*$")  # one of several letters
NEGATED = re.compile(
    r"(?i:不是|不选|而非|排除|\bnot|\bisn't|n't be|\brather than|\binstead of)\s*[(\[\"'*]*$"
)


def _negated(text: str, end: int) -> bool:
    """Whether what begins at `end` is said not to be the answer."""
    return bool(NEGATED.search(text[max(0, end - 40) : end]))


def _is_article(text: str, match) -> bool:
    """Whether the letter found is the word "a" or "I" before another word."""
    return match.group(1) in "AaI" and bool(re.match(r"\s+[a-zA-Z]", text[match.end(1) :]))


def _said(text: str) -> str:
    """An answer in plain characters without its control tokens and what was thought before it."""
    text = re.sub(r"<\|[^|<>]*\|>|</?(?:s|eos|bos|pad)>", "", text.rpartition("</think>")[2])
    return _without_tags(text).translate(PLAIN)


def stated_letter(text: str) -> str | None:
    """The letter that a text states as its answer, whatever the options are; the last where it states
    several, None where it states none."""
    plain, found = _said(text), []
    for pattern in STATED:
        for match in pattern.finditer(plain):
            letter = match.group(1)
            in_words = letter.islower() and not re.fullmatch(r"[\s\"'*.)\]]*", plain[match.end(1) :])
            if not in_words and not _is_article(plain, match):
                found.append((match.start(1), letter.upper()))
    if found:
        return max(found)[1]
    brackets = {
        m.group(1).upper()
        for m in re.finditer(r"[(\[]\s*\**([A-Z])\**\s*[)\]]", plain)
        if not _negated(plain, m.start())
    }
    if len(brackets) == 1:
        return brackets.pop()
    alone = re.match(r"[\s\"'*_`([{]*([A-Za-z])[\s\"'*_`)\]}]*[.,:、。!?]*(?:\s|$)", plain)
    if alone and not brackets:
        rest = plain[alone.end(1) :].strip("\"'*_`)]} \t\n.,:、。!?")
        # a mark, the end of the line, or a reason
        marked = bool(re.match(r"[*_`\"']*\s*[.):、,\]}]|[*_`\"']*\s*\n|\s+because\b", plain[alone.end(1) :]))
        if not rest or marked and alone.group(1).isupper():
            return alone.group(1).upper()
    glued = re.match(r"\s*([A-Z])\s*[.):、](?=\S)", plain)
    return glued.group(1) if glued and not brackets else None


def named_option(text: str, options: dict) -> str | None:
    """The letter of the one option whose name stands in the text; of names inside one another the longest."""
    text, names = _said(text).lower(), {a: name.translate(PLAIN).lower() for a, name in options.items()}
    named = []
    for letter, name in names.items():
        places = re.finditer(rf"(?<![a-z0-9\-]){re.escape(name)}(?![a-z0-9]|-[a-z0-9])", text)
        if any(not _negated(text, place.start()) for place in places):
            named.append(letter)
    inner = lambda a: any(names[a] != names[b] and names[a] in names[b] for b in named)
    longest = [a for a in named if not inner(a)]
    return longest[0] if len(longest) == 1 else None


def extract_letter(text: str, options: dict) -> str | None:
    """The letter of `options` that `text` answers with: the one that it states, else the one alone at its
    beginning or end, else that of the one option it names; else None."""
    stated = stated_letter(text)
    if stated in options:
        return stated
    plain = _said(text)
    start = re.match(r"\s*([A-Z])\s+(\S.*)", plain, re.DOTALL)
    if start and start.group(1) in options:
        name = options[start.group(1)].lower()
        if start.group(2).lower().startswith(name):
            return start.group(1)
    named = named_option(text, options)
    end = re.search(r"(?:^|[\s:,=>→*\u4e00-\u9fff])([A-Z])[.。*)\]\s]*$", plain)
    said_alone = end and not _negated(plain, end.start(1)) and not JOINED.search(plain[: end.start(1)])
    ended = end.group(1) if said_alone else None
    said = {named, ended if ended in options else None} - {None}
    return said.pop() if len(said) == 1 else None  # a name and a letter that differ are no answer


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
