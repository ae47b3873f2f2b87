"""The message classes of `recua.proto`, compiled in memory when first needed.

There is no generated file: protoc (from grpcio-tools) compiles the .proto beside this module into a descriptor. That
works from an installed package, from a checkout, and from a job's read-only copy of the working_dir.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVICE = "recua.v1.Recua"
UNARY_METHODS = ("Generate", "Chat", "ModelInfo")
STREAM_METHODS = ("GenerateStream", "ChatStream")


@dataclass(frozen=True)
class Messages:
    """The message classes, named as in the .proto (typed Any, because they exist only at run time)."""

    Sampling: Any
    TokenIds: Any
    GenerateRequest: Any
    Message: Any
    ChatRequest: Any
    GenerateResponse: Any
    ModelInfoRequest: Any
    ModelInfoResponse: Any
    FinishReason: Any

    def request_of(self, method: str) -> Any:
        """The request class of an rpc, e.g. "ChatStream" -> ChatRequest."""
        return getattr(self, method.removesuffix("Stream") + "Request")

    def response_of(self, method: str) -> Any:
        """The response class of an rpc, e.g. "ChatStream" -> GenerateResponse."""
        return self.ModelInfoResponse if method == "ModelInfo" else self.GenerateResponse


@functools.cache
def messages() -> Messages:
    """Compile the .proto (some milliseconds, once per process) and register it for reflection."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.internal import enum_type_wrapper

    descriptors = descriptor_pb2.FileDescriptorSet.FromString(_compile(Path(__file__).with_name("recua.proto")))
    pool = descriptor_pool.Default()
    for file in descriptors.file:
        pool.Add(file)
    described = pool.FindFileByName("recua.proto")
    classes = {
        name: message_factory.GetMessageClass(descriptor)
        for name, descriptor in described.message_types_by_name.items()
        if name in Messages.__dataclass_fields__
    }
    reasons = enum_type_wrapper.EnumTypeWrapper(described.enum_types_by_name["FinishReason"])
    return Messages(**classes, FinishReason=reasons)


def _compile(proto: Path) -> bytes:
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory(prefix="recua-proto-") as folder:
        output = Path(folder) / "descriptors"
        status = protoc.main(["protoc", f"-I{proto.parent}", f"--descriptor_set_out={output}", proto.name])
        if status != 0:
            raise RuntimeError(f"{proto}: protoc failed with status {status}")
        return output.read_bytes()
