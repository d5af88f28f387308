"""Ground words: given phrases, the words of a given text, or an answer that the base writes itself.

    grounder = Grounder.load(config, head)
    result = grounder.ground(image, phrases=["a red car"])       # masks, boxes, rle, scores
    result = grounder.ground(image, text="A man beside a car.")  # noun phrases of the text
    result = grounder.converse(image, "What do you see?")        # answer and the masks of its noun phrases

Upstream: scripts/demo/grounded_conversation.py (DeepSeek-VL only, asks at the terminal for every phrase).
Here the answer is generated with SDPA and read in one teacher-forced pass afterwards: the same rows, without
keeping all attention.
"""

import re
from os.path import commonprefix

import torch
import torch.nn as nn
from accelerate import Accelerator

from common.errors import UserError
from common.weights import read_weights
from flmm.build import load_trained
from flmm.data.phrases import cut
from flmm.data.samples import SampleBuilder, caption_of_phrases, encode_rle
from flmm.data.transforms import as_picture
from flmm.evaluation import binary_masks
from flmm.models.calibration import Calibration, phrase_features
from flmm.models.flmm import extract
from flmm.models.mask_head.mask_refiner import mask_to_box

PRONOUNS = set("it this that those these them he she you i they me her him a what which whose who".split())
# words that a noun phrase does not cross, for texts in English when spaCy is not installed
BREAKS = set(
    """is are was were be been being has have had do does did can could will would may might must and or but
    while as if then than so because with without in on at by of to from into onto over under above below near
    behind beside between through across around against for about up down out off along toward towards during
    there here not no also just very sits stands sitting standing lies lying holds holding wears wearing looks
    looking shows showing plays playing walks walking rides riding next it he she they we you i this that
    these those which who whose what where when how his""".split()
)


def process_noun_chunks(chunks, words=str.split):
    """Noun chunks worth grounding, in the order given: no "image", no lone pronoun, none repeated or with all
    its `words` inside a longer one."""
    kept = {c: words(c) for c in chunks if "image" not in c.lower() and c.lower() not in PRONOUNS}

    def inside(short, long):
        starts = range(len(long) - len(short) + 1)
        return len(short) < len(long) and any(long[at : at + len(short)] == short for at in starts)

    return [c for c, short in kept.items() if not any(inside(short, long) for long in kept.values())]


def find_interval(intervals, index):
    """Number of the half-open interval [start, end) that holds `index`; len(intervals) behind the last
    one."""
    return next((i for i, (start, end) in enumerate(intervals) if start <= index < end), len(intervals))


PICTURES = {"图", "图片", "图像", "照片", "画面"}  # the picture itself, as "image" in English
CHINESE = re.compile(r"[\u4e00-\u9fff]")
WORD = re.compile(r"[^\s.,;:!?()\[\]{}\"“”„«»…—–]+")
# Markdown around words: headings, list marks and quotes at the start of a line, emphasis and code anywhere
MARKDOWN = re.compile(r"^\s*(?:#+|[-*+>]|\d+[.)])\s+|[*_`|]+", re.MULTILINE)


def noun_phrases(text):
    """Noun phrases of a text, as they stand in it."""
    return [text[start:end] for start, end in noun_spans(text)]


def noun_spans(text):
    """Places [(start, end)] of the noun phrases of a text: of Chinese by jieba, of English by spaCy's
    en_core_web_sm where it is installed, else runs of words between BREAKS. Marks of Markdown end a phrase.
    A phrase is where it was found, and is never looked for again: "the car" begins "the carpet", too."""
    chinese, words = CHINESE.search(text), str.split
    text = MARKDOWN.sub(lambda found: ("。" if chinese else "\n") * len(found[0]), text)
    if chinese:
        import jieba

        spans, words = chinese_spans(text), jieba.lcut
    else:
        try:
            import spacy

            chunks = spacy.load("en_core_web_sm")(text).noun_chunks
            spans = [(c.start_char, c.end_char) for c in chunks]
        except (ImportError, OSError):
            spans = runs_between_breaks(text)
    places = {text[start:end]: (start, end) for start, end in reversed(spans)}  # the first of each
    return sorted(places[chunk] for chunk in process_noun_chunks(places, words))


def chinese_spans(text):
    """Runs of a Chinese text that end with a noun: nouns, adjectives and the 的 between them (jieba's
    tags)."""
    import jieba.posseg

    spans, run, at = [], [], 0  # run: (first letter of the tag, start, end) of each word
    for word, kind in [*jieba.posseg.cut(text), ("", "x")]:
        start, at = at, at + len(word)
        if kind[0] in "anb" or kind == "vn" or word == "的" and run:
            run.append(("n" if kind == "vn" else kind[0], start, at))
            continue
        while run and run[-1][0] != "n":  # a trailing 的 or adjective belongs to no noun
            run.pop()
        if run and text[run[0][1] : run[-1][2]] not in PICTURES:
            spans.append((run[0][1], run[-1][2]))
        run = []
    return spans


