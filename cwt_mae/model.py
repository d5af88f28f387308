"""CWT-MAE-RoPE: a masked autoencoder of wavelet images of one-dimensional signals.

    signal (B, L) -> Ricker wavelet images (B, 3, scales, L) -> patches
    -> transformer encoder on the visible patches
    -> transformer decoder on all -> hidden patches of the image, and the signal itself

Names, shapes and state-dict keys follow the public repository Dryilv/Wearable-Foundation-Model (file
model.py, stage of 2026-01-21); the wavelet front end follows Mobile-Sensing-and-UbiComp-Laboratory/NormWear,
the masking facebookresearch/mae (He et al. 2022), the position encoding RoFormer (Su et al. 2021).

Upstream's numerics had accidents (README.md, "Differences from upstream"). They are mended by default;
`legacy=True` keeps them, for weights that were trained with them.

The wavelet transform is wavelet.py's; its names can be imported from here too, as upstream's.
"""

import functools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
import torch.nn as nn
import torch.nn.functional as F

from cwt_mae.wavelet import create_ricker_wavelets, cwt_ricker, cwt_wrap, floats  # noqa: F401

# ---- parts of the transformer


OURS = 1 + 2**-7  # exact in float32, float16 and bfloat16


def _mark_numerics(module, state_dict, prefix, metadata):
    """Write whose numerics `module` computes with into its state dict."""
    mark = state_dict[prefix + "inv_freq"].detach().clone()
    if mark.numel():
        mark[0] = 1.0 if module.legacy else OURS
    state_dict[prefix + "inv_freq"] = mark


def keep_config(module, state_dict, prefix, metadata):
    """Write the model's whole configuration beside the state dict: `torch.save` keeps it."""
    metadata["config"] = json.dumps(module.config)


def numerics_of(tensors: dict) -> bool | None:
    """Whether the weights of a state dict were trained with upstream's numerics; None without rotary
    tables."""
    found = next((value for key, value in tensors.items() if key.endswith("rope_encoder.inv_freq")), None)
    return None if found is None or not found.numel() else bool(abs(float(found[0]) - OURS) > 2**-9)


class RotaryEmbedding(nn.Module):
    """Rotary position tables, computed from the position ids in float32 at every call (Su et al. 2021).

    Nothing is cached: any position is allowed, no device is asked for a maximum, and `.half()` cannot spoil
    the angles. Legacy: tables rounded to bfloat16.

    `inv_freq` is kept as a buffer for upstream's state-dict key, and nothing is computed from it. Its first
    number says whose numerics the weights beside it were trained with (`numerics_of`): 1, as in every file
    of upstream, or `OURS`.
    """

    def __init__(self, dim: int, legacy: bool = False):
        super().__init__()
        self.dim, self.legacy = dim, legacy
        self.register_buffer("inv_freq", self.frequencies(None))
        self.register_state_dict_post_hook(_mark_numerics)

    def frequencies(self, device) -> torch.Tensor:
        return 1.0 / (10000 ** (torch.arange(0, self.dim, 2, device=device).float() / self.dim))

    def forward(self, pos_ids: torch.Tensor):
        """pos_ids (B, n) -> cos, sin, each (B, n, 1, dim) float32."""
        angle = pos_ids[..., None].float() * self.frequencies(pos_ids.device)
        angle = torch.cat([angle, angle], dim=-1)[:, :, None]
        cos, sin = angle.cos(), angle.sin()
        return (cos.bfloat16().float(), sin.bfloat16().float()) if self.legacy else (cos, sin)


def apply_rotary_pos_emb(q, k, cos, sin):
    """Rotate q and k (B, n, heads, dim) by the tables (B, n, 1, dim); the halves of dim are the two
    coordinates."""

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return rotate(q), rotate(k)


