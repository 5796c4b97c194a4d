"""Which block of the cache belongs to whom. Plain accounting: no tensor is touched here.

A block holds the keys and values of `size` tokens. Full layers keep every token of a sequence; local (chunked) layers
only the current chunk, so they have a pool of their own. Blocks whose tokens and everything before them are equal are
shared between sequences: their name is a hash chain over the tokens, and the tokens are compared as well. Only full,
computed blocks get a name, so a shared block is never written again.
"""

from array import array
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

FREED = -1  # in a table of local blocks: wholly before the current chunk

Blocks32 = NDArray[np.int32]


class BlockPool:
    """`count` blocks with reference counts. A named block that nobody holds stays findable until its place is needed:
    the one unused for longest goes first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._fresh = 0  # blocks from here on were never used, so their memory was never touched
        self._free: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody; the longest unused first
        self._holders: dict[int, int] = {}
        self._named: dict[bytes, tuple[int, bytes]] = {}  # name -> block and its tokens
        self._names: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._free) + len(self._idle) + self.count - self._fresh

    @property
    def touched(self) -> int:
        """Blocks that were ever in use, whose memory is therefore taken up."""
        return self._fresh

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return len(self._holders)

    @property
    def kept(self) -> int:
        """Blocks that nobody holds, kept for whoever asks for the same tokens."""
        return len(self._idle)

    def take(self) -> int:
        """A block of one's own. The caller has looked at `available`."""
        if self._free:
            block = self._free.pop()
        elif self._fresh < self.count:
            block, self._fresh = self._fresh, self._fresh + 1
        else:
            block, _ = self._idle.popitem(last=False)
            del self._named[self._names.pop(block)]
        self._holders[block] = 1
        return block

    def find(self, name: bytes, tokens: bytes) -> int | None:
        """The block of this name, if its tokens are these."""
        block, held = self._named.get(name, (None, b""))
        return block if held == tokens else None

    def share(self, block: int) -> None:
        """Hold a block that `find` gave."""
        self._idle.pop(block, None)
        self._holders[block] = self._holders.get(block, 0) + 1

    def release(self, block: int) -> None:
        """Let go of a block."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        del self._holders[block]
        if block in self._names:
            self._idle[block] = None
        else:
            self._free.append(block)

    def name(self, block: int, name: bytes, tokens: bytes) -> None:
        """Make a computed block findable, unless another of that name is."""
        if name not in self._named:
            self._named[name] = (block, tokens)
            self._names[block] = name


def _none() -> Blocks32:
    return np.full(16, FREED, dtype=np.int32)


@dataclass(eq=False)
class Table:
    """One sequence's blocks: entry j of `full` and `local` is the block of positions [j * size, (j + 1) * size)."""

    salt: bytes = b""  # set apart what the token ids don't show, such as an adapter
    marks: Mapping[int, bytes] = field(default_factory=dict)  # the same from a position on, such as a picture
    full: Blocks32 = field(default_factory=_none)
    local: Blocks32 = field(default_factory=_none)
    count: int = 0  # entries of `full` in use
    local_start: int = 0  # entries of `local` before this one are `FREED`
    local_end: int = 0
    named: int = 0  # leading blocks that were offered for sharing
    names: list[bytes] = field(default_factory=list)  # hash chain of the leading blocks, as far as it was needed
    contents: list[bytes] = field(default_factory=list)

    def name(self, at: int, tokens: Tokens[int], size: int) -> tuple[bytes, bytes]:
        """Name and content of block `at`, whose tokens are all known."""
        for j in range(len(self.names), at + 1):
            content = array("i", tokens[j * size : (j + 1) * size]).tobytes()
            if self.marks:
                content += b"".join(self.marks.get(at, b"") for at in range(j * size, (j + 1) * size))
            parent = self.names[-1] if self.names else self.salt
            self.names.append(blake2b(content, digest_size=16, key=parent).digest())
            self.contents.append(content)
        return self.names[at], self.contents[at]


