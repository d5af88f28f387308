"""Plain phrase annotations, ReasonSeg, and data sets put together.

PhraseDataset reads folders with images/, masks/ (PNGs named as the pictures, pixel = segment id) and
annotations.json: images [{id, file, captions, segments [{id, category, isthing}], phrases [{caption, span
[start, end), text, segment_ids}]}].
"""

import json
from bisect import bisect_right
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from common.errors import UserError
from common.files import check, inside, read_json, reading
from flmm.data.polygons import polygon
from flmm.data.samples import FAR, caption_of_phrases
from flmm.data.skip import Bad
from flmm.data.transforms import load_image, load_segments

PHRASES = {
    "id": (int, str),
    "file": str,
    "captions?": [str],
    "segments": [{"id": int, "isthing": (int, bool)}],
    "phrases": [{"caption": int, "span?": [int], "text": str, "segment_ids": [int]}],
}
REASONSEG = {"text": (str, list), "shapes": [{"label": str, "points": [[float]]}]}


class PhraseDataset(Dataset):
    """One record per picture and caption with at least one phrase; without captions, one per picture.

    limit: only the first so many pictures that have phrases. captions: at most so many captions of each.
    fifths: only pictures whose number in the file, modulo five, is one of these.
    """

    def __init__(self, folder, build=None, limit=None, captions=None, fifths=None, bad=None):
        self.folder, self.build, self.bad = Path(folder), build, bad or Bad()
        source = self.folder / "annotations.json"
        self.items, pictures = [], 0
        for number, image in enumerate(read_json(source, {"images": [dict]})["images"]):
            if pictures == limit:
                break
            if fifths is not None and number % 5 not in fifths:
                continue
            with self.bad.collect():
                check(image, PHRASES, source, f"images[{number}]")
                found = self.captions_of(image, source, captions)
                self.items, pictures = self.items + found, pictures + bool(found)
        if not self.items:
            raise UserError(f"{source}: no picture has a phrase")

    @staticmethod
    def captions_of(image, source, captions):
        """[(picture, caption number, its phrases in order)] of a picture; UserError where its annotation
        contradicts itself."""
        known, texts = {s["id"] for s in image["segments"]}, image.get("captions") or []
        for p in image["phrases"]:
            where = f"{source}: image {image['id']}: phrase {p['text']!r}"
            if not p["segment_ids"] or not known.issuperset(p["segment_ids"]):
                raise UserError(f"{where} has unknown segments")
            if p["caption"] >= 0:
                text, span = "".join(texts[p["caption"] :][:1]), p.get("span") or []
                if len(span) != 2 or min(span) < 0 or not text[slice(*span)].strip():
                    raise UserError(
                        f"{where} needs its caption {p['caption']} and a span [start, end) of words in it"
                    )
            elif not p["text"].strip():
                raise UserError(f"{where} has no words")
        items = []
        for caption in sorted({p["caption"] for p in image["phrases"]})[:captions]:
            phrases = [p for p in image["phrases"] if p["caption"] == caption]
            if caption >= 0:
                phrases = without_overlaps(phrases)
            items.append((image, caption, phrases))
        return items

    def __len__(self):
        return len(self.items)

    def record(self, index):
        info, caption, phrases = self.items[index]
        path = inside(self.folder / "images", info["file"])
        # a picture's whole name: those of two folders may be called alike
        segments = load_segments(inside(self.folder / "masks", info["file"]).with_suffix(".png"))
        image = load_image(path, (segments.shape[1], segments.shape[0]))
        kinds = {s["id"]: bool(s["isthing"]) for s in info["segments"]}
        masks, infos = [], []
        for phrase in phrases:
            ids = phrase["segment_ids"]
            masks.append(np.isin(segments, ids))
            plural = len(ids) > 1
            infos.append({"plural": plural, "text": phrase["text"], "isthing": plural or kinds[ids[0]]})
        if caption >= 0:
            pieces = cut(info["captions"][caption], [phrase["span"] for phrase in phrases])
        else:
            pieces = caption_of_phrases([phrase["text"] for phrase in phrases])
        return {
            "image": image,
            "pieces": pieces,
            "masks": np.stack(masks).astype(np.uint8),
            "mask_infos": infos,
            "file_name": info["file"],
        }

    def __getitem__(self, index):
        return self.build(self.record(index))


