"""Pickles, read without running what is in them: numpy arrays and plain containers only.

A pickle is a program, and numpy's own functions are not safe to lend to it (``numpy.ndarray`` takes
a buffer and the object type, and then follows its bytes as pointers). So nothing of numpy is handed
out: the few names that stored arrays use lead to stand-ins here, and arrays are made from the raw
bytes afterwards.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.data.source import DataError


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that is not data."""


class _Dtype:
    """Stands for ``numpy.dtype``: a type code and a byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, ...)
        if state[2] is not None or state[3] is not None:
            raise _Refused("an array with fields; store plain numbers")
        self.order = state[1]

    def dtype(self) -> np.dtype | None:
        """The type of plain numbers, booleans or strings; None: Python objects."""
        code = self.code.decode("ascii") if isinstance(self.code, bytes) else self.code
        if not isinstance(code, str):
            raise _Refused(f"the array type {code!r}")
        if code in ("O", "O8", "object"):
            return None
        order = self.order if self.order in "<>" else ""
        try:
            dtype = np.dtype(order + code.lstrip("<>|="))
        except TypeError as e:
            raise _Refused(f"the array type {code!r}") from e
        if dtype.kind not in "biufcSUMm":
            raise _Refused(f"the array type {code!r}")
        return dtype


class _Array:
    """Stands for an array until all of the pickle is read."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> Any:
        """The array; of Python objects: a list of them, in lists for further dimensions."""
        if self.state is None:
            raise _Refused("an array without content")
        _, shape, kind, is_fortran, raw = self.state
        if not isinstance(kind, _Dtype):
            raise _Refused("an array without a type")
        dtype = kind.dtype()
        if dtype is None:
            is_plain = len(shape) == 1 or not is_fortran
            if not isinstance(raw, list) or math.prod(shape) != len(raw) or not is_plain:
                raise _Refused(f"an array of objects of shape {shape}; store lists")
            for size in reversed(shape[1:]):
                raw = [raw[i : i + size] for i in range(0, len(raw), size)] if size else []
            return raw
        # Python 2 stored bytes as text
        content = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise _Refused(f"an array of shape {shape} with {len(content)} bytes")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(buffer: Any, kind: Any, shape: Any, order: str) -> _Array:
    """Stands for numpy's ``_frombuffer`` of pickle protocol 5."""
    array = _Array()
    array.state = (1, tuple(shape), kind, order == "F", bytes(buffer))
    return array


def _scalar(kind: Any, raw: Any = b"") -> _Array:
    array = _Array()
    array.state = (1, (), kind, False, raw)
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, which stores bytes in old protocols."""
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding!r}")
    return text.encode("latin1")


def _bytes(content: Any = b"", encoding: str = "latin1") -> bytes:
    """Stands for ``bytes``, which stores the empty ones in old protocols: content, no sizes."""
    if isinstance(content, str):
        return _latin1(content, encoding.replace("-", ""))
    if not isinstance(content, (bytes, bytearray)):
        raise _Refused(f"bytes of {type(content).__name__}")
    return bytes(content)


_NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": _Array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
_PLAIN: dict[str, Callable[..., Any]] = {
    "bytes": _bytes,
    "bytearray": _bytes,
    "set": set,
    "frozenset": frozenset,
    "complex": complex,
}
_ADMITTED: dict[str, Callable[..., Any]] = {
    **{f"numpy.{core}.{name}": f for core in ("core", "_core") for name, f in _NUMPY.items()},
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _latin1,
    "collections.OrderedDict": OrderedDict,
    **{
        f"{builtins}.{name}": f
        for builtins in ("builtins", "__builtin__")
        for name, f in _PLAIN.items()
    },
}
"""Every name a pickle may use -> what it gets."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ADMITTED.get(f"{module}.{name}")
        if found is None:
            raise _Refused(f"{module}.{name}")
        # a pickle can set attributes of what it is given: it gets a function of its own
        return lambda *args: found(*args)

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent object {pid!r}")


def load_arrays(path: Path) -> Any:
    """The arrays of a pickle in the containers they are stored in.

    Raises:
        DataError: the file cannot be read, is no whole pickle, or holds anything but arrays,
            numbers, text, lists, tuples, dictionaries and sets; the message names what.
    """
    try:
        with path.open("rb") as file:
            return _filled(_Unpickler(file, encoding="latin1").load())
    except _Refused as e:
        raise DataError(
            f"{path} asks for {e}; only numpy arrays and plain containers are read from pickles, "
            "because a pickle can run any program. Store it as .npz"
        ) from e
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
    except RecursionError as e:
        raise DataError(f"{path}: its containers hold themselves, or are too deep") from e
    except Exception as e:  # a broken pickle raises whatever its broken instructions lead to
        raise DataError(f"{path} is no whole pickle: {type(e).__name__}: {e}") from e


def _filled(value: Any) -> Any:
    """``value`` with arrays for their stand-ins."""
    if isinstance(value, _Array):
        made = value.array()
        return made[()] if isinstance(made, np.ndarray) and made.ndim == 0 else _filled(made)
    if isinstance(value, dict):
        return {_filled(k): _filled(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_filled(v) for v in value)
    if isinstance(value, _Dtype):
        raise _Refused("an array type without an array")
    return value
