"""Which of the 14 findings a report states: a rule-based labeler for English and Chinese, and CheXbert.

The codes are 0 not mentioned, 1 present, 2 absent, 3 uncertain; only 1 counts as present in the scores. A
report is split into sentences and these into clauses; each finding is searched in each clause, and words of
negation or doubt in the same clause decide its code. Present overrides uncertain, and uncertain overrides
absent.
"""

import re

from common.errors import UserError
from dia_pangu.src.Dataset.prompt import FINDINGS

BLANK, PRESENT, ABSENT, UNCERTAIN = 0, 1, 2, 3
RANK = {BLANK: 0, ABSENT: 1, UNCERTAIN: 2, PRESENT: 3}  # of two statements the one with the higher rank holds

# Words that name a finding. English patterns match at word starts, Chinese ones anywhere.
ENGLISH = {
    "enlarged cardiomediastinum": r"(?:widen\w*|enlarge\w*|broaden\w*)[^,;]*mediastin|"
    r"mediastin\w*[^,;]*(?:widen|enlarge|broaden|shift)|"
    r"(?:aort\w*|pulmonary (?:artery|trunk|conus))[^,;]*"
    r"(?:dilat|ectas|aneurysm|wider than normal|increased)|"
    r"(?:dilat\w*|aneurysm\w*|ectas\w*)[^,;]*(?:aort|pulmonary (?:artery|trunk))",
    "cardiomegaly": r"cardiomegal|heart[^,;]*(?:enlarge|increase|wide|big|broad)|"
    r"(?:enlarge\w*|increase\w*)[^,;]*(?:heart|cardiac|ventric|atri)|"
    r"(?:cardiac|cardiothoracic)[^,;]*(?:increase|enlarge)",
    "lung opacity": r"opacit|opacif|ground.?glass|hazy|haze|infiltrat|density (?:increase|area)|"
    r"(?:increase\w*|patchy)[^,;]*densit",
    "lung lesion": r"nodul|lesion|\bmass\b|masses|tumou?r|metasta",
    "edema": r"(?:pulmonary |interstitial |alveolar )?edema|oedema|interlobular septal thicken",
    "consolidation": r"consolidat",
    "pneumonia": r"pneumoni|infecti|infective|covid",
    "atelectasis": r"atelecta|collaps",
    "pneumothorax": r"pneumothora",
    "pleural effusion": r"pleural[^,;]*(?:effusion|fluid)|effusion[^,;]*pleura|hydrothora|"
    r"(?:fluid|effusion)[^,;]*(?:hemithora|pleural|costophrenic)",
    "pleural other": r"pleura\w*[^,;]*(?:thick|plaque|calcif|scar)|(?:thick|plaque|calcif)\w*[^,;]*pleura",
    "fracture": r"fractur|broken rib|callus|rib break",
    "support devices": r"catheter|pacemaker|\btube\b|\bstent|\bwires?\b|prosthe|\bport\b|cannula|"
    r"drain(?:age)? (?:tube|catheter)|valve replacement|medical material|sternotomy|suture|clips?\b|"
    r"implant|electrode",
}
CHINESE = {
    "enlarged cardiomediastinum": r"纵隔(?:影)?[^，,；]{0,4}(?:增宽|增大|扩大)",
    "cardiomegaly": r"心(?:脏|影|室|房)[^，,；]{0,6}(?:增大|扩大|肥大)",
    "lung opacity": r"磨玻璃|模糊(?:阴)?影|阴影|密度增高",
    "lung lesion": r"结节|肿块|病灶|占位",
    "edema": r"水肿",
    "consolidation": r"实变",
    "pneumonia": r"肺炎|炎症|感染",
    "atelectasis": r"不张|膨胀不全",
    "pneumothorax": r"气胸",
    "pleural effusion": r"胸(?:腔|膜腔)?[^，,；]{0,8}(?:积液|液体)|积液",
    "pleural other": r"胸膜[^，,；腔]{0,6}(?:增厚|肥厚|钙化|粘连|斑)",
    "fracture": r"骨折|骨痂",
    "support devices": r"导管|起搏器|引流管|支架|置管|内固定",
}
PATTERNS = {
    "en": {name: re.compile(rf"\b(?:{p})", re.I) for name, p in ENGLISH.items()},
    "cn": {name: re.compile(p) for name, p in CHINESE.items()},
}
# Opacity words that belong to a more exact finding, and effusions of other places.
EXCEPT = {
    "en": {
        "lung opacity": re.compile(r"suggest\w* pneumonia|pleural", re.I),
        "lung lesion": re.compile(
            r"\b(?:liver|hepatic|renal|kidney|adrenal|splen|thyroid|bone|vertebra|lymph|breast|"
            r"sclerotic|lytic|cyst)|collapsed",
            re.I,
        ),
        "pleural effusion": re.compile(r"pericardi\w*[ -]effusion(?![^,;]*pleural)", re.I),
        "edema": re.compile(r"subcutaneous|soft tissue", re.I),
        "atelectasis": re.compile(r"vertebra|trachea", re.I),
    },
    "cn": {"lung opacity": re.compile(r"肺炎|胸膜")},
}
DENIED_BEFORE = {
    "en": re.compile(
        r"\b(?:no|not|without|free of|absence of|negative for|neither|nor|never|rather than|"
        r"regress\w*|resolv\w*)\b",
        re.I,
    ),
    "cn": re.compile(r"未|无|没有|不伴|排除"),
}
DENIED_AFTER = {
    "en": re.compile(
        r"\b(?:not (?:\w+ ){0,2}(?:observed|detected|seen|found|present|identified|shown|selected|"
        r"distinguished|encountered|monitored|followed|noted|enlarged|widened|increased|evident|remarkable)|"
        r"(?:was|were|is|are) not|n't|absent|ruled out|(?:is|are|was|were|within) normal|resolved|"
        r"disappeared|unremarkable)\b",
        re.I,
    ),
    "cn": re.compile(r"不大|正常|未见|消失|吸收"),
}
DOUBT = {
    "en": re.compile(
        r"\b(?:possibl\w*|may|might|could|questionabl\w*|cannot be excluded|suspicio\w*|uncertain|"
        r"equivocal|\?)",
        re.I,
    ),
    "cn": re.compile(r"可能|疑|待排|不除外"),
}
QUIET = {
    "en": re.compile(
        r"lungs? (?:\w+ ){0,3}(?:clear|normal)|normal chest|"
        r"no (?:active |significant |acute )?(?:finding|abnormal|disease|cardiopulmonary)|"
        r"heart (?:\w+ ){0,2}(?:normal|usual)",
        re.I,
    ),
    "cn": re.compile(r"未见(?:明显)?异常|清晰|心肺膈未见"),
}
# A normal sentence about an organ is a statement that its findings are absent.
NORMAL = {
    "en": [
        (
            re.compile(
                r"heart (?:size |contour)?[^,;]*(?:is|are|of)[^,;]*(?:normal|usual|natural)|normal heart",
                re.I,
            ),
            ("cardiomegaly",),
        ),
        (re.compile(r"pleural spaces? (?:is|are) free", re.I), ("pleural effusion", "pneumothorax")),
        (re.compile(r"ribs are intact", re.I), ("fracture",)),
        (re.compile(r"lungs are clear", re.I), ("lung opacity", "lung lesion", "consolidation")),
    ],
    "cn": [
        (re.compile(r"心(?:脏|影)[^，]*(?:不大|正常)"), ("cardiomegaly",)),
        (re.compile(r"肋骨完整"), ("fracture",)),
        (re.compile(r"胸膜腔未见异常"), ("pleural effusion", "pneumothorax")),
        (re.compile(r"肺野?清晰"), ("lung opacity", "lung lesion", "consolidation")),
    ],
}