def without_overlaps(phrases):
    """Phrases in the order of their spans; of two that overlap the first one counts."""
    kept = []
    for phrase in sorted(phrases, key=lambda phrase: phrase["span"][0]):
        if not kept or phrase["span"][0] >= kept[-1]["span"][1]:
            kept.append(phrase)
    return kept


def cut(text, spans):
    """A caption cut at the spans of its phrases: [(text, k)], k = -1 between them; the blanks between pieces
    are dropped as in PNG's captions."""
    pieces, at = [], 0
    for k, (start, end) in enumerate(spans):
        pieces += [(text[at:start].strip(), -1), (text[start:end], k)]
        at = end
    return [(piece, k) for piece, k in [*pieces, (text[at:].strip(), -1)] if piece or k >= 0]


def read_reasonseg(path):
    """Content of a ReasonSeg annotation, with or without a byte order mark; where it is not UTF-8 it is
    cp1252, as in some published files."""
    with reading(path, "JSON file"):
        content = Path(path).read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252")
        content = json.loads(text)
    check(content, REASONSEG, path)
    return content


class ReasonSegDataset(Dataset):
    """ReasonSeg as LISA scores it: <name>.jpg beside <name>.json {"text": [...], "shapes": [{"label",
    "points"}]}; one record per picture, with its first wording.

    wordings: "first", or "all" for a record per wording. Polygons are painted by falling area, so that of two
    the smaller wins. Pixels labelled "ignore" are in record["ignore"] (H, W) bool and count neither as hit
    nor as miss. Pictures are read upright, as cv2.imread reads them there. bad: see PNGDataset.
    """

    def __init__(self, folder, build=None, wordings="first", bad=None):
        if wordings not in ("first", "all"):
            raise UserError(f"wordings is {wordings!r}, expected first or all")
        self.build, self.items, self.bad = build, [], bad or Bad()
        for path in sorted(Path(folder).glob("*.json")):
            with self.bad.collect():
                content = read_reasonseg(path)
                texts = content["text"] if isinstance(content["text"], list) else [content["text"]]
                if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                    raise UserError(f"{path}: text is no list of questions; write one at least")
                points = [p for shape in content["shapes"] for p in shape["points"]]
                if not all(len(p) == 2 and all(abs(v) <= FAR for v in p) for p in points):
                    raise UserError(f"{path}: shapes has points that are no pair x, y in pixels")
                texts = texts[:1] if wordings == "first" else texts
                self.items += [(path, content, text) for text in texts]
        if not self.items:
            raise UserError(f"{folder}: no ReasonSeg annotation (*.json)")

    def __len__(self):
        return len(self.items)

    def record(self, index):
        path, content, text = self.items[index]
        image = load_image(path.with_suffix(".jpg"))
        # 1 is the target, 2 is ignored: the order decides where two overlap
        shapes = [s for s in content["shapes"] if s["label"].lower() != "flag" and s["points"]]
        drawn = [polygon(s["points"], image.height, image.width) for s in shapes]
        labels = np.zeros((image.height, image.width), np.uint8)
        for at in np.argsort([int(mask.sum()) for mask in drawn])[::-1]:
            labels[drawn[at]] = 2 if "ignore" in shapes[at]["label"].lower() else 1
        return {
            "image": image,
            "pieces": caption_of_phrases([text]),
            "file_name": path.with_suffix(".jpg").name,
            "masks": (labels == 1)[None].astype(np.uint8),
            "ignore": labels == 2,
            "mask_infos": [{"plural": False, "isthing": True, "text": text}],
        }

    def __getitem__(self, index):
        record = self.record(index)
        return {**self.build(record), "ignore": record["ignore"]}


class MixedData(ConcatDataset):
    """Several data sets as one, which tells each of them the epoch."""

    def record(self, index):
        part = bisect_right(self.cumulative_sizes, index)
        return self.datasets[part].record(index - [0, *self.cumulative_sizes][part])

    def set_epoch(self, epoch):
        for part in self.datasets:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
