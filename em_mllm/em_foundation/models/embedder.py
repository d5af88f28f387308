"""Tokens of a signal: patches of IQ, a class token and a token for the sampling rate."""

import math

import torch
from torch import nn

from em_mllm.em_foundation.models.configuration_em import SiTMAEConfig


class TimestepEmbedder(nn.Module):
    """Sinusoids of a scalar, then Linear - SiLU - Linear (upstream TimestepEmbedder).

    t (N,) -> (N, hidden_size). Phases are computed in float64: at 20e6 a float32 phase is off by up to 0.8
    rad.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
        """(N,) -> (N, dim) float32: cosines, then sines, of t at dim // 2 geometric frequencies; one zero if
        dim is odd."""
        half = dim // 2
        frequencies = torch.exp(
            -math.log(max_period) / half * torch.arange(half, dtype=torch.float64, device=t.device)
        )
        phase = t.double()[:, None] * frequencies[None]
        return nn.functional.pad(torch.cat([phase.cos(), phase.sin()], -1), (0, dim % 2)).float()

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(
            self.timestep_embedding(t, self.frequency_embedding_size).to(self.mlp[0].weight.dtype)
        )


def sample_id_matrix(sample_ids_seq, length: int, device=None) -> torch.Tensor:
    """List of B id vectors (one id per valid token of the row), or a (B, M) tensor with -1 at padding -> (B,
    length) int64."""
    if isinstance(sample_ids_seq, torch.Tensor):
        return sample_ids_seq.to(device)
    out = torch.full((len(sample_ids_seq), length), -1, dtype=torch.int64)
    for row, ids in enumerate(sample_ids_seq):
        if len(ids) > length:
            raise ValueError(
                f"sample_ids_seq[{row}] has {len(ids)} ids for a row of {length} tokens; pack fewer signals "
                "into the row"
            )
        out[row, : len(ids)] = ids
    return out.to(device)


def gen_attn_mask(sample_ids: torch.Tensor) -> torch.Tensor:
    """(B, M) ids, -1 at padding -> (B, M, M) bool: True where both tokens are valid and belong to the same
    sample."""
    return (sample_ids[:, :, None] == sample_ids[:, None, :]) & (sample_ids >= 0)[:, :, None]


def mae_scores(
    sample_ids: torch.Tensor, num_special: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Scores that decide which tokens stay visible: (B, M) float32, the lowest are kept.

    cls and sampling-rate tokens 0, the other tokens of each sample an even ramp over [0, 1] in random order
    (so that every sample keeps the same share), row padding +inf. As upstream; `generator` fixes the draw.
    """
    scores = torch.full(sample_ids.shape, float("inf"))
    for row, ids in enumerate(sample_ids.cpu()):
        valid = ids[ids >= 0]
        start = 0
        for length in torch.unique_consecutive(valid, return_counts=True)[1].tolist():
            ramp = torch.cat([torch.zeros(num_special - 1), torch.linspace(0, 1, length - num_special + 1)])
            shuffled = num_special + torch.randperm(length - num_special, generator=generator)
            scores[row, start : start + length] = torch.cat([ramp[:num_special], ramp[shuffled]])
            start += length
    return scores


