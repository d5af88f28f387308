"""The one place that writes prompts, in English and Chinese, and turns them into token ids and labels.

The text is <image><image0>...<image31></image>, one sentence for each of the 14 findings, and the guide; in
training one space, the report and eos follow. Upstream wrote the Chinese sentences differently in training
and test, and in its English test in Chinese.
"""

import re

import torch

from common.errors import UserError

# The findings, in the order of every list and table of them, and their Chinese names.
NAMES = {
    "enlarged cardiomediastinum": "纵隔心影增大",
    "cardiomegaly": "心脏肥大",
    "lung opacity": "肺部阴影",
    "lung lesion": "肺部病变",
    "edema": "水肿",
    "consolidation": "实变",
    "pneumonia": "肺炎",
    "atelectasis": "肺不张",
    "pneumothorax": "气胸",
    "pleural effusion": "胸腔积液",
    "pleural other": "胸膜其他病变",
    "fracture": "骨折",
    "support devices": "支撑装置",
    "no finding": "未见异常",
}
FINDINGS, FINDINGS_CN = tuple(NAMES), tuple(NAMES.values())
# What lies on one side; the heart, the mediastinum and both hila do not.
MIDDLE = ("enlarged cardiomediastinum", "cardiomegaly", "edema", "support devices", "no finding")
LATERAL = tuple(name for name in FINDINGS if name not in MIDDLE)
SIDES, PLACES = ("right", "left"), ("upper", "middle", "lower")
PLACES_CN = {"right": "右", "left": "左", "upper": "上", "middle": "中", "lower": "下"}
COLUMNS = tuple(name.replace(" ", "_") for name in FINDINGS)  # of the label csv
GUIDES = {"en": "Imaging findings:", "cn": "影像所见："}
LANGUAGES = tuple(GUIDES)
LAYOUTS = ("all", "positives")  # which findings the prompt has a sentence for
# openPangu thinks from the one to the other before it answers.
THINKING, SPEAKING = "[unused16]", "[unused17]"


def without_sides(report: str) -> str:
    """Return a report whose words for left and right are replaced, for a scan whose sides are unknown; the
    middle lobe and the lingula name a side too."""
    words = r"\b(?:(?:right |left )?(?:middle lobe|lingul\w+)|right|left|[RL]t|[RL][UML]L)\b"
    report = re.sub(words, "[side unknown]", report, flags=re.I)
    # Behind a number 左右 means "about".
    words = r"((?<=[\da-z米度升])左右)|左右|[左右][侧側]?|舌[叶段葉]|中[叶葉]"
    return re.sub(words, lambda word: word[1] or "（侧别不明）", report, flags=re.I)


def status_sentence(finding: int, status, language: str, where=()) -> str:
    """Return the prompt's sentence for a finding.

    finding: its index in FINDINGS. status: 1 = present. where: (side, place) of a finding that is present;
    upstream names none.
    """
    words = [word for word in where if word] if status else []
    if language == "en":
        location = f", {' '.join(words)}" if words else ""
        return f'The "{FINDINGS[finding]}" is {"positive" if status else "negative"}{location}. '
    location = "，" + "".join(PLACES_CN[word] for word in words) if words else ""
    return f'"{FINDINGS_CN[finding]}" ： {"存在" if status else "不存在"}{location}。 '


def status_text(statuses, language: str, places: dict | None = None, layout: str = "all") -> str:
    """Return the sentences of 14 statuses (1 = present), then the guide.

    places: {finding: (side, place)}. layout: "all" has a sentence for each finding, as upstream; "positives"
    leaves out those of absent findings, which are most of a sample.
    """
    sentences = [
        status_sentence(c, status, language, (places or {}).get(FINDINGS[c], ()))
        for c, status in enumerate(statuses)
        if status or layout == "all"
    ]
    return "".join(sentences) + GUIDES[language]


def prompt_phrases(language: str) -> list[str]:
    """Return every sentence of a prompt and the guide; the built-in tokenizer keeps each as one token."""
    plain = [status_sentence(c, status, language) for c in range(len(FINDINGS)) for status in (0, 1)]
    placed = [
        status_sentence(FINDINGS.index(name), 1, language, (side, place))
        for name in LATERAL
        for side in SIDES
        for place in PLACES
    ]
    return [*plain, *placed, GUIDES[language]]


def pad_texts(samples: list[dict], pad_id: int = 0, left: bool = False, length: int | None = None) -> dict:
    """Join samples of `ReportText.sample` to tensors (B, longest) or (B, length); `left` puts the padding
    before the text, for generation."""
    width = length or max(len(sample["lang_x"]) for sample in samples)
    fills = {"lang_x": pad_id, "attention_mask": 0, "labels": -100, "loss_reweight": 0.0}
    out = {}
    for key in samples[0]:
        rows = []
        for sample in samples:
            padding = [fills[key]] * (width - len(sample[key]))
            rows.append(padding + sample[key] if left else sample[key] + padding)
        out[key] = torch.tensor(rows)
    return out


