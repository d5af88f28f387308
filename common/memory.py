"""--dry-run: how much memory a run takes on each GPU, from one forward and backward pass of its first batch.

Nothing is written. The pass runs where the script runs, with the batch size, lengths, precision and
checkpointing of the command line; hide the GPUs (CUDA_VISIBLE_DEVICES=) for a model that fits on none.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from common.sharding import layer_classes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live; `peak` is the most at once.

    known: tensors that were there before and do not count.
    """

    def __init__(self, known):
        super().__init__()
        self.seen, self.live, self.peak = WeakIdKeyDictionary(), 0, 0
        for tensor in known:
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = True
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return result

    def _gone(self, size):
        self.live -= size


def memory_table(weights: int, trained: int, peak: int, layer: int, root: int, gpus: int, copies: int = 4):
    """Bytes per GPU as {mode: {"weights", "gradients", "optimizer", "activations", "together"}}.

    weights: bytes of all parameters. trained: number of trained ones. peak: most bytes at once in a forward
    and backward pass, gradients included. layer, root: bytes of the largest layer, which is whole while it
    computes (and the next one while it is fetched), and of what belongs to no layer, which stays whole.
    copies: bytes of one number of a gradient and of each of AdamW's two states.
    """
    gradients, states = copies * trained, 2 * copies * trained
    activations = max(peak - gradients, 0)
    gathered = min(weights, weights // gpus + root + 2 * layer)

    def row(weights, gradients, states, step):
        # The optimizer's step needs its own room, when the activations have gone.
        together = weights + states + max(activations + gradients, gradients + step)
        names = ("weights", "gradients", "optimizer", "activations", "together")
        return dict(zip(names, (weights, gradients, states, activations, together)))

    parts = [value // gpus for value in (gradients, states, copies * trained)]
    sharded = row(gathered, *parts)
    whole = row(weights, gradients, states, copies * trained)
    # DDP's buckets are copies of the gradients
    doubled = row(weights, 2 * gradients, states, copies * trained)
    modes = {"one GPU": whole, "DDP": doubled}
    return modes | {f"FSDP2, {gpus} GPUs": sharded, f"ZeRO-3, {gpus} GPUs": sharded}


def table_of(model, peak: int, processes: int) -> dict:
    """`memory_table` of a model whose pass took `peak` bytes."""
    bytes_of = lambda parameters: sum(p.numel() * p.element_size() for p in parameters)
    classes = layer_classes(model)
    layers = [list(m.parameters()) for m in model.modules() if type(m).__name__ in classes]
    inside = {p for layer in layers for p in layer}
    weights = bytes_of(model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layer = max(map(bytes_of, layers), default=0)
    return memory_table(weights, trained, peak, layer, weights - bytes_of(inside), max(2, processes))


def lines_of(table: dict) -> list[str]:
    """The table as text, in GiB."""
    columns = list(next(iter(table.values())))
    text = [f"{'GiB on each GPU':20}" + "".join(f"{name:>13}" for name in columns)]
    for mode, row in table.items():
        text.append(f"{mode:20}" + "".join(f"{row[name] / 2**30:13.3f}" for name in columns))
    return text
