"""What a node of a cluster told of itself: `<partition>.node.json`, typed and bounded, for it is another machine's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from radeon_stack.errors import MachineError
from radeon_stack.text import one_line

MOST_BYTES = 256 << 10
MANY = 256
Word = Annotated[str, Field(max_length=4096), AfterValidator(lambda text: one_line(text, 400))]
Number = Annotated[int, Field(ge=0, lt=1 << 62)]
Seconds = Annotated[float, Field(allow_inf_nan=False, ge=-1e12, le=1e12)]


class Record(BaseModel):
    """Newer versions add keys: what is not known is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Runtime(Record):
    """A program that runs containers; `why_not` when it is there and cannot be used as this user."""

    name: Word
    version: Word = ""
    path: Word = ""
    why_not: Word = ""


class Interface(Record):
    """A network interface; Mbit/s, None where the kernel does not tell it. A bridge or a tunnel is not `physical`."""

    name: Word
    addresses: Annotated[tuple[Word, ...], Field(max_length=MANY)] = ()
    up: bool = False
    speed: Number | None = None
    loopback: bool = False
    physical: bool = False


class Rdma(Record):
    """A port of an InfiniBand or RoCE device: `link` says which of them."""

    name: Word
    port: Word = ""
    link: Word = ""
    state: Word = ""
    rate: Word = ""


class Shared(Record):
    """The home folder as the node has it. `locks`: why a lock of another machine does not count here, "" when it does.

    `clock_offset`: the node's clock less the submit host's, right to a second or two; `mtime_offset`: less the file
    system's.
    """

    writable: bool = False
    locks: Word = ""
    free: Number | None = None
    kind: Word = ""
    mtime_offset: Seconds = 0.0
    clock_offset: Seconds = 0.0


class NodeRecord(Record):
    """One node of a partition. Memory in bytes; `cpus` are those that the job was given, `all_cpus` the node's."""

    hostname: Word
    node: Word = ""
    written: Seconds
    python: Word = ""
    python_version: Word = ""
    torch: bool = False
    cpus: Number = 0
    all_cpus: Number = 0
    memory: Number = 0
    runtimes: Annotated[tuple[Runtime, ...], Field(max_length=MANY)] = ()
    srun: bool = False
    pyxis: bool = False
    interfaces: Annotated[tuple[Interface, ...], Field(max_length=MANY)] = ()
    rdma: Annotated[tuple[Rdma, ...], Field(max_length=MANY)] = ()
    rocm: Word = ""
    shared: Shared = Shared()
    environment: Annotated[dict[Word, Word], Field(max_length=MANY)] = {}
    gpus_asked: Number = 0

    def runtime(self, name: str) -> Runtime | None:
        """The runtime of that name, whether it can be used or not."""
        return next((one for one in self.runtimes if one.name == name), None)

    @property
    def network(self) -> tuple[Interface, ...]:
        """Interfaces by which another node can be reached."""
        return tuple(one for one in self.interfaces if one.up and one.addresses and not one.loopback)


def read_record(file: Path) -> NodeRecord | None:
    """The record in a file; None where there is none. MachineError for one that is none of ours."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(f"cannot be read: {error.strerror}", where=str(file)) from error
    try:
        if len(data) > MOST_BYTES:
            raise ValueError("it is too large")
        return NodeRecord.model_validate_json(data)
    except (ValidationError, ValueError) as error:
        raise MachineError(
            f"is no node's record: {one_line(str(error), 200)}", where=str(file), remedy="ask the node anew: delete it"
        ) from error
