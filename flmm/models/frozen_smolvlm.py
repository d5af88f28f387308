"""SmolVLM, SmolVLM2 and Idefics3 as frozen bases: tiles with their row and column written before each, then
an overview; empty tiles behind them are left out by the model."""

from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from flmm.models.frozen_base import given
from flmm.models.frozen_tiles import FrozenTiles, tile_sample


class SmolVLMImageProcessor:
    """transformers' own processor, and how many tiles it cut. longest_edge: pixels to which the long side of
    a picture is brought before it is cut."""

    def __init__(self, side, longest_edge, **options):
        self.side = side
        self.processor = Idefics3ImageProcessorPil(
            size={"longest_edge": longest_edge}, max_image_size={"longest_edge": side}, **options
        )

    def __call__(self, image):
        out = self.processor(image, return_tensors="pt", return_row_col_info=True)
        tiles = int(out["rows"][0][0]), int(out["cols"][0][0])
        return tile_sample(out["pixel_values"][0], tiles, self.side, image)


class FrozenSmolVLM(FrozenTiles):
    architecture = "SmolVLMForConditionalGeneration"
    image_text, template = "<image>", "chat"

    @staticmethod
    def make_processor(config, preprocessing):
        side = config.vision_config.image_size
        longest = (preprocessing.get("size") or {}).get("longest_edge", 4 * side)
        stated = given(preprocessing, "do_image_splitting", "image_mean", "image_std")
        return SmolVLMImageProcessor(side, longest, **stated)

    def tile_side(self):
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size // self.model.config.scale_factor

    def image_ids(self, sample):
        """As transformers' SmolVLMProcessor writes a picture: <row_1_col_1> and its tile, a new line after
        each row, <global-img> and the overview."""
        (rows, columns), side = self.grid(sample)
        around, tile = "<fake_token_around_image>", "<image>" * side**2
        text = ""
        for row in range(rows):
            for column in range(columns):
                text += f"{around}<row_{row + 1}_col_{column + 1}>{tile}"
            text += "\n"
        text += ("\n" if rows else "") + f"{around}<global-img>{tile}{around}"
        return self.tokenizer(text, add_special_tokens=False).input_ids


class FrozenIdefics3(FrozenSmolVLM):
    architecture = "Idefics3ForConditionalGeneration"
