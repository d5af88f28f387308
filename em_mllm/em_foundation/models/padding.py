"""From padded rows to a flat list of valid tokens and back (the layout that variable-length attention kernels
take)."""

import torch


def unpad_input(hidden_states: torch.Tensor, sample_ids: torch.Tensor):
    """hidden_states (B, M, D), sample_ids (B, M) with -1 at padding.

    Returns tokens (total, D), indices (total,) into the flattened rows, cu_seqlens (samples + 1,) int32 and
    the longest sample. A sample is a run of equal ids inside one row.
    """
    flat = sample_ids.flatten()
    indices = torch.nonzero(flat >= 0).flatten()
    row = indices // sample_ids.shape[1]
    key = row * (flat.max() + 1) + flat[indices]
    lengths = torch.unique_consecutive(key, return_counts=True)[1]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max())


def pad_input(tokens: torch.Tensor, indices: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Inverse of unpad_input: (total, D) to (rows, length, D), zeros at padding."""
    out = tokens.new_zeros(rows * length, tokens.shape[-1])
    return out.index_copy(0, indices, tokens).unflatten(0, (rows, length))
