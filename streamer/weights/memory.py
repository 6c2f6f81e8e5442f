"""Host memory that the device reads by itself: anonymous pages, faulted in and page-locked piece by piece.

torch's own pinned allocator rounds each block up to a power of two and takes 1.7 GB/s; registering an anonymous map of
huge pages has the exact size and takes 5 to 6 GB/s in one thread [H100].
"""

import ctypes
import errno
import logging
import mmap
import os
import sys
import weakref
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger("streamer")

# MADV_POPULATE_WRITE, Linux 5.14 and newer; Python's mmap module has no name for it.
_POPULATE_WRITE = 23


class HostMemory:
    """Anonymous host memory of exactly the size asked for.

    Attributes:
        tensor: [nbytes] uint8, page-aligned, zeroed when it is first touched.
        is_pinned: the device reads it without a bounce buffer.
    """

    def __init__(self, nbytes: int):
        # private: a shared anonymous map is shmem, which gets no huge pages
        self._length = max(nbytes, mmap.PAGESIZE)
        pages = mmap.mmap(-1, self._length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                logger.info("huge pages are not available (%s)", error)
        # the tensor alone keeps the map: with its last view the pages go back to the system
        self.tensor = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
        self.is_pinned = False

    def prepare(self) -> None:
        """Fault the pages in, with Python's lock released; page-locking touched pages is several times faster.

        Raises:
            OSError: the system has not that much memory.
        """
        if sys.platform == "linux":
            # not mmap.madvise, which holds Python's lock: the thread that computes would stand still for 50 ms
            libc = ctypes.CDLL(None, use_errno=True)
            start, length = ctypes.c_void_p(self.tensor.data_ptr()), ctypes.c_size_t(self._length)
            if libc.madvise(start, length, _POPULATE_WRITE) == 0:
                return
            code = ctypes.get_errno()
            if code == errno.ENOMEM:
                raise OSError(code, os.strerror(code))
        self.tensor.zero_()

    def pin(self) -> bool:
        """Page-lock the memory; False if the driver refuses."""
        code = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self._length, 1))  # 1 = portable
        if code == 0:
            self.is_pinned = True
            self._unpin = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self.tensor.data_ptr())
        else:
            _clear_cuda_error()
        return code == 0

    def close(self) -> None:
        """Unlock and unmap; the memory returns to the system when the last view of the tensor is gone."""
        if self.is_pinned:
            self._unpin()
            self.is_pinned = False
        self.tensor = torch.empty(0, dtype=torch.uint8)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Within this, `device` is the one that CUDA calls without a device mean; nothing on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _clear_cuda_error() -> None:
    """A refused call leaves its error for the next launch to report: let one report it here."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        logger.debug("after a refused registration: %s", error)
