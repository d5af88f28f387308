"""Plain phrase annotations, ReasonSeg, and data sets put together.

PhraseDataset reads folders with images/, masks/<id>.png (pixel = segment id) and annotations.json: images
[{id, file, captions, segments [{id, category, isthing}], phrases [{caption, span [start, end), text,
segment_ids}]}].
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import ConcatDataset, Dataset

from common.errors import UserError
from common.files import inside, read_json
from flmm.data.samples import caption_of_phrases
from flmm.data.transforms import load_image, load_segments

PHRASES = {
    "images": [
        {
            "id": (int, str),
            "file": str,
            "captions?": [str],
            "segments": [{"id": int, "isthing": (int, bool)}],
            "phrases": [{"caption": int, "span?": [int], "text": str, "segment_ids": [int]}],
        }
    ]
}
REASONSEG = {"text": (str, list), "shapes": [{"label": str, "points": [[float]]}]}


class PhraseDataset(Dataset):
    """One record per picture and caption with at least one phrase; without captions, one per picture.

    limit: only the first so many pictures that have phrases. captions: at most so many captions of each.
    """

    def __init__(self, folder, build=None, limit=None, captions=None):
        self.folder, self.build = Path(folder), build
        source = self.folder / "annotations.json"
        self.items = []
        for image in read_json(source, PHRASES)["images"]:
            if limit is not None and len({i["id"] for i, _, _ in self.items}) == limit:
                break
            known, texts = {s["id"] for s in image["segments"]}, image.get("captions") or []
            for p in image["phrases"]:
                where = f"{source}: image {image['id']}: phrase {p['text']!r}"
                if not p["segment_ids"] or not known.issuperset(p["segment_ids"]):
                    raise UserError(f"{where} has unknown segments")
                if p["caption"] >= 0 and not (p["caption"] < len(texts) and len(p.get("span") or []) == 2):
                    raise UserError(f"{where} needs its caption {p['caption']} and a span [start, end)")
            for caption in sorted({p["caption"] for p in image["phrases"]})[:captions]:
                phrases = [p for p in image["phrases"] if p["caption"] == caption]
                if caption >= 0:
                    phrases.sort(key=lambda p: p["span"][0])
                    phrases = [
                        p
                        for i, p in enumerate(phrases)
                        if i == 0 or p["span"][0] >= phrases[i - 1]["span"][1]
                    ]
                self.items.append((image, caption, phrases))
        if not self.items:
            raise UserError(f"{source}: no picture has a phrase")

    def __len__(self):
        return len(self.items)

    def record(self, index):
        info, caption, phrases = self.items[index]
        path = inside(self.folder / "images", info["file"])
        segments = load_segments(self.folder / "masks" / (Path(info["file"]).stem + ".png"))
        image = load_image(path, (segments.shape[1], segments.shape[0]))
        kinds = {s["id"]: bool(s["isthing"]) for s in info["segments"]}
        masks, infos = [], []
        for p in phrases:
            masks.append(np.isin(segments, p["segment_ids"]))
            infos.append(
                {
                    "plural": len(p["segment_ids"]) > 1,
                    "text": p["text"],
                    "isthing": len(p["segment_ids"]) > 1 or kinds[p["segment_ids"][0]],
                }
            )
        pieces = caption_of_phrases([p["text"] for p in phrases])
        if (
            caption >= 0
        ):  # cut the caption at the spans, dropping the blanks between pieces as PNG captions do
            text, pieces, at = info["captions"][caption], [], 0
            for k, p in enumerate(phrases):
                start, end = p["span"]
                pieces += [(text[at:start].strip(), -1), (text[start:end], k)]
                at = end
            pieces = [(t, k) for t, k in [*pieces, (text[at:].strip(), -1)] if t or k >= 0]
        return {
            "image": image,
            "pieces": pieces,
            "masks": np.stack(masks).astype(np.uint8),
            "mask_infos": infos,
            "file_name": info["file"],
        }

    def __getitem__(self, index):
        return self.build(self.record(index))


class ReasonSegDataset(Dataset):
    """ReasonSeg: <name>.jpg beside <name>.json {"text": [...], "shapes": [{"label", "points"}]}; one record
    per query.

    Pixels labelled "ignore" are in record["ignore"] (H, W) bool and count neither as hit nor as miss.
    """

    def __init__(self, folder, build=None):
        self.build, self.items = build, []
        for path in sorted(Path(folder).glob("*.json")):
            content = read_json(path, REASONSEG)
            texts = content["text"]
            self.items += [(path, content, text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not self.items:
            raise UserError(f"{folder}: no ReasonSeg annotation (*.json)")

    def __len__(self):
        return len(self.items)

    def record(self, index):
        path, content, text = self.items[index]
        image = load_image(path.with_suffix(".jpg"))
        layers = {"target": Image.new("1", image.size), "ignore": Image.new("1", image.size)}
        for shape in content["shapes"]:
            kind = "ignore" if "ignore" in shape["label"].lower() else "target"
            if "flag" not in shape["label"].lower() and len(shape["points"]) > 2:
                ImageDraw.Draw(layers[kind]).polygon([tuple(p) for p in shape["points"]], fill=1)
        ignore = np.array(layers["ignore"])
        return {
            "image": image,
            "pieces": caption_of_phrases([text]),
            "file_name": path.with_suffix(".jpg").name,
            "masks": (np.asarray(layers["target"]) & ~ignore)[None].astype(np.uint8),
            "ignore": ignore,
            "mask_infos": [{"plural": False, "isthing": True, "text": text}],
        }

    def __getitem__(self, index):
        record = self.record(index)
        return {**self.build(record), "ignore": record["ignore"]}


class MixedData(ConcatDataset):
    """Several data sets as one, which tells each of them the epoch."""

    def set_epoch(self, epoch):
        for part in self.datasets:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
