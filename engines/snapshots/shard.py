"""One rank's shard of one training state, as bytes: written into shared memory, read from there, a peer or a store.

    prefix (64 bytes)   magic, lengths, checksum of prefix + layout + state
    layout (JSON)       whose shard: run, generation, rank, world size; which part of which tensor lies where
    data                the tensors' bytes, each on a 64-byte boundary
    state  (JSON)       step, progress (schedule, data position, random numbers), one checksum per part

The prefix is written last. A file that was cut short, or that has a flipped bit anywhere, is refused.

Checksums are XXH3-64: on the machine this was written on it reads 30 GB/s, zlib's CRC-32 4 GB/s, SHA-256 1.8 GB/s. It
finds accidents, which is the task; files that leave the machine for a store get a SHA-256 too.
"""

import ctypes
import dataclasses
import json
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from infra.errors import CheckpointError

if TYPE_CHECKING:  # node agents keep and verify shards without it
    import torch

MAGIC = b"RECUASH1"
PREFIX = struct.Struct("<8sQQQQQ")
PREFIX_BYTES = 64
ALIGNMENT = 64
CHUNK = 1 << 20
"""Bytes that are checksummed and then copied while they are still in the processor's cache."""


@dataclass(frozen=True)
class Piece:
    """A live tensor and where it lies in the whole one: `offsets` and `tensor.shape` cut it out of `global_shape`.

    `place` names the part of the mesh that holds such pieces: ranks with the same place hold the same bits.
    """

    name: str
    tensor: "torch.Tensor"
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    place: str = ""

    @classmethod
    def whole(cls, name: str, tensor: "torch.Tensor") -> "Piece":
        return cls(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


@dataclass(frozen=True)
class Part:
    """A piece at rest: `position` counts from the start of the data, in bytes."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    position: int
    length: int


@dataclass(frozen=True, order=True)
class ShardName:
    """Which shard; as a file name `generation-00003.step-0000000042.rank-00001-of-00004.shard`."""

    generation: int
    step: int
    rank: int
    world_size: int

    PATTERN = re.compile(r"generation-(\d{5})\.step-(\d{10})\.rank-(\d{5})-of-(\d{5})\.shard")

    def __str__(self) -> str:
        return (
            f"generation-{self.generation:05d}.step-{self.step:010d}"
            f".rank-{self.rank:05d}-of-{self.world_size:05d}.shard"
        )

    @classmethod
    def parse(cls, text: str) -> "ShardName | None":
        match = cls.PATTERN.fullmatch(text)
        return cls(*map(int, match.groups())) if match else None


@dataclass(frozen=True)
class Layout:
    """What stays the same from step to step. `tensors`: how many the whole state has, 0 where each rank knows all."""

    run: str
    generation: int
    rank: int
    world_size: int
    parts: tuple[Part, ...]
    tensors: int = 0

    @property
    def data_bytes(self) -> int:
        return max((part.position + part.length for part in self.parts), default=0)

    def name(self, step: int) -> ShardName:
        return ShardName(self.generation, step, self.rank, self.world_size)

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Layout":
        tree = json.loads(data)
        shapes = ("global_shape", "offsets", "sizes")
        parts = [{**part, **{key: tuple(part[key]) for key in shapes}} for part in tree.pop("parts")]
        return cls(parts=tuple(Part(**part) for part in parts), **tree)

    @classmethod
    def of(
        cls, run: str, generation: int, rank: int, world_size: int, pieces: Sequence[Piece], tensors: int = 0
    ) -> "Layout":
        """Where each piece goes; empty ones are left out."""
        parts, position = [], 0
        for piece in pieces:
            length = piece.tensor.numel() * piece.tensor.element_size()
            if not length:
                continue
            sizes, dtype = tuple(piece.tensor.shape), str(piece.tensor.dtype).removeprefix("torch.")
            parts.append(Part(piece.name, dtype, piece.global_shape, piece.offsets, sizes, position, length))
            position = aligned(position + length)
        return cls(run, generation, rank, world_size, tuple(parts), tensors)


class Shard:
    """A sealed shard that was verified: `layout`, `step`, `progress`, and the tensors, read in place."""

    def __init__(self, layout: Layout, step: int, progress: dict[str, Any], data: memoryview) -> None:
        self.layout, self.step, self.progress = layout, step, progress
        self._data = data

    @property
    def name(self) -> ShardName:
        return self.layout.name(self.step)

    def tensor(self, part: Part) -> "torch.Tensor":
        """A read-only view; valid as long as the shard is kept."""
        return _tensor(self._data, part, part.position)


def open_shard(path: Path) -> Shard:
    """Map a sealed file and verify every byte of it.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names file and tensor.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < PREFIX_BYTES:
                raise CheckpointError(f"snapshot {path}: cut short")
            mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
    except OSError as error:
        raise CheckpointError(f"snapshot {path}: {error.strerror}") from error
    return parse_shard(memoryview(mapped), str(path))


def parse_shard(content: memoryview, source: str) -> Shard:
    """The same from bytes that somebody else holds."""
    layout, state, data = _parts(content, source)
    for part, expected in zip(layout.parts, state["checksums"], strict=True):
        if xxhash.xxh3_64_intdigest(data[part.position : part.position + part.length]) != expected:
            raise CheckpointError(f"snapshot {source}: {part.name} is damaged")
    return Shard(layout, state["step"], state["progress"], data)


def read_layout(path: Path) -> Layout:
    """Whose shard it is and which parts it has, without reading the data.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        content = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"snapshot {path}: {error.strerror}") from error
    with content:
        size = os.fstat(content.fileno()).st_size
        if size < PREFIX_BYTES:
            raise CheckpointError(f"snapshot {path}: cut short")
        return _parts(memoryview(mmap.mmap(content.fileno(), size, access=mmap.ACCESS_READ)), str(path))[0]


def _parts(content: memoryview, source: str) -> tuple[Layout, dict[str, Any], memoryview]:
    if len(content) < PREFIX_BYTES:
        raise CheckpointError(f"snapshot {source}: cut short")
    magic, layout_bytes, data_start, data_bytes, state_bytes, checksum = PREFIX.unpack_from(content)
    state_start = data_start + data_bytes
    if magic != MAGIC or state_start + state_bytes != len(content) or PREFIX_BYTES + layout_bytes > data_start:
        raise CheckpointError(f"snapshot {source}: unfinished, or cut short")
    layout_json = bytes(content[PREFIX_BYTES : PREFIX_BYTES + layout_bytes])
    state_json = bytes(content[state_start:])
    if checksum != _header_checksum(layout_bytes, data_start, data_bytes, state_bytes, layout_json, state_json):
        raise CheckpointError(f"snapshot {source}: its description is damaged")
    return Layout.decode(layout_json), json.loads(state_json), content[data_start:state_start]


class ShardWriter:
    """Fills one file, again and again: `begin`, then `write` or `seal` per step. The file's memory is allocated once.

    Args:
        descriptor: an open file, kept by the caller; grown to what the layout needs.
    """

    def __init__(self, descriptor: int, layout: Layout) -> None:
        self.layout = layout
        self._descriptor, self._layout_json = descriptor, layout.encode()
        self.data_start = aligned(PREFIX_BYTES + len(self._layout_json), mmap.PAGESIZE)
        self.state_start = self.data_start + layout.data_bytes
        size = self.state_start + aligned(64 * len(layout.parts) + (1 << 16), mmap.PAGESIZE)
        if os.fstat(descriptor).st_size < size:
            os.posix_fallocate(descriptor, 0, size)  # a full file system is an error here, not a signal in the copy
        self._map = mmap.mmap(descriptor, self.state_start, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._checksums = [0] * len(layout.parts)

    def begin(self) -> None:
        """From here on the file holds no valid shard until `seal`."""
        os.pwrite(self._descriptor, bytes(PREFIX_BYTES), 0)
        os.pwrite(self._descriptor, self._layout_json, PREFIX_BYTES)

    def address(self, index: int) -> int:
        """Where part `index` lies in this process's memory."""
        return self._address + self.data_start + self.layout.parts[index].position

    @property
    def data(self) -> tuple[int, int]:
        """(address, bytes) of all parts together."""
        return self._address + self.data_start, self.layout.data_bytes

    @property
    def checksums(self) -> tuple[int, ...]:
        """Of all parts, as sealed."""
        return tuple(self._checksums)

    def view(self, index: int) -> "torch.Tensor":
        """Part `index` as a tensor that writes through."""
        part = self.layout.parts[index]
        return _tensor(self._map, part, self.data_start + part.position)

    def write(self, index: int, source: int) -> None:
        """Copy part `index` from host memory at `source`, taking its checksum on the way."""
        target, length, digest = self.address(index), self.layout.parts[index].length, xxhash.xxh3_64()
        for start in range(0, length, CHUNK):
            count = min(CHUNK, length - start)
            digest.update((ctypes.c_char * count).from_address(source + start))
            ctypes.memmove(target + start, source + start, count)
        self._checksums[index] = digest.intdigest()

    def checksum_in_place(self, index: int) -> None:
        """Take the checksum of a part that something else (a GPU's copy engine) has written."""
        length = self.layout.parts[index].length
        view = (ctypes.c_char * length).from_address(self.address(index))
        self._checksums[index] = xxhash.xxh3_64_intdigest(view)

    def seal(self, step: int, progress: Mapping[str, Any]) -> None:
        """Make it a valid shard."""
        state = {"step": step, "progress": dict(progress), "checksums": self._checksums}
        state_json = json.dumps(state, separators=(",", ":")).encode()
        lengths = (len(self._layout_json), self.data_start, self.layout.data_bytes, len(state_json))
        os.pwrite(self._descriptor, state_json, self.state_start)
        os.ftruncate(self._descriptor, self.state_start + len(state_json))
        checksum = _header_checksum(*lengths, self._layout_json, state_json)
        os.pwrite(self._descriptor, PREFIX.pack(MAGIC, *lengths, checksum), 0)


def _tensor(memory: memoryview | mmap.mmap, part: Part, start: int) -> "torch.Tensor":
    """A part in the memory that it lies in, from byte `start` on."""
    import torch

    raw = torch.frombuffer(memory, dtype=torch.uint8, count=part.length, offset=start)
    return raw.view(getattr(torch, part.dtype)).view(part.sizes)


def aligned(position: int, boundary: int = ALIGNMENT) -> int:
    return -(-position // boundary) * boundary


def _header_checksum(layout_bytes: int, start: int, data: int, state_bytes: int, layout: bytes, state: bytes) -> int:
    digest = xxhash.xxh3_64(struct.pack("<4Q", layout_bytes, start, data, state_bytes))
    digest.update(layout)
    digest.update(state)
    return int(digest.intdigest())
