"""Seeded scenes of coloured, textured shapes, with captions, phrases and masks: the built-in data.

A scene is a pure function of (seed, index). With `overlap`, a later object may hide part of an earlier one,
and each keeps at least `min_visible` of its pixels. Words of an object: COLOUR SIZE [TEXTURE] SHAPE; objects
are named in random order, so that neither the words nor their place in the caption tell where an object is.
"""

from itertools import product

import numpy as np

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 208, 32),
    "purple": (132, 48, 176),
    "orange": (240, 130, 24),
    "white": (245, 245, 245),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": (0.15, 0.19), "large": (0.25, 0.32)}  # radius as a share of the side
QUESTION = "Describe."


def shape_mask(shape, cx, cy, r, side):
    """(side, side) bool mask of a shape with centre (cx, cy) and radius r in pixels."""
    y, x = np.mgrid[:side, :side] + 0.5
    dx, dy = x - cx, y - cy
    if shape == "circle":
        return dx**2 + dy**2 <= r**2
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.86 * r
    if shape == "triangle":
        return (dy <= 0.8 * r) & (dy >= -r + 2 * abs(dx) * 0.9)
    return ((abs(dx) <= 0.36 * r) | (abs(dy) <= 0.36 * r)) & (np.maximum(abs(dx), abs(dy)) <= r)


def place_objects(rng, side, min_visible):
    """Two or three objects as dictionaries and their masks, of each at least a share of `min_visible` to be
    seen; (None, None) in the rare case that they do not fit."""
    objects, masks, wanted = [], [], 2 + int(rng.random() < 0.35)
    for _ in range(50):
        if len(objects) == wanted:
            return objects, masks
        size = str(rng.choice(list(SIZES)))
        r = rng.uniform(*SIZES[size]) * side
        obj = {
            "colour": str(rng.choice(list(COLOURS))),
            "size": size,
            "texture": str(rng.choice(TEXTURES)),
            "shape": str(rng.choice(SHAPES)),
        }
        if any((o["colour"], o["shape"]) == (obj["colour"], obj["shape"]) for o in objects):
            continue
        mask = shape_mask(obj["shape"], rng.uniform(r, side - r), rng.uniform(r, side - r), r, side)
        left = [m & ~mask for m in masks]
        if any(m.sum() < min_visible * o["area"] for m, o in zip(left, objects)):
            continue
        objects.append({**obj, "area": mask.sum()})
        masks = [*left, mask]
    return (objects, masks) if len(objects) == wanted else (None, None)


def make_scene(seed, index, side=64, overlap=False, min_visible=0.7):
    """One scene: {"image" (side, side, 3) uint8, "masks" (n, side, side) bool in caption order, "phrases" [n
    texts], "objects" [n dicts], "pieces" [(text, k)]}."""
    rng = np.random.default_rng((seed, index))
    objects = None
    while objects is None:
        objects, masks = place_objects(rng, side, min_visible if overlap else 1)
    y, x = np.mgrid[:side, :side]
    angle, base = rng.uniform(0, 2 * np.pi), rng.uniform(90, 160)
    image = base + 35 * (np.cos(angle) * x + np.sin(angle) * y) / side
    image = np.repeat(image[..., None], 3, axis=2)
    for obj, mask in zip(objects, masks):
        colour = np.array(COLOURS[obj["colour"]]) + rng.normal(0, 8, 3)
        dark = colour * 0.45 + (70 if obj["colour"] == "black" else 0)
        period = max(4, side // 12)
        pattern = {
            "plain": np.zeros_like(mask),
            "striped": (x + y) % period < period / 2,
            "dotted": (x % period < period / 2) & (y % period < period / 2),
        }[obj["texture"]]
        image[mask] = colour
        image[mask & pattern] = dark
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    order = rng.permutation(len(objects))
    objects, masks = [objects[i] for i in order], np.stack([masks[i] for i in order])
    phrases = [
        " ".join(o[k] for k in ("colour", "size", "texture", "shape") if o[k] != "plain") for o in objects
    ]
    pieces = []
    for k, phrase in enumerate(phrases):
        pieces += [("a" if k == 0 else "and a" if k == len(phrases) - 1 else ", a", -1), (phrase, k)]
    return {
        "image": image,
        "masks": masks,
        "phrases": phrases,
        "objects": objects,
        "pieces": [*pieces, (".", -1)],
    }


def all_texts():
    """Every phrase and connecting word that scenes use, for training the tokenizer."""
    objects = product(COLOURS, SIZES, TEXTURES, SHAPES)
    words = ["".join(f" {word}" for word in words if word != "plain") for words in objects]
    return words + [" a", " and a", " , a", " .", QUESTION, " " + QUESTION] * 40
