"""A small convolutional encoder under the interface of SiT-MAE: five strided convolutions over I and Q.

It has no upstream and no pre-training; with labels at hand it learns more in the same time than the
transformer. Its cls vector is mean and maximum over time, so that a linear head on it is the CNN baseline of
the study.
"""

import torch
from einops import rearrange
from torch import nn

from em_mllm.em_foundation.models.configuration_em import SiTMAEConfig
from em_mllm.em_foundation.models.dataclass import SiTMAEModelOutput
from em_mllm.em_foundation.models.embedder import sample_id_matrix
from em_mllm.em_foundation.models.modeling_em import SiTMAEModelWithoutMask, SiTMAEPreTrainedModel

KERNELS = (9, 9, 7, 5, 5)  # each with stride 2


def cnn_config(points: int, **fields) -> SiTMAEConfig:
    """Configuration of the convolutional encoder for signals of up to `points` points."""
    sizes = dict(hidden_size=256, num_hidden_layers=len(KERNELS), num_attention_heads=1, intermediate_size=1)
    patch = 2 ** len(KERNELS)
    length = -(-points // patch) * patch + patch
    return SiTMAEConfig(
        encoder="cnn", patch_size=(patch, 1), max_seq_len=(length, 1), use_fs=False, **{**sizes, **fields}
    )


class SignalCNNModel(SiTMAEPreTrainedModel):
    """samples (B, M, C*P): a cls place, then patches of 32 points; sample_ids_seq (B, M), -1 at padding.

    last_hidden_state (B, M, D): [mean, maximum] over the valid time at the cls place, each patch's vector
    twice behind it. One signal a row. Padding is zero at every layer and changes nothing in eval mode; in
    training the batch norms count it.
    """

    supports_gradient_checkpointing = False

    def __init__(self, config: SiTMAEConfig):
        super().__init__(config)
        if config.hidden_size % 8 or config.patch_size[0] != 2 ** len(KERNELS):
            raise ValueError(
                f"hidden_size={config.hidden_size}, patch_size={config.patch_size[0]}: the convolutional "
                f"encoder needs a multiple of 8, and {2 ** len(KERNELS)}"
            )
        width = config.hidden_size // 4
        sizes = [config.num_channels, width // 2, width, width, 2 * width, 2 * width]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, kernel, 2, kernel // 2), nn.BatchNorm1d(b), nn.ReLU())
            for a, b, kernel in zip(sizes, sizes[1:], KERNELS)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module):
        """Convolutions keep torch's own start."""
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def train(self, mode: bool = True):
        """A frozen encoder keeps the statistics of its batch norms, too."""
        return super().train(mode and any(p.requires_grad for p in self.layers.parameters()))

    def forward(self, samples, patch_positions, sample_ids_seq, apply_layernorm=True, **_):
        ids = sample_id_matrix(sample_ids_seq, samples.shape[1], samples.device)
        valid = (ids >= 0)[:, None, 1:]
        h = rearrange(samples[:, 1:], "b k (c p) -> b c (k p)", c=self.config.num_channels)
        h = h.to(self.layers[0][0].weight.dtype)
        for depth, layer in enumerate(self.layers):
            repeat = 2 ** (len(self.layers) - 1 - depth)
            h = layer(h) * valid.repeat_interleave(repeat, 2)
        mean = h.sum(2) / valid.sum(2).clamp(min=1)
        highest = h.masked_fill(~valid, 0).amax(2)  # a ReLU is never below zero
        cls = torch.cat([mean, highest], 1)[:, None]
        tokens = h.transpose(1, 2)
        out = torch.cat([cls, torch.cat([tokens, tokens], 2)], 1)
        return SiTMAEModelOutput(last_hidden_state=self.layernorm(out) if apply_layernorm else out)


def make_encoder(config: SiTMAEConfig) -> SiTMAEPreTrainedModel:
    """The encoder that a configuration describes, with random weights."""
    return SignalCNNModel(config) if config.encoder == "cnn" else SiTMAEModelWithoutMask(config)
