"""The name that upstream's README gives to my_embedding_layer.py."""

from dia_pangu.src.Model.my_embedding_layer import MyEmbedding, lookup

__all__ = ["MyEmbedding", "lookup"]
