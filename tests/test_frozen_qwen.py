"""The Qwen2.5-VL base, without any download: `cd tests && python test_frozen_qwen.py`, or under pytest."""

import sys
import unittest
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import torch
from PIL import Image

from common.errors import UserError
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.data.transforms import QwenImageProcessor
from flmm.models.flmm import FLMM, extract
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.tiny import tiny_model, tiny_tokenizer


def make():
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen", tokenizer)
    base = FrozenQwen(
        model,
        tokenizer,
        FrozenQwen.make_processor(model.config, {"min_pixels": 1024, "max_pixels": 16384}),
        question="Describe.",
    )
    return base, SampleBuilder.of(base)


class TestQwenInputs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.base, cls.builder = make()
        cls.sample = cls.builder(
            {"image": Image.new("RGB", (96, 48), "red"), "pieces": caption_of_phrases(["a red car", "sky"])}
        )

    def test_grid_belongs_to_the_picture(self):
        t, h, w = self.sample["image_grid_thw"][0].tolist()
        self.assertEqual((t, h * 4, w * 4), (1, 48, 96))
        self.assertEqual(len(self.sample["pixel_values"]), h * w)

    def test_one_image_token_becomes_one_per_merged_patch(self):
        ids = self.base.expand(self.sample["input_ids"], self.sample)
        self.assertEqual((ids == self.base.image_token_id).sum().item(), 6 * 12)

    def test_image_tokens_lie_between_vision_start_and_end(self):
        ids, config = self.base.expand(self.sample["input_ids"], self.sample), self.base.model.config
        start, end = (
            (ids == config.vision_start_token_id).nonzero().item(),
            (ids == config.vision_end_token_id).nonzero().item(),
        )
        self.assertTrue((ids[start + 1 : end] == self.base.image_token_id).all())
        self.assertEqual(end - start - 1, 72)

    def test_token_types_mark_exactly_the_image(self):
        inputs, _ = self.base.batch([self.sample])
        self.assertTrue(
            torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == self.base.image_token_id)
        )

    def test_meta_data_says_that_nothing_is_padded(self):
        meta = self.sample["meta_data"]
        self.assertEqual(meta["image_shape"], meta["padded_shape"])
        self.assertEqual(meta["scale_factor"], (1.0, 1.0))
        self.assertEqual(set(meta["padding"].values()), {0})

    def test_one_processor_changes_no_other(self):
        small, plain = QwenImageProcessor(min_pixels=784, max_pixels=784), QwenImageProcessor()
        patches = [len(p(Image.new("RGB", (280, 280)))["pixel_values"]) for p in (small, plain)]
        self.assertEqual(patches, [4, 400])

    def test_a_picture_too_thin_for_the_model_is_refused_with_its_size(self):
        with self.assertRaisesRegex(UserError, "2000 x 3 pixels"):
            self.base.image_processor(Image.new("RGB", (2000, 3)))


class TestFrozenQwen(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.base, cls.builder = make()

    def test_pictures_of_different_sizes_share_a_batch(self):
        samples = [
            self.builder({"image": Image.new("RGB", size, "red"), "pieces": caption_of_phrases(words)})
            for size, words in (((96, 48), ["a red car", "sky"]), ((64, 64), ["dog"]))
        ]
        together = self.base(samples)
        self.assertEqual(
            [tuple(f["mask_attentions"].shape) for f in together], [(2, 12, 6, 12), (1, 12, 8, 8)]
        )
        for sample, feature in zip(samples, together):
            alone = self.base([sample])[0]["mask_attentions"]
            torch.testing.assert_close(alone, feature["mask_attentions"], atol=1e-6, rtol=0)

    def test_only_the_head_gets_gradients(self):
        sample = self.builder({"image": Image.new("RGB", (64, 64)), "pieces": caption_of_phrases(["a dog"])})
        head = FLMM(*self.base.dims, None, {"base_channels": 4})
        head(extract(self.base, None, [sample]))[0]["pred_masks"].sum().backward()
        self.assertTrue(all(p.grad is not None for p in head.parameters()))
        self.assertTrue(all(p.grad is None and not p.requires_grad for p in self.base.model.parameters()))


if __name__ == "__main__":
    unittest.main()
