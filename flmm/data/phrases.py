"""Plain phrase annotations, ReasonSeg, and data sets put together.

PhraseDataset reads folders with images/, masks/<id>.png (pixel = segment id) and annotations.json: images [{id, file,
captions, segments [{id, category, isthing}], phrases [{caption, span [start, end), text, segment_ids}]}].
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import ConcatDataset, Dataset

from common.errors import UserError
from flmm.data.samples import caption_of_phrases, read_json
from flmm.data.transforms import load_image


class PhraseDataset(Dataset):
    """One record per picture and caption with at least one phrase; without captions, one per picture.

    limit: only the first so many pictures that have phrases. captions: at most so many captions of each.
    """

    def __init__(self, folder, build=None, limit=None, captions=None):
        self.folder, self.build = Path(folder), build
        source = self.folder / "annotations.json"
        self.items = []
        for image in read_json(source, "phrase annotations").get("images", []):
            try:
                if limit is not None and len({i["id"] for i, _, _ in self.items}) == limit:
                    break
                for caption in sorted({p["caption"] for p in image["phrases"]})[:captions]:
                    phrases = [p for p in image["phrases"] if p["caption"] == caption]
                    if caption >= 0:
                        phrases.sort(key=lambda p: p["span"][0])
                        phrases = [p for i, p in enumerate(phrases) if i == 0 or p["span"][0] >= phrases[i - 1]["span"][1]]
                    self.items.append((image, caption, phrases))
            except (KeyError, TypeError, IndexError) as error:
                raise UserError(f"{source}: image {image.get('id')}: field {error} is missing or has the wrong form") from error
        if not self.items:
            raise UserError(f"{source}: no picture has a phrase")

    def __len__(self):
        return len(self.items)

    def record(self, index):
        info, caption, phrases = self.items[index]
        path = self.folder / "images" / info["file"]
        mask_path = self.folder / "masks" / (Path(info["file"]).stem + ".png")
        if not mask_path.is_file():
            raise UserError(f"{mask_path}: no such mask")
        with Image.open(mask_path) as opened:
            segments = np.asarray(opened)
        image = load_image(path, (segments.shape[1], segments.shape[0]))
        kinds = {s["id"]: bool(s["isthing"]) for s in info["segments"]}
        masks, infos = [], []
        for p in phrases:
            if not p["segment_ids"] or any(i not in kinds for i in p["segment_ids"]):
                raise UserError(f"{self.folder / 'annotations.json'}: image {info['id']}: phrase {p['text']!r} has unknown segments")
            masks.append(np.isin(segments, p["segment_ids"]))
            infos.append({"plural": len(p["segment_ids"]) > 1, "text": p["text"],
                          "isthing": len(p["segment_ids"]) > 1 or kinds[p["segment_ids"][0]]})
        pieces = caption_of_phrases([p["text"] for p in phrases])
        if caption >= 0:   # cut the caption at the spans, dropping the blanks between pieces as PNG captions do
            text, pieces, at = info["captions"][caption], [], 0
            for k, p in enumerate(phrases):
                start, end = p["span"]
                pieces += [(text[at:start].strip(), -1), (text[start:end], k)]
                at = end
            pieces = [(t, k) for t, k in [*pieces, (text[at:].strip(), -1)] if t or k >= 0]
        return {"image": image, "pieces": pieces, "masks": np.stack(masks).astype(np.uint8), "mask_infos": infos,
                "file_name": info["file"]}

    def __getitem__(self, index):
        return self.build(self.record(index))


class ReasonSegDataset(Dataset):
    """ReasonSeg: <name>.jpg beside <name>.json {"text": [...], "shapes": [{"label", "points"}]}; one record per query.

    Pixels labelled "ignore" are in record["ignore"] (H, W) bool and count neither as hit nor as miss.
    """

    def __init__(self, folder, build=None):
        self.build, self.items = build, []
        for path in sorted(Path(folder).glob("*.json")):
            content = read_json(path, "a ReasonSeg annotation")
            texts = content.get("text")
            if not texts or "shapes" not in content:
                raise UserError(f"{path}: fields text and shapes are needed")
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
        return {"image": image, "pieces": caption_of_phrases([text]), "file_name": path.with_suffix(".jpg").name,
                "masks": (np.asarray(layers["target"]) & ~ignore)[None].astype(np.uint8), "ignore": ignore,
                "mask_infos": [{"plural": False, "isthing": True, "text": text}]}

    def __getitem__(self, index):
        record = self.record(index)
        return {**self.build(record), "ignore": record["ignore"]}


class Together(ConcatDataset):
    """Several data sets as one; passes the epoch on."""

    def set_epoch(self, epoch):
        for part in self.datasets:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
