"""A LLaVA-class base whose vision tower is EfficientNet-lite0 (arXiv 1905.11946): small enough for a
processor, with ImageNet weights that a package carries.

The tower is registered with transformers, so that a base folder is an ordinary one of
LlavaForConditionalGeneration. Its state dict has the names of the published file.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from flmm.data.transforms import LlavaImageProcessor
from flmm.models.frozen_llava import FrozenLlava

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of the published weights
# (kernel, stride, expansion, channels) of every block
BLOCKS = [
    (3, 1, 1, 16),
    *((3, s, 6, 24) for s in (2, 1)),
    *((5, s, 6, 40) for s in (2, 1)),
    *((3, s, 6, 80) for s in (2, 1, 1)),
    *((5, 1, 6, 112) for _ in range(3)),
    *((5, s, 6, 192) for s in (2, 1, 1, 1)),
    (3, 1, 6, 320),
]
MIDDLE = 10  # the last block at a sixteenth of the picture's side


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's padding: the odd pixel goes to the bottom and the right."""

    def forward(self, x):
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:]]
        pad = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
        return super().forward(F.pad(x, pad))


class Block(nn.Module):
    """Inverted bottleneck without squeeze and excitation."""

    def __init__(self, channels, kernel, stride, expansion, out):
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)
        self.expands, self.skips = expansion > 1, stride == 1 and channels == out

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.skips else y


class EfficientNetLiteConfig(PretrainedConfig):
    model_type = "efficientnet_lite0"

    def __init__(self, image_size=448, **options):
        self.image_size, self.patch_size, self.hidden_size = image_size, 32, 112 + 320 + 1280
        super().__init__(**options)


class EfficientNetLite(PreTrainedModel):
    """Features (B, N, 112 + 320 + 1280), N = (side / 32)^2: of the middle, the last block and the head, each
    normalised by itself. Always in eval mode: the statistics of its norms are those of ImageNet."""

    config_class = EfficientNetLiteConfig
    base_model_prefix, main_input_name = "tower", "pixel_values"
    _supports_sdpa = True  # it has no attention, so any kind suits it

    def __init__(self, config):
        super().__init__(config)
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks, channels = nn.ModuleList(), 32
        for kernel, stride, expansion, out in BLOCKS:
            self._blocks.append(Block(channels, kernel, stride, expansion, out))
            channels = out
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def train(self, mode=True):
        return super().train(False)

    def maps(self, pixel_values):
        """The three feature maps."""
        x, middle = F.relu6(self._bn0(self._conv_stem(pixel_values))), None
        for i, block in enumerate(self._blocks):
            x = block(x)
            middle = x if i == MIDDLE else middle
        return middle, x, F.relu6(self._bn1(self._conv_head(x)))

    def classify(self, pixel_values):
        """Logits of the 1000 ImageNet classes (B, 1000)."""
        return self._fc(self.maps(pixel_values)[2].mean((2, 3)))

    def forward(self, pixel_values, **_):
        middle, last, head = self.maps(pixel_values)
        middle = F.interpolate(middle, size=last.shape[-2:], mode="area")
        tokens = [m.flatten(2).transpose(1, 2) for m in (middle, last, head)]
        hidden = torch.cat([F.layer_norm(t, t.shape[-1:]) for t in tokens], -1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=(hidden,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite)


class FrozenEfficientNet(FrozenLlava):
    image_text, template = "<image>", "plain"

    @staticmethod
    def make_processor(config, preprocessing):
        return LlavaImageProcessor(config.vision_config.image_size, MEAN, STD)
