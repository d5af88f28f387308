"""Attention rows without attention matrices: SDPA for the model, and beside it only what F-LMM reads.

`output_attentions=True` keeps layers x heads x S x S numbers; the mask head reads the rows of the phrase
tokens and the columns of the image tokens. `rows_attention` computes exactly these, merges them per phrase
and drops the rest.
"""

from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.errors import UserError

NAME = "flmm_rows"  # the attention implementation to set on the text part of a base


def rows_of_phrases(phrase_of_row) -> list:
    """phrase_of_row (R,) with values 0..n-1 -> for each phrase the numbers of its rows, a LongTensor.

    Waits for the device: called once a pass, not in every layer.
    """
    parts = [(phrase_of_row == k).nonzero().flatten() for k in range(int(phrase_of_row.max()) + 1)]
    if empty := [k for k, part in enumerate(parts) if not len(part)]:
        raise ValueError(f"phrase {empty[0]} has no token")
    return parts


def merge_rows(rows, phrases, merge="mean"):
    """rows (H, R, N) -> (H, n, N): mean or max over the rows of each phrase. phrases: the number (R,) of the
    phrase of each row, or what `rows_of_phrases` makes of it."""
    parts = rows_of_phrases(phrases) if torch.is_tensor(phrases) else phrases
    parts = [rows.index_select(1, part) for part in parts]
    return torch.stack([part.mean(1) if merge == "mean" else part.amax(1) for part in parts], dim=1)


@dataclass
class AttentionRows:
    """What to keep of one forward pass, and what was kept.

    rows, phrases, columns: one LongTensor per sample of the batch: token positions of the phrase tokens (R,),
    phrase number of each (R,), token positions of the image (N,). maps: after the pass one list per layer
    with one (H, n, N) float32 tensor per sample.
    """

    rows: list
    phrases: list
    columns: list
    merge: str = "mean"
    maps: list = field(default_factory=list)

    def __post_init__(self):
        self.parts = [rows_of_phrases(phrases) for phrases in self.phrases]

    def record(self, query, key, attention_mask, scaling):
        """query (B, H, Q, D), key (B, KV, K, D), attention_mask (B or 1, 1 or H, Q, K) bool, additive or
        None = causal, K = Q."""
        heads, kv_heads = query.shape[1], key.shape[1]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = []
        for b, (rows, parts, columns) in enumerate(zip(self.rows, self.parts, self.columns)):
            # grouped heads: (KV, groups * R, D) against the KV keys, so that no key is repeated
            q = query[b][:, rows].reshape(kv_heads, -1, query.shape[-1])
            scores = (q @ key[b].transpose(1, 2)).view(heads, len(rows), -1).float() * scaling
            if attention_mask is None:
                allowed = torch.arange(key.shape[2], device=rows.device) <= rows[:, None]
                scores = scores.masked_fill(~allowed, float("-inf"))
            else:
                mask = attention_mask[b % len(attention_mask)][:, rows, : key.shape[2]]
                scores = (
                    scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
                )
            # softmax over all columns, but only the image's are ever normalised and kept
            exponents = scores - scores.amax(-1, keepdim=True)
            exponents = exponents.exp_()
            kept = exponents[..., columns] / exponents.sum(-1, keepdim=True)
            layer.append(merge_rows(kept, parts, self.merge))
        self.maps.append(layer)


# What may stand in an attention call beside query, key, value and mask and changes nothing that is attended:
# lengths of packed texts, which SDPA does not read, and inputs of the model that travel along. Whatever else
# holds numbers (soft-capping, sinks, biases, chosen blocks) may change it, so it is refused.
HARMLESS = {"dropout", "sliding_window", "position_ids", "cache_position", "position_embeddings"}
HARMLESS |= {"past_key_values", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
HARMLESS |= {"mm_token_type_ids", "token_type_ids", "image_sizes", "image_grid_thw", "logits_to_keep"}


def attended(module, query, key, attention_mask, is_causal=None):
    """(keys, mask) that SDPA really uses: without a mask it is causal only if the module says so.

    The mask stays None for the plain causal case of equally many queries and keys.
    """
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None:
        return key, attention_mask
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if queries == 1 or not causal:  # one query, or every query, sees all there is
        return key, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device).expand(1, 1, queries, keys)
    return key[:, :, :queries], None  # a cache that is allocated ahead holds nothing behind the queries yet


def rows_attention(
    module, query, key, value, attention_mask, attention_rows: AttentionRows = None, scaling=None, **kwargs
):
    """Attention function of transformers 5: SDPA, plus `attention_rows.record` where `model(...,
    attention_rows=)` is given. UserError for a model whose attention is more than a softmax under a mask."""
    kwargs.pop("output_attentions", None)  # SDPA would warn about it
    idle = (type(None), bool, str)
    if strange := [n for n, value in kwargs.items() if n not in HARMLESS and not isinstance(value, idle)]:
        raise UserError(
            f"{type(module).__name__} attends with {strange[0]}, which SDPA does not know; read this base "
            "with --attention eager"
        )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_rows is not None:
        key, mask = attended(module, query, key, attention_mask, kwargs.get("is_causal"))
        attention_rows.record(query, key, mask, scaling)
    return output, None


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it no mask is built at all
