"""Which device computes a model. Whether there is a GPU is asked of NVIDIA's driver: a worker on a CPU has no torch."""

import ctypes
import importlib.util

from worker.model.checkpoint import TORCH_COMMAND, ModelError


def device_of(name: str) -> str:
    """The device that a setting names: ``cpu``, ``cuda`` or ``cuda:1``; ``auto`` is cuda where torch can use one, else cpu.

    Raises ModelError where the device is missing, or torch, which CUDA needs. Blocks: torch may be imported.
    """
    if name == "cpu" or (name == "auto" and not (has_nvidia_device() and has_torch())):
        return "cpu"
    if not has_torch():
        raise ModelError(f"device is {name}, which needs torch; {TORCH_COMMAND} installs it, or set device to cpu")
    import torch  # noqa: PLC0415 - the extra torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    if not count:
        raise ModelError(f"device is {name}, but torch finds no CUDA device here; cpu works everywhere")
    if (torch.device(name).index or 0) >= count:
        raise ModelError(f"device is {name}, but there are {count} CUDA devices, counted from 0")
    return name


def unused_device_warning(name: str) -> str | None:
    """A warning where ``device`` is auto and a GPU is left unused because torch is missing, else None."""
    if name != "auto" or has_torch() or not has_nvidia_device():
        return None
    return f"torch is not installed, so the model runs on the CPU; {TORCH_COMMAND} lets it use the NVIDIA GPU"


def has_torch() -> bool:
    """Whether the packages of the extra ``torch`` are there. Does not import them."""
    return all(importlib.util.find_spec(package) for package in ("torch", "transformers"))


def has_nvidia_device() -> bool:
    """Whether NVIDIA's driver shows a device to this process (cuDeviceGetCount of the CUDA driver API)."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):  # it is not there, or another library has its name
        return False
