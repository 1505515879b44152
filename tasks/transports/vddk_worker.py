"""The process in which VDDK runs, one disk a process: started by `tasks.transports.vddk`, never imported by it.

Its stdin begins with a line of JSON that says what to open, then a command a line; each is answered on stdout by a
line with the same `id`. Reads, of which there are many, are `slot sector sectors`: the bytes land in that slot of
shared memory, and the slot's number, a byte, or JSON with it and the error, is sent on the socket that the first line
names for the slot, in the order in which they end. What the library logs goes to stderr.

The main thread makes every call: InitEx has to be the main thread's, opens, closes and queries one thread's
(Programming Guide, "Multithreading Considerations"). Only the callbacks of ReadAsync come on threads of the library.

    0 0 4096
    {"id": 2, "op": "allocated", "chunk": 512, "sectors": 131072}     "blocks", in several answers, then a "rest"
    {"id": 3, "op": "reopen", "generation": 1}                        unless that has been done since
    {"id": 4, "op": "close"}

A first line with "open" false only has the server allow again what a worker before, which crashed, had it forbid.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
from contextlib import ExitStack, suppress
from ctypes import byref
from typing import IO, Any

from tasks.transports import vixdisklib_abi as abi

LINE_BYTES = 2048  # of the library's log
KEPT_THREADS = 64  # of the library

Command = dict[str, Any]


class VixFailure(Exception):
    """A call failed: which, the code, the library's text for it."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(call, code, text)
        self.told = {"call": call, "code": code, "text": text}


class Library:
    """The library, loaded and initialised."""

    def __init__(self, wishes: Command) -> None:
        try:
            self._c = ctypes.CDLL(wishes["library"], mode=os.RTLD_NOW)
        except OSError as error:
            raise VixFailure("load", 0, str(error)) from error
        if missing := abi.declare(self._c):
            raise VixFailure("load", 0, f"it has no {', '.join(missing)}")
        self._log = abi.LogFunction(_to_stderr)  # kept: the library calls it as long as we live
        config = wishes["config"].encode() if wishes["config"] else None
        where = wishes["library_dir"].encode()
        self.check("InitEx", *abi.API_VERSION, self._log, self._log, self._log, where, config)

    def has(self, name: str) -> bool:
        """Tell whether this version has a call."""
        return hasattr(self._c, f"VixDiskLib_{name}")

    def call(self, name: str, *arguments: Any) -> Any:
        """Make a call, and return what it returns."""
        return getattr(self._c, f"VixDiskLib_{name}")(*arguments)

    def check(self, name: str, *arguments: Any) -> None:
        """Make a call that returns an error. Raises VixFailure."""
        if error := self.call(name, *arguments):
            raise self.failure(name, error)

    def failure(self, name: str, error: int) -> VixFailure:
        """Return what an error means."""
        pointer = self.call("GetErrorText", error, None)
        text = ctypes.string_at(pointer).decode(errors="replace") if pointer else ""
        self.call("FreeErrorText", pointer)
        return VixFailure(name, abi.code_of(error), text)


def _to_stderr(template: bytes, arguments: int) -> None:
    """Write a line of the library's log: `vsnprintf` of what a printf would get."""
    line = ctypes.create_string_buffer(LINE_BYTES)
    ctypes.CDLL(None).vsnprintf(line, ctypes.c_size_t(LINE_BYTES), template, ctypes.c_void_p(arguments))
    os.write(2, line.value.rstrip(b"\n") + b"\n")


