"""Arrays of numpy, torch and everything that speaks DLPack or __cuda_array_interface__, by address.

A `View` is the address of the caller's own memory; only `spaced_view` may copy.
"""

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from ._arguments import whole
from ._errors import invalid

Array = Any  # numpy.ndarray, torch.Tensor, or an object with one of the protocols above

LEGACY_STREAM = 1  # cudaStreamLegacy: what a stream handle of 0 means to those who hand it over

_TORCH = {
    "torch.float32": "f32",
    "torch.float16": "f16",
    "torch.bfloat16": "bf16",
    "torch.int32": "i32",
    "torch.int64": "i64",
    "torch.uint64": "u64",
    "torch.uint8": "byte",
}
# numpy has no bfloat16 of its own: its bits travel as uint16, ml_dtypes shows them as V2.
_TYPESTR = {
    "f4": "f32",
    "f2": "f16",
    "V2": "bf16",
    "u2": "bf16",
    "i4": "i32",
    "i8": "i64",
    "u8": "u64",
    "u1": "byte",
}
_DLPACK = {
    (2, 32): "f32",
    (2, 16): "f16",
    (4, 16): "bf16",
    (1, 16): "bf16",
    (0, 32): "i32",
    (0, 64): "i64",
    (1, 64): "u64",
    (1, 8): "byte",
}
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "i64": 8, "u64": 8, "byte": 1}


@dataclass(slots=True)
class View:
    """Where an array lies and what it is."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # a key of BYTES
    device: int  # CUDA ordinal; -1: host memory
    stream: int | None  # the stream that the array's owner works on
    writable: bool
    owner: Any  # keeps the memory alive

    def contiguous(self) -> bool:
        """Elements lie one after the other in C order."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides)):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True


def view(array: Array, name: str) -> View:
    """The memory of `array`; `name` is for error texts."""
    if hasattr(array, "data_ptr"):
        return _view_torch(array, name)
    if hasattr(array, "__cuda_array_interface__"):
        return _view_interface(array, array.__cuda_array_interface__, name, on_device=True)
    if hasattr(array, "__array_interface__"):
        return _view_interface(array, array.__array_interface__, name, on_device=False)
    if hasattr(array, "__dlpack__"):
        return _view_dlpack(array, name)
    raise invalid(
        f"{name} is a {type(array).__name__}, must be an array of numpy or torch, or offer "
        "DLPack or __cuda_array_interface__"
    )


def spaced_view(array: Array, name: str, dimensions: int) -> View:
    """The memory of `array`, or of a copy, with strides over 0 along the first dimensions.

    A stride of 0 (broadcast) cannot be said in C, where it means "contiguous", nor can one below.
    """
    given = view(array, name)
    if all(
        stride > 0 or extent <= 1
        for stride, extent in zip(given.strides[:dimensions], given.shape[:dimensions])
    ):
        return given
    if hasattr(array, "data_ptr"):
        return view(array.contiguous(), name)
    if given.device < 0 and hasattr(array, "__array_interface__"):
        import numpy

        return view(numpy.ascontiguousarray(array), name)
    raise invalid(
        f"{name} has strides {list(given.strides)}, must have positive ones: it is broadcast or "
        "reversed, and only arrays of numpy and torch are copied here"
    )


def _view_torch(tensor: Any, name: str) -> View:
    dtype = _TORCH.get(str(tensor.dtype))
    if dtype is None:
        raise invalid(f"{name} has elements of {tensor.dtype}, must be one of {', '.join(_TORCH)}")
    torch = sys.modules["torch"]
    if tensor.requires_grad and torch.is_grad_enabled():
        raise invalid(
            f"{name} requires grad, must not: there is no gradient through vattn. Call it under "
            f"torch.no_grad() or give {name}.detach()"
        )
    if tensor.layout != torch.strided or tensor.is_neg() or hasattr(tensor, "get_mask"):
        kind = "negated view" if tensor.is_neg() else tensor.layout
        kind = "masked tensor" if hasattr(tensor, "get_mask") else kind
        raise invalid(f"{name} is a {kind}, must be a plain dense tensor")
    kind, stream, device = tensor.device.type, None, -1
    if kind == "cuda":
        device = tensor.device.index
        stream = torch.cuda.current_stream(device).cuda_stream
    elif kind != "cpu":
        raise invalid(f"{name} is on device {tensor.device}, must be cpu or cuda")
    try:
        pointer = tensor.data_ptr()
    except RuntimeError as error:
        raise invalid(f"{name} has no memory of its own: {error}") from None
    if pointer == 0 and tensor.numel() > 0:
        raise invalid(f"{name} is a {type(tensor).__name__} without memory of its own")
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return View(pointer, shape, strides, dtype, device, stream, True, tensor)


