"""The text of files that do not state their encoding: tables, lists of labels, headers.

UTF-8, and UTF-16 and UTF-32 with or without their mark, are known by their bytes. All else is a guess, and
said: GB18030 where the bytes are Chinese and would be nonsense in Latin letters, else cp1252, which is
Latin-1 with curly quotes and dashes.
"""

import codecs
import re
import sys
from pathlib import Path

from common.files import reading

MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16's, which begins alike
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# No Latin word: two high bytes apart from letters ("°C", "ção" and "Größe" are), or four together
NONSENSE = re.compile(rb"[\xa1-\xfe]{4}|(?<![A-Za-z])[\xa1-\xfe]{2}(?![A-Za-z])")


def read_text(path) -> str:
    """The text of a file, with \\n at the end of each line."""
    path = Path(path)
    with reading(path, "text file"):
        return decoded(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def decoded(data: bytes, path) -> str:
    """Bytes out of the file `path` as text, with U+FFFD for what cannot be read."""
    return data.decode(encoding_of(data, path), "replace")


def encoding_of(data: bytes, path) -> str:
    """The name of an encoding that `data` can be read in; where it is a guess, it is said on the screen."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    zeros, quarter = [data[i:400:4].count(0) for i in range(4)], len(data[:400]) // 4
    if quarter and sum(zeros) > quarter:  # bytes that text in UTF-8 does not hold
        for pair, encoding in ((zeros[2:], "utf-32-le"), (zeros[:2], "utf-32-be")):
            if pair == [quarter, quarter]:
                return encoding
        return "utf-16-le" if zeros[1] + zeros[3] > zeros[0] + zeros[2] else "utf-16-be"
    if fits(data, "utf-8"):
        return "utf-8-sig"
    foreign = foreign_letters(data, "utf-8")
    if 2 * foreign.count("\ufffd") < len(foreign):  # cut short, or another hand has written into it
        encoding = "utf-8-sig"
    elif is_chinese(data):
        encoding = "gb18030"
    else:
        encoding = "cp1252" if fits(data, "cp1252") else "latin1"
    print(
        f"{path}: its text is not all UTF-8 and was read as {encoding}, a guess; if names or labels look "
        "wrong, save it as UTF-8",
        file=sys.stderr,
    )
    return encoding


def fits(data: bytes, encoding: str) -> bool:
    """Whether all bytes can be read in an encoding."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def foreign_letters(data: bytes, encoding: str) -> list[str]:
    """The characters beyond ASCII of bytes in an encoding, U+FFFD for what cannot be read."""
    return re.findall(r"[^\x00-\x7f]", data.decode(encoding, "replace"))


def is_chinese(data: bytes) -> bool:
    """Whether bytes are Chinese in GB18030: mostly everyday characters, and nonsense in Latin letters."""
    if not NONSENSE.search(data):
        return False
    foreign = set(foreign_letters(data, "gb18030"))
    # The rows of GB2312 up to 0xD7 are marks and the 3755 most frequent characters.
    everyday = [c for c in foreign if b"\xa1" <= c.encode("gb2312", "ignore")[:1] <= b"\xd7"]
    return 2 * len(everyday) > len(foreign)
