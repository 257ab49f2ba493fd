"""`device` and `precision` as the Trainer wants to hear them."""

from __future__ import annotations

import re
from typing import Any

import torch


def pin_device(device: str, accelerator: str, devices: Any) -> dict[str, Any]:
    """`device` as the Trainer's `accelerator` and `devices`; of `cpu` and `cuda`, `trainer.devices` says how many.

    Raises:
        ValueError: a device that is not there, or two settings that contradict each other.
    """
    counted = device in ("cpu", "cuda") and accelerator == "auto"
    if device != "auto" and (devices != "auto" or accelerator != "auto") and not counted:
        raise ValueError(f"device ({device}) and trainer.accelerator/devices are both set; leave one of them out")
    if device == "auto":
        if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
            raise ValueError(
                f"trainer.accelerator is {accelerator}, and this machine has no GPU that this PyTorch can use; leave "
                "it out, or set it to cpu"
            )
        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        return {"accelerator": accelerator, "devices": 1 if devices == "auto" else devices}
    if device == "cpu":
        return {"accelerator": "cpu", "devices": 1 if devices == "auto" else devices}
    found = re.fullmatch(r"cuda(?::(\d+(?:,\d+)*))?", device)
    if found is None:
        raise ValueError(f"device {device!r} is not known; use auto, cpu, cuda, cuda:7 or cuda:0,1")
    numbers = [int(number) for number in (found.group(1) or "0").split(",")]
    there = torch.cuda.device_count()
    if max(numbers) >= there:
        have = f"cuda:0 to cuda:{there - 1}" if there else "no GPU that this PyTorch can use"
        raise ValueError(f"device {device}: this machine has {have}; use --device cpu or another number")
    return {"accelerator": "cuda", "devices": numbers if devices == "auto" else devices}


def one_device(device: str) -> torch.device:
    """`device` for a verb that needs one, by the same names.

    Raises:
        ValueError: a device that is not there, or several.
    """
    pinned = pin_device(device, "auto", "auto")
    if pinned["accelerator"] == "cpu":
        return torch.device("cpu")
    if isinstance(pinned["devices"], int):  # a count: the first one
        return torch.device("cuda", 0)
    if len(pinned["devices"]) > 1:
        raise ValueError(f"device {device}: one is needed here, such as cuda:{pinned['devices'][0]}")
    return torch.device("cuda", pinned["devices"][0])


def resolve_precision(precision: str, accelerator: str, devices: Any) -> str:
    """What `auto` means on the first of these devices."""
    if precision != "auto":
        return {"32": "32-true"}.get(precision, precision)
    if accelerator in ("cuda", "gpu"):
        with torch.cuda.device(devices[0] if isinstance(devices, list) else 0):
            return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "32-true"