def language_of(text: str) -> str:
    """Return "cn" if the text has a Chinese character, else "en"."""
    return "cn" if re.search(r"[\u4e00-\u9fff]", text) else "en"


def clauses(text: str, language: str) -> list[str]:
    """Split a text into sentences, and these into the parts that a negation does not reach across."""
    if language == "cn":
        return [part for part in re.split(r"[。；;，,\n]", text) if part.strip()]
    sentences = re.split(r"(?<=[^\d\W])[.;:!](?=\s|$)|(?<=\d)\.(?=\s|$)|\n|;", text)
    parts = []
    for sentence in sentences:
        parts += re.split(
            r"\b(?:but|however|although|except|whereas|while)\b|,\s+(?=(?:there|a|an|mild|minimal|bilateral)\b)",
            sentence,
        )
    return [part for part in parts if part and part.strip()]


def code_of(clause: str, match: re.Match, language: str) -> int:
    """Return the code of a finding that was matched in a clause, by the words of negation or doubt around
    it."""
    denied_before = DENIED_BEFORE[language].search(clause[: match.start()])
    denied_after = DENIED_AFTER[language].search(clause[match.start() :])
    if denied_before or denied_after:
        return ABSENT
    return UNCERTAIN if DOUBT[language].search(clause) else PRESENT


