"""VixDiskLib as C sees it: layouts, numbers, prototypes, and what its error codes mean. No call is made here.

Facts from VMware's "Virtual Disk Development Kit Programming Guide" and from nbdkit's vddk plugin (`vddk-structs.h`,
`vddk-stubs.h`). This module and the worker's are all that the process imports in which the library runs: nothing of
ours, nothing that loads OpenSSL.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, Union, c_char, c_char_p, c_int, c_long, c_uint32, c_uint64, c_void_p

SECTOR_BYTES = 512
VERSIONS = (9, 8, 7, 6)  # of libvixDiskLib.so.N, the newest first
SERVES = {6: "6.5", 7: "6.5", 8: "6.7", 9: "7.0"}  # the oldest vSphere that the library of each version reads from
API_VERSION = (6, 5)  # what InitEx is told we were built for; newer libraries take it

NOT_SUPPORTED = 6
ASYNC = 25000  # ReadAsync has begun, and its callback will be called

OPEN_READ_ONLY = 4
COMPRESSION = {"none": 0, "zlib": 16, "fastlz": 32, "skipz": 64}

MIN_CHUNK_SECTORS = 128  # of QueryAllocatedBlocks
MAX_CHUNKS = 512 * 1024  # of one call of it

CRED_UID = 1
SPEC_VMX = 0

VixError = c_uint64
LogFunction = CFUNCTYPE(None, c_char_p, c_void_p)  # format, va_list: on x86-64 passed as a pointer
CompletionFunction = CFUNCTYPE(None, c_void_p, VixError)


class _Uid(Structure):
    _fields_ = (("userName", c_char_p), ("password", c_char_p))


class _SessionId(Structure):
    _fields_ = (("cookie", c_char_p), ("userName", c_char_p), ("key", c_char_p))


class _Credentials(Union):
    _fields_ = (("uid", _Uid), ("sessionId", _SessionId))


class _StorageObject(Structure):
    _fields_ = (("id", c_char_p), ("datastoreMoRef", c_char_p), ("ssId", c_char_p))


class ConnectParams(Structure):
    """`VixDiskLibConnectParams` since 6.7; the library allocates it where it can, since it may be longer there."""

    _fields_ = (
        ("vmxSpec", c_char_p),
        ("serverName", c_char_p),
        ("thumbPrint", c_char_p),
        ("reserved1", c_long),
        ("credType", c_int),
        ("creds", _Credentials),
        ("port", c_uint32),
        ("nfcHostPort", c_uint32),
        ("reserved3", c_char_p),
        ("reserved4", c_char * 8),
        ("reserved5", c_void_p),
        ("vStorageObjSpec", _StorageObject),
        ("specType", c_int),
    )


class Info(Structure):
    """`VixDiskLibInfo`; the last two fields are there since 7.0 only."""

    _fields_ = (
        ("biosGeo", c_uint32 * 3),
        ("physGeo", c_uint32 * 3),
        ("capacity", c_uint64),
        ("adapterType", c_int),
        ("numLinks", c_int),
        ("parentFileNameHint", c_char_p),
        ("uuid", c_char_p),
        ("logicalSectorSize", c_uint32),
        ("physicalSectorSize", c_uint32),
    )


class Block(Structure):
    """A run of allocated sectors."""

    _fields_ = (("offset", c_uint64), ("length", c_uint64))


class BlockList(Structure):
    """`VixDiskLibBlockList`: `blocks` goes on for `numBlocks`."""

    _fields_ = (("numBlocks", c_uint32), ("blocks", Block * 1))


_Params = POINTER(ConnectParams)
_HANDLE = c_void_p

REQUIRED: dict[str, tuple[object, tuple[object, ...]]] = {
    "InitEx": (VixError, (c_uint32, c_uint32, LogFunction, LogFunction, LogFunction, c_char_p, c_char_p)),
    "Exit": (None, ()),
    "ConnectEx": (VixError, (_Params, c_char, c_char_p, c_char_p, POINTER(_HANDLE))),
    "Disconnect": (VixError, (_HANDLE,)),
    "Open": (VixError, (_HANDLE, c_char_p, c_uint32, POINTER(_HANDLE))),
    "Close": (VixError, (_HANDLE,)),
    "GetTransportMode": (c_char_p, (_HANDLE,)),
    "GetInfo": (VixError, (_HANDLE, POINTER(POINTER(Info)))),
    "FreeInfo": (None, (POINTER(Info),)),
    "Read": (VixError, (_HANDLE, c_uint64, c_uint64, c_void_p)),
    "GetErrorText": (c_void_p, (VixError, c_char_p)),
    "FreeErrorText": (None, (c_void_p,)),
}
OPTIONAL: dict[str, tuple[object, tuple[object, ...]]] = {
    "AllocateConnectParams": (_Params, ()),  # since 6.7
    "FreeConnectParams": (None, (_Params,)),
    "ReadAsync": (VixError, (_HANDLE, c_uint64, c_uint64, c_void_p, CompletionFunction, c_void_p)),  # since 6.0
    "Wait": (VixError, (_HANDLE,)),  # since 6.5
    "QueryAllocatedBlocks": (VixError, (_HANDLE, c_uint64, c_uint64, c_uint64, POINTER(POINTER(BlockList)))),  # 6.7
    "FreeBlockList": (VixError, (POINTER(BlockList),)),
    "PrepareForAccess": (VixError, (_Params, c_char_p)),
    "EndAccess": (VixError, (_Params, c_char_p)),
    "Cleanup": (VixError, (_Params, POINTER(c_uint32), POINTER(c_uint32))),
}


def declare(library: ctypes.CDLL) -> list[str]:
    """Tell ctypes the prototypes of what is in `library`; return the names of what must be there and is not."""
    missing = []
    for name, (result, arguments) in (REQUIRED | OPTIONAL).items():
        function = getattr(library, f"VixDiskLib_{name}", None)
        if function is not None:
            function.restype, function.argtypes = result, arguments
        elif name in REQUIRED:
            missing.append(f"VixDiskLib_{name}")
    return missing


def code_of(error: int) -> int:
    """Return the error code of a VixError: the rest of its bits may be anything."""
    return error & 0xFFFF


# What an operator can make of a code, beside the library's own text; {host} is host:port.
WORDS = {
    1: "unknown error, which is what VDDK says where the thumbprint is not the server's",
    2: "out of memory: its own, or the ESXi host's for NFC sessions",
    4: "the host has no such file",
    6: "not supported: none of the transport modes works for this disk",
    13: "no access to the file: it is locked by a running VM, or the account may not read it",
    15: "the file is locked",
    32: "the licence does not allow it",
    35: "wrong user name or password",
    36: "the connection to the host was lost",
    3014: "the account may not do it, or user name or password are wrong",
    4000: "the server has no such VM",
    13003: "the VM has no such snapshot",
    14008: "the name of {host}, or of the ESXi host behind it, cannot be resolved here",
    14009: "{host}, or port 902 of the ESXi host behind it, refuses the connection",
    14010: "a socket failed on the way to the host",
    14011: "the connection to the host was lost",
    16007: "a read past the end of the disk",
    16053: "a part of VDDK did not start: its folder is not complete, or its plugins do not load",
    16054: "the connection is not usable any more",
    16064: "the host's licence does not include the backup API that VDDK uses",
    18000: "cannot connect to the host: {host} cannot be reached, or its thumbprint is another",
    18001: "not possible with this kind of host",
}

# Codes that say nothing of the disk: a connection, or memory at the host, that may be there again soon.
LOST = frozenset({2, 36, 14010, 14011, 16054})
OUT_OF_MEMORY = 2
LOCKED = frozenset({13, 15})


def in_words(code: int, *, host: str, text: str = "") -> str:
    """Return what a code means: our words for it, with the library's own `text`; with neither, the number."""
    known = WORDS.get(code, "").format(host=host)
    both = f"{known} ({text})" if known and text else known or text or "no words for it"
    return f"{both}, VIX error {code}"
