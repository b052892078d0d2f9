"""libtpu, the runtime and compiler of TPUs, on machines without a TPU: it is asked for nothing that is not there."""

import importlib.util
import os
from pathlib import Path

# It asks for no metadata server, no other host, and no lock; the type of accelerator is any that it knows.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GOOGLE = "0x1ae0"  # vendor of PCI devices, TPUs among them
DEVICES = Path("/sys/bus/pci/devices")


def quiet_libtpu() -> None:
    """Sets `WITHOUT_TPU` in the environment where libtpu is installed and no TPU is.

    JAX loads libtpu wherever it is installed, as for `dpo-jax plan --target`, and without these it prints errors.
    """
    if importlib.util.find_spec("libtpu") and not has_google_device():
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


def has_google_device() -> bool:
    """Returns whether this machine has a PCI device of Google's: a TPU, or a network card of its cloud."""
    return any(GOOGLE in vendor.read_text() for vendor in DEVICES.glob("*/vendor"))
