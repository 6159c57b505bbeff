"""Counts that outlast a pass, and the question whether a pass repeats one that was counted.

Activation checkpointing runs a forward pass again inside of the backward pass, and what is traced
once runs in both. So the question is asked when a pass runs, in operators that the compiler does
not look into.

Symbols: C columns of the logits, S sequences.
"""

import torch
from torch import Tensor

_MOST = 256  # passes that are known again
_MOST_ENTRIES = 2**21  # that their columns may take together


def is_recomputation() -> bool:
    """True inside a backward pass: a forward that runs there repeats one that ran before.

    Activation checkpointing does that. Whatever counts tokens must not count them again. torch does
    not tell the library's own checkpointing from others', so a first forward that a hook or a
    custom backward runs is taken for a repetition too.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def count(counted: Tensor, load: Tensor) -> None:
    """Add ``load`` (S, C) to ``counted`` (C,), unless this pass repeats another one."""
    (torch.ops.sonic.count if torch.compiler.is_compiling() else _count)(counted, load)


def earlier_load(counted: Tensor, passes: "EarlierLoads", load: Tensor, prob_sum: Tensor) -> Tensor:
    """(C + 1,) ``counted`` before this pass, which is added unless it repeats another one.

    Args:
        counted: (C + 1,) int64 loads and tokens of the passes so far.
        passes: what earlier passes found.
        load: (C + 1,) int64 of this pass. prob_sum: (S, C) of this pass.
    """
    # Of a traced pass everything that is saved for backward may be replaced by a repetition's. An
    # eager pass with a graph keeps its own loads there, and what a repetition finds is not used.
    is_traced = torch.compiler.is_compiling()
    has_graph = torch.is_grad_enabled()
    arguments = (counted, passes.table, passes.num_kept, load, prob_sum.detach())
    operator = torch.ops.sonic.earlier_load if is_traced else _earlier_load
    earlier: Tensor = operator(*arguments, is_traced or not has_graph, has_graph)
    return earlier


class EarlierLoads:
    """The counts that passes found, for the passes that repeat them.

    When a pass is repeated, later ones have been counted, and nothing but its numbers ties the two
    together. So a repetition takes the counts of the pass whose loads and probabilities are nearest
    to its own; among equal ones, that which was taken least often. All of it happens on the device,
    in memory that is taken once: a CUDA graph may contain it.

    Attributes:
        table: (passes, 2 C + 2) int64, by pass: the fp64 numbers it is known by, the C + 1 counts,
            and how often it was taken. Integers, because a module's floats are cast.
        num_kept: () int64, all that were kept; the last ones are in the table.
    """

    def __init__(self, counted: Tensor) -> None:
        columns = counted.shape[0] - 1
        passes = max(16, min(_MOST, _MOST_ENTRIES // columns))
        self.table = counted.new_zeros(passes, 2 * columns + 2)
        self.num_kept = counted.new_zeros(())

    def clear(self) -> None:
        """Forget all passes; to be called when the counts start anew."""
        self.num_kept.zero_()


def _look(load: Tensor, prob_sum: Tensor) -> Tensor:
    """(C,) fp64: loads and probabilities, by which a pass is known again."""
    return load[:-1] + prob_sum.sum(dim=0).double().nan_to_num()


def _find(table: Tensor, num_kept: Tensor, look: Tensor, otherwise: Tensor, taken: bool) -> Tensor:
    """The counts of the pass that looks so; ``otherwise`` where none is kept."""
    columns = look.shape[0]
    distance = (table[:, :columns].view(torch.float64) - look).abs().sum(dim=1)
    is_kept = torch.arange(len(table), device=table.device) < num_kept
    distance = torch.where(is_kept, distance, torch.inf)
    is_near = is_kept & (distance == distance.min())
    times = table[:, -1]
    place = torch.where(is_near, times, torch.iinfo(times.dtype).max).argmin()[None]
    earlier = table[:, columns:-1].index_select(0, place)[0]
    if taken:
        times.index_add_(0, place, torch.ones_like(place))
    return torch.where(num_kept > 0, earlier, otherwise)


# --------------------------------------------------------------------------------- operators
# They write past the version counters of what they count in: no gradient leads there, and a
# checkpoint that saved the counts with the rest of its inputs must not refuse them in backward.


def _count(counted: Tensor, load: Tensor) -> None:
    if not is_recomputation():
        counted.data.add_(load.sum(dim=0))


def _earlier_load(
    counted: Tensor,
    table: Tensor,
    num_kept: Tensor,
    load: Tensor,
    prob_sum: Tensor,
    keep: bool,
    has_graph: bool,
) -> Tensor:
    counted, table, num_kept = counted.data, table.data, num_kept.data
    if is_recomputation():
        # Without a graph this repetition is itself repeated.
        return _find(table, num_kept, _look(load, prob_sum), counted - load, taken=has_graph)
    earlier = counted.clone()
    counted.add_(load)
    if keep:
        look = _look(load, prob_sum).view(torch.int64)
        row = torch.cat([look, earlier, earlier.new_zeros(1)])
        table.index_copy_(0, (num_kept % len(table))[None], row[None])
        num_kept.add_(1)
    return earlier


def _count_fake(counted: Tensor, load: Tensor) -> None:
    pass


def _earlier_load_fake(counted: Tensor, *_: object) -> Tensor:
    return torch.empty_like(counted)


# A CUDA graph that the compiler records (mode="reduce-overhead") would keep the answer of the pass
# that was recorded, and write to its own copy of the table.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define("count(Tensor(a!) counted, Tensor load) -> ()", tags=_TAGS)
# The schema does not say that the first three are written to, on purpose. torch.compile would then
# hand a pass that it repeats copies of what they were, or refuse to repeat it; a repetition has to
# see what they are now. Nothing else that is traced reads them, and their order does not matter
# but for which pass is called the earlier one.
_LIBRARY.define(
    "earlier_load(Tensor counted, Tensor table, Tensor num_kept, Tensor load, Tensor prob_sum,"
    " bool keep, bool has_graph) -> Tensor",
    tags=_TAGS,
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("count", _count, _device)
    _LIBRARY.impl("earlier_load", _earlier_load, _device)
torch.library.register_fake("sonic::count", _count_fake, lib=_LIBRARY)
torch.library.register_fake("sonic::earlier_load", _earlier_load_fake, lib=_LIBRARY)
