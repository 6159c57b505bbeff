"""Calls: only vprintf, which a kernel's printf becomes (PTX ISA 9.7.12.5)."""

import re
import struct
import sys

import numpy as np

from .accesses import local_bytes
from .builder import instruction, lanes_of
from .ptx import Sym, Vec
from .values import LANES

CONVERSION = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?(?:hh|h|ll|l|j|z|t)?([diouxXeEfFgGcsp%])")


def c_string(memory, addr):
    base, _, data = memory.find(addr, "string")
    tail = data[addr - base :]
    return tail[: int(np.argmax(tail == 0))].tobytes().decode()


def formatted(memory, text, raw):
    """The C format `text` with argument bytes `raw`, each aligned to its 4 or 8 bytes."""
    at, out, last = 0, [], 0
    for m in CONVERSION.finditer(text):
        out.append(text[last : m.start()])
        last = m.end()
        spec, kind = m.group(), m.group(1)
        if kind == "%":
            out.append("%")
            continue
        wide = kind in "eEfFgGsp" or "l" in spec or "j" in spec or "z" in spec
        size = 8 if wide else 4
        at = -(-at // size) * size
        code = (
            "d"
            if kind in "eEfFgG"
            else ("q" if wide else "i")
            if kind in "di"
            else ("Q" if wide else "I")
        )
        (value,) = struct.unpack_from("<" + code, raw, at)
        at += size
        if kind == "s":
            value = c_string(memory, value)
        spec = re.sub(r"hh|h|ll|l|j|z|t", "", spec).replace("p", "#x").replace("i", "d")
        out.append(spec % value)
    return "".join(out) + text[last:]


@instruction("call", "uni")
def call(b, ins):
    names = [o.name for o in ins.operands if isinstance(o, Sym)]
    if "vprintf" not in names:
        raise b.unsupported(ins)
    result, _, args = ins.operands
    if not (isinstance(result, Vec) and isinstance(args, Vec)):
        raise b.unsupported(ins)
    text_param, args_param = (x.name for x in args.items)

    def run(M, w, frag, m):
        for i in lanes_of(m):
            fmt = c_string(M.memory, int(w.call_params[text_param][i].view(np.uint64)[0]))
            where = int(w.call_params[args_param][i].view(np.uint64)[0])
            raw = b""
            if where:
                off = int(local_bytes(w, np.array([where], np.uint64), 1)[0])
                raw = w.local[i, off:].tobytes()
            M.output.append(formatted(M.memory, fmt, raw))
            sys.stdout.write(M.output[-1])
        w.call_params[result.items[0].name] = np.zeros((LANES, 4), np.uint8)

    return run
