"""Masks on pictures: as many colours as there are phrases, always the same ones."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.checkpoint import atomic_path

# with Chinese letters, on Linux, Windows and macOS; Pillow looks where the system keeps its fonts
FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc")


def colours(count):
    """`count` RGB colours; neighbours differ strongly (golden-ratio steps in hue), any number is fine."""
    return [
        tuple(
            int(255 * v)
            for v in colorsys.hsv_to_rgb((0.02 + 0.618034 * k) % 1, 0.85, 0.95 - 0.2 * (k // 8 % 2))
        )
        for k in range(count)
    ]


def overlay(image, masks, strength=0.55):
    """The picture in grey with masks (n, H, W) laid over it, each in its colour; the later one wins where two
    overlap."""
    pixels = np.array(image.convert("L").convert("RGB"), np.float32)
    for mask, colour in zip(np.asarray(masks, bool), colours(len(masks))):
        pixels[mask] = (1 - strength) * pixels[mask] + strength * np.array(colour, np.float32)
    return Image.fromarray(pixels.astype(np.uint8))


def label(phrase, number):
    """A phrase as (text, font) that can be drawn; beyond Latin letters and without one of FONTS its number
    stands for it."""
    try:
        phrase.encode("latin-1")
        return phrase, None
    except UnicodeEncodeError:
        for name in FONTS:
            try:
                return phrase, ImageFont.truetype(name, 12)
            except OSError:
                continue
        return f"phrase {number}", None


def labelled_strip(image, columns, phrases, height=256):
    """One picture for a report: the image, then one overlay per (title, masks), with the phrases in their
    colours below."""
    width = max(64, round(image.width * height / image.height))
    panels = [("picture", image), *((title, overlay(image, masks)) for title, masks in columns)]
    line = 14
    strip = Image.new("RGB", (width * len(panels), height + line * (len(phrases) + 1) + 6), "white")
    draw = ImageDraw.Draw(strip)
    for i, (title, panel) in enumerate(panels):
        strip.paste(
            panel.resize((width, height), Image.NEAREST if image.width < height else Image.BILINEAR),
            (i * width, line),
        )
        draw.text((i * width + 3, 1), title, fill="black")
    for k, (phrase, colour) in enumerate(zip(phrases, colours(len(phrases)))):
        draw.rectangle([4, height + line * (k + 1) + 4, 12, height + line * (k + 1) + 12], fill=colour)
        text, font = label(phrase, k + 1)
        draw.text((18, height + line * (k + 1) + 1), text, fill="black", font=font)
    return strip


def save_image(image, path):
    """Write a PIL image whole or not at all."""
    with atomic_path(path) as temporary:
        image.save(temporary)
    return path
