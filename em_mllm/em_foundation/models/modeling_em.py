"""SiT-MAE: a transformer over patches of raw IQ, trained by hiding three quarters of them (upstream
modeling_em.py).

Inputs of every model (B rows of M tokens, several signals may share a row):
    patches          (B, M, C*P) float, channel-major patch vectors I0..I(P-1), Q0..Q(P-1)
    patch_positions  (B, M) int64, per signal 0 = cls, 1 = sampling rate (if use_fs), then the IQ patches;
                     0 at row padding
    sample_ids_seq   list of B vectors with one signal id per valid token, or (B, M) with -1 at padding
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from em_mllm.em_foundation.models.block import SiTMAELayer, run_layers, uses_varlen
from em_mllm.em_foundation.models.configuration_em import (
    REGRESSION_TASKS,
    SPECTRUM_BANDS,
    SPECTRUM_POWERS,
    SiTMAEConfig,
)
from em_mllm.em_foundation.models.dataclass import (
    MultiTaskOutput,
    SiTMAEDecoderOutput,
    SiTMAEForPreTrainingOutput,
    SiTMAEModelOutput,
)
from em_mllm.em_foundation.models.embedder import (
    SiTMAEEmbeddings,
    TimestepEmbedder,
    gen_attn_mask,
    mae_scores,
    sample_id_matrix,
)

CONTRAST_TEMPERATURE = 0.2


class SiTMAEPreTrainedModel(PreTrainedModel):
    config_class = SiTMAEConfig
    base_model_prefix = "sit"
    main_input_name = "patches"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["SiTMAELayer"]  # what FSDP2 shards as one piece

    def _init_weights(self, module):
        """Upstream's rule: Linear N(0, initializer_range) with zero bias, LayerNorm 1 and 0, position tables
        Xavier-uniform."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, SiTMAEEmbeddings):
            self._init_positions(module.position_embeddings)
            nn.init.normal_(module.cls_token, std=0.02)
            if self.config.stem == "overlap":
                nn.init.zeros_(module.overlap.weight)  # begins as upstream's
        elif isinstance(module, TimestepEmbedder):
            nn.init.normal_(module.mlp[0].weight, std=0.02)
            nn.init.normal_(module.mlp[2].weight, std=0.02)
        elif isinstance(module, SiTMAEDecoder):
            self._init_positions(module.decoder_position_embeddings)
            nn.init.normal_(module.mask_token, std=0.02)

    @torch.no_grad()
    def _init_positions(self, table):
        if self.config.position_init == "xavier":
            nn.init.xavier_uniform_(table)
        else:
            sinusoids = TimestepEmbedder.timestep_embedding(torch.arange(len(table)), table.shape[1])
            table.copy_(sinusoids * self.config.initializer_range)  # no louder than the patches


