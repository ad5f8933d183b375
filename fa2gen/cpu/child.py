"""`python -m fa2gen.cpu.child REQUEST REPLY`: one launch in a process that was started under AddressSanitizer.

Every memory is an allocation of its own, of exactly its size, so that the sanitizer sees the byte before and the byte
after. Standard library only: everything imported here runs under the sanitizer.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from pathlib import Path

from fa2gen.cpu.run import Memory, run_library

__all__ = ["main"]


def main(request: str, reply: str) -> None:
    path, job, contents = pickle.loads(Path(request).read_bytes())
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    memories = []
    for name, data in contents:
        address = libc.malloc(len(data))
        ctypes.memmove(address, data, len(data))
        memories.append(Memory(name, address, len(data)))
    message, counts = run_library(path, job, memories)
    results = [(m.name, ctypes.string_at(m.address, m.bytes)) for m in memories]
    Path(reply).write_bytes(pickle.dumps((message, counts, results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
