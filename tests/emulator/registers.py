"""setmaxnreg: the CTA's register pool (PTX ISA 9.7.19.5)."""

from .builder import BLOCK, converged, instruction


class RegisterPool:
    """Registers of a CTA by warp; an increase waits until enough were given back.

    The kernel starts with its `.maxnreg`, or the most registers a thread that the launch allows:
    64K by the number of threads, in steps of 8.
    """

    def __init__(self, warps, most):
        each = most or min(65536 // (32 * warps) // 8 * 8, 256)
        self.free, self.held, self.waiters = 0, dict.fromkeys(range(warps), each), []


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
            held = pool.held[w.index]
            if (n <= held) if increase else (n >= held):
                return None
            if n - held > pool.free:
                w.why = (
                    f"setmaxnreg.inc to {n}: {pool.free} of {n - held} registers a thread are free"
                )
                pool.waiters.append(w)
                return BLOCK
            pool.free -= n - held
            pool.held[w.index] = n
            if not increase:
                for x in pool.waiters:
                    M.wake(x)
                pool.waiters.clear()
            return None

        return run

    return build


instruction("setmaxnreg.inc.sync.aligned")(setmaxnreg(True))
instruction("setmaxnreg.dec.sync.aligned")(setmaxnreg(False))