class Disk:
    """The disk, open. generation: how often it has been opened."""

    def __init__(self, library: Library, wishes: Command) -> None:
        self._library, self._wishes = library, wishes
        self._params, self._strings = self._connect_params()
        self._connection, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.generation = 0
        self.unprepared = ""

    def prepare(self) -> None:
        """Have the server forbid what would move the disks away, or note why it would not: a copy can do without."""
        if not self._library.has("PrepareForAccess"):
            self.unprepared = "this version cannot"
            return
        try:
            self._library.check("PrepareForAccess", self._params, self._wishes["identity"].encode())
        except VixFailure as failure:
            self.unprepared = "{call}: {text} ({code})".format(**failure.told)

    def open(self) -> None:
        """Connect and open. Raises VixFailure, with nothing left open."""
        modes, snapshot = self._wishes["modes"].encode(), self._wishes["snapshot"].encode() or None
        flags = abi.OPEN_READ_ONLY | abi.COMPRESSION[self._wishes["compression"]]
        self._library.check("ConnectEx", self._params, b"\1", snapshot, modes, byref(self._connection))
        try:
            path = self._wishes["path"].encode()
            self._library.check("Open", self._connection, path, flags, byref(self.handle))
        except VixFailure:
            self.handle = ctypes.c_void_p()
            self._library.call("Disconnect", self._connection)
            raise
        self.generation += 1

    def close(self) -> None:
        """Let what is under way end, then close and disconnect."""
        if self.handle:
            if self._library.has("Wait"):
                self._library.call("Wait", self.handle)
            self._library.call("Close", self.handle)
            self._library.call("Disconnect", self._connection)
            self.handle = ctypes.c_void_p()

    def leave(self) -> None:
        """Close, and have the server allow again what it forbade while the VM was accessed."""
        self.close()
        try:
            self.end_access()
        except VixFailure:
            if not self.unprepared:  # else nothing was forbidden
                raise  # which ends this process in a way that has another one try again, and tell
        finally:
            self.finish()

    def end_access(self) -> None:
        """Have the server allow again what it forbade. Raises VixFailure."""
        if self._library.has("EndAccess"):
            self._library.check("EndAccess", self._params, self._wishes["identity"].encode())

    def finish(self) -> None:
        """Have the library clean up and end."""
        if self._library.has("Cleanup"):
            counts = ctypes.c_uint32(), ctypes.c_uint32()
            self._library.call("Cleanup", self._params, *map(byref, counts))
        self._library.call("Exit")

    def describe(self) -> dict[str, Any]:
        """Return capacity in sectors, and the transport mode that the library chose."""
        info = ctypes.POINTER(abi.Info)()
        self._library.check("GetInfo", self.handle, byref(info))
        capacity = info.contents.capacity
        self._library.call("FreeInfo", info)
        mode = self._library.call("GetTransportMode", self.handle) or b"?"
        return {"sectors": capacity, "mode": mode.decode(), "unprepared": self.unprepared}

    def _connect_params(self) -> tuple[Any, list[bytes]]:
        """Return the parameters, and the strings that must live as long."""
        wishes, library = self._wishes, self._library
        params = library.call("AllocateConnectParams") if library.has("AllocateConnectParams") else None
        params = params or ctypes.pointer(abi.ConnectParams())
        names = ("server", "thumbprint", "user", "password")
        strings = [f"moref={wishes['vm']}".encode(), *(wishes[name].encode() for name in names)]
        it = params.contents
        it.vmxSpec, it.serverName, it.thumbPrint, it.creds.uid.userName, it.creds.uid.password = strings
        it.credType, it.specType, it.port = abi.CRED_UID, abi.SPEC_VMX, wishes["port"]
        return params, strings


