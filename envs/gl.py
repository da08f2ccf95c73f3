"""Which OpenGL draws without a display: EGL where it works, else OSMesa; a MUJOCO_GL that is set is respected.

MuJoCo's Python packages choose a back-end when they are imported and cannot change it later, so `choose` comes first.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Callable

from longdream.envs.contract import UserError

EGL_OPENGL_API = 0x30A2
EGL_PLATFORM_DEVICE = 0x313F
OSMESA_RGBA = 0x1908
INSTALL = {"egl": "apt install libegl1 libgl1 libgl1-mesa-dri", "osmesa": "apt install libosmesa6"}
"""What brings each back-end on Debian and Ubuntu."""


def choose() -> str:
    """Set MUJOCO_GL to a back-end that works, unless it is set; the name that it has then.

    Raises:
        UserError: nothing works, or not the one that is asked for; the message names the package to install.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked in ("off", "disable", "disabled", "0", "false"):
        raise UserError(f"MUJOCO_GL={asked} turns rendering off: unset it, or set it to egl or osmesa")
    wanted = [asked] if asked in PROBES else [] if asked else list(PROBES)
    wanted = [name for name in wanted if os.environ.get("PYOPENGL_PLATFORM", name) == name]
    if asked and asked not in PROBES:
        return asked  # glfw and the like: it needs a display, and says so itself
    if not wanted:
        told = " ".join(f"{key}={os.environ[key]}" for key in ("MUJOCO_GL", "PYOPENGL_PLATFORM") if key in os.environ)
        raise UserError(f"{told}: PYOPENGL_PLATFORM must be the same as MUJOCO_GL, egl or osmesa, or unset")
    reasons = {}
    for name in wanted:
        reasons[name] = PROBES[name]()
        if reasons[name] is None:
            os.environ["MUJOCO_GL"] = name
            if name == "osmesa":  # drawn by a thread that dm_control starts, it complains of environments left open
                os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    mend = " or ".join(INSTALL[name] for name in wanted)
    raise UserError(f"nothing here draws without a display ({told}): {mend}")


def try_egl() -> str | None:
    """Why EGL cannot be used, or None: some device of it can be initialised and has desktop OpenGL."""
    egl = _load("EGL")
    if egl is None:
        return "no libEGL"
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display_of = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not query or not display_of:
        return "libEGL without devices"
    devices, found = (ctypes.c_void_p * 64)(), ctypes.c_int()
    kind = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    kind(query)(64, devices, ctypes.byref(found))
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    for device in devices[: found.value]:
        display = get_display(EGL_PLATFORM_DEVICE, device, None)
        # never terminated: the display belongs to the process, and somebody else may be drawing on it
        if display and egl.eglInitialize(display, None, None) and egl.eglBindAPI(EGL_OPENGL_API):
            return None
    return f"none of {found.value} EGL devices can be initialised"


def try_osmesa() -> str | None:
    """Why OSMesa cannot be used, or None: it makes a context."""
    mesa = _load("OSMesa")
    if mesa is None:
        return "no libOSMesa"
    mesa.OSMesaCreateContextExt.restype = ctypes.c_void_p
    mesa.OSMesaDestroyContext.argtypes = [ctypes.c_void_p]
    context = mesa.OSMesaCreateContextExt(OSMESA_RGBA, 24, 8, 0, None)
    if not context:
        return "OSMesa makes no context"
    mesa.OSMesaDestroyContext(context)
    return None


PROBES: dict[str, Callable[[], str | None]] = {"egl": try_egl, "osmesa": try_osmesa}
"""Back-ends in the order in which they are tried, each with what tells why it cannot be used."""


def _load(name: str) -> ctypes.CDLL | None:
    path = ctypes.util.find_library(name)
    try:
        return ctypes.CDLL(path) if path else None
    except OSError:
        return None
