"""Epilogues: functions from accumulator values to the values that are stored.

A matrix-multiply accumulator, whatever the architecture, gives each thread pairs of neighbours in
blocks of eight columns: two columns of a row, or, of a transposed tile, two rows of a column. An
epilogue therefore works on *units*: one or two such blocks of the accumulator, the blocks of a
loaded tile C that belong to them, and the blocks of D and Aux that come out. A thread holds one
pair per block; :meth:`Epilogue.unit` maps the pairs of one unit.

Gated tensors keep eight gate columns and the eight up columns that belong to them side by side, so
a unit has gate and up of the same columns in the same thread and needs no data from its neighbours.
"""

from sonic.device.activation import activate, activate_grad
from sonic.device.blocks import EpilogueBlocks
from sonic.runtime.problem import EpilogueKind, Problem


class Epilogue(EpilogueBlocks):
    """The arithmetic of one epilogue."""

    def unit(self, acc, c, bias, score):
        """Values of one unit: lists of pairs per block.

        :param acc: accumulator pairs. :param c: pairs of the loaded tile, or ``[]``.
        :param bias: pairs to add to the accumulator, or ``None``. :param score: the pair of the
        values' row scores, or ``None``.
        :returns: ``(D pairs, Aux pairs, the pair of the row sums' increments or None)``.
        """
        kind = self.problem.epilogue
        if bias is not None:
            acc = [
                tuple(a + b for a, b in zip(x, y, strict=True))
                for x, y in zip(acc, bias, strict=True)
            ]
        if kind is EpilogueKind.LINEAR or kind is EpilogueKind.ACCUMULATE:
            return acc, [], None
        if kind is EpilogueKind.ACTIVATION:
            post = tuple(
                activate(self.problem.activation, self.precise, *inputs)
                for inputs in zip(*acc, strict=True)
            )
            return acc, [post], None
        return self._activation_grad(acc[0], c, score)

    def _activation_grad(self, acc, preact, scores):
        grads, posts, sums = [], [], []
        for grad, score, inputs in zip(acc, scores, zip(*preact, strict=True), strict=True):
            post, input_grads = activate_grad(
                self.problem.activation, self.precise, grad * score, *inputs
            )
            grads.append(input_grads)
            posts.append(post * score)
            sums.append(grad * post)
        return list(zip(*grads, strict=True)), [tuple(posts)], tuple(sums)


def make_epilogue(problem: Problem) -> Epilogue:
    """The epilogue of ``problem``, with the number of blocks of each of its tensors."""
    return Epilogue.of(problem)