class BlockStore:
    """The blocks of all sequences in both groups of layers.

    full, local: blocks in each group's pool. chunk: tokens that local layers see, None where a model has no such
    layers. size: tokens a block. share: whether equal prefixes share their blocks.
    """

    def __init__(self, full: int, local: int = 0, chunk: int | None = None, size: int = 32, share: bool = True) -> None:
        self.full, self.local = BlockPool(full), BlockPool(local if chunk else 0)
        self.chunk, self.size, self.share = chunk, size, share
        self.asked_tokens = self.hit_tokens = 0  # of all prompts that were looked up

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that these pools can hold."""
        tokens = self.full.count * self.size
        if self.chunk is None or self.local.count >= self.local_need:
            return tokens
        return min(tokens, self.local.count * self.size)

    @property
    def local_need(self) -> int:
        """Most local blocks that one sequence holds: a chunk need not begin at a block's edge."""
        if self.chunk is None:
            return 0
        return min(self.full.count, -(-self.chunk // self.size) + (self.chunk % self.size != 0))

    def attach(self, table: Table, tokens: Tokens[int], limit: int) -> int:
        """Share the longest known prefix of `tokens` into an empty table; at most `limit` tokens, returned."""
        if not self.share:
            return 0
        blocks = self._hit(table, tokens, limit)
        first = self._first_local(blocks * self.size)
        self._resize(table, blocks)
        for j in range(blocks):
            block = self.full.find(*table.name(j, tokens, self.size))
            assert block is not None
            self.full.share(block)
            table.full[j] = block
        table.count = table.named = blocks
        if self.chunk is not None:
            for j in range(first, blocks):
                block = self.local.find(*table.name(j, tokens, self.size))
                assert block is not None
                self.local.share(block)
                table.local[j] = block
            table.local_start, table.local_end = first, blocks
        return blocks * self.size

    def _hit(self, table: Table, tokens: Tokens[int], limit: int) -> int:
        """Leading blocks that are known, local ones included where the next token would look at them."""
        hit = 0
        while (hit + 1) * self.size <= limit and self.full.find(*table.name(hit, tokens, self.size)) is not None:
            hit += 1
        while self.chunk is not None and hit:
            first = self._first_local(hit * self.size)
            lacking = (j for j in range(first, hit) if self.local.find(*table.name(j, tokens, self.size)) is None)
            shorter = next(lacking, None)
            if shorter is None:
                break
            hit = shorter
        return hit

    def _first_local(self, position: int) -> int:
        """The first local block that the token at `position` looks at (or would be written to)."""
        return 0 if self.chunk is None else position // self.chunk * self.chunk // self.size

    def reserve(self, table: Table, length: int, local_length: int | None = None, spare: int = 0) -> bool:
        """Have room for `length` tokens in the full group and `local_length` (default: as many) in the local one.

        False, and nothing changed, where the pools lack blocks, or fewer than `spare` full ones would be left.
        """
        blocks = -(-length // self.size)
        local = 0 if self.chunk is None else -(-(length if local_length is None else local_length) // self.size)
        more, more_local = max(0, blocks - table.count), max(0, local - table.local_end)
        if more + spare > self.full.available or more_local > self.local.available:
            return False
        self._resize(table, max(blocks, local))
        for j in range(table.count, table.count + more):
            table.full[j] = self.full.take()
        for j in range(table.local_end, table.local_end + more_local):
            table.local[j] = self.local.take()
        table.count += more
        table.local_end += more_local
        return True

    def room(self, table: Table) -> int:
        """Tokens, from position 0 on, that a table has blocks for."""
        return (table.count if self.chunk is None else min(table.count, table.local_end)) * self.size

    def computed(self, table: Table, tokens: Tokens[int], length: int) -> None:
        """The first `length` tokens are computed: offer their full blocks, and free the chunks that are over."""
        if self.share:
            for j in range(table.named, length // self.size):
                name, content = table.name(j, tokens, self.size)
                self.full.name(int(table.full[j]), name, content)
                if self.chunk is not None:
                    self.local.name(int(table.local[j]), name, content)
                table.named = j + 1
        if self.chunk is not None:
            self._free_local(table, self._first_local(length))

    def release(self, table: Table) -> None:
        """Let go of everything: deepest blocks first, so that they are also forgotten first."""
        for j in reversed(range(table.count)):
            self.full.release(int(table.full[j]))
        for j in reversed(range(table.local_start, table.local_end)):
            self.local.release(int(table.local[j]))
        table.count = table.named = table.local_start = table.local_end = 0
        table.full, table.local = _none(), _none()

    def _free_local(self, table: Table, first: int) -> None:
        for j in range(table.local_start, min(first, table.local_end)):
            self.local.release(int(table.local[j]))
            table.local[j] = FREED
        table.local_start = max(table.local_start, min(first, table.local_end))

    def _resize(self, table: Table, blocks: int) -> None:
        """Room for this many entries in both arrays, at least doubled where they grow."""
        for name in ("full", "local"):
            old = getattr(table, name)
            if len(old) < blocks:
                grown = np.full(max(blocks, 2 * len(old)), FREED, dtype=np.int32)
                grown[: len(old)] = old
                setattr(table, name, grown)
