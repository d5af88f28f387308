"""What the tests of em_mllm share: the sizes of a tiny encoder, and small files of signals and questions."""

import json

import h5py
import numpy as np


def tiny_sizes(width=16, points=144, patch=16, **more) -> dict:
    """Sizes of an encoder of one layer and of a decoder as small, as config.json holds them; more: others."""
    part = {
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": width,
    }
    decoder = {f"decoder_{name}": size for name, size in part.items()}
    about = {"patch_size": [patch, 1], "max_seq_len": [points, 1], "attention_type": "sdpa"}
    return {**part, **decoder, **about, **more}


def write_h5(path, iq, **more):
    """One file of signals iq (Num, T, 2); more: attributes where they are text or single numbers, else data
    sets."""
    with h5py.File(path, "w") as file:
        file["IQ_data"] = np.asarray(iq)
        for name, value in more.items():
            if np.ndim(value):
                file[name] = value
            else:
                file.attrs[name] = value
    return path


def write_questions(path, rows, encoding="utf-8"):
    """A question file of `rows` [{"question", "answer", "iq_index_in_h5", ...}], which get their numbers as
    ids."""
    records = [{"id": n, **row} for n, row in enumerate(rows)]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding=encoding)
    return path