def runs_between_breaks(text):
    """Runs of words of an English text between BREAKS, articles and marks of punctuation."""
    spans, run, articles = [], [], ("a", "an", "the")
    for word in [*WORD.finditer(text), None]:  # the last one closes the last run
        name = word[0].lower() if word else ""
        breaks = name in BREAKS or not any(letter.isalnum() for letter in name)
        gap = text[run[-1].end() : word.start()] if run and word else ""
        if run and (breaks or name in articles or "\n" in gap or gap.strip()):
            if len(run) > 1 or run[0][0].lower() not in articles:
                spans.append((run[0].start(), run[-1].end()))
            run = []
        if not breaks:
            run.append(word)
    return spans


class KeywordSelector(nn.Module):
    """Which words of an answer deserve a mask, read from the base's hidden states (paper, section on the
    keyword selector).

    A linear map of the layer-averaged hidden state (d -> 1), sigmoid, threshold 0.3; neighbours above it form
    one phrase.
    """

    threshold = 0.3

    def __init__(self, num_layers, hidden_size):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(num_layers))
        self.linear = nn.Linear(hidden_size, 1)

    def forward(self, hidden_states):
        """(L, T, d) -> logits (T,)."""
        weights = self.layer_weights.softmax(0)
        return self.linear(torch.einsum("l,ltd->td", weights, hidden_states.float()))[:, 0]

    def spans(self, hidden_states):
        """(L, T, d) -> token spans [(start, end)]."""
        return runs((self(hidden_states).sigmoid() > self.threshold).tolist())


def runs(flags):
    """[(start, end)] of the runs of True."""
    out, start = [], None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        if not flag and start is not None:
            out, start = [*out, (start, i)], None
    return out