class TensorizedLinear(nn.Module):
    """Linear layer of low rank: y = u(v(x)), rank = max(32, int(min(in, out) * rank_ratio)).

    Smaller than a dense layer below rank in * out / (in + out) only; the floor of 32 makes small layers
    larger.
    """

    def __init__(self, in_features: int, out_features: int, rank_ratio: float = 0.5, bias: bool = True):
        super().__init__()
        self.rank = max(32, int(min(in_features, out_features) * rank_ratio))
        self.v = nn.Linear(in_features, self.rank, bias=False)
        self.u = nn.Linear(self.rank, out_features, bias=bias)
        init_weights(self)

    def forward(self, x):
        return self.u(self.v(x))


class DecomposedPatchEmbed(nn.Module):
    """Cut images (B, C, S, L) into patches of `patch_size` (scales, samples) -> (B, N, D), all times of a row
    first."""

    def __init__(
        self,
        img_size=(64, 3000),
        patch_size=(4, 50),
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer=None,
    ):
        super().__init__()
        self.img_size, self.patch_size = tuple(img_size), tuple(patch_size)
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, imgs):
        return self.norm(self.proj(imgs).flatten(2).transpose(1, 2))


class RoPEAttention(nn.Module):
    """Multi-head attention with rotary positions: x (B, n, D) -> (B, n, D).

    attn_mask: (B, n) bool, True = may be attended to.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(
                f"width {dim} does not give {num_heads} heads of an even size; change one of them"
            )
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, rope_cos=None, rope_sin=None, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, n, heads, head dim)
        if rope_cos is not None:
            q, k = (t.to(v.dtype) for t in apply_rotary_pos_emb(q, k, rope_cos, rope_sin))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = None if attn_mask is None else attn_mask[:, None, None]
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm transformer block with a dense MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer=nn.LayerNorm,
        linear=nn.Linear,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = norm_layer(dim)
        self.attn = RoPEAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = norm_layer(dim)
        self.mlp = nn.Sequential(
            linear(dim, hidden), nn.GELU(), nn.Dropout(drop), linear(hidden, dim), nn.Dropout(drop)
        )

    def forward(self, x, rope_cos=None, rope_sin=None, attn_mask=None):
        x = x + self.attn(self.norm1(x), rope_cos, rope_sin, attn_mask)
        return x + self.mlp(self.norm2(x))


class TensorizedBlock(Block):
    """Pre-norm transformer block whose MLP is of low rank (`TensorizedLinear`)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        rank_ratio: float = 0.5,
        norm_layer=nn.LayerNorm,
    ):
        linear = functools.partial(TensorizedLinear, rank_ratio=rank_ratio)
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, drop, attn_drop, norm_layer, linear)


class LeadAttention(nn.Module):
    """Attention between the leads of a recording, at the same place of each: x (B * M, n, D) -> the same.

    present: (B, M) bool, leads that there are; the others are not attended to. It adds nothing until it is
    trained, so that weights of one lead mean what they meant.
    """

    def __init__(self, dim: int, num_heads: int, leads: int):
        super().__init__()
        self.leads, self.norm = leads, nn.LayerNorm(dim)
        self.attn = RoPEAttention(dim, num_heads)

    def forward(self, x, present=None):
        by_place = self.norm(x).unflatten(0, (-1, self.leads)).transpose(1, 2)  # (B, n, M, D)
        mask = None
        if present is not None:
            # A recording without any lead attends to all of them, which no loss looks at.
            present = present | ~present.any(1, keepdim=True)
            mask = present.repeat_interleave(x.shape[1], 0)
        mixed = self.attn(by_place.flatten(0, 1), attn_mask=mask).unflatten(0, by_place.shape[:2])
        return x + mixed.transpose(1, 2).flatten(0, 1)