class SiTMAEEncoder(nn.Module):
    def __init__(self, config: SiTMAEConfig):
        super().__init__()
        self.layer = nn.ModuleList(
            SiTMAELayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False

    def forward(self, hidden_states, attn_mask, sample_ids, **options):
        return run_layers(self, self.layer, hidden_states, attn_mask, sample_ids, **options)


class SiTMAEModelWithoutMask(SiTMAEPreTrainedModel):
    """The encoder as a feature extractor.

    last_hidden_state (B, M, D) has passed the final LayerNorm; upstream skips it on the eager path (its
    module stays untrained there): apply_layernorm=False gives that. hidden_states: embedding output and each
    layer's output, never normalised. options: head_mask, (heads,) or (layers, heads), output_attentions and
    output_hidden_states.
    """

    def __init__(self, config: SiTMAEConfig):
        super().__init__(config)
        self.embeddings = SiTMAEEmbeddings(config)
        self.encoder = SiTMAEEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def needs_mask(self, h, sample_ids, head_mask=None, output_attentions=False, **_) -> bool:
        """Not where every row is one signal, nor where the variable-length kernel serves all layers."""
        config = self.config
        dropout = config.attention_probs_dropout_prob if self.training else 0.0
        if config.attention_type == "fa2" and uses_varlen(h, dropout, head_mask, output_attentions):
            return False
        return bool((sample_ids != sample_ids[:, :1]).any()) or bool((sample_ids < 0).any())

    def forward(
        self, samples, patch_positions, sample_ids_seq, apply_layernorm=True, return_dict=True, **options
    ):
        sample_ids = sample_id_matrix(sample_ids_seq, samples.shape[1], samples.device)
        h = self.embeddings.embed(samples, patch_positions)
        attn_mask = None
        if self.needs_mask(h, sample_ids, **options):
            attn_mask = gen_attn_mask(sample_ids)
        h, states, attentions = self.encoder(h, attn_mask, sample_ids, **options)
        out = SiTMAEModelOutput(
            last_hidden_state=self.layernorm(h) if apply_layernorm else h,
            hidden_states=states,
            attentions=attentions,
        )
        return out if return_dict else out.to_tuple()


class SiTMAEModel(SiTMAEModelWithoutMask):
    """The encoder over the visible tokens only; same weights as SiTMAEModelWithoutMask.

    noise: (B, M) scores as mae_scores makes them; drawn from torch's generator when absent.
    """

    def forward(self, patches, patch_positions, sample_ids_seq, noise=None, return_dict=True, **options):
        sample_ids = sample_id_matrix(sample_ids_seq, patches.shape[1], patches.device)
        if noise is None:
            noise = mae_scores(sample_ids, self.config.num_special)
        noise, visible = noise.to(patches.device), None
        if self.config.stem == "overlap":  # or a visible token would show what is hidden beside it
            visible = self.embeddings.choose(sample_ids, noise)[2] == 0
        h = self.embeddings.embed(patches, patch_positions, visible)
        h, visible_ids, ids_keep, ids_restore, mae_mask = self.embeddings.hide(h, sample_ids, noise)
        attn_mask = gen_attn_mask(visible_ids)
        h, states, attentions = self.encoder(h, attn_mask, visible_ids, **options)
        out = SiTMAEModelOutput(
            self.layernorm(h), mae_mask, ids_restore, ids_keep, attn_mask, states, attentions
        )
        return out if return_dict else out.to_tuple()


class SiTMAEDecoder(nn.Module):
    """Fills the hidden places with one learned vector and predicts every patch."""

    def __init__(self, config: SiTMAEConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        self.decoder_position_embeddings = nn.Parameter(torch.zeros(config.num_positions, size))
        self.decoder_layers = nn.ModuleList(
            SiTMAELayer(config, size, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(size, config.patch_size[0] * config.num_channels)
        if config.spectrum_weight:
            self.spectrum_pred = nn.Linear(config.hidden_size, len(SPECTRUM_POWERS) * SPECTRUM_BANDS)
        if config.contrast_weight:
            width = config.hidden_size
            self.contrast_pred = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.gradient_checkpointing = False

    def forward(self, latent, ids_keep, patch_positions, sample_ids, **options):
        """latent (B, Kmax, D) and ids_keep (B, Kmax), which holds M at filler places -> logits (B, M, C*P).

        Each visible token goes to its own place, row by row. Upstream un-shuffles the padded batch instead,
        which puts filler vectors where the mask token belongs in every row shorter than the longest.
        """
        visible = self.decoder_embed(latent)
        rows, length = sample_ids.shape
        # one spare place takes the filler
        h = self.mask_token.to(visible.dtype).expand(rows, length + 1, -1)
        h = h.scatter(1, ids_keep[..., None].expand_as(visible), visible)[:, :length]
        h = h + self.decoder_position_embeddings[patch_positions]
        attn_mask = gen_attn_mask(sample_ids)
        h, states, attentions = run_layers(self, self.decoder_layers, h, attn_mask, sample_ids, **options)
        return SiTMAEDecoderOutput(self.decoder_pred(self.decoder_norm(h)), states, attentions)


def cls_vectors(encoded, is_cls) -> torch.Tensor:
    """(S, D): what the masked encoder says of each signal. is_cls (B, M): the places of the cls tokens, which
    are never hidden."""
    visible = F.pad(is_cls, (0, 1)).gather(1, encoded.ids_keep)  # the filler is none
    return encoded.last_hidden_state[visible]


class SiTMAEForPreTraining(SiTMAEPreTrainedModel):
    """Masked autoencoder: loss = mean squared error of the hidden patches (standardised per patch with
    norm_pix_loss).

    spectrum (B, M, 128): with spectrum_weight, the log spectra of each whole signal in the row of its cls
    token; the encoder's cls output, which has seen the visible patches alone, predicts them, and their mean
    squared error joins the loss. target (B, M, C*P): what the hidden patches are to become where that is not
    `patches`, as the signal without its noise. second (B, M, C*P): with contrast_weight, another view of the
    same signals, whose visible patches are those that the first view hides, as far as mask_ratio allows; the
    cls tokens are to find their own signal among those of the batch (InfoNCE, both ways). options: head_mask,
    output_attentions and output_hidden_states of the encoder.
    """

    def __init__(self, config: SiTMAEConfig):
        super().__init__(config)
        self.sit = SiTMAEModel(config)
        self.decoder = SiTMAEDecoder(config)
        self.post_init()

    def forward(
        self,
        patches,
        patch_positions,
        sample_ids_seq,
        noise=None,
        spectrum=None,
        target=None,
        second=None,
        return_dict=True,
        **options,
    ):
        sample_ids = sample_id_matrix(sample_ids_seq, patches.shape[1], patches.device)
        if noise is None:
            noise = mae_scores(sample_ids, self.config.num_special).to(patches.device)
        encoded = self.sit(patches, patch_positions, sample_ids, noise, **options)
        logits = self.decoder(encoded.last_hidden_state, encoded.ids_keep, patch_positions, sample_ids).logits
        target = patches if target is None else target
        if self.config.norm_pix_loss:
            spread = (target.var(-1, keepdim=True) + 1e-6).sqrt()
            target = (target - target.mean(-1, keepdim=True)) / spread
        error = ((logits - target) ** 2).mean(-1)
        # mask_ratio 0 hides nothing: 0, not nan
        hidden_loss = (error * encoded.mae_mask).sum() / encoded.mae_mask.sum().clamp(min=1)
        loss, spectrum_loss, contrast_loss = hidden_loss, None, None
        is_cls = (patch_positions == 0) & (sample_ids >= 0)
        if spectrum is not None and self.config.spectrum_weight:
            guess = self.decoder.spectrum_pred(cls_vectors(encoded, is_cls))
            spectrum_loss = F.mse_loss(guess, spectrum[is_cls].to(guess.dtype))
            loss = loss + self.config.spectrum_weight * spectrum_loss
        if second is not None and self.config.contrast_weight:
            is_iq = (patch_positions >= self.config.num_special) & (sample_ids >= 0)
            noise = noise.to(patches.device)
            other = self.sit(second, patch_positions, sample_ids, torch.where(is_iq, 1 - noise, noise))
            one, two = (
                F.normalize(self.decoder.contrast_pred(cls_vectors(view, is_cls)).float(), dim=1)
                for view in (encoded, other)
            )
            alike, own = one @ two.T / CONTRAST_TEMPERATURE, torch.arange(len(one), device=one.device)
            contrast_loss = (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2
            loss = loss + self.config.contrast_weight * contrast_loss
        names = ("mae_mask", "ids_restore", "attn_mask", "hidden_states", "attentions")
        kept = {name: getattr(encoded, name) for name in names}
        out = SiTMAEForPreTrainingOutput(loss, hidden_loss, spectrum_loss, contrast_loss, logits, **kept)
        return out if return_dict else out.to_tuple()


def encoder_of(config: SiTMAEConfig):
    """The encoder under a head: this file's, or the convolutional one."""
    from em_mllm.em_foundation.models.modeling_cnn import make_encoder  # which builds on this file

    return make_encoder(config)


class SiTMAEHeadModel(SiTMAEPreTrainedModel):
    """The encoder `sit` with heads on its un-normalised output, as upstream. A subclass says what they
    predict and what that costs. options: as of SiTMAEModelWithoutMask."""

    def predict(self, hidden_states):
        """(B, M, D) -> logits of every token."""
        raise NotImplementedError

    def cost(self, logits, labels, patch_positions, sample_ids):
        """-> loss, and {task: unweighted loss} or None."""
        raise NotImplementedError

    def per_signal(self, per_token, patch_positions, sample_ids):
        """per_token (B, M, ...) -> (S, ...), one row per signal in the order of the packed rows, read as
        config.pooling says."""
        is_cls = (patch_positions == 0) & (sample_ids >= 0)
        if self.config.pooling == "cls":
            return per_token[is_cls]
        is_iq = (patch_positions >= self.config.num_special) & (sample_ids >= 0)
        owner = (is_cls.flatten().cumsum(0) - 1)[is_iq.flatten()]  # a signal's tokens follow its cls token
        total = per_token.new_zeros(int(is_cls.sum()), *per_token.shape[2:])
        total = total.index_add(0, owner, per_token[is_iq])
        return total / owner.bincount(minlength=len(total)).reshape(-1, *[1] * (total.dim() - 1))

    def read_out(self, per_token, labels, patch_positions, sample_ids):
        """per_token as it is when labels are per token, (B, M) or (B, M, 1), as upstream; else per signal."""
        if labels.shape[:2] == per_token.shape[:2]:
            return per_token
        return self.per_signal(per_token, patch_positions, sample_ids)

    def forward(self, samples, patch_positions, sample_ids_seq, labels=None, return_dict=True, **options):
        sample_ids = sample_id_matrix(sample_ids_seq, samples.shape[1], samples.device)
        encoded = self.sit(samples, patch_positions, sample_ids, apply_layernorm=False, **options)
        logits = self.predict(encoded.last_hidden_state)
        loss = details = None
        if labels is not None:
            loss, details = self.cost(logits, labels, patch_positions, sample_ids)
        out = MultiTaskOutput(loss, logits, encoded.hidden_states, encoded.attentions, details)
        return out if return_dict else out.to_tuple()


class SiTMAEForClassification(SiTMAEHeadModel):
    """One linear head.

    labels: one per signal (S,) in the order of the packed rows, read by config.pooling, or one per token (B,
    M) as upstream; multi-label and regression targets have a last axis of num_labels. logits: (B, M,
    num_labels) always.
    """

    def __init__(self, config: SiTMAEConfig):
        super().__init__(config)
        self.sit = encoder_of(config)
        classes = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, classes) if classes > 0 else nn.Identity()
        self.post_init()

    def predict(self, hidden_states):
        return self.classifier(hidden_states)

    def cost(self, logits, labels, patch_positions, sample_ids):
        read = self.read_out(logits, labels, patch_positions, sample_ids)
        kind = self.config.problem_type
        if kind == "regression" or not kind and self.config.num_labels == 1:
            value = read.squeeze(-1)
            return F.mse_loss(value, labels.to(read.dtype).reshape(value.shape)), None
        if kind == "single_label_classification" or not kind and not labels.is_floating_point():
            return F.cross_entropy(read.flatten(0, -2), labels.flatten().long()), None
        return F.binary_cross_entropy_with_logits(read, labels.to(read.dtype)), None


class SiTForMultiTask(SiTMAEHeadModel):
    """A classifier and five regression heads on one encoder; loss = sum of w_k / sum(w) * loss_k over the
    labels given.

    labels: {"classification": ids, "pulse_width": values, ...}, per signal or per token as in
    SiTMAEForClassification. Cross-entropy for the classes, mean absolute error for the rest; a regression
    value of nan means "not known" and is left out.
    """

    def __init__(self, config: SiTMAEConfig):
        super().__init__(config)
        self.sit = encoder_of(config)
        size = config.hidden_size
        self.classifier = nn.Linear(size, config.num_labels)
        for name in REGRESSION_TASKS:
            inner = (nn.Linear(size, 2 * size), nn.LayerNorm(2 * size), nn.Dropout(0.25), nn.ReLU())
            setattr(self, f"regression_head_{name}", nn.Sequential(*inner, nn.Linear(2 * size, 1)))
        self.post_init()

    def predict(self, hidden_states):
        logits = {"classification": self.classifier(hidden_states)}
        for name in REGRESSION_TASKS:
            logits[name] = getattr(self, f"regression_head_{name}")(hidden_states)
        return logits

    def cost(self, logits, labels, patch_positions, sample_ids):
        losses = {}
        for name, target in labels.items():
            read = self.read_out(logits[name], target, patch_positions, sample_ids)
            losses[name] = self.task_loss(name, read, target)
        return self.weigh(losses), losses

    def weigh(self, losses: dict) -> torch.Tensor:
        """Weighted mean of {task: loss}, by the configuration's label_weights."""
        weights = {name: float((self.config.label_weights or {}).get(name, 1.0)) for name in losses}
        return sum(weights[name] / sum(weights.values()) * value for name, value in losses.items())

    @staticmethod
    def task_loss(name, logits, target):
        if name == "classification":
            return F.cross_entropy(logits.flatten(0, -2), target.flatten().long())
        target = target.to(logits.dtype).reshape(logits.shape)
        known = torch.isfinite(target)
        return ((logits - target.nan_to_num())[known].abs()).sum() / known.sum().clamp(min=1)