class Grounder:
    """Base, head and SAM together, ready for pictures. SAM encodes a picture once for as many turns as it
    stays."""

    def __init__(self, base, head, sam_encoder, selector=None, calibration=None):
        self.base, self.head, self.sam_encoder, self.selector = base, head.eval(), sam_encoder, selector
        self.calibration = calibration
        self.builder = SampleBuilder.of(base, sam_encoder)

    @classmethod
    def load(cls, config, head_path, selector_path=None, device=None):
        """config: dictionary of read_config. head_path, selector_path: weight files; calibration.json in the
        head's folder is taken along. device: accelerate's choice by default."""
        # What costs little is read before the base is loaded.
        device, selector = device or Accelerator().device, None
        calibration = Calibration.beside(head_path)
        words = read_weights(selector_path) if selector_path else None
        base, head, encoder, _ = load_trained(config, head_path, device)
        if words is not None:
            selector = KeywordSelector(base.num_layers, base.hidden_size).to(device)
            wanted, given = (
                {k: tuple(v.shape) for k, v in d.items()} for d in (selector.state_dict(), words)
            )
            if given != wanted:
                raise UserError(f"{selector_path}: is no selector of this base; train one on it")
            selector.load_state_dict(words)
        return cls(base, head, encoder, selector, calibration)

    @torch.no_grad()
    def _masks(self, image, sample, texts):
        """Result for a sample whose mask_ids name the phrases `texts`."""
        [feature] = extract(self.base, self.sam_encoder, [sample], likelihood=True)

        # Of a large picture only the masks are kept, and each phrase's logits are let go.
        size = (image.height, image.width)
        [output] = self.head([feature], finish=lambda logits: binary_masks(logits, size).cpu())
        coarse = binary_masks(output["pred_masks"], size).cpu()
        masks = coarse if output["sam_pred_masks"] is None else output["sam_pred_masks"]
        numbers, scores = phrase_features(feature, output), output["scores"]
        presence = numbers[:, 0].exp()  # of one word of the phrase: it orders phrases, and is no probability
        if self.calibration is not None:
            presence, scores = self.calibration(numbers)
        return {
            "phrases": texts,
            "masks": masks.numpy(),
            "coarse_masks": coarse.numpy(),
            # x0, y0, x1, y1 in pixels; None: nothing found
            "boxes": [mask_to_box(m) if m.any() else None for m in masks],
            "rle": [encode_rle(m.numpy()) for m in masks],
            "scores": [round(float(s), 4) for s in scores],
            "presence": [float(p) for p in presence],
            "calibrated": self.calibration is not None,
        }

    def ground(self, image, phrases=None, text=None):
        """Masks for given phrases (one, or a list), or for the noun phrases of `text` in its place.

        image: a path, a PIL picture or an array, see `as_picture`. Returns {"phrases", "masks" (n, H, W)
        bool, "coarse_masks", "boxes", "rle", "scores", "presence", "calibrated"}: with a calibration beside
        the head, the IoU to expect and the probability that the thing is there; without one, SAM's predicted
        IoU and the base's own probability of a word of the phrase, which is higher for what is there and
        means no more than that. Raises UserError for an empty phrase or a text without any noun phrase.
        """
        if None not in (phrases, text):
            raise UserError("both phrases and a text are given; leave one of them out")
        if phrases is None:
            if not (spans := noun_spans(text or "")):
                raise UserError(f"no noun phrase in {text!r}; give the phrases themselves")
            pieces = cut(text, spans)
            phrases = [piece for piece, k in pieces if k >= 0]
        else:
            phrases = [phrases] if isinstance(phrases, str) else list(phrases)
            pieces = caption_of_phrases(phrases, self.base.lead)
        if wrong := [p for p in phrases if not isinstance(p, str)]:
            raise UserError(f"phrases hold {wrong[0]!r}, which is no text; write the words to look for")
        if not phrases or any(not p.strip() for p in phrases):
            raise UserError("an empty phrase cannot be grounded; write the words to look for")
        image = as_picture(image)
        return self._masks(image, self.builder({"image": image, "pieces": pieces}), phrases)

    def converse(self, image, question=None, max_new_tokens=128, history=(), look=0):
        """Ask, answer, ground: {"answer", and the result of `ground` for the phrases of the answer}.

        image: a picture as `ground` takes it, or a list of them that the base sees in this order; the masks
        are of that with the number `look`. history: [(question, answer)] of earlier turns about them. Phrases
        come from the keyword selector if one is loaded, else from noun_phrases; without any the whole answer
        counts.
        """
        images = [as_picture(one) for one in (image if isinstance(image, (list, tuple)) else [image])]
        pictures, image = [{"image": one, **self.base.image_processor(one)} for one in images], images[look]
        texts = [""] * (len(images) - 1) + [self.base.question if question is None else question]
        sample = {
            "input_ids": torch.tensor(self.base.encode_prompt(texts, history)),
            "file_name": "picture",
            **pictures[look],
            "pictures": pictures,
            "look": look,
        }
        ids, prompt = self.base.generate(sample, max_new_tokens), sample["input_ids"]
        if not ids:
            raise UserError("the base answered nothing; ask another question")
        sample["input_ids"] = torch.cat([prompt, torch.tensor(ids)])
        if self.selector is not None:
            probe = {**sample, "mask_ids": torch.cat([torch.full_like(prompt, -1), torch.arange(len(ids))])}
            spans = self.selector.spans(self.base([probe])[0]["hidden_states"])
        else:
            spans = spans_of_noun_phrases(self.base.tokenizer, ids)
        spans = spans or [(0, len(ids))]
        mask_ids = torch.full((len(ids),), -1)
        for k, (start, end) in enumerate(spans):
            mask_ids[start:end] = k
        sample["mask_ids"] = torch.cat([torch.full_like(prompt, -1), mask_ids])
        decode = self.base.tokenizer.decode
        texts = [decode(ids[start:end]).strip() for start, end in spans]
        return {"answer": decode(ids).strip(), **self._masks(image, sample, texts)}


def spans_of_noun_phrases(tokenizer, ids):
    """Token spans [(start, end)] of the noun phrases of an answer, which is given as ids; found by the text
    of the ids themselves, because re-tokenising is no identity."""
    answer = tokenizer.decode(ids)
    # how much of the answer stands before each token; of the first bytes of a character nothing does yet
    said = [len(commonprefix([tokenizer.decode(ids[:i]), answer])) for i in range(len(ids) + 1)]
    intervals, spans, last = list(zip(said, said[1:])), [], 0
    for start, end in noun_spans(answer):
        first, final = (find_interval(intervals, at) for at in (start, end - 1))
        first = said.index(said[first])  # with the bytes that its first character begins with
        if first >= last:
            spans.append((first, final + 1))
            last = final + 1
    return spans


def answer_then_ground(base, sample, max_new_tokens=32):
    """Reasoning segmentation: the base answers the query (the sample's only phrase), and the answer is what
    is grounded.

    Returns a copy of `sample` whose phrase is the answer, and the answer's text; the query itself is kept
    where the base is silent.
    """
    [info] = sample["mask_infos"]
    prompt = torch.tensor(base.encode_prompt(info["text"].strip()))
    ids = torch.tensor(base.generate({**sample, "input_ids": prompt}, max_new_tokens), dtype=torch.long)
    if not len(ids):
        return sample, ""
    mask_ids = torch.cat([torch.full_like(prompt, -1), torch.zeros_like(ids)])
    answered = {**sample, "input_ids": torch.cat([prompt, ids]), "mask_ids": mask_ids}
    return answered, base.tokenizer.decode(ids).strip()