def init_weights(module: nn.Module):
    """In all of `module`: Linear weights Xavier-uniform, biases 0; LayerNorm 1 and 0; convolutions
    Xavier-uniform."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


# ---- the model


class CWT_Encoder(nn.Module):
    """Front end and encoder: what pre-training and every later use share, with the keys of `CWT_MAE_RoPE`.

    signal_len, patch_size_time: samples; the second divides the first.
    cwt_scales, patch_size_freq: scales; the second divides the first.
    preprocess: how signals were prepared for the model (fields of dataset.Preprocess), kept for whoever runs
        it.
    legacy: upstream's numerics in the wavelet images, the rotary tables and positions, and the number of kept
        patches.
    padding, lowest_scale, scale_step, log_scales: see `cwt_wrap`.
    rope_stride: a patch in row h and column w of the grid has the rotary position 1 + h * rope_stride + w.
        Default 0, time alone; in legacy the width of the grid, upstream's flattened index. Give an upstream
        model the width that it was trained with to keep its relative positions at another signal length.
    patch_norm: LayerNorm after the patch embedding (which removes the amplitude). raw_patches: add an
    embedding of the plain signal under each patch, with a learned gain. leads: names of the leads of a
    recording, in the order of x (B, M, L). They share the patch embedding; each
        block attends within a lead, then between leads. None: one signal, x (B, L).

    `config` holds all of these as plain values: CWT_MAE_RoPE(**config) builds the same model.
    """

    def __init__(
        self,
        signal_len: int = 3000,
        cwt_scales: int = 64,
        patch_size_time: int = 50,
        patch_size_freq: int = 4,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_rank_ratio: float = 0.5,
        preprocess: dict | None = None,
        legacy: bool = False,
        padding: str | None = None,
        lowest_scale: float = 0.1,
        scale_step: float = 1.0,
        log_scales: bool = False,
        rope_stride: int | None = None,
        patch_norm: bool = True,
        raw_patches: bool = False,
        leads: list | None = None,
    ):
        config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        if signal_len % patch_size_time:
            near = max(1, round(signal_len / patch_size_time)) * patch_size_time
            raise ValueError(
                f"signal_len {signal_len} is not a multiple of patch_size_time {patch_size_time}; use {near}"
            )
        if cwt_scales % patch_size_freq:
            raise ValueError(
                f"cwt_scales {cwt_scales} is not a multiple of patch_size_freq {patch_size_freq}"
            )
        self.config = config
        self.legacy, self.signal_len, self.cwt_scales = legacy, signal_len, cwt_scales
        self.patch_size_time, self.patch_size_freq = patch_size_time, patch_size_freq
        sizes, norm = (patch_size_freq, patch_size_time), nn.LayerNorm if patch_norm else None
        self.patch_embed = DecomposedPatchEmbed((cwt_scales, signal_len), sizes, 3, embed_dim, norm)
        self.grid_size, self.num_patches = self.patch_embed.grid_size, self.patch_embed.num_patches
        self.rope_stride = rope_stride if rope_stride is not None else self.grid_size[1] if legacy else 0
        self.rope_encoder = RotaryEmbedding(embed_dim // num_heads, legacy)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_patches + 1, embed_dim))
        self.blocks = nn.ModuleList(
            TensorizedBlock(embed_dim, num_heads, rank_ratio=mlp_rank_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        if raw_patches:
            self.raw_embed = nn.Conv1d(1, embed_dim, patch_size_time, stride=patch_size_time)
            self.raw_gain = nn.Parameter(torch.tensor(0.1))
        self.leads = len(leads or [None])
        if leads:
            self.lead_embed = nn.Parameter(torch.empty(self.leads, embed_dim))
            self.lead_blocks = nn.ModuleList(
                LeadAttention(embed_dim, num_heads, self.leads) for _ in range(depth)
            )
        init_weights(self)
        if leads:
            nn.init.normal_(self.lead_embed, std=0.02)
            for block in self.lead_blocks:
                nn.init.zeros_(block.attn.proj.weight)
        for tokens in (self.cls_token, self.pos_embed):
            nn.init.normal_(tokens, std=0.02)
        self.register_state_dict_post_hook(keep_config)

    def images(self, x: torch.Tensor, real: torch.Tensor | None = None):
        """x (B, L) or (B, 1, L), L up to signal_len -> images (B, 3, S, signal_len), signal and real (B,
        signal_len). With leads x and real are (B, M, L), and every row stands for a lead: B * M rows.

        The images are normalised; the signal has mean 0 and deviation 1 over its real part and is 0 outside
        of it. A shorter signal is padded at its end. real: bool, or None where there is no padding; a lead
        without a real sample is missing.
        """
        x, real = self.checked(x, real)
        config, mask = self.config, real
        if real is not None and self.leads > 1:
            # A missing lead has no mean and no deviation: it is a zero line, which nothing looks at.
            missing = real.sum(1, keepdim=True) < 2
            mask, x = real | missing, torch.where(missing, 0.0, x)
        scales = (self.cwt_scales, config["lowest_scale"], config["scale_step"])
        form = dict(padding=config["padding"], log_scales=config["log_scales"], normalize=True)
        imgs = cwt_wrap(x, *scales, self.legacy, real=mask, **form)
        x = x if mask is None else torch.where(mask, x, 0.0)
        mask = torch.ones_like(x) if mask is None else mask
        count = mask.sum(1, keepdim=True)
        x = (x - (x * mask).sum(1, keepdim=True) / count) * mask
        x = x / (x.square().sum(1, keepdim=True) / (count - 1)).clamp(min=1e-10).sqrt()
        return imgs, x, real

    def checked(self, x: torch.Tensor, real: torch.Tensor | None):
        """x as (B, signal_len) floats and its mask, or a ValueError that says what is wrong."""
        x, real = floats(x), None if real is None else torch.as_tensor(real).bool()
        if self.leads > 1:
            if x.ndim != 3 or x.shape[1] != self.leads:
                raise ValueError(
                    f"x has shape {tuple(x.shape)}, expected (batch, {self.leads} leads, samples) for "
                    f"{', '.join(self.config['leads'])}"
                )
            x, real = x.flatten(0, 1), None if real is None else real.flatten(0, 1)
        elif x.ndim == 3 and x.shape[1] == 1:
            x, real = x[:, 0], real[:, 0] if real is not None and real.ndim == 3 else real
        if x.ndim != 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (batch, samples) or (batch, 1, samples)"
            )
        length, missing = x.shape[1], self.signal_len - x.shape[1]
        if length < 2 or missing < 0:
            raise ValueError(
                f"x has {length} samples, the model takes 2 .. {self.signal_len}; cut longer records into "
                "windows or build the model with another signal_len"
            )
        if real is not None and real.shape != x.shape:
            raise ValueError(f"real has shape {tuple(real.shape)}, expected {tuple(x.shape)} as x")
        # On an accelerator these questions would stall its queue; neither a compiler nor vmap can ask them.
        asked = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if asked and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            fine = torch.isfinite(x) if real is None else torch.isfinite(x) | ~real.to(x.device)
            bad = ~fine.all(1)
            if bad.any():
                raise ValueError(f"x holds NaN or infinite values in rows {bad.nonzero().flatten().tolist()}")
            empty = real.sum(1) < 2 if real is not None else bad
            if self.leads > 1:
                empty = empty.unflatten(0, (-1, self.leads)).all(1)
            if empty.any():
                raise ValueError(
                    f"real leaves fewer than 2 samples in rows {empty.nonzero().flatten().tolist()}"
                )
        if missing:
            real = F.pad(torch.ones_like(x, dtype=torch.bool) if real is None else real, (0, missing))
            x = F.pad(x, (0, missing))
        return x, None if real is None else real.to(x.device)

    def windows_at_once(self, memory: float = 2.0**28) -> int:
        """Windows whose images and tokens fit into `memory` bytes without gradients; at least 1."""
        width, pixels = self.config["embed_dim"], self.cwt_scales * self.signal_len
        # Images and their copy, and the widest point of a block: its input, norm, q, k, v and MLP.
        return max(1, int(memory / (4 * (6 * pixels + 16 * (self.num_patches + 1) * width))))

    def real_patches(self, real):
        """real (B, L) -> (B, N) bool: patches that hold at least one real sample."""
        if real is None:
            return None
        return real.unflatten(1, (-1, self.patch_size_time)).any(2).repeat(1, self.grid_size[0])

    def rope_ids(self, device) -> torch.Tensor:
        """(1, N + 1) rotary positions: class token 0, then the patches row by row."""
        rows, columns = (torch.arange(size, device=device) for size in self.grid_size)
        return F.pad((1 + rows[:, None] * self.rope_stride + columns).flatten(), (1, 0))[None]

    def forward_encoder(self, imgs, x=None, patches=None, ids_keep=None, slots=None):
        """Encode patches of imgs (B, 3, S, L): all of them, or those of ids_keep (B, K) -> (B, 1 + N or K,
        D).

        x: signal as `images` gives it, for raw_patches. patches (B, N), slots (B, K): bool, those that may be
        attended.
        """
        dtype = self.pos_embed.dtype  # images are float32 even where the weights are not
        tokens = self.patch_embed(imgs.to(dtype))
        if hasattr(self, "raw_embed"):
            raw = self.raw_embed(x[:, None].to(dtype)).transpose(1, 2)  # (B, W, D)
            tokens = tokens + self.raw_gain * raw.repeat(1, self.grid_size[0], 1)
        tokens = tokens + self.pos_embed[:, 1:]
        present = None
        if self.leads > 1:
            tokens = tokens + self.lead_embed.repeat(len(tokens) // self.leads, 1)[:, None]
            present = None if patches is None else patches.any(1).unflatten(0, (-1, self.leads))
        pos_ids, mask = self.rope_ids(tokens.device), patches
        if ids_keep is not None:
            tokens = tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))
            pos_ids = F.pad(pos_ids[0, 1:][ids_keep], (1, 0))
            mask = slots
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls_token, tokens], dim=1)
        cos, sin = self.rope_encoder(pos_ids)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, cos, sin, mask)
            if self.leads > 1:
                tokens = self.lead_blocks[i](tokens, present)
        return self.norm(tokens)

    def patch_tokens(self, x, real=None):
        """x and real as `images` takes them -> tokens (B, M * N, D) of all patches of all leads, class tokens
        left out, and their mask or None."""
        imgs, signal, real = self.images(x, real)
        patches = self.real_patches(real)
        tokens = self.forward_encoder(imgs, signal, patches)[:, 1:]
        if self.leads > 1:
            tokens = tokens.unflatten(0, (-1, self.leads)).flatten(1, 2)
            patches = None if patches is None else patches.unflatten(0, (-1, self.leads)).flatten(1, 2)
        return tokens, patches


class CWT_MAE_RoPE(CWT_Encoder):
    """Masked autoencoder of wavelet images: `loss, pred_spec, pred_time, imgs = model(x)`.

    mask_ratio: fraction of the patches that is hidden from the encoder.
    time_loss_weight: weight of the signal's loss beside the image's.
    column_masking: hide all scales of a time column together, so that nothing can be read off a neighbouring
        row.
    masked_time_loss: weigh the signal's squared error by the hidden fraction of its column (upstream: the
        whole signal).
    channel_weights: weights of the three images (signal, first and second difference) in the image's loss.
    **encoder: see `CWT_Encoder`.

    Default sizes have 95,618,954 parameters.
    """

    def __init__(
        self,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        time_loss_weight: float = 1.0,
        column_masking: bool = False,
        masked_time_loss: bool = False,
        channel_weights=(1.0, 1.0, 1.0),
        **encoder,
    ):
        own = {key: value for key, value in locals().items() if key not in ("self", "__class__", "encoder")}
        super().__init__(**encoder)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} is outside 0 <= ratio < 1")
        self.config |= own | {"channel_weights": list(channel_weights)}
        self.mask_ratio, self.time_loss_weight = mask_ratio, time_loss_weight
        self.column_masking, self.masked_time_loss = column_masking, masked_time_loss
        self.channel_weights = channel_weights
        self.patch_pixels = 3 * self.patch_size_freq * self.patch_size_time
        width = decoder_embed_dim
        self.rope_decoder = RotaryEmbedding(width // decoder_num_heads, self.legacy)
        self.decoder_embed = nn.Linear(self.config["embed_dim"], width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, self.num_patches + 1, width))
        self.decoder_blocks = nn.ModuleList(Block(width, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred_spec = nn.Linear(width, self.patch_pixels)
        self.time_reducer = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=(self.grid_size[0], 1)), nn.GELU()
        )
        self.time_pred = nn.Linear(width, self.patch_size_time)
        for name in "decoder_embed decoder_blocks decoder_pred_spec time_reducer time_pred".split():
            init_weights(getattr(self, name))
        for tokens in (self.mask_token, self.decoder_pos_embed):
            nn.init.normal_(tokens, std=0.02)

    def random_masking(self, noise: torch.Tensor, patches=None):
        """Choose the visible patches: those of lowest noise (B, N), padding last.

        Returns mask (B, N) float, 1 = hidden; ids_restore (B, N); ids_keep (B, K); and slots (B, K) bool,
        None if all True: False where a record has too few patches for its place among the visible (padding
        keeps the ratio).
        """
        keep = 1 - self.mask_ratio
        height, width = self.grid_size
        if self.column_masking:  # one draw a column; the stable sort keeps its rows together
            noise = noise[:, :width].repeat(1, height)
        unit = height if self.column_masking else 1
        if patches is not None:
            noise = noise.masked_fill(~patches, math.inf)
        if self.legacy:  # the float product loses a patch at ratios .8 and .9
            len_keep = int(self.num_patches // unit * keep) * unit
        else:
            len_keep = max(1, round(self.num_patches // unit * keep)) * unit
        ids_shuffle = noise.argsort(dim=1, stable=True)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep, slots, count = ids_shuffle[:, :len_keep], None, len_keep
        if patches is not None:
            count = ((patches.sum(1, keepdim=True) // unit * keep).round().clamp(min=1) * unit).clamp(
                max=len_keep
            )
            slots = torch.arange(len_keep, device=noise.device) < count
        mask = (ids_restore >= count).float()
        return mask, ids_restore, ids_keep, slots

    def mask_leads(self, noise, patches):
        """`random_masking`, the same for all leads of a recording: else one would show what another hides."""
        if self.leads == 1:
            return self.random_masking(noise, patches)
        joint = None if patches is None else patches.unflatten(0, (-1, self.leads)).any(1)
        found = self.random_masking(noise, joint)
        mask, ids_restore, ids_keep, slots = (
            None if part is None else part.repeat_interleave(self.leads, 0) for part in found
        )
        return mask, ids_restore, ids_keep, None if slots is None else slots & patches.gather(1, ids_keep)

    def forward_decoder(self, latent, ids_restore, patches=None, slots=None):
        """latent (B, 1 + K, D) -> features of all patches (B, N, E)."""
        tokens = self.decoder_embed(latent)
        visible = tokens[:, 1:]
        mask_token = self.mask_token.to(tokens.dtype)
        if slots is not None:
            visible = torch.where(slots[..., None], visible, mask_token)
        hidden = mask_token.expand(len(tokens), ids_restore.shape[1] - visible.shape[1], -1)
        restored = torch.cat([visible, hidden], dim=1)
        restored = restored.gather(1, ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], restored], dim=1) + self.decoder_pos_embed
        cos, sin = self.rope_decoder(self.rope_ids(tokens.device))
        mask = None if patches is None else F.pad(patches, (1, 0), value=True)
        for block in self.decoder_blocks:
            tokens = block(tokens, cos, sin, mask)
        return self.decoder_norm(tokens)[:, 1:]

    def predict_time(self, features):
        """Decoder features (B, N, E) -> signal (B, signal_len)."""
        grid = features.transpose(1, 2).unflatten(2, self.grid_size)  # (B, E, H, W)
        columns = self.time_reducer(grid)[:, :, 0].transpose(1, 2)  # (B, W, E)
        return self.time_pred(columns).flatten(1)

    def patchify(self, imgs):
        """(B, C, S, L) -> (B, N, C * p_f * p_t), each patch in the order channel, scale, time."""
        b, c, _, _ = imgs.shape
        (h, w), p, q = self.grid_size, self.patch_size_freq, self.patch_size_time
        return imgs.reshape(b, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * p * q)

    def unpatchify(self, patches):
        """The inverse of `patchify`."""
        (h, w), p, q = self.grid_size, self.patch_size_freq, self.patch_size_time
        return (
            patches.reshape(len(patches), h, w, -1, p, q).permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3)
        )

    def forward_loss_spec(self, imgs, pred, mask, real=None):
        """Mean squared error of the hidden patches, averaged over each record and then over records, so that
        a batch in parts gives the same; real (B, L) bool leaves padding out."""
        weights = torch.tensor(self.channel_weights, dtype=imgs.dtype, device=imgs.device).view(1, 3, 1, 1)
        weights = weights.expand(1, 3, self.cwt_scales, self.signal_len)
        if real is not None:
            weights = weights * real[:, None, None]
        weights = self.patchify(weights)  # (1 or B, N, P)
        error = (pred.to(imgs.dtype) - self.patchify(imgs)).square()
        loss = torch.linalg.vecdot(error, weights) / weights.sum(-1).clamp(min=1e-6)  # (B, N)
        mask = mask * (weights.sum(-1) > 0)
        return self.mean_of_rows((loss * mask).sum(1) / (mask.sum(1) + 1e-6), real)

    def forward_loss_time(self, x, pred, mask, real=None):
        """Mean squared error of the normalised signal x (B, L), averaged in the same way."""
        weights = torch.ones_like(x) if real is None else real.to(x.dtype)
        if self.masked_time_loss:
            hidden = mask.unflatten(1, self.grid_size).mean(1)  # (B, W) hidden fraction
            weights = weights * hidden.repeat_interleave(self.patch_size_time, dim=1)
        rows = ((pred.to(x.dtype) - x).square() * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
        return self.mean_of_rows(rows, real)

    def mean_of_rows(self, rows, real):
        """Mean over recordings and, where there are several, over the leads that are there."""
        if self.leads == 1 or real is None:
            return rows.mean()
        there = real.any(1).to(rows.dtype)
        return (rows * there).sum() / there.sum().clamp(min=1)

    def forward_losses(self, x, noise=None, real=None) -> dict:
        """x (B, L) or (B, 1, L), in any unit -> loss, loss_spec, loss_time, mask (B, N) with 1 = hidden,
        pred_spec (B, N, 3 * p_f * p_t), pred_time (B, L), imgs (B, 3, S, L), signal (B, L) normalised.

        noise (B, N) in [0, 1): fixes the masks; drawn here if absent. real (B, L) bool: one run of samples
        that are signal; the rest is padding and left out of statistics, attention and losses.
        """
        imgs, signal, real = self.images(x, real)
        patches = self.real_patches(real)
        if self.mask_ratio == 0:
            latent = self.forward_encoder(imgs, signal, patches)
            slots, ids_restore = (
                patches,
                torch.arange(self.num_patches, device=imgs.device).expand(len(imgs), -1),
            )
            mask = torch.zeros(ids_restore.shape, device=imgs.device)
        else:
            if noise is None:
                noise = torch.rand(len(imgs) // self.leads, self.num_patches, device=imgs.device)
            mask, ids_restore, ids_keep, slots = self.mask_leads(noise.to(imgs.device), patches)
            latent = self.forward_encoder(imgs, signal, patches, ids_keep, slots)
        features = self.forward_decoder(latent, ids_restore, patches, slots)
        pred_spec, pred_time = self.decoder_pred_spec(features), self.predict_time(features)
        loss_spec = self.forward_loss_spec(imgs, pred_spec, mask, real)
        loss_time = self.forward_loss_time(signal, pred_time, mask, real)
        losses = dict(loss_spec=loss_spec, loss_time=loss_time)
        losses["loss"] = loss_spec + self.time_loss_weight * loss_time
        return losses | dict(mask=mask, pred_spec=pred_spec, pred_time=pred_time, imgs=imgs, signal=signal)

    def forward(self, x, noise=None, real=None, details: bool = False):
        """(loss, pred_spec, pred_time, imgs), as upstream; with `details` the dictionary of `forward_losses`,
        for training loops: they call the model through a wrapper that knows `forward` alone."""
        out = self.forward_losses(x, noise, real)
        return out if details else (out["loss"], out["pred_spec"], out["pred_time"], out["imgs"])
