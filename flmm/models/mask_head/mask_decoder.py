"""Mask head of F-LMM (arXiv 2406.05821): a small UNet that turns attention maps into mask logits.

Upstream: flmm/models/mask_head/mask_decoder.py (UNetHead on mmseg's UNet); state-dict keys are the same,
mmseg is not needed.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import UserError


class ConvModule(nn.Module):
    """conv (no bias) -> GroupNorm -> ReLU, named as mmcv names them: `conv`, `gn`."""

    def __init__(self, in_channels, out_channels, kernel_size, num_groups, stride=1, dilation=1):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        self.gn = nn.GroupNorm(num_groups, out_channels)

    def forward(self, x):
        return F.relu(self.gn(self.conv(x)))


class BasicConvBlock(nn.Module):
    """`num_convs` 3x3 ConvModules; only the first one has the stride, only the others the dilation."""

    def __init__(self, in_channels, out_channels, num_convs, num_groups, stride=1, dilation=1):
        super().__init__()
        first = ConvModule(in_channels, out_channels, 3, num_groups, stride=stride)
        others = [
            ConvModule(out_channels, out_channels, 3, num_groups, dilation=dilation)
            for _ in range(num_convs - 1)
        ]
        self.convs = nn.Sequential(first, *others)

    def forward(self, x):
        return self.convs(x)


class InterpConv(nn.Module):
    """Bilinear x2 in float32, then a 1x1 ConvModule; index 1 of `interp_upsample` as in mmseg."""

    def __init__(self, in_channels, out_channels, num_groups):
        super().__init__()
        self.interp_upsample = nn.Sequential(
            nn.Identity(), ConvModule(in_channels, out_channels, 1, num_groups)
        )

    def forward(self, x):
        x = F.interpolate(x.float(), scale_factor=2, mode="bilinear", align_corners=False).to(x.dtype)
        return self.interp_upsample(x)


class UpConvBlock(nn.Module):
    def __init__(self, in_channels, out_channels, num_convs, num_groups, dilation, upsample):
        super().__init__()
        self.conv_block = BasicConvBlock(
            2 * out_channels, out_channels, num_convs, num_groups, dilation=dilation
        )
        if upsample:
            self.upsample = InterpConv(in_channels, out_channels, num_groups)
        else:
            self.upsample = ConvModule(in_channels, out_channels, 1, num_groups)

    def forward(self, skip, x):
        return self.conv_block(torch.cat([skip, self.upsample(x)], dim=1))


class UNetHead(nn.Module):
    """UNet over per-phrase attention maps.

    x: (n, in_channels, h, w), every value in [0, 1] when `normalize_input`; n phrases, in_channels = layers *
    heads. Each map is divided by its sum, as upstream; with `log_maps` it is the logarithm instead, of mean 0
    and deviation 1, in which places count that get little beside one that gets nearly all. Returns
    logits (n, 1, h', w'); h', w' = floor(side * s), s = max(1, upsample_input / longer side).
    Raises ValueError for another channel count (a head of another base) or for values outside [0, 1].
    Defaults are the values of every published configuration.
    """

    def __init__(
        self,
        in_channels,
        normalize_input=True,
        upsample_input=64,
        base_channels=64,
        num_stages=4,
        strides=(1, 1, 1, 1),
        enc_num_convs=(2, 2, 2, 2),
        dec_num_convs=(2, 2, 2),
        downsamples=(True, True, True),
        enc_dilations=(1, 1, 1, 1),
        dec_dilations=(1, 1, 1),
        num_groups=1,
        log_maps=False,
    ):
        super().__init__()
        if log_maps and not normalize_input:
            raise UserError("unet.log_maps has no effect with normalize_input: false; leave one of them out")
        for name, values, count in (
            ("strides", strides, num_stages),
            ("enc_num_convs", enc_num_convs, num_stages),
            ("enc_dilations", enc_dilations, num_stages),
            ("dec_num_convs", dec_num_convs, num_stages - 1),
            ("dec_dilations", dec_dilations, num_stages - 1),
            ("downsamples", downsamples, num_stages - 1),
        ):
            if len(values) < count or min(values, default=1) < (name != "downsamples"):
                raise UserError(
                    f"unet.{name} is {list(values)}, num_stages {num_stages} needs {count} of them from 1 on"
                )
        if base_channels % num_groups:
            raise UserError(f"unet.base_channels {base_channels} does not divide by num_groups {num_groups}")
        self.in_channels, self.normalize_input, self.log_maps = in_channels, normalize_input, log_maps
        self.upsample_input = upsample_input
        self.multiple = 2 ** (num_stages - 1)  # upstream pads to this, whatever is really down-sampled
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels = in_channels
        for i in range(num_stages):
            width = base_channels * 2**i
            stage = nn.Sequential()
            if i > 0:
                if strides[i] == 1 and downsamples[i - 1]:
                    stage.append(nn.MaxPool2d(2))
                upsample = strides[i] != 1 or downsamples[i - 1]
                self.decoder.append(
                    UpConvBlock(
                        width, width // 2, dec_num_convs[i - 1], num_groups, dec_dilations[i - 1], upsample
                    )
                )
            stage.append(
                BasicConvBlock(channels, width, enc_num_convs[i], num_groups, strides[i], enc_dilations[i])
            )
            self.encoder.append(stage)
            channels = width
        self.conv_seg = nn.Conv2d(base_channels, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"mask head takes {self.in_channels} channels, the attention has {x.shape[1]}: "
                "this head belongs to another base model"
            )
        if self.normalize_input:
            if x.numel() and not (0 <= x.min() and x.max() <= 1):
                raise ValueError("attention maps must lie in [0, 1]")
            if self.log_maps:
                x = x.clamp(min=1e-9).log()
                x = x - x.mean(dim=(-2, -1), keepdim=True)
                x = x / x.std(dim=(-2, -1), keepdim=True, correction=0).clamp(min=1e-3)
            else:
                x = x / x.sum(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
        scale = max(1.0, (self.upsample_input or 0) / max(x.shape[-2:]))
        if scale > 1 and self.mixes_first:
            x, (h, w) = self.first_layer(x, scale)
        else:
            if scale > 1:  # scale_factor, not size: for sides that do not divide, the sample positions differ
                x = F.interpolate(x.float(), scale_factor=scale, mode="bilinear").to(x.dtype)
            h, w = x.shape[-2:]
            x = self.encoder[0](F.pad(x, (0, -w % self.multiple, 0, -h % self.multiple)))
        skips = [x]
        for stage in self.encoder[1:]:
            x = stage(x)
            skips.append(x)
        for i in reversed(range(len(self.decoder))):
            x = self.decoder[i](skips[i], x)
        return self.conv_seg(x[..., :h, :w])

    @property
    def mixes_first(self):
        """Whether mixing the channels before enlarging the maps is the cheaper order: with more channels than
        the nine mixings of a 3x3 kernel have outputs."""
        conv = self.encoder[0][-1].convs[0].conv
        return conv.stride == (1, 1) and self.in_channels > 9 * conv.out_channels

    def first_layer(self, x, scale):
        """The enlarged and padded maps after the first stage, and their size before padding.

        Enlarging acts on every channel alike, so it changes places with the mixing of channels: nine mixings
        at the low resolution, each enlarged, shifted by its place in the kernel and added up. Equal to
        rounding; bench/flmm.py has the whole head 2.8 times faster at 1024 channels.
        """
        first, *others = self.encoder[0][-1].convs
        weight = first.conv.weight  # (O, C, 3, 3)
        mixed = F.conv2d(x, weight.permute(2, 3, 0, 1).flatten(0, 2)[..., None, None])  # (n, 9 O, h, w)
        total = None
        for tap, part in enumerate(mixed.split(weight.shape[0], 1)):
            part = F.interpolate(part.float(), scale_factor=scale, mode="bilinear")
            h, w = part.shape[-2:]
            tall, wide = h + -h % self.multiple, w + -w % self.multiple
            row, column = divmod(tap, 3)
            part = F.pad(part, (1 - column, wide - w + column - 1, 1 - row, tall - h + row - 1))
            total = part if total is None else total + part
        x = F.relu(first.gn(total.to(mixed.dtype)))
        for module in others:
            x = module(x)
        return x, (h, w)
