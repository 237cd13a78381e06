"""A plain model of the kernel's ledger for one process. It does no I/O.

A call that may orphan bytes returns how many.
"""

from __future__ import annotations

from dataclasses import dataclass, field

CONTEXT = 1 << 17  # bytes of a context without an admission


@dataclass
class Entry:
    """An allocation, a handle, a mapping or a context."""

    bytes: int
    home: int  # the level that it counts for
    managed: bool = False
    exported: bool = False
    references: int = 1
    owner: int = -1  # handle number of a mapping
    gone: bool = False  # whether it ended with the last context


@dataclass
class Call:
    """A call that never returned."""

    bytes: int  # charged
    asked: int
    managed: bool
    has: int  # what it may have allocated


@dataclass
class Life:
    """The expected entry of a process in the ledger.

    The entry exists from the process's first call until the process exits, or until it is in no managed cgroup.
    """

    number: int = 0
    turn: int = 0
    home: int = -1  # the level that counts it; below 0: no call yet
    asked: bool = False  # whether a request for memory or a context is unsettled
    granted: bool = False
    admitted: int = 0
    late: int = 0  # admitted bytes that were released with the last context
    call: Call | None = None
    pool: int = 0
    overhead: int = 0
    loose_managed: int = 0  # bytes without an entry
    loose_handles: int = 0
    contexts: int = 0
    ended: int = 0
    unseen: bool = False  # whether a context counts whose creation was not recorded
    retained: int = 0
    primary: bool = False
    frees_nothing: bool = False
    exports_pools: bool = False
    managed_freed: int = 0
    pointers: dict[int, Entry] = field(default_factory=dict)
    handles: dict[int, Entry] = field(default_factory=dict)
    mappings: dict[int, Entry] = field(default_factory=dict)
    context_entries: dict[int, Entry] = field(default_factory=dict)

    # -- sums

    @property
    def managed(self) -> int:
        """Return the managed bytes that are charged as such."""
        return self.loose_managed + sum(e.bytes for e in self.there() if e.managed)

    @property
    def vmm(self) -> int:
        """Return the bytes of handles."""
        return self.loose_handles + sum(e.bytes for e in self.handles.values())

    def there(self) -> list[Entry]:
        """Return the pointers that did not end with a context."""
        return [entry for entry in self.pointers.values() if not entry.gone]

    def entries(self) -> list[Entry]:
        """Return everything that has an entry in the kernel's map."""
        spaces = self.pointers, self.handles, self.mappings, self.context_entries
        return [entry for space in spaces for entry in space.values()]

    def bytes(self) -> int:
        """Return all charged bytes."""
        plain = sum(e.bytes for e in self.there() if not e.managed)
        in_flight = self.admitted + (self.call.bytes if self.call else 0)
        return plain + self.managed + self.vmm + self.pool + self.overhead + in_flight

    # -- calls in flight

    def leave_unsettled(self) -> None:
        """Turn an unsettled admission into overhead, at another request or the end of the thread."""
        self.overhead += self.admitted
        self.admitted, self.late, self.asked = 0, 0, False

    def enter(self) -> None:
        """Begin another call. The end of the previous call was not recorded."""
        call, self.call = self.call, None
        if call and call.managed:
            self.loose_managed += call.has
        elif call:
            self.overhead += call.has

    def take_over(self) -> int | None:
        """Return the admission that the starting call takes from the thread, or None."""
        found = self.admitted + self.late if self.asked and self.granted else None
        self.admitted, self.late, self.asked = 0, 0, False
        return found

    # -- pointers and handles

    def name_pointer(self, at: int, new: Entry) -> int:
        """Enter a pointer that a call returned. It may be in use already."""
        old = self.pointers.get(at)
        self.pointers[at] = new
        if not old:
            return 0
        new.home = old.home
        if old.gone:
            return 0
        new.references = old.references
        least = 0 if old.exported else min(old.bytes, new.bytes)
        both, orphaned = old.managed and new.managed, 0
        if old.managed:
            self.loose_managed += old.bytes - (least if both else 0)
        elif old.exported:
            orphaned = old.bytes
        else:
            self.overhead += old.bytes - (least if new.managed else 0)
        if not new.managed:
            self.overhead += new.bytes - least
        else:
            self.loose_managed += new.bytes
        new.bytes, new.managed = least, both
        return orphaned

    def name_handle(self, at: int, new: Entry) -> None:
        """Enter a handle that a call returned. It may be in use already."""
        old = self.handles.get(at)
        self.handles[at] = new
        if not old:
            return
        least = 0 if old.exported else min(old.bytes, new.bytes)
        self.loose_handles += old.bytes + new.bytes - least
        new.bytes, new.home, new.references = least, old.home, old.references

    def free(self, at: int, is_trusted: bool) -> int:
        """Free a pointer, successfully."""
        entry = self.pointers.get(at)
        if not entry or (entry.managed and not is_trusted):
            return 0
        del self.pointers[at]
        if entry.gone:
            return 0
        if entry.managed:
            self.managed_freed += entry.bytes
        return entry.bytes if entry.exported or self.frees_nothing or not is_trusted else 0

    def fail_to_free(self, at: int, is_trusted: bool, home: int) -> None:
        """Enter a pointer again whose free failed, unless it ended with a context."""
        entry = self.pointers.get(at)
        if not entry or (entry.managed and not is_trusted):
            return
        if entry.gone:
            del self.pointers[at]
        else:
            entry.home = home

    def drop(self, handle: int) -> int:
        """Drop a reference to a handle."""
        entry = self.handles[handle]
        entry.references -= 1
        if entry.references:
            return 0
        del self.handles[handle]
        return entry.bytes if entry.exported or self.frees_nothing else 0

    def give_back(self, bytes_: int) -> int:
        """Release pool bytes."""
        some = min(bytes_, self.pool)
        unused = min(some, max(0, self.contexts * CONTEXT - self.overhead))
        self.pool -= some
        self.overhead += unused
        some -= unused
        return some if self.exports_pools or self.frees_nothing or not self.contexts else 0

    # -- contexts

    def begin_context(self, bytes_: int) -> None:
        """Add a context that is charged with these bytes."""
        self.overhead += bytes_
        self.contexts += 1

    def show_context(self) -> None:
        """Count a context without a record of its creation, unless a context counts already."""
        if not self.contexts:
            self.unseen = True
            self.contexts = 1

    def allocate(self) -> None:
        """Count and charge the context that a successful allocation shows."""
        if not self.contexts:
            self.overhead += max(0, CONTEXT - max(0, self.overhead))
        self.show_context()

    def retain(self, admitted: int | None) -> None:
        """Add a reference to the primary context. It may be the first."""
        self.retained += 1
        if not self.primary and (admitted is not None or not self.unseen):
            self.primary = True
            self.begin_context(CONTEXT if admitted is None else admitted)

    def release_primary(self) -> int:
        """Drop a reference to the primary context."""
        if not self.retained:
            return self.end_unseen()
        self.retained -= 1
        return 0 if self.retained or not self.primary else self.end_primary()

    def end_primary(self) -> int:
        """End the primary context, after its last reference or a reset."""
        if not self.primary:
            return self.end_unseen()
        self.primary = False
        return self.end_context()

    def end_context(self) -> int:
        """End a context of any kind."""
        self.contexts -= 1
        if not self.contexts:
            return self.end_last_context()
        self.end_own_bytes()
        return 0

    def end_own_bytes(self) -> None:
        """Release the bytes of a context that may not be the last."""
        self.ended += 1
        self.overhead -= max(0, min(CONTEXT, self.overhead))

    def end_unseen(self) -> int:
        """End a context without a record of its creation. It releases no other bytes, because another may remain."""
        if self.unseen:
            self.hide_context()
            self.end_own_bytes()
        return 0

    def hide_context(self) -> None:
        """Stop counting a context without a record of its creation."""
        if self.unseen:
            self.unseen = False
            self.contexts -= 1

    def end_last_context(self) -> int:
        """End the last context. Handles and pools survive it."""
        lost = self.bytes() - self.vmm - self.pool
        self.admitted, self.late = 0, self.admitted + self.late
        open_ = sum(e.bytes for e in self.there() if e.exported) + max(0, self.overhead - CONTEXT)
        self.managed_freed += self.managed
        unused = max(0, -lost)
        self.overhead, self.loose_managed, self.pool = -max(0, unused - self.pool), 0, max(0, self.pool - unused)
        for entry in self.pointers.values():
            entry.gone = True
        return max(0, min(lost, self.bytes() + lost if self.frees_nothing else open_))
