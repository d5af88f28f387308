"""What the processes of a run tell each other, however long one of them keeps the others waiting.

NCCL ends a run in which a process waits for ten minutes; preparing data, checking a checkpoint or writing 84
GB can take longer. These calls wait for half a day, on a group of their own (gloo), and for no device. A
process that dies is noticed at once all the same: its launcher ends the others.
"""

from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(hours=12)
_groups = {}  # of each world that this process was in: one, but for tests


def group():
    """The patient group of all processes, made at the first call; None in a run of one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[world]


def from_main(value):
    """The main process's `value`, on all processes."""
    box = [value]
    if group() is not None:
        dist.broadcast_object_list(box, 0, group())
    return box[0]


def from_all(value) -> list:
    """The values of all processes, in the order of their numbers, on each of them."""
    if group() is None:
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group())
    return found


def meet():
    """Wait until every process has come here."""
    from_all(None)