def label_clause(clause: str, language: str):
    """Yield (finding, code) for everything that one clause states."""
    for pattern, absent in NORMAL[language]:
        if pattern.search(clause):
            for name in absent:
                yield name, ABSENT
    for name in FINDINGS[:-1]:
        exception = EXCEPT[language].get(name)
        if exception is not None and exception.search(clause):
            continue
        for match in PATTERNS[language][name].finditer(clause):
            yield name, code_of(clause, match, language)


def label_report(text: str) -> list[int]:
    """Return the codes of the 14 findings of one report, English or Chinese as its characters say."""
    language = language_of(text)
    parts = clauses(text, language)
    codes = dict.fromkeys(FINDINGS, BLANK)
    for name, code in (stated for clause in parts for stated in label_clause(clause, language)):
        if RANK[code] > RANK[codes[name]]:
            codes[name] = code

    # "No finding" is what a report with normal statements and without any finding says.
    found = any(codes[name] in (PRESENT, UNCERTAIN) for name in FINDINGS[:-1] if name != "support devices")
    normal = ABSENT in codes.values() or any(QUIET[language].search(clause) for clause in parts)
    if normal and not found and codes["support devices"] != PRESENT:
        codes["no finding"] = PRESENT
    return [codes[name] for name in FINDINGS]


def positives(texts) -> list[list[int]]:
    """Return (N, 14) rows with 1 where a report states a finding as present."""
    return [[int(code == PRESENT) for code in label_report(text)] for text in texts]


class CheXbert:
    """The published CheXbert labeler (BERT, 13 heads of 4 classes and one of 2), to be called like
    `positives`.

    weights: its file chexbert.pth. bert: local folder with configuration and tokenizer of bert-base-uncased.
    Texts are cut at 512 tokens.
    """

    def __init__(self, weights, bert):
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        from common.weights import read_weights

        try:
            config = AutoConfig.from_pretrained(bert)
            self.tokenizer = AutoTokenizer.from_pretrained(bert)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{bert}: not a folder with BERT's configuration and tokenizer ({str(error).splitlines()[0]})"
            ) from error
        self.bert = AutoModel.from_config(config, add_pooling_layer=True)
        # The order of the heads is that of FINDINGS.
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(config.hidden_size, 4 if i < 13 else 2) for i in range(14)
        )
        tensors = {
            key: value for key, value in read_weights(weights).items() if not key.endswith("position_ids")
        }
        module = torch.nn.ModuleDict({"bert": self.bert, "linear_heads": self.heads})
        missing, unexpected = module.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise UserError(
                f"{weights}: not CheXbert weights ({len(missing)} tensors missing, {len(unexpected)} "
                "unexpected)"
            )
        module.eval()

    def __call__(self, texts, batch_size: int = 16) -> list[list[int]]:
        import torch

        rows = []
        with torch.no_grad():
            for start in range(0, len(texts), batch_size):
                cleaned = [
                    re.sub(r"\s+", " ", text).strip() or "." for text in texts[start : start + batch_size]
                ]
                batch = self.tokenizer(
                    cleaned, padding=True, truncation=True, max_length=512, return_tensors="pt"
                )
                first = self.bert(**batch).last_hidden_state[:, 0]
                chosen = torch.stack([head(first).argmax(-1) for head in self.heads], dim=1)
                rows += (chosen == 1).int().tolist()
        return rows
