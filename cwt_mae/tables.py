"""Signals in text tables: .csv and .tsv as people and programs write them.

    encoding      see text.py                       delimiter     comma, semicolon, tab, | or spaces
    numbers       decimal point or comma            missing       empty, ?, nan, NA, null
    header        none, plain, quoted, after #; perhaps a line of units below it, or lines about the device
                  above it, of which "Sample rate, 512 Hz" counts; pandas' 0, 1, 2 ...; a wristband's two
    clock         a column of seconds, their parts, minutes or hours, of dates and times, or of times of day

A day may stand in a column beside its times; other text is left out and named. A table of more than 64
nameless or numbered columns holds a series in each line and its label, a number or a word, at the end
(Kaggle's heart beats); name_TRAIN.tsv and name_TEST.tsv are UCR sets.
"""

import csv
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from common.errors import UserError
from cwt_mae.readers import part_of, series_record, words
from cwt_mae.recording import Recording, as_channel, check_rate, unique
from cwt_mae.text import read_text

MISSING = {"", "?", "nan", "na", "n/a", "#n/a", "null", "none", "-", "inf", "-inf"}
CLOCKS = set("time t timestamp seconds sec secs datetime date ts epoch unix unixtime date_time clock".split())
CLOCKS |= set("ms millis milliseconds index_time zeit datum temps 时间 时间戳 时刻 日期 日期时间".split())
CLOCKS |= {"elapsed time", "date time", "time stamp"}
COUNTERS = ("", "index", "sample", "samples", "sample #", "n", "no", "nr", "i", "frame", "row", "unnamed: 0")
COUNTERS += ("序号",)
UNITS = {"s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3}
UNITS |= {"millis": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "µs": 1e-6, "microseconds": 1e-6, "ns": 1e-9}
UNITS |= {"秒": 1.0, "毫秒": 1e-3, "微秒": 1e-6, "分": 60.0, "分钟": 60.0, "min": 60.0, "minutes": 60.0}
UNITS |= {"h": 3600.0, "hours": 3600.0, "小时": 3600.0}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
DAY = re.compile(r"\d{4}[-/]\d\d?[-/]\d\d?$|\d\d?(?P<mark>[-/.])\d\d?(?P=mark)\d{4}$")
DATE = re.compile(r"(\d{1,2})(?P<mark>[-/.])(\d{1,2})(?P=mark)(\d{4})[ T]")  # day or month first
TIME = re.compile(
    rf"(?i)(\d{{4}}[-/]\d\d?[-/]\d\d?[T ]|{DATE.pattern})?"
    r"\d{1,2}:\d\d(:\d\d)?([.,]\d+)?( ?[AP]M|Z|[+-]\d\d:?\d\d)?$|\d{1,2}:\d\d[.,]\d+$"
)
RATE = re.compile(
    r"(?i)(?:\b(?:sampl\w*[ _-]*(?:rate|freq\w*)|fs)|采样频?率)(?:\s*[\[(（](k?)(?:hz|hertz|赫兹?)[\])）])?"
    r"\W*?(\d+(?:\.\d+)?)\s*[\"']?(k?)(?:hz|hertz|赫兹?|$|[^\w.])"
)
WIDE = 64


@dataclass
class Text:
    """A text table, cut: names (None without a header) and units of its columns, the lines of data with
    decimal points, the number of the first of them, and the rate in Hz that the lines above them state."""

    names: list | None
    units: list
    delimiter: str | None
    lines: list
    first: int
    rate: float | None


def read_table(path: Path, fs=None) -> list[Recording]:
    """One text table: a column for each channel and a sample in each line, or a series in each line."""
    path = Path(path)
    text = split_table(path)
    head = fields(text.lines[0], text.delimiter)
    width, named = len(head), text.names is not None
    if path.suffix.lower() == ".tsv" and re.search(r"_(TRAIN|TEST)$", path.stem, re.I) and not named:
        return ucr_records(path, text, width)
    counted = named and sum(bool(re.fullmatch(r"\w{0,3}\d+", name)) for name in text.names)
    if width > WIDE and (not named or counted > 0.9 * width):
        first = int(named and text.names[0].lower() in COUNTERS)  # pandas' index
        return kaggle_records(path, text, range(first, width))
    ends_empty = named and len(text.names) == width - 1 and not head[-1]
    if named and len(text.names) != width and not ends_empty:
        raise UserError(f"{path}: header names {len(text.names)} columns, the data have {width}")
    names = [*(text.names or []), *[""] * width][:width]  # "" where there is none
    units = [*text.units, *[""] * width][:width]

    # Columns of numbers, one of which may be the clock
    kinds = [kind_of(text, i) for i in range(width)]
    wanted = [i for i, kind in enumerate(kinds) if kind == "number"]
    table = dict(zip(wanted, numbers(path, text, wanted, width).T))
    rate, jumps, used = clock_of(path, text, names, units, kinds, table)
    rate = text.rate if rate is None else rate
    remarks = [i for i, kind in enumerate(kinds) if kind in ("text", "date") and i not in used]
    remarks = [names[i] or f"column {i + 1}" for i in remarks]
    clock = next((name for name in remarks if clock_name(name, "")[0] in CLOCKS), None)
    if clock and rate is None and fs is None:
        raise UserError(
            f"{path}: column {clock} holds no times that are read; write seconds or ISO times, or pass "
            "--input-fs"
        )
    empty = [i for i in wanted if np.isnan(table[i]).all()]
    for what, left in (("of text", remarks), ("without a value", [names[i] for i in empty if names[i]])):
        if left:
            print(f"{path}: columns {what} left out: {', '.join(left)}", file=sys.stderr)
    chosen = [i for i in wanted if i not in used and i not in empty]
    if not chosen:
        raise UserError(f"{path}: holds no channel of numbers{' beside its time column' if used else ''}")
    rate, plain = check_rate(rate, path, fs), {i: named_unit(names[i]) for i in chosen}
    labels = unique(plain[i][0] or f"c{i}" for i in chosen)
    channels = {
        label: as_channel(table[i], rate, unit=units[i] or plain[i][1], jumps=jumps)
        for label, i in zip(labels, chosen)
    }
    return [Recording(path.stem, path, channels)]


def named_unit(name: str) -> tuple[str, str]:
    """("ECG", "mV") of "ECG [mV]" or "ECG (mV)"; other names have no unit."""
    found = re.match(r"(.+?)\s*[\[(（]\s*([^\[\]()（）]*?)\s*[\])）]$", name)
    return (found[1], found[2]) if found else (name, "")


def split_table(path: Path) -> Text:
    """Find header, delimiter and data of a text table."""
    text = read_text(path).rstrip("\n").replace("\u2212", "-")  # a minus sign as word processors write it
    lines = text.split("\n")
    at, comment, delimiter = below_comments(lines)
    some = [line for line in lines[at : at + 200] if line.strip()]
    if not some:
        raise UserError(f"{path}: holds no line of data")
    delimiter = delimiter or find_delimiter(some)
    at = below_device(lines, at, delimiter)
    names, units, at = header_of(lines, at, delimiter, comment)
    stated = next(filter(None, map(RATE.search, lines[:at])), None)
    rate = float(stated[2]) * (1000 if stated[1] or stated[3] else 1) if stated else None
    if names is None and (wristband := wristband_rate(lines[at : at + 2], delimiter)):
        rate, at = wristband, at + 2

    # Data, with decimal points. To look at each line takes as long as to read it, so only where it must be.
    body = lines[at:]
    if any(mark in text for mark in ("\n\n", "\n#", "\n%")):
        body = [line for line in body if line and not line.startswith(("#", "%"))]
    if not body:
        raise UserError(f"{path}: holds a header but no line of data")
    if any('"' in line for line in body[:5]):
        rows = csv.reader(body, delimiter=delimiter or " ", skipinitialspace=True)
        body, delimiter = ["\t".join(row) for row in rows], "\t"
    elif delimiter == "," and one_column(names, body[:50]):
        delimiter = None
    if delimiter != "," and any(re.search(r"\d,\d", line) for line in body[:50]):
        body = [line.replace(",", ".") for line in body]
    return Text(names, units, delimiter, body, at + 1, rate)


def below_comments(lines: list) -> tuple[int, str, str | None]:
    """(the first line that is no comment, the last comment, the delimiter that a line such as "sep=;"
    states)."""
    comment, delimiter = "", None
    for at, line in enumerate(map(str.strip, lines)):
        if re.match(r"(?i)sep=.$", line):
            delimiter = line[-1]
        elif line.startswith(("#", "%", "//")):
            comment = line.lstrip("#%/ ")
        elif line:
            return at, comment, delimiter
    return len(lines), comment, delimiter


def below_device(lines: list, at: int, delimiter) -> int:
    """The first line below those about the device: that of the names, or of the data. About the device are
    more lines than names and units, and a first one that states the rate or has another width than they."""
    first = first_data(lines, at, delimiter)
    above = [line for line in lines[at:first] if line.strip()] if first is not None else []
    width = len(fields(lines[first], delimiter)) if above else 0
    row = fields(above[0], delimiter) if len(above) == 2 else []
    setting = len(row) == 2 and bool(NUMBER.match(row[1])) and row[1] not in ("0", "1")  # "Gain,200"
    title = len(above) == 2 and (len(row) != width or setting)
    if len(above) > 2 or title or above and states_rate(above[0], delimiter, width):
        last = lines[first - 1]
        named = len(fields(last, delimiter)) == width and not states_rate(last, delimiter, width)
        at = first - bool(last.strip() and named)
    return at


def header_of(lines: list, at: int, delimiter, comment: str) -> tuple[list | None, list, int]:
    """(names of the columns or None, their units, the first line below); the last comment may hold names."""
    below = next((i for i in range(at + 1, len(lines)) if lines[i].strip()), len(lines))
    head, second = (fields(line, delimiter) for line in (lines[at], "".join(lines[below : below + 1])))
    odd, units = [i for i, v in enumerate(head) if not is_value(v)], []
    # Data may have a word, such as a label, in each line, or nothing in its place.
    alike = odd == [i for i, v in enumerate(second) if v == "" and i in odd or not is_value(v)]
    if not odd or 2 * len(odd) < len(head) and alike:
        if not counts_columns([v for i, v in enumerate(head) if i not in odd]):
            names = fields(comment, delimiter)
            return names if comment and len(names) == len(head) else None, units, at
    at = below
    if at < len(lines) and not any(is_value(v) and v for v in second):
        units, at = [v.strip("()[] ") for v in second], at + 1
    return head, units, at


def counts_columns(head: list) -> bool:
    """Whether a line of numbers are names: 0, 1, 2 ... or 1, 2, 3 ..., as pandas gives them, with or without
    an index."""
    counted = head[not head[0] :]
    counts = [[str(i + first) for i in range(len(counted))] for first in (0, 1)]
    return counted in counts and len(counted) > (2 if head[0] else 0)


def wristband_rate(lines: list, delimiter) -> float | None:
    """The rate in Hz of a wristband's file (BVP.csv of Empatica), which begins with two lines, each with one
    number in every column: the second since 1970 at which it was begun, and the rate. Of others None."""
    rows = [set(fields(line, delimiter)) for line in lines]
    if len(rows) == 2 and all(len(row) == 1 and NUMBER.match(*row) for row in rows):
        second, rate = (float(*row) for row in rows)
        if 1e9 < second < 1e10 and 0 < rate < 1e4:
            return rate
    return None


def states_rate(line: str, delimiter, width: int) -> bool:
    """Whether a line says the rate and is none of names: it has a number, or another width than the data."""
    row = fields(line, delimiter)
    alone = RATE.match(line.strip()) or any(v and is_value(v) for v in row)
    return bool(RATE.search(line)) and (len(row) != width or bool(alone))


def first_data(lines: list, at: int, delimiter) -> int | None:
    """The first of three lines one after the other, from `at` on, that hold values alone; None without
    them."""
    for i in range(at, min(at + 100, len(lines) - 2)):
        three = [fields(line, delimiter) for line in lines[i : i + 3]]
        if len({len(row) for row in three}) == 1 and all(v and is_value(v) for row in three for v in row):
            return i
    return None


def one_column(names, lines: list) -> bool:
    """Whether the commas of these lines are decimal commas of a single column: it has one name, or what
    follows them begins with zeros."""
    if not all(re.fullmatch(r"\s*[+-]?\d+,\d+\s*", line) for line in lines):
        return False
    return len(names or "") == 1 or any(re.search(r",0\d", line) for line in lines)


def find_delimiter(lines: list) -> str | None:
    """The delimiter that cuts the last of these lines into most equal rows; None: spaces."""
    tail = lines[len(lines) // 2 :][:20]
    counts = {delimiter: {line.count(delimiter) for line in tail} for delimiter in "\t;|,"}
    some = [delimiter for delimiter, count in counts.items() if count != {0}]
    return next((delimiter for delimiter in some if len(counts[delimiter]) == 1), next(iter(some), None))


def fields(line: str, delimiter) -> list[str]:
    """The fields of one line, without quotes and blanks."""
    if delimiter is None:
        return line.split()
    return [field.strip().strip("'\" ") for field in next(csv.reader([line], delimiter=delimiter))]


def is_value(text: str) -> bool:
    """Whether a field is a number, a time, or missing: what data consist of."""
    text = text.strip()
    return text.lower() in MISSING or bool(NUMBER.match(text.replace(",", "."))) or bool(TIME.match(text))


def kind_of(text: Text, column: int) -> str:
    """ "number", "time", "date" or "text": what the column holds in some of the lines."""
    lines, seen = text.lines, []
    for line in lines[:50] + lines[len(lines) // 2 : len(lines) // 2 + 20] + lines[-20:]:
        row = fields(line, text.delimiter)
        if column < len(row) and row[column].lower() not in MISSING:
            seen.append(row[column])
    if all(NUMBER.match(v.replace(",", ".")) for v in seen):
        return "number"
    forms = {"time": TIME, "date": DAY, "text": re.compile("")}
    return next(kind for kind, form in forms.items() if all(map(form.match, seen)))


def numbers(path, text: Text, columns, width: int = 0) -> np.ndarray:
    """(lines, columns) float64: the given columns; what is missing is nan. UserError naming the line
    otherwise."""
    lines, delimiter = text.lines, text.delimiter
    options = dict(delimiter=delimiter, ndmin=2, dtype=np.float64, comments=None)
    if len(columns) != width:
        options["usecols"] = list(columns)
    try:
        return np.loadtxt(lines, **options)
    except ValueError:
        pass  # something is missing, or wrong

    mark = re.escape(delimiter) if delimiter else r"\s"
    gap = re.compile(rf"(?i)(?<![^{mark}\n])[ ]*(?:\?|nan|na|#?n/a|null|none|-)?[ ]*(?![^{mark}\n])")
    try:
        return np.loadtxt([gap.sub("nan", line) for line in lines] if delimiter else lines, **options)
    except ValueError as error:
        complaint = " ".join(str(error).split())
    row = re.search(r"row (\d+)", complaint)
    of_columns = "column" in complaint and "changed" in complaint
    where = f"line {int(row[1]) + text.first - of_columns}: " if row else ""
    raise UserError(f"{path}: {where}lines do not all have the same columns of numbers ({complaint[:100]})")


def clock_of(path, text: Text, names, units, kinds, table):
    """(rate or None, jumps, columns used) of the column that holds the time, of several the first that
    rises evenly. Other clocks and counts of the lines are no signals either."""
    clocks, days, used = [], [], set()
    for i, name in enumerate(names):
        word, unit = clock_name(name, units[i])
        if kinds[i] == "time":
            clocks.append(i)
        if kinds[i] == "date" and (not word or word.split(" ")[-1] in CLOCKS):
            days.append(i)
        if kinds[i] != "number":
            continue
        even, step = evenly(table[i]), np.diff(table[i][:2]).sum()
        if even and unit is None and (word in COUNTERS and abs(step - 1) < 1e-9 or not word and step >= 1):
            used.add(i)  # a plain count of the lines says nothing about the rate
        elif word in CLOCKS or even and not word or word.split(" ")[-1] in CLOCKS and rises(table[i]):
            clocks.append(i)
        elif even:
            used.add(i)  # a clock of another name, which no signal resembles
            print(
                f"{path}: column {name} rises evenly, so it is not taken for a signal; if it is the time, "
                "call it time_s or time_ms",
                file=sys.stderr,
            )
    found, problem = (None, []), None
    for i in clocks:
        try:
            x, unit = table.get(i), 1.0
            if x is None:
                texts = column_of(text, i)
                if days and re.match(r"\d\d?:", texts[0]):
                    texts = [" ".join(pair) for pair in zip(column_of(text, days[0]), texts)]
                    used.add(days[0])
                x = times_of(path, texts)
            else:
                unit = clock_unit(path, names[i], clock_name(names[i], units[i])[1], x)
            found = steps_of(path, names[i] or f"column {i + 1}", x, unit)
            break
        except UserError as error:
            problem = problem or error
    else:
        if problem is not None:
            raise problem
    return *found, used | {i for i in clocks if kinds[i] == "time" or rises(table[i])}


def clock_name(name: str, unit: str):
    """(word, seconds of its unit or None) of a column name: "Time (ms)" -> ("time", .001), "time_s" ->
    ("time", 1)."""
    text = name.strip().lower()
    found = re.match(r"(.*?)[\s_]*[\(（\[\{/]\s*([a-zµ毫微秒]+)\s*[\)）\]\}]?$", text) or re.match(
        r"(.*)_([a-zµ毫微秒]+)$", text
    )
    if found and found[2] in UNITS:
        return found[1].strip(" _"), UNITS[found[2]]
    if text in UNITS and text not in ("s", "h", "min"):  # also names of signals and of their least values
        return "time", UNITS[text]
    return text, UNITS.get(unit.strip().lower())


def clock_unit(path, name: str, unit, x) -> float:
    """Seconds of the clock's unit; UserError where neither name nor values can tell."""
    if unit is not None:
        return unit
    steps = np.diff(x)
    step = float(np.median(steps)) if len(steps) else 0.0
    if abs(x[0]) > 1e17:
        return 1e-9
    if abs(x[0]) > 1e14:
        return 1e-6
    if abs(x[0]) > 1e11:
        return 1e-3
    if step >= 2 and abs(x[0]) < 1e9:
        raise UserError(
            f"{path}: column {name} goes in steps of {step:g} of an unnamed unit; call it time_s, time_ms "
            "or time_us"
        )
    return 1.0


def evenly(x) -> bool:
    """Whether a column rises by the same step throughout, as no signal does."""
    for steps in map(np.diff, (x[:9], x)):  # of a signal the first few tell
        if len(steps) < 2 or not (np.isfinite(steps).all() and steps.min() > 0):
            return False
        if np.ptp(steps) >= 1e-3 * steps[0]:
            return False
    return True


def rises(x) -> bool:
    """Whether a column goes up and never down, as a clock does."""
    steps = np.diff(x[np.isfinite(x)])
    return len(steps) > 0 and bool(steps.min() >= 0 and steps.max() > 0)


def times_of(path, texts: list) -> np.ndarray:
    """Seconds (L,) of dates and times or times of day, from the first one on; midnight may pass."""
    try:
        texts = iso_dates([afternoon(text) for text in texts])
        if re.match(r"\d{4}[-/]", texts[0]):
            texts = [t.replace("/", "-").replace(",", ".").replace("Z", "+00:00") for t in texts]
            texts = [re.sub(r"(?<![\d.])(\d)(?=[-: T])", r"0\1", t) for t in texts]
            stamps = [datetime.fromisoformat(t) for t in texts]
            return np.array([(stamp - stamps[0]).total_seconds() for stamp in stamps])
        units = ([float(part.replace(",", ".")) for part in t.split(":")[::-1]] for t in texts)
        seconds = np.array([sum(v * 60.0**k for k, v in enumerate(row)) for row in units])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: a time is not readable ({error}); write ISO times or seconds") from error
    return seconds + 86400 * np.cumsum(np.r_[0, np.diff(seconds) < -43200])


def afternoon(text: str) -> str:
    """A time with AM or PM on the clock of 24 hours; any other as it is."""
    found = re.fullmatch(r"(?i)(.*?)(\d{1,2})(:[\d:.,]+?) ?([AP])M", text)
    return text if not found else f"{found[1]}{int(found[2]) % 12 + 12 * (found[4] in 'Pp'):02d}{found[3]}"


def iso_dates(texts: list) -> list:
    """Dates such as 31.12.2024 or 12/31/2024 with the year first; which number is the month, one above 12,
    the dot or a date that never changes must say."""
    found = [DATE.match(text) for text in texts]
    if not all(found):
        return texts
    days = {(int(f[1]), int(f[3]), f[2]) for f in found}
    day_first = any(a > 12 or mark == "." for a, _, mark in days)
    if not day_first and len(days) > 1 and not any(b > 12 for _, b, _ in days):
        raise ValueError(f"{texts[0]} may begin with the day or the month")
    day, month = (1, 3) if day_first else (3, 1)
    return [f"{f[4]}-{int(f[month]):02d}-{int(f[day]):02d} {t[f.end() :]}" for f, t in zip(found, texts)]


def steps_of(path, name: str, x, unit: float):
    """(rate in Hz, jumps) of a clock column: even steps but for jumps forward, which are gaps."""
    seconds = (x - x[0]) * unit
    steps = np.diff(seconds)
    rising = steps[steps > 0]
    if len(rising) and np.isfinite(seconds).all():
        # A clock that stands still now and then shows its last digit; of another the numbers tell it.
        least, step = rising.min(), float(np.median(steps))
        digit = least if (steps == 0).any() else last_digit(x - x[0], least / unit) * unit
        jumps = np.flatnonzero(steps > 1.5 * step)
        even = np.delete(steps, jumps)
        gaps = len(jumps) <= 0.01 * len(steps) + 1 and np.abs(even - step).max() < 0.5 * step
        if rate := even_rate(seconds, digit):
            return rate, []
        if gaps and steps.min() >= 0:
            return 1 / even.mean(), [(int(j) + 1, float(seconds[j + 1])) for j in jumps]
        if rate := even_rate(seconds, least):  # ticks that are no power of ten
            return rate, []
    raise UserError(
        f"{path}: column {name} does not rise evenly; resample it or drop the column and pass --input-fs"
    )


def even_rate(seconds, digit: float) -> float | None:
    """The rate in Hz of a clock that never leaves a straight line by more than its last digit, else None. A
    whole number of Hz that all these times round is the rate: their ends alone are not exact."""
    count = np.arange(len(seconds))
    mean = seconds[-1] / count[-1]
    if not np.abs(seconds - mean * count).max() <= 1.01 * digit <= 4.1 * mean:
        return None
    whole = max(1, round(1 / mean))
    return float(whole) if np.abs(seconds - count / whole).max() <= 1.01 * digit else 1 / mean


def last_digit(x, least: float) -> float:
    """The largest power of ten that all these numbers are multiples of; a thousandth of their least step for
    numbers of many digits."""
    top = np.floor(np.log10(1.01 * least))
    for digit in 10.0 ** np.arange(top, top - 3, -1):
        if np.abs(x / digit - np.round(x / digit)).max() < 0.01:
            return digit
    return 1e-3 * least


def column_of(text: Text, column: int) -> list[str]:
    """The words of one column, "" where a line is too short."""
    return [(fields(line, text.delimiter) + [""] * (column + 1))[column] for line in text.lines]


def ucr_records(path: Path, text: Text, width: int) -> list[Recording]:
    """The series of a UCR .tsv file: the label, a number or a word, then the values."""
    labels = column_of(text, 0) if kind_of(text, 0) == "text" else words(numbers(path, text, [0])[:, 0])
    rows = enumerate(zip(numbers(path, text, range(1, width)), labels, strict=True))
    return [series_record(path, part_of(path), i, [row], label or None) for i, (row, label) in rows]


def kaggle_records(path: Path, text: Text, columns: range) -> list[Recording]:
    """A series in each line; the last column is the label if it holds words, or whole numbers alone. Zeros at
    the end of Kaggle's 187 samples are padding."""
    if kind_of(text, columns[-1]) == "text":
        labels, rows = column_of(text, columns[-1]), numbers(path, text, columns[:-1])
    else:
        rows = numbers(path, text, columns)
        labels, stated = rows[:, -1], rows[np.isfinite(rows[:, -1]), -1]
        few = len(np.unique(stated)) <= max(2, len(labels) // 2) or len(columns) == 188
        labelled = few and len(stated) > 0 and bool((stated == np.round(stated)).all())
        labels, rows = (words(labels), rows[:, :-1]) if labelled else ([None] * len(rows), rows)
    named = re.search(r"(?i)(?:^|_)(test|train)$", path.stem)
    part = named[1].lower() if named else ""
    records = []
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        if len(row) == 187:
            there = np.flatnonzero(row)
            row = row[: there[-1] + 1] if len(there) else row
        records.append(series_record(path, part, i, [row], label or None))
    return records
