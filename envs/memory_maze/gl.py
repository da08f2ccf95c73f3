"""Choice of the OpenGL backend for rendering without a display: EGL if it works, else OSMesa, unless MUJOCO_GL is set.

MuJoCo's Python packages select a backend when they are imported and cannot change it later. Call `choose` before that.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longdream.envs.contract import UserError

EGL_OPENGL_API = 0x30A2
EGL_PLATFORM_DEVICE = 0x313F
OSMESA_RGBA = 0x1908
INSTALL = {"egl": "apt install libegl1 libgl1 libgl1-mesa-dri", "osmesa": "apt install libosmesa6"}
"""How to install each backend on Debian and Ubuntu."""


def choose() -> str:
    """Set MUJOCO_GL to a backend that works, unless it is set already. Returns its value.

    Raises:
        UserError: no backend works, or the requested one does not; the message names the package to install.
    """
    requested = os.environ.get("MUJOCO_GL", "").lower()
    if requested in ("off", "disable", "disabled", "0", "false"):
        raise UserError(f"MUJOCO_GL={requested} turns rendering off: unset it, or set it to egl or osmesa")
    if requested and requested not in PROBES:
        return requested  # such as glfw, which needs a display and reports errors itself
    candidates = [requested] if requested else list(PROBES)
    candidates = [name for name in candidates if os.environ.get("PYOPENGL_PLATFORM", name) == name]
    if not candidates:
        variables = ("MUJOCO_GL", "PYOPENGL_PLATFORM")
        values = " ".join(f"{key}={os.environ[key]}" for key in variables if key in os.environ)
        raise UserError(f"{values}: PYOPENGL_PLATFORM must be the same as MUJOCO_GL, egl or osmesa, or unset")
    reasons = {}
    for name in candidates:
        reasons[name] = PROBES[name]()
        if reasons[name] is None:
            os.environ["MUJOCO_GL"] = name
            if name == "osmesa":  # dm_control's render thread would print errors about environments left open
                os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")
            return name
    failures = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    commands = " or ".join(INSTALL[name] for name in candidates)
    raise UserError(f"no OpenGL backend works without a display here ({failures}): {commands}")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause Python's cyclic garbage collector within this context, unless it is off already. Threads may overlap.

    The finalizer of an object with an OpenGL context makes that context the thread's current one.
    """
    with _pauses.lock:
        if _pauses.count == 0:
            _pauses.enabled = gc.isenabled()
            gc.disable()
        _pauses.count += 1
    try:
        yield
    finally:
        with _pauses.lock:
            _pauses.count -= 1
            if _pauses.count == 0 and _pauses.enabled:
                gc.enable()


class _Pauses:
    """How many contexts of `no_garbage_collection` are open, and whether the collector was on before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.enabled = True


_pauses = _Pauses()


def try_egl() -> str | None:
    """None if an EGL device can be initialised and has desktop OpenGL; else the reason why EGL cannot be used."""
    egl = _load("EGL")
    if egl is None:
        return "no libEGL"
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display_of = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not query or not display_of:
        return "libEGL without devices"
    devices = (ctypes.c_void_p * 64)()
    count = ctypes.c_int()
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)
    query_devices(64, devices, ctypes.byref(count))
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    for device in devices[: count.value]:
        display = get_display(EGL_PLATFORM_DEVICE, device, None)
        # eglTerminate is not called: the display is shared by the process, and other code may be using it
        if display and egl.eglInitialize(display, None, None) and egl.eglBindAPI(EGL_OPENGL_API):
            return None
    return f"none of {count.value} EGL devices can be initialised"


def try_osmesa() -> str | None:
    """None if OSMesa creates a context; else the reason why OSMesa cannot be used."""
    mesa = _load("OSMesa")
    if mesa is None:
        return "no libOSMesa"
    mesa.OSMesaCreateContextExt.restype = ctypes.c_void_p
    mesa.OSMesaDestroyContext.argtypes = [ctypes.c_void_p]
    context = mesa.OSMesaCreateContextExt(OSMESA_RGBA, 24, 8, 0, None)
    if not context:
        return "OSMesa creates no context"
    mesa.OSMesaDestroyContext(context)
    return None


PROBES: dict[str, Callable[[], str | None]] = {"egl": try_egl, "osmesa": try_osmesa}
"""The backends in the order in which they are tried, each with the function that tests it."""


def _load(name: str) -> ctypes.CDLL | None:
    path = ctypes.util.find_library(name)
    try:
        return ctypes.CDLL(path) if path else None
    except OSError:
        return None
