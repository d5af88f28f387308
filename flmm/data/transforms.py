"""Pictures in, tensors and geometry out: one processor per base family, and loading a picture whatever its
mode.

Upstream: flmm/datasets/{llava_processors,llava_next_processors,pad2square_processor,qwen_image_processor}.py
and deepseek_vl's VLMImageProcessor. Each processor is called with an RGB PIL image and returns
    {"pixel_values", ..., "meta_data": {"padding": {before_height, after_height, before_width, after_width},
     "image_shape": {height, width} unpadded, "padded_shape": {height, width}}}
Sizes are truncated where upstream truncates: transformers' own DeepSeek processor rounds, and gives other
sizes for half of all pictures.
"""

import os
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps

from common.errors import UserError
from common.files import reading

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_image(path, size=None):
    """Read any picture as RGB. size: (width, height) of its annotation, for training and scoring.

    Without `size` a picture is turned upright by its EXIF tag. With it the pixels stay as they are stored, as
    upstream reads them, since masks and polygons lie on those; only if the annotation's sides are those of
    the upright picture and not of the stored one, it is turned. Grey, palette, CMYK and 16-bit pictures are
    converted, transparency is laid on white.
    """
    with reading(path, "picture"), Image.open(path) as image:
        image.load()
        turned = upright(image)
        if size is None or image.size != tuple(size) and turned.size == tuple(size):
            image = turned
        return to_rgb(image)


def as_picture(given):
    """RGB picture of a path, a PIL picture of any mode, or an array (H, W), (H, W, 1), (H, W, 3) or
    (H, W, 4) of bytes. A file is turned upright by its EXIF tag; an open picture stays as it is, since its
    owner lays masks on those pixels."""
    if isinstance(given, (str, os.PathLike)):
        return load_image(given)
    with reading("image", "picture"):
        if isinstance(given, Image.Image):
            return to_rgb(given)
        pixels = np.asarray(given)
    shape, dtype = pixels.shape, pixels.dtype
    if pixels.ndim == 3 and shape[2] == 1:
        pixels = pixels[..., 0]
    if dtype != np.uint8 or 0 in shape or pixels.ndim != 2 and (pixels.ndim != 3 or shape[2] not in (3, 4)):
        raise UserError(
            f"image is {type(given).__name__} of shape {shape} and type {dtype}; give a path, a PIL picture, "
            "or an array (height, width, 3) of uint8 from 0 to 255"
        )
    return to_rgb(Image.fromarray(pixels))


def upright(image):
    """A picture turned as its EXIF tag says; as it is where Pillow cannot read the tag, which damages no
    pixel."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of a foreign format's parser: SyntaxError, struct.error and others
        return image


def load_segments(path, colours=False):
    """(H, W) int64 segment ids of a panoptic PNG (R + 256 G + 65536 B) or of a grey or palette PNG (its
    values). colours: a palette holds the colours of a panoptic PNG that a tool has made smaller."""
    with reading(path, "mask picture"), Image.open(path) as opened:
        if opened.format in ("JPEG", "MPO"):
            raise UserError(f"{path}: JPEG changes the numbers of segments; take the PNG that it was made of")
        paletted = colours and opened.mode == "P"
        values = np.asarray(opened.convert("RGB") if paletted else opened, np.int64)
        return values if values.ndim == 2 else values[..., :3] @ np.array([1, 256, 65536])


def to_rgb(image):
    """PIL image of any mode -> RGB."""
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip to 255 instead of scaling
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _meta(unpadded, padded, before):
    (h, w), (ph, pw), (top, left) = unpadded, padded, before
    return {
        "padding": {
            "before_height": top,
            "after_height": ph - h - top,
            "before_width": left,
            "after_width": pw - w - left,
        },
        "image_shape": {"height": h, "width": w},
        "padded_shape": {"height": ph, "width": pw},
    }


def _normalise(pixels, mean, std):
    """(h, w, 3) uint8 -> (3, h, w) float32."""
    x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def pad_to_square(image, mean):
    """Centre a PIL image on a square of the (rounded-down) mean colour; returns the square and (top,
    left)."""
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    square.paste(image, (left, top))
    return square, (top, left)


class LlavaImageProcessor:
    """Long side to `size`, bicubic, no crop, mean-colour padding to a square. min_size: least short side
    (DeepSeek: 14)."""

    def __init__(self, size=336, mean=CLIP_MEAN, std=CLIP_STD, min_size=1):
        self.size, self.mean, self.std, self.min_size = size, mean, std, min_size

    def target(self, h, w):
        """Upstream's LLaVA arithmetic: short * size / long in one division, truncated."""
        short = max(int(min(h, w) * self.size / max(h, w)), self.min_size)
        return (self.size, short) if h >= w else (short, self.size)

    def __call__(self, image):
        h, w = self.target(image.height, image.width)
        square, before = pad_to_square(image.resize((w, h), Image.BICUBIC), self.mean)
        return {
            "pixel_values": _normalise(square, self.mean, self.std),
            "image_sizes": (image.height, image.width),
            "meta_data": _meta((h, w), (self.size, self.size), before),
        }


