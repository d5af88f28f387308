"""Outputs of the encoder models. B rows, M tokens, D hidden size, V values per patch."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class SiTMAEModelOutput(ModelOutput):
    """mae_mask (B, M) is 1 at hidden tokens; ids_keep (B, Kmax) and attn_mask (B, Kmax, Kmax) belong to the
    visible ones."""

    last_hidden_state: torch.Tensor | None = None
    mae_mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    ids_keep: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


@dataclass
class SiTMAEDecoderOutput(ModelOutput):
    """logits (B, M, V): the predicted patch vectors."""

    logits: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


@dataclass
class SiTMAEForPreTrainingOutput(ModelOutput):
    """loss: hidden_loss (mean squared error over hidden patches) + spectrum_weight * spectrum_loss +
    contrast_weight * contrast_loss, where there are these.

    attn_mask: the encoder's (B, Kmax, Kmax).
    """

    loss: torch.Tensor | None = None
    hidden_loss: torch.Tensor | None = None
    spectrum_loss: torch.Tensor | None = None
    contrast_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mae_mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


@dataclass
class MultiTaskOutput(ModelOutput):
    """logits: {task: tensor}; loss_details: {task: unweighted loss}."""

    loss: torch.Tensor | None = None
    logits: dict | torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    loss_details: dict | None = None