def tokens_kept(sample_ids: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """How many tokens of each row stay visible: (B, M) sample ids, -1 at padding -> (B,) int64.

    2 S + (V - 2 S)(1 - mask_ratio), truncated, for S samples and V valid tokens: the 2 stands there with and
    without a sampling-rate token, as upstream.
    """
    valid = (sample_ids >= 0).sum(1)
    samples = torch.tensor([len(torch.unique(row[row >= 0])) for row in sample_ids], device=valid.device)
    return 2 * samples + ((valid - 2 * samples) * (1 - mask_ratio)).to(torch.int64)


class SiTMAEEmbeddings(nn.Module):
    """Patch vectors to token embeddings, with or without hiding most of them (upstream SiTMAEEmbeddings)."""

    def __init__(self, config: SiTMAEConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(config.num_positions, config.hidden_size))
        self.projection = nn.Linear(config.num_channels * config.patch_size[0], config.hidden_size)
        if config.stem == "overlap":
            self.overlap = nn.Linear(2 * self.projection.in_features, config.hidden_size, bias=False)
        # in the state dict even without use_fs, as upstream
        self.fs_embedder = TimestepEmbedder(config.hidden_size)

    def neighbours(self, patches, patch_positions, visible=None) -> torch.Tensor:
        """(B, M, 2*C*P): the patches before and behind each IQ patch in its own signal, zero where there is
        none, or where it is not visible."""
        special = self.config.num_special
        if visible is not None:
            patches = patches * visible[..., None]
        before = nn.functional.pad(patches, (0, 0, 1, -1)) * (patch_positions > special)[..., None]
        later = nn.functional.pad(patch_positions, (-1, 1)) == patch_positions + 1
        behind = nn.functional.pad(patches, (0, 0, -1, 1)) * (later & (patch_positions >= special))[..., None]
        return torch.cat([before, behind], -1)

    def embed(self, patches, patch_positions, visible=None) -> torch.Tensor:
        """patches (B, M, C*P), patch_positions (B, M): 0 = cls (and padding), 1 = sampling rate, then IQ ->
        (B, M, D). visible (B, M) bool: which patches others may see, by default all."""
        if patches.shape[-1] != self.projection.in_features:
            raise ValueError(
                f"patches have {patches.shape[-1]} values, the encoder takes {self.projection.in_features}; "
                "check patch_size"
            )
        if (highest := int(patch_positions.max())) >= len(self.position_embeddings):
            raise ValueError(
                f"position {highest} is beyond the table of {len(self.position_embeddings)}; signals longer "
                f"than max_seq_len={self.config.max_seq_len[0]} points must be cut"
            )
        patches = patches.to(self.projection.weight.dtype)
        h = self.projection(patches)
        if self.config.stem == "overlap":
            h = h + self.overlap(self.neighbours(patches, patch_positions, visible))
        h = torch.where((patch_positions == 0)[..., None], self.cls_token.to(h.dtype), h)
        if self.config.use_fs:
            is_fs = patch_positions == 1
            rates, which = torch.unique(patches[..., 0][is_fs], return_inverse=True)  # few rates, many tokens
            h = h.masked_scatter(is_fs[..., None], self.fs_embedder(rates)[which].to(h.dtype))
        return h + self.position_embeddings[patch_positions]

    def choose(self, sample_ids: torch.Tensor, scores: torch.Tensor):
        """Which tokens stay visible, those of lowest score of each row; `tokens_kept` says how many.

        sample_ids and scores (B, M). Returns ids_keep (B, Kmax) with M at padding, ids_restore (B, M),
        mae_mask (B, M) float.
        """
        rows, length = sample_ids.shape
        len_keep = tokens_kept(sample_ids, self.config.mask_ratio)
        order = scores.argsort(dim=1, stable=True)
        rank = torch.arange(length, device=scores.device).expand(rows, -1)
        is_kept = rank < len_keep[:, None]
        # kept ids ascending, then `length` as filler
        head = torch.where(is_kept, order, length).sort(1).values
        order = torch.where(is_kept, head, order)
        ids_restore = order.argsort(dim=1, stable=True)
        mae_mask = ((ids_restore >= len_keep[:, None]) & (sample_ids >= 0)).to(torch.float32)
        return head[:, : int(len_keep.max())], ids_restore, mae_mask

    def hide(self, h: torch.Tensor, sample_ids: torch.Tensor, scores: torch.Tensor):
        """Keep the tokens h (B, M, D) that `choose` says.

        Returns visible (B, Kmax, D) zero padded, visible_ids (B, Kmax) sample ids with -1 at padding, and
        ids_keep, ids_restore, mae_mask of `choose`.
        """
        ids_keep, ids_restore, mae_mask = self.choose(sample_ids, scores)
        filler = ids_keep == sample_ids.shape[1]
        index = ids_keep.masked_fill(filler, 0)
        visible = h.gather(1, index[..., None].expand(-1, -1, h.shape[-1])).masked_fill(filler[..., None], 0)
        visible_ids = sample_ids.gather(1, index).masked_fill(filler, -1)
        return visible, visible_ids, ids_keep, ids_restore, mae_mask