class DeepseekImageProcessor(LlavaImageProcessor):
    """DeepSeek-VL: `max(int(side / long * size), 14)`; hybrid bases also get the picture at `high_res`
    pixels."""

    def __init__(self, size=384, mean=CLIP_MEAN, std=CLIP_STD, min_size=14, high_res=None):
        super().__init__(size, mean, std, min_size)
        self.high_res = high_res

    def target(self, h, w):
        return tuple(max(int(side / max(h, w) * self.size), self.min_size) for side in (h, w))

    def __call__(self, image):
        out = super().__call__(image)
        if self.high_res:
            high = DeepseekImageProcessor(self.high_res, self.mean, self.std, self.min_size)
            h, w = high.target(image.height, image.width)
            square, _ = pad_to_square(image.resize((w, h), Image.BICUBIC), self.mean)
            out["high_res_pixel_values"] = _normalise(square, self.mean, self.std)
            # the hybrid tower reduces the padded square itself, so its low-resolution half must not be cut
            # anew
            out["pixel_values"] = _normalise(
                square.resize((self.size, self.size), Image.BICUBIC), self.mean, self.std
            )
            out["meta_data"] = _meta((h, w), square.size, ((square.height - h) // 2, (square.width - w) // 2))
        return out


def fine_grid(canvas, patch, image_size):
    """(rows, columns) of patches that are left of a canvas (height, width) when the padding around a picture
    of image_size (height, width) is cut off, by the installed model's own rounding."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    tiles = torch.empty(1, canvas[0] // patch, canvas[1] // patch)
    return tuple(unpad_image(tiles, tuple(image_size)).shape[1:])


class LlavaNextImageProcessor:
    """transformers' own anyres processor, plus where the picture lies on the tiled canvas."""

    def __init__(
        self,
        size=336,
        pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        patch=14,
    ):
        self.size, self.pinpoints, self.patch = size, [list(p) for p in pinpoints], patch
        self.processor = self.native(
            image_grid_pinpoints=self.pinpoints, image_mean=list(mean), image_std=list(std)
        )

    def native(self, **options):
        """transformers' processor."""
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        crop = {"height": self.size, "width": self.size}
        return LlavaNextImageProcessorPil(size={"shortest_edge": self.size}, crop_size=crop, **options)

    def __call__(self, image):
        from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

        canvas = select_best_resolution((image.height, image.width), self.pinpoints)
        with fitting(image):
            if 0 in fine_grid(canvas, self.patch, (image.height, image.width)):
                raise ValueError("so thin that not one row of the model's patches is left of it")
        out = self.processor(image, return_tensors="pt")
        h, w = get_patch_output_size(
            np.empty((image.height, image.width, 3), np.uint8), canvas, input_data_format="channels_last"
        )
        meta = _meta((h, w), canvas, ((canvas[0] - h) // 2, (canvas[1] - w) // 2))
        meta["grid_shape"] = {"height": canvas[0] // self.size, "width": canvas[1] // self.size}
        meta["ori_shape"] = {"height": image.height, "width": image.width}
        return {
            "pixel_values": out["pixel_values"][0],
            "image_sizes": (image.height, image.width),
            "meta_data": meta,
        }


@contextmanager
def fitting(image):
    """Names a picture whose size the block cannot take."""
    try:
        yield
    except ValueError as error:
        text = f"picture of {image.width} x {image.height} pixels: {error}; crop it or scale it"
        raise UserError(text) from error


class QwenImageProcessor:
    """transformers' Qwen2-VL processor; nothing is padded, so the picture fills the grid."""

    def __init__(self, **options):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        # a copy: transformers 5.17 writes min_pixels into the class's own
        size = dict(options.pop("size", Qwen2VLImageProcessorPil.size))
        self.processor = Qwen2VLImageProcessorPil(size=size, **options)

    def __call__(self, image):
        with fitting(image):
            out = self.processor(image, return_tensors="pt")
        h, w = (int(side) * self.processor.patch_size for side in out["image_grid_thw"][0, 1:])
        meta = _meta((h, w), (h, w), (0, 0))
        meta["scale_factor"] = (h / image.height, w / image.width)
        meta["original_shape"] = {"height": image.height, "width": image.width}
        return {
            "pixel_values": out["pixel_values"],
            "image_grid_thw": out["image_grid_thw"],
            "image_sizes": (image.height, image.width),
            "meta_data": meta,
        }


class Pad2Square:
    """The picture itself on a mean-colour square, uint8 (h, w, 3): the first step of MGM bases."""

    def __init__(self, mean=CLIP_MEAN):
        self.mean = mean

    def __call__(self, image):
        square, before = pad_to_square(image, self.mean)
        return {
            "pixel_values": torch.from_numpy(np.array(square)),
            "image_sizes": (image.height, image.width),
            "meta_data": _meta((image.height, image.width), (square.height, square.width), before),
        }