def _view_interface(array: Any, interface: dict[str, Any], name: str, on_device: bool) -> View:
    """__array_interface__ and __cuda_array_interface__, which share their keys."""
    numpy_ma = sys.modules.get("numpy.ma")
    if interface.get("mask") is not None or (
        numpy_ma is not None and isinstance(array, numpy_ma.MaskedArray)
    ):
        raise invalid(f"{name} is a masked array, must be a plain one: masks are not looked at")
    typestr = interface["typestr"]
    dtype = _TYPESTR.get(typestr[1:])
    fields = getattr(getattr(array, "dtype", None), "names", None)
    if dtype is None or typestr[0] == ">" or fields is not None:
        raise invalid(
            f"{name} has elements of type {fields or typestr}, must be float32, float16, bfloat16 "
            "(or uint16 that holds it), int32, int64, uint64 or uint8 in little-endian order"
        )
    shape = tuple(interface["shape"])
    size = BYTES[dtype]
    strides = interface.get("strides")
    if strides is None:
        strides = _dense(shape)
    elif any(stride % size for stride in strides):
        raise invalid(
            f"{name} has strides of {strides} bytes, must be multiples of its {size}-byte elements"
        )
    else:
        strides = tuple(stride // size for stride in strides)
    if not isinstance(interface.get("data"), tuple):
        raise invalid(f"{name} says no address in its array interface, must have one")
    pointer, readonly = interface["data"]
    device = _device_of(array) if on_device else -1
    return View(
        pointer, shape, strides, dtype, device, interface.get("stream"), not readonly, array
    )


def _device_of(array: Any) -> int:
    """CUDA ordinal of an array with __cuda_array_interface__, which does not say it itself."""
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[1])
    return int(getattr(getattr(array, "device", None), "id", 0))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h 1.x, which is that of 0.x."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = (
    ctypes.c_void_p,
    [ctypes.py_object, ctypes.c_char_p],
)
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]


def _view_dlpack(array: Any, name: str) -> View:
    """The capsule is kept and never marked as used: its own destructor then frees what it holds."""
    device_type, _ = array.__dlpack_device__()
    try:
        capsule = array.__dlpack__(max_version=(1, 0))
    except TypeError:  # a producer from before version 1
        capsule = array.__dlpack__()
    writable = True
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise invalid(
                f"{name} speaks DLPack {managed.major}.{managed.minor}, must be version 1"
            )
        tensor, writable = managed.tensor, not managed.flags & 1
    else:
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    dtype = _DLPACK.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise invalid(
            f"{name} has DLPack elements of code {tensor.code}, {tensor.bits} bits and "
            f"{tensor.lanes} lanes, must be float32, float16, bfloat16, int32, int64, "
            "uint64 or uint8"
        )
    if device_type not in (1, 2, 3):  # CPU, CUDA, pinned host memory
        raise invalid(
            f"{name} is on DLPack device type {device_type}, must be 1 (CPU), 2 (CUDA), 3 (pinned)"
        )
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else _dense(shape)
    return View(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        strides,
        dtype,
        tensor.device_id if device_type == 2 else -1,
        None,
        writable,
        capsule,
    )


def dense_view(
    array: Array,
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    kinds: tuple[str, ...],
    written: bool = False,
) -> View:
    """The memory of a contiguous array of one of these shapes and kinds of elements; refusals tell
    of the first shape. written: a call writes to it."""
    taken = view(array, name)
    if taken.shape not in shapes:
        raise invalid(f"{name} has shape {list(taken.shape)}, must be {list(shapes[0])}")
    if not taken.contiguous():
        raise invalid(f"{name} has strides {list(taken.strides)}, must be contiguous")
    if taken.dtype not in kinds:
        raise invalid(f"{name} has elements of {taken.dtype}, must be {' or '.join(kinds)}")
    if written and not taken.writable:
        raise invalid(f"{name} is read-only, must be writable")
    return taken


def empty_like(array: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """A new array of torch, on the device of `array`, if that is of torch; else of numpy."""
    if hasattr(array, "data_ptr"):
        torch = sys.modules["torch"]
        kind = next(key for key, value in _TORCH.items() if value == dtype).removeprefix("torch.")
        return torch.empty(shape, dtype=getattr(torch, kind), device=array.device)
    if hasattr(array, "__cuda_array_interface__") or not hasattr(array, "__array_interface__"):
        raise invalid(f"outputs for a {type(array).__name__} cannot be made here, must be given")
    import numpy

    kinds = {"f32": "f4", "f16": "f2", "bf16": "u2", "i32": "i4", "i64": "i8", "u64": "u8", "byte": "u1"}
    return numpy.empty(shape, kinds[dtype])


def stream_handle(stream: Any, views: list[View]) -> int | None:
    """cudaStream_t of a call: `stream` if given, else the one that the arrays' owner works on.

    `stream` is a handle or an object with the handle in `cuda_stream` (torch) or `ptr` (cupy).
    None, with arrays in host memory, makes the call block.
    """
    if stream is None:
        owned = [v.stream for v in views if v.stream is not None]
        if not owned:
            return LEGACY_STREAM if any(v.device >= 0 for v in views) else None
        stream = owned[0]
    handle = getattr(stream, "cuda_stream", None)
    if handle is None:
        handle = getattr(stream, "ptr", stream)
    return whole(handle, "stream", 0, 2**64 - 1) or LEGACY_STREAM
