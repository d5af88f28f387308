"""The one place that writes prompts, for training and test, in English and Chinese, and turns them into ids and labels.

Text: <image><image0>...<image31></image>, one sentence for each of the 14 findings, the guide; in training one space, the
report and eos. Upstream wrote the Chinese sentences differently in training and test, and the test's English ones in
Chinese.
"""
import torch

from common.errors import UserError

FINDINGS = ("enlarged cardiomediastinum", "cardiomegaly", "lung opacity", "lung lesion", "edema", "consolidation",
            "pneumonia", "atelectasis", "pneumothorax", "pleural effusion", "pleural other", "fracture",
            "support devices", "no finding")
FINDINGS_CN = ("纵隔心影增大", "心脏肥大", "肺部阴影", "肺部病变", "水肿", "实变", "肺炎", "肺不张", "气胸", "胸腔积液",
               "胸膜其他病变", "骨折", "支撑装置", "未见异常")
COLUMNS = tuple(name.replace(" ", "_") for name in FINDINGS)  # of the label csv
GUIDES = {"en": "Imaging findings:", "cn": "影像所见："}
LANGUAGES = tuple(GUIDES)


def status_text(statuses, language: str) -> str:
    """14 statuses (1 = present) as sentences, then the guide."""
    if language == "en":
        said = [f'The "{name}" is {"positive" if status else "negative"}. ' for name, status in zip(FINDINGS, statuses)]
    else:
        said = [f'"{name}" ： {"存在" if status else "不存在"}。 ' for name, status in zip(FINDINGS_CN, statuses)]
    return "".join(said) + GUIDES[language]


class ReportText:
    """Prompts and reports as ids.

    tokenizer: of the language model; <image>, </image> and <image0>... are added to it. num_embeddings: rows V of the
    word table. Image tokens get the ids V, V+1 and V+2+j that MyEmbedding expects, whatever ids the tokenizer gave them:
    they are found by name. skip_unknown: upstream's labels, which leave unknown words out of the loss because openPangu's
    pad token is its unknown token.
    """

    def __init__(self, tokenizer, num_embeddings: int, image_tokens: int = 32, volumes: int = 1, language: str = "en",
                 max_length: int = 2048, skip_unknown: bool = False):
        if language not in LANGUAGES:
            raise UserError(f"--language {language}: choose from {', '.join(LANGUAGES)}")
        self.tokenizer, self.num_embeddings, self.language = tokenizer, num_embeddings, language
        self.max_length, self.skip_unknown = max_length, skip_unknown
        self.cut = 0  # reports that did not fit
        images = [f"<image{j}>" for j in range(image_tokens * volumes)]
        self.images = "".join("<image>" + "".join(images[i:i + image_tokens]) + "</image>"
                              for i in range(0, len(images), max(1, image_tokens)))
        names = ["<image>", "</image>", *images]
        words = len(tokenizer) - len([name for name in tokenizer.get_added_vocab() if name.strip("</>0123456789") == "image"])
        if words > num_embeddings:
            raise UserError(f"the tokenizer has {words} tokens, the language model only {num_embeddings} rows; "
                            "take the tokenizer that belongs to the model (--tokenizer-path)")
        tokenizer.add_tokens(names, special_tokens=True)
        self.rows = {tokenizer.convert_tokens_to_ids(name): num_embeddings + j for j, name in enumerate(names)}
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def prompt(self, statuses) -> str:
        return self.images + status_text(statuses, self.language)

    def ids(self, text: str) -> list[int]:
        """Token ids with bos; image tokens as row numbers of the embedding table."""
        return [self.rows.get(token, token) for token in self.tokenizer(text).input_ids]

    def sample(self, statuses, report: str | None = None, name: str = "") -> dict:
        """lang_x, attention_mask, labels as lists. Without a report: the prompt alone, for generation.

        The eos after the report keeps attention mask 0, as upstream (nothing follows it). Labels cover the space, the
        report and eos. A report beyond max_length is cut and gets no eos, so that nobody learns to stop in mid-sentence.
        """
        question = self.ids(self.prompt(statuses))
        if len(question) >= self.max_length:
            raise UserError(f"{name or 'sample'}: the prompt alone has {len(question)} tokens, --max-length is "
                            f"{self.max_length}; raise it or lower the number of image tokens")
        if report is None:
            return {"lang_x": question, "attention_mask": [1] * len(question)}
        ids = self.ids(self.prompt(statuses) + " " + report.replace("•", ""))
        if len(ids) + 1 > self.max_length:
            self.cut += 1
            ids, mask = ids[:self.max_length], [1] * self.max_length
        else:
            mask = [1] * len(ids) + [0]
            ids = ids + [self.tokenizer.eos_token_id]
        labels = [-100 if i < len(question) or token >= self.num_embeddings else token for i, token in enumerate(ids)]
        if self.skip_unknown:
            labels = [-100 if token == self.pad_id else token for token in labels]
        return {"lang_x": ids, "attention_mask": mask, "labels": labels}

    def pad(self, samples: list[dict], left: bool = False, length: int | None = None) -> dict:
        """Samples to tensors (B, longest) or (B, length); `left` puts the padding before the text, for generation."""
        width = length or max(len(sample["lang_x"]) for sample in samples)
        fill = {"lang_x": self.pad_id, "attention_mask": 0, "labels": -100}
        out = {}
        for key in samples[0]:
            rows = [[fill[key]] * (width - len(s[key])) for s in samples]
            out[key] = torch.tensor([pad + s[key] if left else s[key] + pad for s, pad in zip(samples, rows)])
        return out

    def decode(self, ids) -> str:
        """Generated ids to one line of text: special tokens, NUL and line breaks removed."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return " ".join(text.replace("\0", " ").split())