class Worker:
    """Answers commands."""

    def __init__(self, library: Library, disk: Disk, wishes: Command, out: IO[bytes]) -> None:
        self._library, self._disk, self._out = library, disk, out
        self._slot_bytes, self._request_bytes = wishes["slot_bytes"], wishes["request_bytes"]
        self._answer_fds: list[int] = wishes["answer_fds"]
        self._others = [list[int]() for _ in self._answer_fds]  # a slot's reads under way, but for one
        self._failures: list[VixFailure | None] = [None for _ in self._answer_fds]
        whole = self._slot_bytes * wishes["slots"]
        self._ring = mmap.mmap(wishes["ring_fd"], whole, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._ring))
        self._callback = abi.CompletionFunction(self._completed)
        self._here, self._kept = threading.local(), 0
        self._asynchronous = library.has("ReadAsync") and library.has("Wait")

    def serve(self, commands: IO[str]) -> None:
        """Answer until told to close, or nobody is there any more to tell."""
        for line in commands:
            if not line.startswith("{"):
                self._read(*map(int, line.split()))
            elif (command := json.loads(line))["op"] == "close":
                break
            else:
                self._obey(command)

    def _obey(self, command: Command) -> None:
        try:
            getattr(self, f"_{command['op']}")(command)
        except VixFailure as failure:
            self.tell(command["id"], error=failure.told, generation=self._disk.generation)

    def tell(self, number: int, **what: Any) -> None:
        """Write one answer; several threads may."""
        tell(self._out, {"id": number} | what)

    def _read(self, slot: int, start: int, count: int) -> None:
        """Read sectors into a slot, in requests, which have one answer; it goes where those for this slot do."""
        into, most = self._base + slot * self._slot_bytes, self._request_bytes // abi.SECTOR_BYTES
        requests = range(0, count, most)
        self._others[slot], self._failures[slot] = [*requests[1:]], None
        for at in requests:
            try:
                if not self._begun(slot, start + at, min(most, count - at), into + at * abi.SECTOR_BYTES):
                    self._ended(slot)
            except VixFailure as failure:
                self._ended(slot, failure)

    def _begun(self, slot: int, start: int, count: int, into: int) -> bool:
        """Tell whether the callback will say how it ended, else it has ended well. Raises VixFailure."""
        if not self._disk.handle:
            raise VixFailure("Read", 14011, "the disk is not open")
        if self._asynchronous:
            error = self._library.call("ReadAsync", self._disk.handle, start, count, into, self._callback, slot)
            if abi.code_of(error) == abi.ASYNC:
                return True
            self._asynchronous = abi.code_of(error) != abi.NOT_SUPPORTED
            if self._asynchronous:
                raise self._library.failure("ReadAsync", error)
        self._library.check("Read", self._disk.handle, start, count, into)
        return False

    def _completed(self, slot: int | None, error: int) -> None:
        """Tell how a read ended: by a thread of the library's, which passes no slot for the first one."""
        self._keep_thread()
        self._ended(slot or 0, self._library.failure("ReadAsync", error) if error else None)

    def _keep_thread(self) -> None:
        """Have Python remember the thread of the library's that we are on.

        Else it makes itself at home there anew for each callback, in memory that it maps and unmaps, which holds up
        every other thread. What it remembers stays, so it is to remember a few at most.
        """
        if not getattr(self._here, "kept", False) and self._kept < KEPT_THREADS:
            self._here.kept = True
            self._kept += 1
            ctypes.pythonapi.PyGILState_Ensure()

    def _ended(self, slot: int, failure: VixFailure | None = None) -> None:
        """Note that a read has ended, and answer where it was the slot's last one."""
        if failure:
            self._failures[slot] = failure
        try:
            self._others[slot].pop()  # one step, whichever threads are at it
        except IndexError:
            self._answer(slot, self._failures[slot])

    def _answer(self, slot: int, failure: VixFailure | None) -> None:
        answer = b"%c" % slot
        if failure:
            told = {"slot": slot, "error": failure.told, "generation": self._disk.generation}
            answer = json.dumps(told).encode()
        with suppress(BrokenPipeError, ConnectionError):  # nobody waits any more
            os.write(self._answer_fds[slot], answer)

    def _allocated(self, command: Command) -> None:
        """Tell the runs of allocated sectors, call by call; the part of a chunk at the end is not asked for."""
        if not self._library.has("QueryAllocatedBlocks"):
            raise VixFailure("QueryAllocatedBlocks", abi.NOT_SUPPORTED, "VDDK has it since 6.7")
        chunk, end = command["chunk"], command["sectors"] // command["chunk"] * command["chunk"]
        for start in range(0, end, chunk * abi.MAX_CHUNKS):
            found = self._query(start, min(chunk * abi.MAX_CHUNKS, end - start), chunk)
            self.tell(command["id"], blocks=found)
        self.tell(command["id"], rest=(end, chunk))

    def _query(self, start: int, count: int, chunk: int) -> list[tuple[int, int]]:
        found = ctypes.POINTER(abi.BlockList)()
        self._library.check("QueryAllocatedBlocks", self._disk.handle, start, count, chunk, byref(found))
        first = ctypes.addressof(found.contents) + abi.BlockList.blocks.offset
        blocks = (abi.Block * found.contents.numBlocks).from_address(first)
        runs = [(block.offset, block.length) for block in blocks]
        self._library.call("FreeBlockList", found)
        return runs

    def _reopen(self, command: Command) -> None:
        if self._disk.generation == command["generation"]:
            self._disk.close()
            self._disk.open()
        self.tell(command["id"], generation=self._disk.generation)


def tell(out: IO[bytes], what: dict[str, Any]) -> None:
    """Write a line of JSON, whole."""
    out.write(json.dumps(what).encode() + b"\n")
    out.flush()


def main() -> None:
    """Open the disk that the first line of stdin names, and answer what is asked."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not pass for an answer
    wishes = json.loads(sys.stdin.readline())
    with ExitStack() as stack:
        try:
            library = Library(wishes)
            disk = Disk(library, wishes)
            if not wishes["open"]:
                stack.callback(disk.finish)
                disk.end_access()
                return
            stack.callback(disk.leave)
            disk.prepare()
            disk.open()
            worker = Worker(library, disk, wishes, out)
            worker.tell(0, **disk.describe(), generation=disk.generation)
        except VixFailure as failure:
            tell(out, {"id": 0, "error": failure.told})
            return
        worker.serve(sys.stdin)


if __name__ == "__main__":
    main()
