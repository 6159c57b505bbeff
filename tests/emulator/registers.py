"""setmaxnreg: the CTA's register pool (PTX ISA 9.7.19.5)."""

from .builder import BLOCK, converged, instruction
from .memory import Fault


class RegisterPool:
    """Registers of a CTA by warp; an increase waits until enough were given back.

    The kernel starts with its `.maxnreg`, or the most registers a thread that the launch allows:
    64K by the number of threads, in steps of 8.
    """

    def __init__(self, warps, most):
        each = most or min(65536 // (32 * warps) // 8 * 8, 256)
        self.free, self.held, self.waiters = 0, dict.fromkeys(range(warps), each), []
        self.asked = [[] for _ in range(warps)]  # by warp, the counts of its setmaxnregs

    def ask(self, warp, n):
        """All warps of a warpgroup execute a setmaxnreg, with the same count.

        The ISA says the same instruction; kernels known to be good give each role of a warpgroup's
        warps its own, with one count.
        """
        mine = self.asked[warp]
        mine.append(n)
        for i, other in self.group(warp):
            if len(other) >= len(mine) and other[len(mine) - 1] != n:
                raise Fault(
                    f"setmaxnreg to {n}, but to {other[len(mine) - 1]} in warp {i} of the same "
                    "warpgroup"
                )

    def group(self, warp):
        first = warp // 4 * 4
        return list(enumerate(self.asked))[first : first + 4]

    def check_exit(self):
        """No warp of a warpgroup may have gone without."""
        for warp, mine in enumerate(self.asked):
            for i, other in self.group(warp):
                if len(other) > len(mine):
                    raise Fault(
                        f"setmaxnreg to {other[len(mine)]} by warp {i} but not by warp {warp} of "
                        "the same warpgroup: all its warps must execute it"
                    )


def setmaxnreg(increase):
    def build(b, ins):
        n = ins.operands[0].bits
        if n % 8 or not 24 <= n <= 256:
            raise b.unsupported(ins)

        def run(M, w, frag, m):
            if not converged(w, frag):
                return BLOCK
            pool = w.cta.registers
            if pool is None:
                most = w.cta.program.kernel.directives.get("maxnreg", (0,))[0]
                pool = w.cta.registers = RegisterPool(len(w.cta.warps), most)
            if frag.token is None:
                pool.ask(w.index, n)
                frag.token = n
            held = pool.held[w.index]
            if (n <= held) if increase else (n >= held):
                frag.token = None
                return None
            if n - held > pool.free:
                w.why = (
                    f"setmaxnreg.inc to {n}: {pool.free} of {n - held} registers a thread are free"
                )
                pool.waiters.append(w)
                return BLOCK
            pool.free -= n - held
            pool.held[w.index], frag.token = n, None
            if not increase:
                for x in pool.waiters:
                    M.wake(x)
                pool.waiters.clear()
            return None

        return run

    return build


instruction("setmaxnreg.inc.sync.aligned")(setmaxnreg(True))
instruction("setmaxnreg.dec.sync.aligned")(setmaxnreg(False))