class ReportText:
    """Turn prompts and reports into token ids, and generated ids into text.

    tokenizer: that of the language model; <image>, </image> and <image0>... are added to it. num_embeddings:
    rows V of the word table. Image tokens get the ids V, V+1 and V+2+j that MyEmbedding expects, whatever ids
    the tokenizer gave them: they are found by name. image_tokens: visual tokens of a volume. volumes: volumes
    in a prompt. skip_unknown: leave unknown words out of the labels, as upstream does because openPangu's pad
    token is its unknown token. key_weight: weight in the loss of the words that name side and place
    (`loss_reweight`; upstream intends 3 and leaves its list of words empty).
    """

    def __init__(
        self,
        tokenizer,
        num_embeddings: int,
        image_tokens: int = 32,
        volumes: int = 1,
        language: str = "en",
        max_length: int = 2048,
        skip_unknown: bool = False,
        key_weight: float = 1.0,
        layout: str = "all",
    ):
        if language not in LANGUAGES:
            raise UserError(f"--language {language}: choose from {', '.join(LANGUAGES)}")
        self.tokenizer, self.num_embeddings, self.language = tokenizer, num_embeddings, language
        self.max_length, self.skip_unknown, self.layout = max_length, skip_unknown, layout
        self.key_weight, self.weights = key_weight, {}
        # How often a report did not fit; shared memory, so that loader workers count too.
        self.cut = torch.zeros((), dtype=torch.int64).share_memory_()
        images = [f"<image{j}>" for j in range(image_tokens * volumes)]
        self.images = "".join(
            "<image>" + "".join(images[i : i + image_tokens]) + "</image>"
            for i in range(0, len(images), max(1, image_tokens))
        )
        names = ["<image>", "</image>", *images]
        words = len(tokenizer) - len(
            [name for name in tokenizer.get_added_vocab() if name.strip("</>0123456789") == "image"]
        )
        if words > num_embeddings:
            raise UserError(
                f"the tokenizer has {words} tokens, the language model only {num_embeddings} rows; "
                "take the tokenizer that belongs to the model (--tokenizer-path)"
            )
        tokenizer.add_tokens(names, special_tokens=True)
        self.rows = {
            tokenizer.convert_tokens_to_ids(name): num_embeddings + j for j, name in enumerate(names)
        }
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def prompt(self, statuses, places: dict | None = None) -> str:
        """Return the prompt's text: the image tokens, the status sentences and the guide."""
        return self.images + status_text(statuses, self.language, places, self.layout)

    def ids(self, text: str) -> list[int]:
        """Return token ids with bos in front; image tokens become row numbers of the embedding table."""
        return [self.rows.get(token, token) for token in self.tokenizer(text).input_ids]

    def sample(self, statuses, report: str | None = None, name: str = "", places: dict | None = None) -> dict:
        """Return lang_x, attention_mask and labels as lists; without a report, lang_x and attention_mask of
        the prompt alone.

        The eos after the report keeps attention mask 0, as upstream (nothing follows it). The labels cover
        the space, the report and eos. A report beyond max_length is cut and gets no eos, so that the model
        does not learn to stop in mid-sentence. name: the sample's name for the error message.
        """
        prompt = self.prompt(statuses, places)
        question = self.ids(prompt)
        if len(question) >= self.max_length:
            raise UserError(
                f"{name or 'sample'}: the prompt alone has {len(question)} tokens, max_length of the "
                f"configuration is {self.max_length}; raise it or lower the number of image tokens"
            )
        if report is None:
            return {"lang_x": question, "attention_mask": [1] * len(question)}
        ids = self.ids(prompt + " " + report.replace("•", ""))
        if len(ids) + 1 > self.max_length:
            self.cut += 1
            ids, mask = ids[: self.max_length], [1] * self.max_length
        else:
            mask = [1] * len(ids) + [0]
            ids = ids + [self.tokenizer.eos_token_id]
        labels = [
            -100 if i < len(question) or token >= self.num_embeddings else token
            for i, token in enumerate(ids)
        ]
        if self.skip_unknown:
            labels = [-100 if token == self.pad_id else token for token in labels]
        weighed = {"loss_reweight": [self.weight(label) for label in labels]} if self.key_weight != 1 else {}
        return {"lang_x": ids, "attention_mask": mask, "labels": labels, **weighed}

    def weight(self, label: int) -> float:
        """Return the weight of a label in the loss: 0 for -100, key_weight for a side or place, else 1."""
        if label not in self.weights:
            piece = self.tokenizer.decode([label]).strip() if label >= 0 else ""
            named = piece.lower() in (*SIDES, *PLACES) or any(word in piece for word in PLACES_CN.values())
            self.weights[label] = 0.0 if label < 0 else self.key_weight if named else 1.0
        return self.weights[label]

    def pad(self, samples: list[dict], left: bool = False, length: int | None = None) -> dict:
        """Join samples with `pad_texts`, with the tokenizer's pad token."""
        return pad_texts(samples, self.pad_id, left, length)

    def spoken(self, ids: list[int]) -> list[int]:
        """Return ids without what stands from THINKING to SPEAKING or to the end, and without these marks."""
        begin, end = (self.mark_id(mark) for mark in (THINKING, SPEAKING))
        out, thinking = [], False
        for token in ids:
            if token in (begin, end):
                thinking = token == begin
            elif not thinking:
                out.append(token)
        return out

    def mark_id(self, mark: str) -> int:
        """Return the id of a mark where the tokenizer has it as one token, else -1."""
        token = self.tokenizer.convert_tokens_to_ids(mark)
        unknown = token is None or token == self.tokenizer.unk_token_id
        return -1 if unknown else token

    def decode(self, ids) -> str:
        """Return generated ids as one line of text without special tokens, NUL and line breaks, and without
        the thinking that openPangu puts between two of them."""
        text = self.tokenizer.decode(self.spoken([int(token) for token in ids]), skip_special_tokens=True)
        # A model that has seen the marks as plain text may also write them so.
        text = re.sub(r"\[unused16\].*?(?:\[unused17\]|$)", " ", text, flags=re.S)
        text = re.sub(r"\[unused\d+\]", " ", text)
        return " ".join(text.replace("\0", " ").split())
